"""Comparison of an atlas's own label map with one that was predicted of its scan.

Both are streamed once, slab by slab, beside the scan; what is kept are counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atlas_store import OrganTable
from kpt_dask.atlases.profiles import Voxels
from kpt_dask.grid import Grid

LOWEST_HU, HIGHEST_HU = -2048, 8192
"""Range of the histograms of HU; what lies outside counts as their first or last bin, 1 HU wide."""

PERCENTILES = (10, 50)
"""Percentiles of HU that are compared."""

SLAB = 32
"""Planes that are read at a time where an array does not say itself."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Sizes and positions of an atlas's organs, in the order of the organ table.

    Attributes
    ----------
    volume_ml : ndarray (organ), float64
        0 where the label map does not show the organ.
    centroid : ndarray (organ, 3), float64
        (z, y, x) in mm; NaN where the label map does not show the organ.
    """

    volume_ml: NDArray[np.float64]
    centroid: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Measures of an atlas's labels, alone and against predicted ones; O organs of a table.

    Attributes
    ----------
    layout : Layout
        Of the labels.
    predicted : Layout
        Of the predicted labels.
    own_dice : ndarray (O), float64
        Dice of each organ with its own prediction; NaN of organs that the labels do not show, here
        and below.
    other_dice : ndarray (O), float64
        Dice of each organ with the prediction of another one that it fits best; NaN where there is
        no other.
    other : ndarray (O), int64
        Which one that is.
    mirrored : ndarray (3, O), float64
        Dice of each organ with its prediction, were the label map mirrored along z, y or x.
    hu : ndarray (O, 2), float64
        10th percentile and median of the scan in each labelled organ: a low one says that a part of
        it lies beside the organ.
    gap_mm : ndarray (O), float64
        Largest height along z, between the first and last plane of a labelled organ, in which it
        has no voxel.
    """

    layout: Layout
    predicted: Layout
    own_dice: NDArray[np.float64]
    other_dice: NDArray[np.float64]
    other: NDArray[np.int64]
    mirrored: NDArray[np.float64]
    hu: NDArray[np.float64]
    gap_mm: NDArray[np.float64]

    @property
    def offset(self) -> NDArray[np.float64]:
        """Vector from each predicted centroid to the labelled one, (O, 3), mm."""
        return self.layout.centroid - self.predicted.centroid


def compare(
    labels: Voxels, predicted: Voxels, scan: Voxels, grid: Grid, organs: OrganTable
) -> Comparison:
    """Compare a label map with a predicted one.

    Parameters
    ----------
    labels, predicted : array-like of unsigned integers (z, y, x)
        NumPy or Zarr.
    scan : array-like (z, y, x)
        HU.
    grid : Grid
        Their common grid.
    organs : OrganTable
        Label values; others count as none.

    Returns
    -------
    Comparison

    Examples
    --------
    >>> import numpy as np
    >>> from atlas_store import load_organs
    >>> from kpt_dask.grid import Grid
    >>> labels = np.zeros((8, 8, 8), np.uint8)
    >>> labels[2:6, 2:6, 0:4] = 1
    >>> grid = Grid.axis_aligned(labels.shape, (2.0, 2.0, 2.0))
    >>> found = compare(labels, labels[..., ::-1], labels * 40.0, grid, load_organs("openkbp"))
    >>> found.own_dice[0], found.mirrored[2, 0], found.hu[0, 1]
    (0.0, 1.0, 40.0)
    """
    counts = _Counts(len(organs.names), labels.shape)
    number_of = np.zeros(1 << 16, np.uint16)
    number_of[list(organs.values)] = np.arange(1, len(organs.names) + 1)
    depth = labels.shape[0]
    for part in _slabs(labels):
        slab = number_of[np.asarray(labels[part])]
        other = number_of[np.asarray(predicted[part])]
        upside_down = number_of[np.asarray(labels[depth - part.stop : depth - part.start])][::-1]
        counts.add_labels(part.start, slab, other)
        counts.add_mirrored((upside_down, slab[:, ::-1], slab[:, :, ::-1]), other)
        counts.add_values(part.start, slab, scan)
    return counts.comparison(grid)


