"""The Gaussian scale space: constants, octave shapes, and the kernels that blur.

An octave holds the Gaussians ``G[0] … G[5]`` at σ0·κ^i voxels and their differences
``D[i] = G[i+1] − G[i]``; extrema are sought in ``D[1] … D[3]`` (Wachinger et al. 2015,
eq. 1, with three levels per octave). Each Gaussian is blurred from the one before it.
Octave o + 1 starts at octave o's Gaussian of 2·σ0, every second voxel, and is kept as
level o + 1 of the volume's multiscale pyramid.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from kpt_dask.jit import kernel

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
def blur_planes(
    ring: Planes, first: int, n: int, taps: Row, scratch: Planes, padded: Row, out: Planes
) -> None:
    """Blur planes of a volume in all three directions; edges repeat.

    The taps are added one pair at a time along whole rows: such loops vectorize for any
    number of taps, and every voxel goes through the same operations in the same order.
    Along z, a row is blurred for all planes before the next row, so that the rows it needs
    are read once and stay in the fastest cache.

    Parameters
    ----------
    ring : float32 array (m, y, x)
        Planes of the volume, as far as the taps reach from those to make; plane p is
        ``ring[p % m]``.
    first, n : int
        First plane to make, and the number of planes of the volume.
    taps : float32 array (r + 1)
        From `gaussian_taps`.
    scratch : float32 array (number of planes to make, y, x)
    padded : float32 array (at least x + 2·r)
        Scratch.
    out : float32 array (k, y, x)
        A ring that receives plane p as ``out[p % k]``.
    """
    m = ring.shape[0]
    r = taps.size - 1
    count, ny, nx = scratch.shape
    for y in range(ny):
        for j in range(count):
            z = first + j
            row = scratch[j, y]
            centre = ring[z % m, y]
            for x in range(nx):
                row[x] = taps[0] * centre[x]
            for k in range(1, r + 1):
                w = taps[k]
                before = ring[max(z - k, 0) % m, y]
                after = ring[min(z + k, n - 1) % m, y]
                for x in range(nx):
                    row[x] += w * (before[x] + after[x])
    for j in range(count):
        plane = scratch[j]
        made = out[(first + j) % out.shape[0]]
        for y in range(ny):
            middle = padded[r : r + nx]
            centre = plane[y]
            for x in range(nx):
                middle[x] = taps[0] * centre[x]
            for k in range(1, r + 1):
                w = taps[k]
                before = plane[max(y - k, 0)]
                after = plane[min(y + k, ny - 1)]
                for x in range(nx):
                    middle[x] += w * (before[x] + after[x])
            padded[:r] = padded[r]
            padded[r + nx : nx + 2 * r] = padded[r + nx - 1]
            row = made[y]
            for x in range(nx):
                row[x] = taps[0] * middle[x]
            for k in range(1, r + 1):
                w = taps[k]
                before = padded[r - k : r - k + nx]
                after = padded[r + k : r + k + nx]
                for x in range(nx):
                    row[x] += w * (before[x] + after[x])
