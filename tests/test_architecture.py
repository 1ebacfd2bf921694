"""The house: which room may import which, and how large and how named things are.

An exception says why it stands. A stale one fails: the lists are compared exactly.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"kpt_dask.cli", "kpt_dask.napari_plugin"},
    {"kpt_dask.demo", "kpt_dask.relabelling"},
    {"kpt_dask.annotation_check", "kpt_dask.batches", "kpt_dask.evaluation", "kpt_dask.exports"},
    {"kpt_dask.baselines"},
    {"kpt_dask.segmentation"},
    {"kpt_dask.report"},
    {"kpt_dask.organ_transfer"},
    {"kpt_dask.matching", "kpt_dask.atlases"},
    {"kpt_dask.keypoints"},
    {"kpt_dask.volumes", "kpt_dask.measures"},
    {"kpt_dask.annotations"},
    {"kpt_dask.label_files"},
    {"kpt_dask.scans"},
    {"kpt_dask.output"},
    {"kpt_dask.resampling", "kpt_dask.runtime"},
    {"kpt_dask.options", "kpt_dask.kernels", "kpt_dask.grid", "kpt_dask.remote"},
    {"kpt_dask.errors"},
    {"atlas_store"},
)
"""From top to bottom: a layer imports those below it, and no room beside it."""

UPWARDS: dict[tuple[str, str], str] = {}
"""Imports (module, imported module) against the layers that still stand, and why."""

PURE = (
    "kpt_dask.kernels",
    "kpt_dask.keypoints.descriptors",
    "kpt_dask.keypoints.extrema",
    "kpt_dask.keypoints.local_frames",
    "kpt_dask.keypoints.sweep",
    "kpt_dask.keypoints.sweep_plan",
    "kpt_dask.matching.search",
    "kpt_dask.matching.translations",
    "kpt_dask.volumes.blur",
    "kpt_dask.volumes.scale_space",
)
"""Modules that know neither Dask nor Zarr, besides every one named kernels."""

INTERNALS = {
    "llvmlite": ("kpt_dask.kernels",),
    "numba.core": ("kpt_dask.kernels", "atlas_store.arrays"),
    "zarr.core": ("atlas_store.arrays", "atlas_store.storage"),
    "numcodecs": ("atlas_store.arrays", "atlas_store.storage"),
}
"""Libraries' internals, and the rooms that may touch them."""

TOUCHING: dict[tuple[str, str], str] = {}
"""Other modules that touch internals still (module, library), and why."""

FACE = "a user's face: flat keyword options"
COMMAND = "a command of the command line: one parameter for each option"

MANY_PARAMETERS = {
    "kpt_dask.atlases.add.add_atlas": FACE,
    "kpt_dask.atlases.add.add_folder": FACE,
    "kpt_dask.cli.atlas.add": COMMAND,
    "kpt_dask.cli.atlas.add_folder": COMMAND,
    "kpt_dask.cli.batch.batch": COMMAND,
    "kpt_dask.cli.evaluate.evaluate": COMMAND,
    "kpt_dask.cli.main.export": COMMAND,
    "kpt_dask.cli.main.segment": COMMAND,
    "kpt_dask.cli.measure.measure": COMMAND,
    "kpt_dask.cli.slurm.main": COMMAND,
    "kpt_dask.evaluation.run.evaluate": FACE,
    "kpt_dask.exports.export": FACE,
    "kpt_dask.segmentation.segment": FACE,
    "kpt_dask.segmentation.segment_volume": FACE,
}
"""Functions of more than eight parameters, and why."""