class _Counts:
    """Counts over voxels; number 0 is no organ."""

    def __init__(self, organs: int, shape: tuple[int, ...]) -> None:
        n = organs + 1
        self.both = np.zeros((n, n), np.int64)
        self.mirrored = np.zeros((3, n), np.int64)
        self.sums = np.zeros((2, n, 3))
        self.planes = np.zeros((n, shape[0]), np.int64)
        self.values = np.zeros((n, HIGHEST_HU - LOWEST_HU), np.int64)

    def add_labels(self, start: int, slab: NDArray[np.uint16], other: NDArray[np.uint16]) -> None:
        n = len(self.both)
        where = _where(slab | other)
        here, there = slab[where].astype(np.int64), other[where].astype(np.int64)
        self.both += np.bincount(here * n + there, minlength=n * n).reshape(n, n)
        for axis, position in enumerate(where):
            at = position + (start if axis == 0 else 0)
            for sums, organ in zip(self.sums, (here, there), strict=True):
                sums[:, axis] += np.bincount(organ, at, n)
        flat = np.bincount(here * len(slab) + where[0], minlength=n * len(slab))
        self.planes[:, start : start + len(slab)] += flat.reshape(n, len(slab))

    def add_mirrored(
        self, mirrored: Sequence[NDArray[np.uint16]], other: NDArray[np.uint16]
    ) -> None:
        where = _where(other)
        organ = other[where]
        for both, labels in zip(self.mirrored, mirrored, strict=True):
            both += np.bincount(organ[labels[where] == organ], minlength=len(both))

    def add_values(self, start: int, slab: NDArray[np.uint16], scan: Voxels) -> None:
        where = _where(slab)
        if not where[0].size:
            return
        # Only the box around the organs is read of the scan.
        z, y, x = (slice(int(at.min()), int(at.max()) + 1) for at in where)
        hu = np.asarray(scan[start + z.start : start + z.stop, y, x])
        inside = slab[z, y, x]
        height = self.values.shape[1]
        bins = np.rint(hu[inside > 0]).astype(np.int64) - LOWEST_HU
        number = inside[inside > 0].astype(np.int64)
        flat = np.bincount(
            number * height + np.clip(bins, 0, height - 1), minlength=self.values.size
        )
        self.values += flat.reshape(self.values.shape)

    def comparison(self, grid: Grid) -> Comparison:
        own, other = self.both.sum(axis=1)[1:], self.both.sum(axis=0)[1:]
        total = own[:, None] + other[None, :]
        shown = own > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            dice = 2 * self.both[1:, 1:] / total
            mirrored = 2 * self.mirrored[:, 1:] / (own + other)
        dice[~shown] = np.nan
        mirrored[:, ~shown] = np.nan
        others = np.where(np.isnan(dice) | np.eye(len(dice), dtype=np.bool_), -1.0, dice)
        nearest = others.argmax(axis=1)
        best = others[np.arange(len(dice)), nearest]
        below = np.cumsum(self.values[1:], axis=1)
        wanted = [np.ceil(below[:, -1:] * percent / 100) for percent in PERCENTILES]
        hu = np.stack([(below >= number).argmax(axis=1) for number in wanted], axis=1)
        gaps = np.array([_longest_gap(planes) for planes in self.planes[1:]])
        return Comparison(
            _layout(own, self.sums[0, 1:], grid),
            _layout(other, self.sums[1, 1:], grid),
            np.diagonal(dice).copy(),
            np.where(best < 0, np.nan, best),
            nearest,
            mirrored,
            np.where(shown[:, None], hu + float(LOWEST_HU), np.nan),
            np.where(shown, gaps * float(grid.spacing[0]), np.nan),
        )


def _where(array: NDArray[np.uint16]) -> tuple[NDArray[np.intp], ...]:
    """Do what `numpy.nonzero` does; where little is, several times as fast."""
    found: tuple[NDArray[np.intp], ...] = np.unravel_index(np.flatnonzero(array), array.shape)
    return found


def _layout(sizes: NDArray[np.int64], sums: NDArray[np.float64], grid: Grid) -> Layout:
    centroid = np.full(sums.shape, np.nan)
    for i in np.flatnonzero(sizes):
        centroid[i] = grid.to_mm(sums[i] / sizes[i])
    return Layout(sizes * grid.voxel_volume / 1000, centroid)


def _longest_gap(planes: NDArray[np.int64]) -> int:
    """Count the empty planes of the longest run between planes that are not."""
    shown = np.flatnonzero(planes)
    return int(np.diff(shown).max(initial=1)) - 1


def _slabs(array: Voxels) -> Iterator[slice]:
    """Cut an array into slabs of a chunk's height."""
    height = int((getattr(array, "chunks", None) or (SLAB,))[0])
    for z in range(0, array.shape[0], height):
        yield slice(z, min(z + height, array.shape[0]))
