#!/usr/bin/env python
"""How a store behaves as it grows: adding, opening, listing, selecting and matching.

Atlases are real patients' keypoints, jittered, with about 110 of them in organs and a volume
of a few voxels. Only the last ones of each size are added as a user adds them, and timed;
those before are copied into place, which is quicker and gives the same files. Everything is
measured in one warm process; the first query of each kind is not counted, since it compiles.
`exact` compares the scan with every keypoint of the index by BLAS; `graph` searches the graphs that
pynndescent built, in a process of its own. `selected_by_both` is the fraction of the atlases
selected after an exact search that are selected after a search in graphs, too.

`graph_build_s` and `graph_build_mib` are what building the graphs took that were not there, for
`graph_keypoints` keypoints. `graph_s_per_add` is what graphs cost for each atlas if a store grows
to this size one by one and is searched after every one: the keypoints in all graphs that `auto`
then builds, at the measured time for each. `add_scan_s` is a real patient's whole add, from files,
and `add_with_graphs` how many times as long it takes with that. `search_process_mib` is the most
memory that a process of its own holds that proposes atlases.

With `--folder` the store is kept, and the next run goes on from there: sizes can be measured
one by one.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import xarray as xr
from memory import resident_mib
from numcodecs import Blosc
from zarr.codecs import BloscCodec

from atlas_store import Atlas, AtlasKeypoints, AtlasStore, OrganInfo, load_organs
from atlas_store.index.search import REPRESENTED_BY, AtlasIndex
from atlas_store.index.segments import PAYS_FROM, merges
from atlas_store.keypoints import VARIABLES
from atlas_store.layout import data_folder, marker_key
from atlas_store.storage.cache import index_folder
from atlas_store.storage.digests import digest
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.matching.first_pass import match
from kpt_dask.matching.selection import propose_atlases, restrict_to, select_atlases
from kpt_dask.runtime import cluster

DATA = Path(__file__).parents[2] / "shared" / "data" / "openkbp"
IN_ORGANS = 110
SHAPE = (4, 4, 4)
SELECTED = 20

SEARCH = """
import sys
from memory import resident_mib
from atlas_store import AtlasStore
from kpt_dask.matching.selection import propose_atlases

store, scans = map(AtlasStore.open, sys.argv[1:])
propose_atlases(next(iter(scans.atlases())).keypoints(), store, store.ids(), 20)
print(resident_mib("VmHWM"))
"""
"""Program of a process that proposes atlases of one store for the first of another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the openkbp patients")
    parser.add_argument("--folder", type=Path, help="keep the store and the figures here")
    parser.add_argument("--sizes", default="20,200,2000,20000", help="atlases, growing")
    parser.add_argument(
        "--graph-up-to",
        type=int,
        default=2000,
        metavar="N",
        help="largest store of which graphs are built whether or not that pays",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="phantoms, 4 and 8 atlases")
    options = parser.parse_args()
    sizes = [4, 8] if options.quick else [int(size) for size in options.sizes.split(",")]
    graph_up_to = 0 if options.quick else options.graph_up_to
    repeats = 2 if options.quick else options.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        data = None if options.quick else options.data
        real = originals(folder / "originals", data)
        url = folder / "store"
        if url.exists():
            store = AtlasStore.open(url)
        else:
            store = AtlasStore.create(url, load_organs("openkbp"), store_parameters())
        figures = folder / "figures.json"
        rows: dict[int, dict[str, float]] = {}
        if figures.exists():
            rows = {int(k): v for k, v in json.loads(figures.read_text()).items()}
        with cluster.session() as client:
            for size in sizes:
                print(f"Growing to {size} atlases …", file=sys.stderr)
                row = measure(store, real, size, graph_up_to, repeats, client)
                row["search_process_mib"] = search_in_a_process(url, folder / "originals")
                row["add_scan_s"] = add_scan(data, client)
                rows[size] = with_graphs(rows.get(size, {}) | row, size)
                figures.write_text(json.dumps(rows, indent=2))
        report(rows)
    if options.json:
        options.json.write_text(json.dumps(metrics(rows), indent=2) + "\n")


