"""One octave of a column of a volume, swept plane by plane from top to bottom.

A sweep keeps, of each Gaussian, only the planes that something still needs: the next
Gaussian, the extremum test, or a descriptor. Its memory is about two hundred planes,
whatever the length of the volume. It knows neither Dask nor Zarr.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from kpt_dask import descriptors
from kpt_dask.descriptors import HALF_WIDTH, PATCH, describe, sample_patch
from kpt_dask.jit import kernel
from kpt_dask.scalespace import FIRST_TAPS, LEVEL_TAPS, LEVELS, blur_plane, level_sigma

Planes = Annotated[NDArray[np.float32], "z y x"]

_LARGEST_SIGMA = level_sigma(LEVELS + 0.5)
REACH = int(np.ceil(HALF_WIDTH * _LARGEST_SIGMA * (PATCH // 2 + 1) / (PATCH // 2) + 0.5)) + 1
"""Planes that a descriptor may need on either side of its keypoint."""


@kernel
def difference(upper: Planes, lower: Planes, z: int, out: Planes) -> None:
    """Put plane `z` of a difference of Gaussians into its ring."""
    a = upper[z % upper.shape[0]]
    b = lower[z % lower.shape[0]]
    o = out[z % out.shape[0]]
    for y in range(o.shape[0]):
        u = a[y]
        v = b[y]
        w = o[y]
        for x in range(w.size):
            w[x] = u[x] - v[x]


@kernel
def flag_candidates(dogs: NDArray[np.float32], level: int, z: int, y: int, flags: NDArray[np.uint8]) -> None:
    """Flag the voxels of a row that are strict extrema against eight of their neighbours.

    Those along x, y, z and scale: cheap, vectorized, and few voxels pass.
    """
    here = dogs[level, z % 3, y]
    finer = dogs[level - 1, z % 3, y]
    coarser = dogs[level + 1, z % 3, y]
    for i in range(here.size - 2):
        x = i + 1
        v = here[x]
        above = (v > finer[x]) & (v > coarser[x]) & (v > here[i]) & (v > here[i + 2])
        below = (v < finer[x]) & (v < coarser[x]) & (v < here[i]) & (v < here[i + 2])
        flags[x] = above | below
    before = dogs[level, z % 3, y - 1]
    after = dogs[level, z % 3, y + 1]
    under = dogs[level, (z - 1) % 3, y]
    over = dogs[level, (z + 1) % 3, y]
    for x in range(here.size):
        v = here[x]
        above = (v > before[x]) & (v > after[x]) & (v > under[x]) & (v > over[x])
        below = (v < before[x]) & (v < after[x]) & (v < under[x]) & (v < over[x])
        flags[x] = flags[x] & (above | below)


@kernel
def is_extremum(dogs: NDArray[np.float32], level: int, z: int, y: int, x: int) -> bool:
    """Whether a voxel is strictly above, or strictly below, all 80 neighbours in space and scale."""
    v = dogs[level, z % 3, y, x]
    sign = 1 if v > dogs[level, z % 3, y, x - 1] else -1
    for d in range(level - 1, level + 2):
        for k in range(z - 1, z + 2):
            for j in range(y - 1, y + 2):
                for i in range(x - 1, x + 2):
                    if d == level and k == z and j == y and i == x:
                        continue
                    if not sign * v > sign * dogs[d, k % 3, j, i]:
                        return False
    return True


@kernel
def vertex(before: float, here: float, after: float) -> float:
    """Where a parabola through three samples around a strict extremum has its vertex, ±0.5."""
    offset = 0.5 * (before - after) / (before - 2.0 * here + after)
    return min(max(offset, -0.5), 0.5)


@kernel
def advance(slab, made, reach, core, source, rings, taps, dogs, half_width, edge, out):  # type: ignore[no-untyped-def]
    n = made[-1]
    ny, nx = slab.shape[1:]
    plane = np.empty((ny, nx), np.float32)
    padded = np.empty(nx + 64, np.float32)
    flags = np.zeros(nx, np.uint8)
    patch = np.empty((PATCH + 2, PATCH + 2, PATCH + 2), np.float32)
    count = 0
    index = np.empty(3, np.int64)
    offset = np.empty(3, np.float64)
    ranks = np.empty(64, np.uint8)
    for p in range(slab.shape[0]):
        source[made[0] % source.shape[0]] = slab[p]
        made[0] += 1
        for i in range(6):
            before = source if i == 0 else rings[i - 1]
            r = taps[i].size - 1
            while made[i + 1] < reach[i] and made[i] > min(made[i + 1] + r, n - 1):
                z = made[i + 1]
                blur_plane(before, z, n, taps[i], plane, padded, rings[i][z % rings[i].shape[0]])
                made[i + 1] += 1
        while made[7] < min(made[6], n):
            for level in range(5):
                difference(rings[level + 1], rings[level], made[7], dogs[level])
            made[7] += 1
            z = made[7] - 2
            if z < core[0, 0] or z >= core[0, 1]:
                continue
            for level in range(1, 4):
                for y in range(core[1, 0], core[1, 1]):
                    flag_candidates(dogs, level, z, y, flags)
                    for x in range(core[2, 0], core[2, 1]):
                        if flags[x] and is_extremum(dogs, level, z, y, x):
                            v = dogs[level, z % 3, y, x]
                            index[0] = z; index[1] = y; index[2] = x
                            offset[0] = vertex(dogs[level, (z - 1) % 3, y, x], v, dogs[level, (z + 1) % 3, y, x])
                            offset[1] = vertex(dogs[level, z % 3, y - 1, x], v, dogs[level, z % 3, y + 1, x])
                            offset[2] = vertex(dogs[level, z % 3, y, x - 1], v, dogs[level, z % 3, y, x + 1])
                            ds = vertex(dogs[level - 1, z % 3, y, x], v, dogs[level + 1, z % 3, y, x])
                            sigma = 1.6 * 2 ** ((level + ds) / 3)
                            sample_patch(rings[level], n, index, offset, sigma * half_width / 5, patch)
                            q = describe(patch, ranks, edge)
                            if q > 0 and count < out[0].shape[0]:
                                out[0][count, 0] = z + offset[0]
                                out[0][count, 1] = y + offset[1]
                                out[0][count, 2] = x + offset[2]
                                out[0][count, 3] = sigma
                                out[0][count, 4] = v
                                out[0][count, 5] = q
                                out[1][count] = ranks
                                count += 1
    return count
