"""Compiled kernels on disk: what is damaged, stale or cannot be written never ends the work."""

import importlib
import pkgutil
import pwd
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest

import atlas_store
import kpt_dask
from atlas_store.arrays import kernel_cache
from atlas_store.arrays.kernel_cache import KernelCacheWarning, stamp

SOURCE = """
from atlas_store.arrays.jit import kernel
{constant}

def doubled(x):
    return 2 * x

@kernel
def inner(x):
    return x + ADDED

@kernel
def outer(x):
    return inner(x) * 3
"""


@pytest.fixture(autouse=True)
def no_other_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    kernel_cache.writable_folder.cache_clear()
    kernel_cache._warned.clear()


def load(folder: Path, constant: str = "ADDED = 4") -> Any:
    """Import a module of kernels as a new process would."""
    path = folder / "kernels.py"
    path.write_text(SOURCE.format(constant=constant))
    module = ModuleType("kernels_of_a_test")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return module


def hits(kernel: Any) -> int:
    return sum(kernel.stats.cache_hits.values())


def files(folder: Path) -> list[Path]:
    return sorted((folder / "__pycache__").glob("kernels.*"))


def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    for expected in (0, 1):
        outer = load(tmp_path).outer
        assert outer(1) == 15
        assert hits(outer) == expected


@pytest.mark.parametrize("constant", ["ADDED = 5", "ADDED = 5.0", "ADDED = np.int64(5)"])
def test_a_changed_constant_of_a_called_kernel_compiles_anew(tmp_path: Path, constant: str) -> None:
    assert load(tmp_path).outer(1) == 15
    count = len(files(tmp_path))
    changed = load(tmp_path, f"import numpy as np\n{constant}").outer
    assert changed(1) == 18
    assert hits(changed) == 0
    assert len(files(tmp_path)) == count, "what is stale is replaced"


def test_what_a_kernel_does_not_use_compiles_nothing(tmp_path: Path) -> None:
    assert load(tmp_path).outer(1) == 15
    moved = load(tmp_path, "ADDED = 4\nOTHER = 3\ndef another():\n    return OTHER\n").outer
    assert moved(1) == 15
    assert hits(moved) == 1


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: bytes(len(data)),
        lambda data: b"garbage" * 1000,
        _flipped,
    ],
    ids=["empty", "half", "zeros", "garbage", "a bit"],
)
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    assert load(tmp_path).outer(1) == 15
    good = [path.read_bytes() for path in files(tmp_path)]
    for path, data in zip(files(tmp_path), good, strict=True):
        path.write_bytes(damage(data))
    healed = load(tmp_path).outer
    assert healed(1) == 15
    assert hits(healed) == 0
    again = load(tmp_path).outer
    assert again(1) == 15
    assert hits(again) == 1


def test_a_file_of_another_kernel_is_not_taken_for_this_one(tmp_path: Path) -> None:
    module = load(tmp_path)
    assert (module.outer(1), module.inner(1)) == (15, 5)
    inner, outer = (
        next(p for p in files(tmp_path) if f".{n}." in p.name) for n in ("inner", "outer")
    )
    outer.write_bytes(inner.read_bytes())
    assert load(tmp_path).outer(1) == 15


def test_where_no_folder_can_be_written_a_warning_says_what_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__pycache__").write_text("in the way")
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    module = load(tmp_path)
    with pytest.warns(KernelCacheWarning, match="set NUMBA_CACHE_DIR") as told:
        assert (module.outer(1), module.inner(2.5)) == (15, 6.5)
    assert len(told) == 1
    assert str(tmp_path) in str(told[0].message)


def test_a_folder_that_can_no_longer_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    module = load(tmp_path)
    [folder] = (tmp_path / "cache").iterdir()
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.warns(KernelCacheWarning, match=str(folder)):
        assert module.outer(1) == 15


def test_without_a_home_no_folder_named_tilde_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    (tmp_path / "__pycache__").write_text("in the way")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(KernelCacheWarning):
        assert load(tmp_path).outer(1) == 15
    assert not (tmp_path / "~").exists()


def test_what_was_compiled_at_installation_serves_users_who_cannot_write_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path).outer(1) == 15
    kernel_cache.writable_folder.cache_clear()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "own"))
    outer = load(tmp_path).outer
    assert outer(1) == 15
    assert hits(outer) == 1


def test_all_that_kernels_refer_to_is_known_by_content() -> None:
    """A kernel that reads an object of a kind that `stamp` only names might go stale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [
            importlib.import_module(found.name)
            for root in (kpt_dask, atlas_store)
            for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}.")
            if not found.name.endswith("__main__")
        ]
    kernels = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, kernel_cache._Dispatcher)
    }
    assert len(kernels) > 50
    assert len({stamp(kernel) for kernel in kernels}) == len(kernels)
    named = {
        part.split()[1].partition(".")[0]
        for kernel in kernels
        for part in kernel_cache._parts(kernel, set())
        if isinstance(part, str) and part.startswith("object ")
    }
    assert named <= {"typing", "numba", "llvmlite", "kpt_dask", "atlas_store"}


def test_stamps_know_arrays_and_nested_values() -> None:
    table = np.arange(3)
    first = [*kernel_cache._parts((1, "a", frozenset({"x", "y"}), table), set())]
    assert first == [*kernel_cache._parts((1, "a", frozenset({"y", "x"}), table.copy()), set())]
    assert first != [*kernel_cache._parts((1, "a", frozenset({"x", "y"}), table + 1), set())]