def sources(folder: Path, data: Path | None) -> tuple[AtlasStore, list[tuple[Path, Path]]]:
    """Make a store, and list scans for it with their label maps: real patients, or phantoms."""
    if data is not None and data.is_dir():
        scans = sorted(data.glob("*_ct.nii.gz"))[:9]
        pairs = [(scan, Path(str(scan).replace("_ct.nii.gz", "_seg.nii.gz"))) for scan in scans]
        return AtlasStore.create(folder, load_organs("openkbp"), store_parameters()), pairs
    print("Phantoms are used, not real CT.", file=sys.stderr)
    names = [[f"body_{seed}_{what}.nii.gz" for what in ("ct", "seg")] for seed in (1, 2)]
    pairs = [(folder.parent / scan, folder.parent / labels) for scan, labels in names]
    for seed, pair in enumerate(pairs, 1):
        write_phantom(*pair, seed, (110, 65, 80), 4.0, overwrite=True)
    return AtlasStore.create(folder, load_organs("visceral"), store_parameters(4.0)), pairs


def originals(folder: Path, data: Path | None) -> list[xr.Dataset]:
    """Keypoints of real patients, or of phantoms; the first is the scan."""
    if folder.exists():
        store = AtlasStore.open(folder)
    else:
        print("Extracting keypoints …", file=sys.stderr)
        store, pairs = sources(folder, data)
        for pair in pairs:
            add_atlas(store, *pair)
    return [store[atlas_id].keypoints() for atlas_id in store]


def add_scan(data: Path | None, client: Any) -> float:
    """Seconds that it takes to add a scan from its files."""
    with tempfile.TemporaryDirectory() as name:
        store, (pair, *_) = sources(Path(name, "store"), data)
        return timed(lambda: add_atlas(store, *pair, client=client))[0]


def jittered(original: xr.Dataset, rng: np.random.Generator) -> xr.Dataset:
    """Another patient: positions, scales and ranks a little different, some in organs."""
    n = original.sizes["keypoint"]
    made = original.copy(deep=True)
    made.position.values += rng.normal(0, 3, (n, 3)).astype(np.float32)
    made.scale.values *= np.exp(rng.normal(0, 0.1, n)).astype(np.float32)
    ranks = original.descriptor.values + rng.normal(0, 4, (n, 64))
    made.descriptor.values[:] = ranks.argsort(axis=1).argsort(axis=1)
    middle = np.median(made.position.values, axis=0)
    near = np.linalg.norm(made.position.values - middle, axis=1).argsort()[:IN_ORGANS]
    made.label.values[:] = 0
    made.label.values[near] = 1
    return made


def add(store: AtlasStore, atlas_id: str, keypoints: xr.Dataset) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 1:3, 1:3] = 1
    organ = store.organs.names[store.organs.values.index(1)]
    with store.draft(atlas_id, store.parameters) as draft:
        image = draft.group.create_group("image")
        image.create_array("labels/organs/0", data=labels, compressors=BloscCodec())
        draft.commit(
            keypoints[list(VARIABLES)],
            annotated=[organ],
            organs={organ: OrganInfo(8, ((1, 3),) * 3, (0.0, 0.0, 0.0))},
            shape=SHAPE,
            spacing=(2.0, 2.0, 2.0),
            origin=(0.0, 0.0, 0.0),
            source=["jittered"],
        )


