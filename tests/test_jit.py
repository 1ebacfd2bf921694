"""Kernels are compiled once for a state of the sources, and anew when any of them changes."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpt_dask import jit
from kpt_dask.jit import flat

INNER = """
from package.jit import kernel

FACTOR = {factor}

@kernel
def inner(x):
    return FACTOR * x
"""
OUTER = """
from package.inner import inner
from package.jit import kernel

@kernel
def outer(x):
    return inner(x) + 1
"""
RUN = "from package.outer import outer\nprint(outer(3), sum(outer.stats.cache_hits.values()))"


def run(folder: Path) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, check=True, capture_output=True, text=True
    )
    return [int(word) for word in done.stdout.split()]


def test_a_change_in_another_file_compiles_a_kernel_anew(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(jit.__file__, package / "jit.py")
    (package / "__init__.py").touch()
    (package / "outer.py").write_text(OUTER)
    (package / "inner.py").write_text(INNER.format(factor=2))
    assert run(tmp_path) == [7, 0]
    assert run(tmp_path) == [7, 1]
    (package / "inner.py").write_text(INNER.format(factor=4))
    assert run(tmp_path) == [13, 0]


@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(0, 3)] * 3))
def test_a_part_of_an_array_is_found_in_its_memory(
    shape: tuple[int, int, int], begin: tuple[int, int, int]
) -> None:
    whole = np.arange(10 * 11 * 12).reshape(10, 11, 12)
    part = whole[tuple(slice(a, a + n) for a, n in zip(begin, shape, strict=True))]
    memory, strides = flat(part)
    assert memory.flags.c_contiguous
    assert np.shares_memory(memory, whole)
    z, y, x = np.indices(shape)
    np.testing.assert_array_equal(memory[z * strides[0] + y * strides[1] + x], part)


def test_rows_in_pieces_are_refused() -> None:
    whole = np.arange(60).reshape(3, 4, 5)
    for part in (whole[..., ::2], whole[::-1], whole.transpose(2, 1, 0)):
        with pytest.raises(ValueError, match="rows in one piece"):
            flat(part)
