"""Lattices of the refinement, over the part of the scan where organs may lie.

The lattices of all levels share their first point, the first voxel of that part. Reads no voxel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atlas_store import Atlas
from atlas_store.arrays.boxes import Box, begin_of, shape_of
from kpt_dask.grid import Grid
from kpt_dask.organ_transfer.refinement.iteration import BOX, PAD

Level = tuple[float, int]
"""Spacing of a lattice, mm, and iterations on it."""

FULL: tuple[Level, ...] = ((12.0, 15), (8.0, 10), (6.0, 8), (4.0, 6), (3.0, 5))
"""Levels (mm, iterations), coarsest first."""
FAST: tuple[Level, ...] = ((12.0, 12), (8.0, 8), (6.0, 8))
"""Levels (mm, iterations) of ``--fast``: most of the gain of `FULL` in half of its time or less."""
COARSE = 6.0
"""Spacing, mm, up to which a level is used whatever the size of the organs."""
BOXES = 2
"""Least number of boxes of local correlation along a typical organ, for a coarser level."""
MOST_POINTS = 2_000_000
"""Largest number of points of a lattice. Levels with more are left out, as in whole bodies with ten
organs, so a task takes at most ≈ 190 MB whatever the scan."""


@dataclass(frozen=True)
class Lattice:
    """Points over a box of the scan's voxels.

    Attributes
    ----------
    first : (int, int, int)
        Voxel of the scan at the first point.
    spacing : float
        mm from one point to the next.
    step : float
        The same in voxels.
    shape : (int, int, int)
        Points along each axis; the last ones lie at or beyond the last voxel of the box.
    """

    first: tuple[int, int, int]
    spacing: float
    step: float
    shape: tuple[int, int, int]

    @classmethod
    def over(cls, box: Box, grid: Grid, spacing: float) -> "Lattice":
        """Cover a box of voxels."""
        step = spacing / float(grid.spacing[0])
        depth, height, width = (math.ceil((n - 1) / step) + 1 for n in shape_of(box))
        z, y, x = begin_of(box).tolist()
        return cls((z, y, x), spacing, step, (depth, height, width))

    @property
    def padded(self) -> tuple[int, int, int]:
        """Shape of the arrays of its points, with `PAD` points more on every side."""
        z, y, x = (n + 2 * PAD for n in self.shape)
        return z, y, x

    def points_in(self, box: Box) -> tuple[slice, slice, slice]:
        """Points in a box of voxels, and the next ones around it."""
        sides = []
        for (a, b), first, n in zip(box, self.first, self.shape, strict=True):
            low, high = math.floor((a - first) / self.step), math.ceil((b - 1 - first) / self.step)
            sides.append(slice(min(max(low, 0), n - 1), min(high + 1, n)))
        return sides[0], sides[1], sides[2]

    @property
    def size(self) -> int:
        """Number of points."""
        return math.prod(self.shape)

    def origin(self, grid: Grid) -> NDArray[np.float64]:
        """First point, mm."""
        first: NDArray[np.float64] = grid.origin + grid.spacing * np.array(self.first)
        return first


def typical_size(atlases: Sequence[Atlas]) -> float:
    """Median of the longest sides of all organs' bounding boxes in atlases, mm; 0 of none."""
    sides = [
        float(atlas.info.spacing[0]) * max(b - a for a, b in organ.bounding_box)
        for atlas in atlases
        for organ in atlas.organs.values()
    ]
    return float(np.median(sides)) if sides else 0.0


def fitting(levels: Sequence[Level], size: float) -> list[Level]:
    """Leave out the levels that are too coarse for organs of a size, mm.

    Local correlation looks at boxes of 5 × 5 × 5 points. Where organs are hardly larger than
    that, as in the head and neck, it would compare what is beside them. Where they are larger, as
    in the trunk, they also start farther off, and need to be found.
    """
    points = 2 * BOX + 1
    return [one for one in levels if one[0] <= max(size / (BOXES * points), COARSE)]


def lattices(box: Box, grid: Grid, levels: Sequence[Level]) -> list[tuple[Lattice, int]]:
    """Lay lattices over a box of voxels: those of the levels, as far as `MOST_POINTS` allows.

    Returns
    -------
    list of (Lattice, int)
        Each with its iterations; one at least.
    """
    found = [(Lattice.over(box, grid, spacing), n) for spacing, n in levels]
    return [found[0], *(one for one in found[1:] if one[0].size <= MOST_POINTS)]