def copy_of(template: Atlas, atlas_id: str, keypoints: xr.Dataset) -> None:
    """Put an atlas into place that differs from another in its keypoints alone."""
    objects, uuid = template.objects, uuid4().hex
    files = {key: objects.read(f"{template.path}/{key}") for key in objects.keys(template.path)}
    pack = Blosc("lz4", clevel=5, shuffle=Blosc.BITSHUFFLE).encode
    for name, variable in VARIABLES.items():
        chunk = f"keypoints/{name}/c" + "/0" * len(variable.dims)
        files[chunk] = pack(np.ascontiguousarray(keypoints[name].values))
    described = json.loads(files.pop("zarr.json") or b"")
    described["attributes"]["digests"] = {key: digest(data or b"") for key, data in files.items()}
    files["zarr.json"] = json.dumps(described).encode()
    folder = Path(objects.url, data_folder(atlas_id, uuid))
    for key, data in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data or b"")
    info = replace(template.info, id=atlas_id, uuid=uuid, digest=digest(files["zarr.json"]))
    Path(objects.url, marker_key(atlas_id)).write_bytes(info.dump())


def measure(
    store: AtlasStore,
    real: list[xr.Dataset],
    size: int,
    graph_up_to: int,
    repeats: int,
    client: Any,
) -> dict[str, float]:
    """Grow to this size, and see how it is."""
    scan, row = real[0], {}
    last = min(20, size // 2)

    def grow(to: int) -> list[float]:
        """Add atlases, and time it; the first ones of each original, and the last of a size."""
        seconds = []
        templates: dict[int, Atlas] = {}
        for i in range(len(store), to):
            one = 1 + i % (len(real) - 1)
            keypoints = jittered(real[one], np.random.default_rng(i))
            if i < to - last and one in templates:
                copy_of(templates[one], f"a{i}", keypoints)
            else:
                seconds.append(timed(lambda i=i, k=keypoints: add(store, f"a{i}", k))[0])
                templates[one] = store[f"a{i}"]
        return seconds[-last:]

    grow(size - last)
    row["index_from_nothing_s"], _ = timed(lambda: AtlasIndex.open(store))
    nothing_new = median(lambda: AtlasIndex.open(store), repeats)
    added = grow(size)
    refresh, _ = timed(lambda: AtlasIndex.open(store))
    if added:
        row["add_s"] = statistics.median(added) + max(refresh - nothing_new, 0) / last
    row["open_s"] = median(lambda: AtlasStore.open(store.url), repeats)
    row["list_s"] = median(store.atlases, repeats)
    row["open_index_s"] = median(lambda: AtlasIndex.open(store), repeats)
    ids = store.ids()

    def select_and_match(index: str = "auto") -> set[str]:
        proposed = propose_atlases(scan, store, ids, SELECTED, index=index)
        atlases = AtlasKeypoints.load(store, proposed)
        matches = match(scan, atlases, client=client)
        selected = select_atlases(matches, scan, atlases, store, SELECTED)
        restrict_to(matches, selected, len(atlases))
        return {atlases.ids[i] for i in selected}

    opened = AtlasIndex.open(store)
    building, built = timed(lambda: sum(opened.build_needed(ids)))
    by_exact = select_and_match("exact")
    select_and_match()
    row["select_and_match_s"] = median(select_and_match, repeats)
    asked = [scan[name].values for name in ("descriptor", "scale", "sign")]
    exact = AtlasIndex.open(store, "exact")
    expected = exact.query(*asked, ids)
    row["exact_query_s"] = median(lambda: exact.query(*asked, ids), repeats)
    if size <= graph_up_to:
        graph = AtlasIndex.open(store, "pynndescent")
        longer, more = timed(lambda: sum(graph.build_graphs()))
        building, built = building + longer, built + more
        found = graph.query(*asked, ids)
        row["graph_query_s"] = median(lambda: graph.query(*asked, ids), repeats)
        row["recall"] = recall(expected, found)
        by_graph = select_and_match("pynndescent")
        row["selected_by_both"] = len(by_exact & by_graph) / len(by_exact)
        row["select_and_match_by_graph_s"] = median(
            lambda: select_and_match("pynndescent"), repeats
        )
    if built:
        row["graph_build_s"], row["graph_keypoints"] = building, built
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        row["graph_build_mib"] = most / 1024
    row["resident_mib"] = resident_mib()
    row["bytes_per_atlas"] = folder_bytes(Path(store.url)) / size
    row["index_bytes_per_atlas"] = folder_bytes(index_folder(store.uuid)) / size
    row["keypoints"] = len(exact)
    return row


def search_in_a_process(store: Path, scans: Path) -> float:
    """Propose atlases for a scan, and return the memory that it took, MiB."""
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, store, scans],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def with_graphs(row: dict[str, float], size: int) -> dict[str, float]:
    """Add what graphs cost while a store grows to this size, if building any was measured."""
    if "graph_build_s" not in row:
        return row
    sizes: list[int] = []
    built = 0
    for _ in range(size):
        sizes.append(REPRESENTED_BY)
        groups = merges(sizes)
        joined = {i for group in groups for i in group}
        made = [sum(sizes[i] for i in group) for group in groups]
        built += sum(one for one in made if one >= 2 * PAYS_FROM)
        sizes = [one for i, one in enumerate(sizes) if i not in joined] + made
    each = built / row["graph_keypoints"] * row["graph_build_s"] / size
    ratio = (row["add_scan_s"] + each) / row["add_scan_s"]
    return row | {"graph_s_per_add": each, "add_with_graphs": ratio}


