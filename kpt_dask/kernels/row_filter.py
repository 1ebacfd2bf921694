"""Symmetric filters of rows, vectorised.

A symmetric filter adds up pairs of rows, each pair times its tap. As a loop over voxels for each
tap, it reads and writes the sum again for every tap. In LLVM's language, the sums of some vectors
stay in registers over all taps, and two neighbouring rows are made together, because they share
most of what they read: extraction takes little more than half of the time.

Each voxel goes through the same operations in the same order, wherever it lies in a row and
whichever function makes it; as in all kernels, multiply-adds may be fused.
"""

from typing import Any

import numpy as np

from kpt_dask.kernels.jit import either, inlined_kernel, kernel
from kpt_dask.kernels.row_filter_llvm import filter_voxels
from kpt_dask.kernels.simd import LANES

VECTORS = 4
"""Vectors whose sums are made side by side, so that none waits for its own last addition."""
WIDE = VECTORS * LANES
"""Voxels of these vectors."""


@kernel
def row_plain(source: Any, tables: Any, taps: Any, out: Any, where: Any, n: int) -> None:
    """Filter a row: out[at + x] = Σ_k taps[k] · (source[low_k + x] + source[high_k + x]).

    The term of k = 0 is taps[0] · source[low_0 + x] alone.

    Parameters
    ----------
    source, out : float32 arrays, one axis
        What is read and what is written do not overlap.
    tables : two int64 arrays (rows, taps), C order
        Where the row before and the row after begin in `source`, for each tap.
    taps : float32 array (taps)
    where : (int, int, int)
        Added to whatever the tables say; which row of the tables; where the result begins in `out`.
    n : int
        Voxels of the row.
    """
    low, high = tables
    base, row, at = where
    # Unsigned indices: a loop that asks whether one is negative is not vectorised.
    to, centre = np.uint64(at), np.uint64(base + low[row, 0])
    for x in range(np.uint64(n)):
        out[to + x] = taps[0] * source[centre + x]
    for k in range(1, taps.size):
        tap = taps[k]
        before, after = np.uint64(base + low[row, k]), np.uint64(base + high[row, k])
        for x in range(np.uint64(n)):
            out[to + x] += tap * (source[before + x] + source[after + x])


@kernel
def two_rows_plain(source: Any, tables: Any, taps: Any, out: Any, where: Any, n: int) -> None:
    """Do what `row_plain` does for two rows of the tables, the second to ``out[at + step]`` on.

    They must be neighbours: where the second has its rows after it, the first has them one tap
    later, ``high[row, k + 1] == high[row + 1, k]``, and so have ``low[row + 1, k + 1]`` and
    ``low[row, k]``. `step` is the fourth number of `where`.
    """
    base, row, at, step = where
    row_plain(source, tables, taps, out, (base, row, at), n)
    row_plain(source, tables, taps, out, (base, row + 1, at + step), n)


@inlined_kernel
def row_llvm(source: Any, tables: Any, taps: Any, out: Any, where: Any, n: int) -> None:
    """Do what `row_plain` does."""
    base, row, at = where
    if n < LANES:
        for x in range(n):
            filter_voxels(source, tables, taps, out, (base + x, row, at + x, 0), 1, 1, 1)
        return
    x = 0
    while x + WIDE <= n:
        filter_voxels(source, tables, taps, out, (base + x, row, at + x, 0), 1, VECTORS, LANES)
        x += WIDE
    while x < n:
        # The last vector may do again what the one before it has done.
        x = min(x, n - LANES)
        filter_voxels(source, tables, taps, out, (base + x, row, at + x, 0), 1, 1, LANES)
        x += LANES


@inlined_kernel
def two_rows_llvm(source: Any, tables: Any, taps: Any, out: Any, where: Any, n: int) -> None:
    """Do what `two_rows_plain` does."""
    base, row, at, step = where
    if n < LANES:
        for x in range(n):
            filter_voxels(source, tables, taps, out, (base + x, row, at + x, step), 2, 1, 1)
        return
    x = 0
    while x + WIDE <= n:
        filter_voxels(source, tables, taps, out, (base + x, row, at + x, step), 2, VECTORS, LANES)
        x += WIDE
    while x < n:
        x = min(x, n - LANES)
        filter_voxels(source, tables, taps, out, (base + x, row, at + x, step), 2, 1, LANES)
        x += LANES


sum_row = either(row_llvm, row_plain)
sum_two_rows = either(two_rows_llvm, two_rows_plain)
