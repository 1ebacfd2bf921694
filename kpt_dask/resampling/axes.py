"""Axes of two parallel grids, and the weights that resample one along the other.

Pure functions, no I/O: what `kpt_dask.resampling.stream` applies to a streaming scan.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from kpt_dask.grid import Grid

VOTES = 1 << 20
"""Votes of all neighbours along one axis together, a whole number."""


@dataclass(frozen=True, eq=False)
class AxisTable:
    """Input samples and their weights, for each output sample along one axis.

    Attributes
    ----------
    start : ndarray (n_out,), int64
        First input sample of each output sample; never decreases.
    weights : ndarray (n_out, taps), float32
        Weights of the input samples from `start` on; each row sums to 1.
    n_in : int
        Number of input samples.
    """

    start: NDArray[np.int64]
    weights: NDArray[np.float32]
    n_in: int

    @property
    def votes(self) -> NDArray[np.int64]:
        """The weights as whole numbers, so that sums of their products are exact."""
        return np.rint(self.weights.astype(np.float64) * VOTES).astype(np.int64)

    @property
    def is_identity(self) -> bool:
        """Whether every output sample is the input sample of the same index."""
        n = len(self.start)
        return (
            n == self.n_in and self.weights.shape[1] == 1 and bool((self.start == range(n)).all())
        )


def axis_table(n_in: int, n_out: int, ratio: float, first: float) -> AxisTable:
    """Make the weights of one axis.

    Parameters
    ----------
    n_in, n_out : int
        Numbers of samples.
    ratio : float
        Output spacing over input spacing.
    first : float
        Where output sample 0 lies, in input samples.
    """
    position = first + ratio * np.arange(n_out)
    half_width = max(1.0, ratio)
    low = np.floor(position - half_width).astype(np.int64) + 1
    samples = low[:, None] + np.arange(int(np.ceil(2 * half_width)) + 1)
    weights = np.maximum(1 - np.abs(samples - position[:, None]) / half_width, 0)
    weights /= weights.sum(axis=1, keepdims=True)
    inside = np.clip(samples, 0, n_in - 1)
    used = weights > 0
    begin = np.where(used, inside, n_in).min(axis=1)
    taps = int((np.where(used, inside, -1).max(axis=1) - begin).max()) + 1
    start = np.minimum(begin, n_in - taps)
    folded = np.zeros((n_out, taps))
    rows, columns = np.nonzero(used)
    np.add.at(folded, (rows, (inside - start[:, None])[rows, columns]), weights[rows, columns])
    return AxisTable(start, folded.astype(np.float32), n_in)


@dataclass(frozen=True)
class Orientation:
    """How a stored array's axes run in the world.

    Attributes
    ----------
    axes : tuple of int
        ``axes[a]`` is the stored axis that runs (nearly) along world axis a (z, y, x).
    flipped : tuple of bool
        Whether it runs against its world axis.
    """

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    @classmethod
    def of(cls, grid: Grid) -> "Orientation":
        """Find the orientation of a grid, the nearest one if it is oblique."""
        cosines = grid.affine[:3, :3] / grid.spacing
        axes = max(
            permutations(range(3)), key=lambda axes: sum(abs(cosines[a, axes[a]]) for a in range(3))
        )
        flipped = [bool(cosines[a, axes[a]] < 0) for a in range(3)]
        return cls((axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2]))

    def apply(self, grid: Grid) -> Grid:
        """Reorder and flip a grid's axes; its voxels stay where they are."""
        affine = grid.affine.copy()
        for a, stored in enumerate(self.axes):
            column = grid.affine[:3, stored]
            affine[:3, a] = -column if self.flipped[a] else column
            if self.flipped[a]:
                affine[:3, 3] += (grid.shape[stored] - 1) * column
        z, y, x = (grid.shape[stored] for stored in self.axes)
        return Grid((z, y, x), affine)


def along_own_axes(grid: Grid, spacing: float) -> Grid:
    """Make the grid with the same axes (in world order) whose spacing is at least `spacing`, mm.

    Axes that are coarser already stay as they are.
    """
    permuted = Orientation.of(grid).apply(grid)
    coarser = np.maximum(permuted.spacing, spacing)
    size = np.maximum(np.rint(np.array(permuted.shape) * permuted.spacing / coarser).astype(int), 1)
    affine = permuted.affine.copy()
    affine[:3, :3] *= coarser / permuted.spacing
    affine[:3, 3] = permuted.to_mm((coarser / permuted.spacing - 1) / 2)
    return Grid((int(size[0]), int(size[1]), int(size[2])), affine)


def axis_tables(source: Grid, target: Grid) -> tuple[AxisTable, AxisTable, AxisTable]:
    """Tables along the world axes (z, y, x), from a grid to one whose axes are parallel."""
    permuted = Orientation.of(source).apply(source)
    middle = (np.array(target.shape) - 1) / 2
    tables = []
    for a in range(3):
        # Rounded to what float32 headers hold, or a flipped file could have other weights in
        # the last bit.
        ratio = round(float(target.spacing[a] / permuted.spacing[a]), 7)
        first = round(
            float(permuted.to_index(target.to_mm(np.where(np.arange(3) == a, 0, middle)))[a]), 6
        )
        tables.append(axis_table(permuted.shape[a], target.shape[a], ratio, first))
    return tables[0], tables[1], tables[2]