NAMED_ALIKE = {
    "kpt_dask.cli.atlas": "the click group of `kpt atlas`",
    "kpt_dask.cli.batch": "the click command `kpt batch`",
    "kpt_dask.cli.evaluate": "the click command `kpt evaluate`",
    "kpt_dask.cli.main": "an entry point is called main",
    "kpt_dask.cli.measure": "the click command `kpt measure`",
    "kpt_dask.cli.report": "the click command `kpt report`",
}
"""Rooms and files named like what their package exports, and why."""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of both packages, by its dotted name."""
    found = {}
    folders = ROOT / "kpt_dask", ROOT / "atlas_store"
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules that a module imports, anywhere in it, and names that may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else str(node.module)


def functions(name: str) -> Iterator[ast.FunctionDef]:
    """Functions and methods of a module."""
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.FunctionDef):
            yield node


def exported(name: str) -> set[str]:
    """What a module lists in ``__all__``."""
    for node in modules()[name].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def layer(name: str) -> tuple[int, str] | None:
    for depth, rooms in enumerate(LAYERS):
        for room in rooms:
            if within(name, room):
                return depth, room
    return None


def test_every_module_has_its_layer() -> None:
    without = [name for name in modules() if layer(name) is None]
    assert without == ["kpt_dask", "kpt_dask.__main__"]


def test_the_lists_name_modules_that_exist() -> None:
    rooms = {room for rooms in LAYERS for room in rooms} | set(PURE)
    rooms |= {room for touching in INTERNALS.values() for room in touching}
    assert sorted(rooms - set(modules())) == []
    assert sorted({library for _, library in TOUCHING} - set(INTERNALS)) == []


def test_imports_lead_down() -> None:
    against = set()
    for name, tree in modules().items():
        here = layer(name)
        for other in imports(tree):
            there = layer(other)
            if here is None or there is None or here[1] == there[1]:
                continue
            if here[0] >= there[0]:
                against.add((name, other))
    assert against == set(UPWARDS)


def test_modes_of_the_transfer_know_nothing_of_each_other() -> None:
    moving, warping = (f"kpt_dask.organ_transfer.{room}" for room in ("moving", "warping"))
    for room, other in ((moving, warping), (warping, moving)):
        for name, tree in modules().items():
            if within(name, room):
                assert not any(within(one, other) for one in imports(tree)), name


def test_kernels_know_neither_dask_nor_zarr() -> None:
    for name, tree in modules().items():
        if any(within(name, room) for room in PURE) or name.endswith(".kernels"):
            known = {one.split(".")[0] for one in imports(tree)}
            assert not known & {"dask", "distributed", "zarr"}, name


@pytest.mark.parametrize("library", INTERNALS)
def test_internals_are_touched_in_one_room(library: str) -> None:
    touching = {
        name
        for name, tree in modules().items()
        if any(within(one, library) for one in imports(tree))
        and not any(within(name, room) for room in INTERNALS[library])
    }
    assert touching == {name for name, one in TOUCHING if one == library}


def test_pieces_in_llvms_language_are_short() -> None:
    for name, tree in modules().items():
        if any(within(one, "llvmlite") for one in imports(tree)):
            path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
            assert len(path.read_text().splitlines()) <= 100, name


def test_no_room_or_file_is_named_like_what_its_package_exports() -> None:
    public = exported("kpt_dask") | exported("atlas_store")
    alike = set()
    for name in modules():
        package, _, own = name.rpartition(".")
        names = exported(name) | (exported(package) if package in modules() else set()) | public
        if package and own in names:
            alike.add(name)
        if own in {f.name for f in modules()[name].body if isinstance(f, ast.FunctionDef)}:
            alike.add(name)
    assert alike == set(NAMED_ALIKE)


def test_few_modules_lie_outside_rooms() -> None:
    assert len(list((ROOT / "kpt_dask").glob("*.py"))) <= 12


def test_few_functions_have_more_than_eight_parameters() -> None:
    many = set()
    for name in modules():
        for function in functions(name):
            names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
            names += [a.arg for a in function.args.kwonlyargs]
            # Not counted: the receiver, and the typing context of an LLVM intrinsic.
            if len([one for one in names if one not in ("self", "cls", "_")]) > 8:
                many.add(f"{name}.{function.name}")
    assert many == set(MANY_PARAMETERS)
