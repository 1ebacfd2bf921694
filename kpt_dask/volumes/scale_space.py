"""The Gaussian scale space: its constants, the taps between its levels, and octave shapes.

An octave holds the Gaussians ``G[0] … G[5]`` at σ0·κ^i voxels and their differences
``D[i] = G[i+1] − G[i]``; extrema are sought in ``D[1] … D[3]`` (Wachinger et al. 2015,
eq. 1, with three levels per octave). Each Gaussian is blurred from the one before it, see
`kpt_dask.volumes.blur`.
Octave o + 1 starts at octave o's Gaussian of 2·σ0, every second voxel, and is kept as
level o + 1 of the volume's multiscale pyramid.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

Row = Annotated[NDArray[np.float32], "x"]

SIGMA0 = 1.6
"""Blur of an octave's first Gaussian, voxels of that octave."""
INPUT_SIGMA = 0.5
"""Blur that level 0 of a volume is taken to have already, voxels."""
LEVELS = 3
"""Levels per octave in which extrema are sought."""
TRUNCATE = 3.0
"""Radius of the taps, in standard deviations."""
SMALLEST_OCTAVE = 12
"""Voxels that an octave has along its shortest axis, at least."""
MAX_OCTAVES = 5
"""A volume has at most this many octaves."""


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
