"""Extrema of the difference of Gaussians over space and scale (Wachinger et al. 2015, eq. 1).

Kernels here know neither Dask nor Zarr.
"""

from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import kernel
from kpt_dask.volumes.blur import TILE

Planes = Annotated[NDArray[np.float32], "z y x"]
Differences = Annotated[NDArray[np.float32], "level z y x"]


class Extrema(NamedTuple):
    """Extrema of some planes, in the order of the planes.

    Attributes
    ----------
    voxel : int64 array (n, 3)
        Voxel (z, y, x) of the octave.
    offset : float64 array (n, 4)
        From there to the extremum along z, y, x (voxels) and scale (levels), each ±0.5.
    level : uint8 array (n)
        Level of the octave, 1 … 3.
    response : float32 array (n)
        Difference of Gaussians at the voxel, HU.
    """

    voxel: NDArray[np.int64]
    offset: NDArray[np.float64]
    level: NDArray[np.uint8]
    response: NDArray[np.float32]

    @classmethod
    def empty(cls, n: int) -> "Extrema":
        """Uninitialized arrays for `n` extrema."""
        return cls(
            np.empty((n, 3), np.int64),
            np.empty((n, 4), np.float64),
            np.empty(n, np.uint8),
            np.empty(n, np.float32),
        )


@kernel
def vertex(before: float, here: float, after: float) -> float:
    """Where the parabola through an extremum and its two neighbours has its vertex, ±0.5."""
    curvature = before - 2.0 * here + after
    if curvature == 0.0:
        return 0.0
    return min(max(0.5 * (before - after) / curvature, -0.5), 0.5)


@kernel
def find_extrema(
    rings: Any,
    differences: Differences,
    planes: tuple[int, int, int],
    core: NDArray[np.int64],
    extrema: Any,
) -> int:
    """Find the extrema of planes ``first − 1 … last − 2``, the last whose next plane is there.

    Parameters
    ----------
    rings : tuple of float32 arrays (m, y, x)
        Ring buffers of the input and of each Gaussian; plane p is ``ring[p % m]``.
    differences : float32 array (levels + 2, 3, y, x)
        Ring buffers that receive the differences of Gaussians of planes ``before … last − 1``.
    planes : (before, first, last)
        Numbers of planes; `before` is less than `first` if earlier differences must be made again.
    core : int64 array (3, 2)
        (start, stop) along z, y, x of the voxels to test.
    extrema : Extrema
        Receives the extrema.

    Returns
    -------
    int
        Number of extrema; −1 if there are more than `extrema` can hold.
    """
    before, first, last = planes
    ny, nx = differences.shape[2:]
    levels = differences.shape[0] - 2
    found = np.empty((levels * TILE * nx, 3), np.int64)
    count = 0
    for plane in range(before, last):
        z = plane - 1
        test = plane >= first and core[0, 0] <= z < core[0, 1]
        for top in range(0, ny, TILE):
            end = min(top + TILE, ny)
            for level in range(levels + 2):
                _subtract(rings[level + 2], rings[level + 1], plane, top, end, differences[level])
            if not test:
                continue
            # A row is tested against the rows beside it, so testing lags one row behind.
            rows = max(top - 1, core[1, 0]), min(end - 1, core[1, 1])
            n = _find_in_rows(differences, z, rows, (core[2, 0], core[2, 1]), found)
            if count + n > extrema.level.size:
                return -1
            for i in range(n):
                level, y, x = found[i, 0], found[i, 1], found[i, 2]
                _refine(differences, level, z, y, x, extrema, count)
                count += 1
    return count


@kernel
def _subtract(upper: Planes, lower: Planes, z: int, first: int, last: int, out: Planes) -> None:
    """Subtract rows ``first … last − 1`` of a plane."""
    u = upper[z % upper.shape[0], first:last].reshape(-1)
    v = lower[z % lower.shape[0], first:last].reshape(-1)
    w = out[z % out.shape[0], first:last].reshape(-1)
    for i in range(w.size):
        w[i] = u[i] - v[i]


