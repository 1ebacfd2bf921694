"""The Gaussian scale space: constants, octave shapes, and the kernels that blur.

An octave holds the Gaussians ``G[0] … G[5]`` at σ0·κ^i voxels and their differences
``D[i] = G[i+1] − G[i]``; extrema are sought in ``D[1] … D[3]`` (Wachinger et al. 2015,
eq. 1, with three levels per octave). Each Gaussian is blurred from the one before it.
Octave o + 1 starts at octave o's Gaussian of 2·σ0, every second voxel, and is kept as
level o + 1 of the volume's multiscale pyramid.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.rows import sum_row, sum_two_rows

Row = Annotated[NDArray[np.float32], "x"]
Plane = Annotated[NDArray[np.float32], "y x"]
Planes = Annotated[NDArray[np.float32], "z y x"]

SIGMA0 = 1.6
"""Blur of an octave's first Gaussian, voxels of that octave."""
INPUT_SIGMA = 0.5
"""Blur that level 0 of a volume is taken to have already, voxels."""
LEVELS = 3
"""Levels per octave in which extrema are sought."""
TRUNCATE = 3.0
"""Gaussian taps reach this many standard deviations."""
SMALLEST_OCTAVE = 12
"""An octave needs this many voxels along its shortest axis."""
MAX_OCTAVES = 5

TILE = 8
"""Rows that are blurred along y and x at a time."""
MARGIN = 32
"""Voxels beside a row that is blurred along x."""


def gaussian_taps(sigma: float) -> Row:
    """Half of a sampled, truncated Gaussian that sums to one: (centre, next, …, last), float32."""
    radius = math.ceil(TRUNCATE * sigma)
    weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    taps: Row = (weights / (weights[0] + 2 * weights[1:].sum())).astype(np.float32)
    return taps


def level_sigma(level: float) -> float:
    """σ of a level of an octave, in voxels of that octave."""
    return float(SIGMA0 * 2.0 ** (level / LEVELS))


def _increment(sigma: float, from_sigma: float) -> float:
    return math.sqrt(sigma**2 - from_sigma**2)


FIRST_TAPS = gaussian_taps(_increment(SIGMA0, INPUT_SIGMA))
"""From level 0 of a volume to G[0] of octave 0."""
FINER_TAPS = gaussian_taps(_increment(SIGMA0, 2 * INPUT_SIGMA))
"""From level 0 at half its spacing to G[0] of the octave before octave 0."""
LEVEL_TAPS = tuple(
    gaussian_taps(_increment(level_sigma(i + 1), level_sigma(i))) for i in range(LEVELS + 2)
)
"""From G[i] to G[i + 1]."""


def next_octave_taps(octave: int) -> Row:
    """From level `octave` of a volume to its Gaussian at 2·σ0."""
    return gaussian_taps(_increment(2 * SIGMA0, SIGMA0 if octave else INPUT_SIGMA))


def octave_shapes(shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """Shapes (z, y, x) of the octaves of a volume, the volume's own first."""
    shapes = [(shape[0], shape[1], shape[2])]
    while len(shapes) < MAX_OCTAVES:
        z, y, x = ((n + 1) // 2 for n in shapes[-1])
        if min(z, y, x) < SMALLEST_OCTAVE:
            break
        shapes.append((z, y, x))
    return shapes


@kernel
def blur_scratch(n_planes: int, width: int, radius: int) -> Row:
    """Make the scratch that `blur_planes` needs for so many planes of this width at a time."""
    return np.zeros(n_planes * (TILE + 2 * radius) * width + 2 * (width + 2 * MARGIN), np.float32)


@kernel
def _reach(first: int, n_rows: int, n: int, m: int, low: Any, high: Any) -> None:
    """Tabulate the places in a ring of m from which rows from `first` on are blurred."""
    for j in range(n_rows):
        for k in range(low.shape[1]):
            low[j, k] = max(first + j - k, 0) % m
            high[j, k] = min(first + j + k, n - 1) % m


@kernel
def blur_planes(
    ring: Planes, first: int, count: int, n: int, taps: Row, scratch: Row, out: Planes
) -> None:
    """Blur planes of a volume in all three directions; edges repeat.

    The taps are added one pair at a time, from the innermost: every voxel goes through the
    same operations in the same order. Along z, a row is blurred for all planes before the
    next row, so that the rows it needs are read once and stay in the fastest cache; a few
    rows later the other directions follow, before the next cache has lost it.

    Parameters
    ----------
    ring : float32 array (m, y, x)
        Planes of the volume, as far as the taps reach from those to make; plane p is
        ``ring[p % m]``.
    first, count, n : int
        First plane to make, how many, and the number of planes of the volume.
    taps : float32 array (r + 1)
        From `gaussian_taps`; r at most `MARGIN`.
    scratch : float32 array
        From `blur_scratch`, for at least as many planes and as large a radius.
    out : float32 array (k, y, x)
        A ring that receives plane p as ``out[p % k]``.
    """
    r = taps.size - 1
    ny, nx = ring.shape[1:]
    z_low, z_high = np.empty((count, r + 1), np.int64), np.empty((count, r + 1), np.int64)
    _reach(first, count, n, ring.shape[0], z_low, z_high)
    z_low *= ny * nx
    z_high *= ny * nx
    y_low, y_high = np.empty((TILE, r + 1), np.int64), np.empty((TILE, r + 1), np.int64)
    x_low, x_high = np.empty((1, r + 1), np.int64), np.empty((1, r + 1), np.int64)
    for k in range(r + 1):
        x_low[0, k] = MARGIN - k
        x_high[0, k] = MARGIN + k
    # Of each plane, a ring of rows blurred along z; then two rows blurred along y as well,
    # with a margin for what repeats.
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
                sum_two_rows(
                    ring, y * nx, z_low, z_high, j, taps, scratch, j * plane + at, plane, nx
                )
            if count % 2:
                j = count - 1
                sum_row(ring, y * nx, z_low, z_high, j, taps, scratch, j * plane + at, nx)
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
                    sum_two_rows(scratch, base, y_low, y_high, t, taps, padded, MARGIN, pitch, nx)
                else:
                    sum_row(scratch, base, y_low, y_high, t, taps, padded, MARGIN, nx)
                for i in range(both):
                    left = i * pitch + MARGIN
                    right = left + nx - 1
                    for k in range(1, r + 1):
                        padded[left - k] = padded[left]
                        padded[right + k] = padded[right]
                    at = to + (t + i) * nx
                    sum_row(padded, i * pitch, x_low, x_high, 0, taps, out, at, nx)
