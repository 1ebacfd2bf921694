"""Gaussian blur of the planes of a volume, in all three directions at once.

Kernels here know neither Dask nor Zarr.
"""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.row_filter import sum_row, sum_two_rows

Row = Annotated[NDArray[np.float32], "x"]
Planes = Annotated[NDArray[np.float32], "z y x"]

TILE = 8
"""Rows that are blurred along y and x at a time."""
MARGIN = 32
"""Voxels of padding on either side of a row that is blurred along x."""


@kernel
def blur_scratch(n_planes: int, width: int, radius: int) -> Row:
    """Allocate the scratch buffer of `blur_planes` for batches of planes of this width."""
    return np.zeros(n_planes * (TILE + 2 * radius) * width + 2 * (width + 2 * MARGIN), np.float32)


@kernel
def _reach(first: int, n_rows: int, n: int, m: int, low: Any, high: Any) -> None:
    """Tabulate which of the m rows of a ring buffer are summed for rows from `first` on."""
    for j in range(n_rows):
        for k in range(low.shape[1]):
            low[j, k] = max(first + j - k, 0) % m
            high[j, k] = min(first + j + k, n - 1) % m


@kernel
def blur_planes(
    ring: Planes, first: int, count: int, n: int, taps: Row, scratch: Row, out: Planes
) -> None:
    """Blur planes of a volume in all three directions; edges repeat.

    Taps are added one pair at a time, from the innermost: the same operations in the same order
    for every voxel. Along z, a row is blurred for all planes before the next row, so that the
    rows it needs are read once and stay in the L1 cache. The other directions follow a few rows
    later, while the result is still in the L2 cache.

    Parameters
    ----------
    ring : float32 array (m, y, x)
        Ring buffer of all planes within the radius of those to make; plane p is
        ``ring[p % m]``.
    first, count, n : int
        First plane to make, how many, and the number of planes of the volume.
    taps : float32 array (r + 1)
        From `kpt_dask.volumes.scale_space.gaussian_taps`; r is at most `MARGIN`.
    scratch : float32 array
        From `blur_scratch`, for at least as many planes and as large a radius.
    out : float32 array (k, y, x)
        Ring buffer that receives plane p as ``out[p % k]``.
    """
    r = taps.size - 1
    ny, nx = ring.shape[1:]
    planes, made = ring.reshape(-1), out.reshape(-1)
    z_low, z_high = np.empty((count, r + 1), np.int64), np.empty((count, r + 1), np.int64)
    _reach(first, count, n, ring.shape[0], z_low, z_high)
    z_low *= ny * nx
    z_high *= ny * nx
    y_low, y_high = np.empty((TILE, r + 1), np.int64), np.empty((TILE, r + 1), np.int64)
    x_low, x_high = np.empty((1, r + 1), np.int64), np.empty((1, r + 1), np.int64)
    for k in range(r + 1):
        x_low[0, k] = MARGIN - k
        x_high[0, k] = MARGIN + k
    # Scratch holds, per plane, a ring buffer of rows blurred along z; then two rows blurred along
    # y as well, padded for the edges that repeat.
    window = TILE + 2 * r
    plane = window * nx
    pitch = nx + 2 * MARGIN
    padded = scratch[count * plane : count * plane + 2 * pitch]
    done = 0
    for top in range(0, ny, TILE):
        rows = min(TILE, ny - top)
        for y in range(done, min(top + rows + r, ny)):
            at = y % window * nx
            for j in range(0, count - 1, 2):
                where = y * nx, j, j * plane + at, plane
                sum_two_rows(planes, (z_low, z_high), taps, scratch, where, nx)
            if count % 2:
                j = count - 1
                sum_row(planes, (z_low, z_high), taps, scratch, (y * nx, j, j * plane + at), nx)
        done = min(top + rows + r, ny)
        _reach(top, rows, ny, window, y_low, y_high)
        y_low *= nx
        y_high *= nx
        for j in range(count):
            to = ((first + j) % out.shape[0] * ny + top) * nx
            for t in range(0, rows, 2):
                both = min(2, rows - t)
                base = j * plane
                if both == 2:
                    where = base, t, MARGIN, pitch
                    sum_two_rows(scratch, (y_low, y_high), taps, padded, where, nx)
                else:
                    sum_row(scratch, (y_low, y_high), taps, padded, (base, t, MARGIN), nx)
                for i in range(both):
                    left = i * pitch + MARGIN
                    right = left + nx - 1
                    for k in range(1, r + 1):
                        padded[left - k] = padded[left]
                        padded[right + k] = padded[right]
                    at = to + (t + i) * nx
                    sum_row(padded, (x_low, x_high), taps, made, (i * pitch, 0, at), nx)