@kernel
def _find_in_rows(
    differences: Differences, z: int, rows: Any, columns: Any, found: NDArray[np.int64]
) -> int:
    """Write (level, y, x) of the extrema in part of a plane to `found`; return their number.

    All voxels of a row are compared with eight neighbours first, those along each axis and scale:
    few pass.
    """
    flat = differences.reshape(-1)
    ny, nx = differences.shape[2:]
    area = ny * nx
    below, above = ((z - 1) % 3 - z % 3) * area, ((z + 1) % 3 - z % 3) * area
    passed = np.empty(max(columns[1] - columns[0], 0), np.bool_)
    count = 0
    for y in range(rows[0], rows[1]):
        for level in range(1, differences.shape[0] - 1):
            at = ((level * 3 + z % 3) * ny + y) * nx + columns[0]
            _mark_candidates(flat, at, (1, nx, 3 * area), (below, above), passed)
            for i in range(passed.size):
                if passed[i] and _is_extremum(differences, level, z, y, columns[0] + i):
                    found[count, 0] = level
                    found[count, 1] = y
                    found[count, 2] = columns[0] + i
                    count += 1
    return count


@kernel
def _mark_candidates(
    flat: NDArray[np.float32], at: int, steps: Any, planes: Any, passed: NDArray[np.bool_]
) -> None:
    """Mark the voxels of a row that lie above, or below, both neighbours on each axis and scale."""
    # Unsigned indices: a loop that asks whether one is negative is not vectorised.
    here = np.uint64(at)
    left, right = np.uint64(at - steps[0]), np.uint64(at + steps[0])
    front, back = np.uint64(at - steps[1]), np.uint64(at + steps[1])
    below, above = np.uint64(at + planes[0]), np.uint64(at + planes[1])
    finer, coarser = np.uint64(at - steps[2]), np.uint64(at + steps[2])
    for i in range(np.uint64(passed.size)):
        v = flat[here + i]
        a, b, c, d = flat[left + i], flat[right + i], flat[front + i], flat[back + i]
        e, f, g, h = flat[below + i], flat[above + i], flat[finer + i], flat[coarser + i]
        maximum = (v > a) & (v > b) & (v > c) & (v > d) & (v > e) & (v > f) & (v > g) & (v > h)
        minimum = (v < a) & (v < b) & (v < c) & (v < d) & (v < e) & (v < f) & (v < g) & (v < h)
        passed[i] = maximum | minimum


@kernel
def _is_extremum(differences: Differences, level: int, z: int, y: int, x: int) -> bool:
    """Whether a voxel is strictly above, or below, all 80 neighbours in space and scale."""
    v = differences[level, z % 3, y, x]
    sign = 1 if v > differences[level, z % 3, y, x - 1] else -1
    for d in range(level - 1, level + 2):
        for k in range(z - 1, z + 2):
            for j in range(y - 1, y + 2):
                for i in range(x - 1, x + 2):
                    itself = d == level and k == z and j == y and i == x
                    if not itself and not sign * v > sign * differences[d, k % 3, j, i]:
                        return False
    return True


@kernel
def _refine(
    differences: Differences, level: int, z: int, y: int, x: int, extrema: Any, at: int
) -> None:
    """Write extremum `at`, interpolated by a parabola along each axis and over scale."""
    d, k = differences[level], z % 3
    v = d[k, y, x]
    extrema.voxel[at, 0] = z
    extrema.voxel[at, 1] = y
    extrema.voxel[at, 2] = x
    extrema.offset[at, 0] = vertex(d[(z - 1) % 3, y, x], v, d[(z + 1) % 3, y, x])
    extrema.offset[at, 1] = vertex(d[k, y - 1, x], v, d[k, y + 1, x])
    extrema.offset[at, 2] = vertex(d[k, y, x - 1], v, d[k, y, x + 1])
    finer, coarser = differences[level - 1, k, y, x], differences[level + 1, k, y, x]
    extrema.offset[at, 3] = vertex(finer, v, coarser)
    extrema.level[at] = level
    extrema.response[at] = v