def recall(expected: Any, found: Any) -> float:
    """Share of the accepted matches of the exact search that the other search finds too."""
    pairs = []
    for one in (expected, found):
        i, k = np.nonzero((one.atlas >= 0) & (one.first <= np.float32(0.81) * one.second))
        pairs.append(set(zip(i.tolist(), one.atlas[i, k], one.keypoint[i, k], strict=True)))
    return len(pairs[0] & pairs[1]) / max(len(pairs[0]), 1)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def median(function: Callable[[], Any], repeats: int) -> float:
    return statistics.median(timed(function)[0] for _ in range(repeats))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def metrics(rows: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Figures by name; the growths are from the first size to 2000, or to the last."""
    first = min(rows)
    large = 2000 if 2000 in rows else max(rows)
    flat: dict[str, Any] = {
        "match_growth_20_to_2000": rows[large]["select_and_match_s"]
        / rows[first]["select_and_match_s"],
        "add_growth_20_to_2000": rows[large]["add_s"] / rows[first]["add_s"],
        **(
            {
                "match_growth_200_to_20000": rows[20000]["select_and_match_s"]
                / rows[200]["select_and_match_s"]
            }
            if {200, 20000} <= rows.keys()
            else {}
        ),
        "grown_from": first,
        "grown_to": large,
    }
    return flat | {
        f"{what}_{size}": value for size, row in rows.items() for what, value in row.items()
    }


def report(rows: dict[int, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"{'atlases':24}" + "".join(f"{size:>12}" for size in rows))
    for name in names:
        values = (f"{row[name]:12.4g}" if name in row else f"{'–':>12}" for row in rows.values())
        print(f"{name:24}" + "".join(values))
    flat = metrics(rows)
    for name in ("match_growth_20_to_2000", "add_growth_20_to_2000"):
        print(f"{name}: {flat[name]:.2f} (from {flat['grown_from']} to {flat['grown_to']} atlases)")
    if "match_growth_200_to_20000" in flat:
        print(f"match_growth_200_to_20000: {flat['match_growth_200_to_20000']:.2f}")
    for size, row in rows.items():
        if "graph_query_s" not in row:
            continue
        gain = row["exact_query_s"] - row["graph_query_s"]
        if gain > 0 and "graph_build_s" in row:
            print(
                f"{size} atlases: a graph saves {gain:.3g} s a scan; building it pays after"
                f" {row['graph_build_s'] / gain:.0f} scans."
            )
        elif gain <= 0:
            print(f"{size} atlases: exact search is quicker than a graph.")


if __name__ == "__main__":
    main()
