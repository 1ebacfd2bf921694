"""Measures of each organ that was found: volume, position, density, and a confidence.

Counted block by block, as soon as a block is decided. Counts are whole numbers, so their sums do
not depend on how the volume was cut.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from atlas_store import OrganTable
from atlas_store.arrays.flat import as_flat_view
from kpt_dask.grid import Grid
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.views import flat_row

SURE, POSSIBLE = 1.75, 0.375
"""Multiples of the threshold: voxels that reach them make up the bounds of a volume's interval."""
BORDER_ERROR = 5.0
"""mm; a volume's interval is at least as wide as if the border of a ball of that volume were so far
off. With it, mode local held the true volume of 92 % of the organs of fifteen of OpenKBP's
patients, on which it was chosen, and of 95 % of those of sixteen others."""
FIRM = 1.25
"""Multiple of the threshold: the confidence is the share of an organ's voxels that reach it."""
BORDER = 3.0
"""mm; error of a border that seems sure. It costs a small organ more of its confidence."""
UNSURE = 0.35
"""Confidence below which an organ is doubtful, and warned of."""
_BORDER_ERRORS = -BORDER_ERROR, BORDER_ERROR
LEVELS = POSSIBLE, 1.0, FIRM, SURE
"""Multiples of the threshold at which shares are counted."""


@dataclass(frozen=True)
class OrganMeasures:
    """Measures of one organ in a segmentation.

    Attributes
    ----------
    volume_ml : float
        In the label map on the working grid, or in another one: see `as_delivered`. 0 if the organ
        was not found; then all others but `votes` are None, 0 or False.
    interval_ml : (float, float)
        Volumes where the share is at least `SURE` times the threshold, and at least
        `POSSIBLE` times, overlaps with other organs not resolved; and at least as wide as
        V (1 ∓ `BORDER_ERROR` / r)³, with r the radius of a ball of the volume V.
    mean_hu : float or None
        On the working grid, as are the position and the extent: voxels at borders mix HU there, so
        that thin bone has less than in the scan's own voxels, which `kpt measure` takes.
    centroid : (float, float, float) or None
        Mean position (z, y, x) of its voxels, mm, LPS.
    extent : ((float, float, float), (float, float, float)) or None
        Centres of its outermost voxels (z, y, x), mm, LPS: lowest and highest.
    votes : int
        Keypoints of the scan that voted for the organ.
    spread_mm : float or None
        Root mean square distance of these keypoints from their centroid, mm.
    at_border : bool
        Whether it reaches the first or last voxels of the field of view: it may be cut off.
    confidence : float
        From 0 to 1; 0 if the organ was not found. It tells whether the atlases agree where an organ
        lies, not whether it is there: one that was removed is labelled all the same. In mode
        `local` the mean overlap of two atlases, `OrganCounts.overlap`. In the others the product
        of three: the share of the atlases that show the organ in which a match moved it; Dice of
        the voxels whose share reaches the threshold with those whose share reaches `FIRM` times as
        much; and 1 − `BORDER` / r, where r is the radius of a ball of the organ's volume, or 0 if
        r ≤ `BORDER`. Without the first, ρ with Dice was 0.36 in mode `organ` (OpenKBP, 25 patients,
        20 selected atlases), with it 0.53; 15 of 18 organs with Dice < 0.3 are below `UNSURE`.
    sd_hu : float or None
        Standard deviation of the HU whose mean is `mean_hu`; None in answers of earlier versions.
    """

    volume_ml: float
    interval_ml: tuple[float, float]
    mean_hu: float | None
    centroid: tuple[float, float, float] | None
    extent: tuple[tuple[float, float, float], tuple[float, float, float]] | None
    votes: int
    spread_mm: float | None
    at_border: bool
    confidence: float
    sd_hu: float | None = None

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Make measures of what JSON holds: lists become tuples again."""
        low, high = said["interval_ml"]
        centroid, extent = said["centroid"], said["extent"]
        return cls(
            **{
                **said,
                "interval_ml": (low, high),
                "centroid": centroid and tuple(centroid),
                "extent": extent and tuple(map(tuple, extent)),
            }
        )


@dataclass(frozen=True)
class OrganCounts:
    """Counts of each organ in one block, or in all: whole numbers.

    Attributes
    ----------
    above : int64 array (organ, 4)
        Voxels, whatever their labels, whose share is at least `LEVELS` times the threshold.
    voxels : int64 array (organ)
        Voxels labelled as the organ; the others are of these.
    hu, hu_squared : int64 arrays (organ)
        Sums of their HU, and of the squares of these.
    indices : int64 array (organ, 3)
        Sum of their indices z, y, x.
    low, high : int64 arrays (organ, 3)
        Their lowest and highest indices.
    cut : bool array (organ)
        Whether one of them is an outermost voxel of an oblique scan's field of view. In other scans
        the indices tell.
    overlap : float64 array (organ)
        Mean overlap of two warped atlases' labels, of the whole scan; NaN where there is none.
    weights : float64 array (organ, atlas)
        Part of each atlas in an organ's votes, of the whole scan: rows sum to 1, or are 0 where no
        atlas votes. Known only of the sum of all blocks; no atlases before.
    """

    above: NDArray[np.int64]
    voxels: NDArray[np.int64]
    hu: NDArray[np.int64]
    hu_squared: NDArray[np.int64]
    indices: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    cut: NDArray[np.bool_]
    overlap: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def empty(cls, organs: int) -> "OrganCounts":
        """Make counts of nothing."""
        return cls(
            np.zeros((organs, len(LEVELS)), np.int64),
            np.zeros(organs, np.int64),
            np.zeros(organs, np.int64),
            np.zeros(organs, np.int64),
            np.zeros((organs, 3), np.int64),
            np.full((organs, 3), np.iinfo(np.int64).max),
            np.full((organs, 3), -1),
            np.zeros(organs, np.bool_),
            np.full(organs, np.nan),
            np.zeros((organs, 0)),
        )

    def __add__(self, other: "OrganCounts") -> "OrganCounts":
        """Add up the counts of two blocks."""
        return OrganCounts(
            self.above + other.above,
            self.voxels + other.voxels,
            self.hu + other.hu,
            self.hu_squared + other.hu_squared,
            self.indices + other.indices,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.cut | other.cut,
            self.overlap,
            self.weights,
        )


def parts_of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale weights (organ, atlas), so that each row sums to 1, or is 0 where it was 0."""
    total = weights.sum(axis=1, keepdims=True)
    parts: NDArray[np.float64] = np.divide(
        weights, total, out=np.zeros_like(weights), where=total > 0
    )
    return parts


def levels_of(threshold: float) -> tuple[np.float32, ...]:
    """Shares from which on voxels are counted, `LEVELS` times the threshold."""
    return tuple(np.float32(min(level * threshold, 1.0)) for level in LEVELS)


@kernel
def count_row(share: Any, levels: Any, above: Any) -> None:
    """Count the voxels of a row whose share is at least each level, in `above` (4)."""
    a, b, c, d = 0, 0, 0, 0
    for x in range(share.size):
        a += share[x] >= levels[0]
        b += share[x] >= levels[1]
        c += share[x] >= levels[2]
        d += share[x] >= levels[3]
    above[0] += a
    above[1] += b
    above[2] += c
    above[3] += d


def count_labels(
    labels: NDArray[Any],
    hu: NDArray[Any],
    values: Sequence[int],
    corner: NDArray[np.int64],
    counts: OrganCounts,
) -> None:
    """Count the voxels of all organs in a box.

    Parameters
    ----------
    labels, hu : ndarray (z, y, x)
        The labels decided, each 0 or one of `values`, and the scan, whole HU.
    values : sequence of int
        Labels of all organs.
    corner : int64 array (3)
        The box's first voxel in the scan.
    counts : OrganCounts
        Changed.
    """
    organ_of = np.zeros(max(values) + 1, np.int64)
    organ_of[list(values)] = np.arange(len(values))
    sums = _Sums(
        *(counts.voxels, counts.hu, counts.hu_squared, counts.indices, counts.low, counts.high)
    )
    _count_labels(labels.shape, as_flat_view(labels), as_flat_view(hu), organ_of, corner, sums)


class _Sums(NamedTuple):
    """Those arrays of `OrganCounts` that labels change, for a kernel."""

    voxels: NDArray[np.int64]
    hu: NDArray[np.int64]
    hu_squared: NDArray[np.int64]
    indices: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]


@kernel
def _count_labels(shape: Any, labels: Any, hu: Any, organ_of: Any, corner: Any, sums: Any) -> None:
    """Do what `count_labels` does, run by run of equal labels along each row."""
    depth, height, width = shape
    for z in range(depth):
        for y in range(height):
            row = flat_row(labels, z, y, width)
            labelled = 0
            for x in range(width):
                labelled |= row[x]
            if labelled == 0:
                continue
            hu_of_row = flat_row(hu, z, y, width)
            x = 0
            while x < width:
                value, first, total, squared = row[x], x, 0, 0
                while x < width and row[x] == value:
                    one = int(hu_of_row[x])
                    total += one
                    squared += one * one
                    x += 1
                if value == 0:
                    continue
                organ, n = organ_of[value], x - first
                begin = corner[0] + z, corner[1] + y, corner[2] + first
                sums.voxels[organ] += n
                sums.hu[organ] += total
                sums.hu_squared[organ] += squared
                sums.indices[organ, 0] += n * begin[0]
                sums.indices[organ, 1] += n * begin[1]
                sums.indices[organ, 2] += n * begin[2] + n * (n - 1) // 2
                for axis in range(3):
                    last = begin[axis] + (n - 1 if axis == 2 else 0)
                    sums.low[organ, axis] = min(sums.low[organ, axis], begin[axis])
                    sums.high[organ, axis] = max(sums.high[organ, axis], last)


def organ_measures(
    counts: OrganCounts,
    organs: OrganTable,
    grid: Grid,
    keypoints: xr.Dataset,
    votes: xr.Dataset,
    showing: Sequence[int],
) -> dict[str, OrganMeasures]:
    """Measure each organ from what was counted.

    Parameters
    ----------
    counts : OrganCounts
        Counts of all blocks.
    organs : OrganTable
    grid : Grid
        The working grid.
    keypoints, votes : xarray.Dataset
        From `kpt_dask.extract` and `kpt_dask.vote`.
    showing : sequence of int
        How many of the atlases show each organ.

    Returns
    -------
    dict of str to OrganMeasures
        In the order of the table.
    """
    position = np.asarray(keypoints.position.values, np.float64)
    label = np.asarray(votes.label.values)
    return {
        organ.name: _one(counts, o, grid, position[label == organ.value], showing[o])
        for o, organ in enumerate(organs)
    }


def as_delivered(
    organs: Mapping[str, OrganMeasures], counts: NDArray[np.int64], grid: Grid
) -> dict[str, OrganMeasures]:
    """Replace volumes by those of a label map on another grid than the working grid.

    Parameters
    ----------
    organs : mapping of str to OrganMeasures
        From `organ_measures`.
    counts : int64 array (organ)
        Voxels of each organ in that label map.
    grid : Grid
        Grid of that label map.

    Returns
    -------
    dict of str to OrganMeasures
        Intervals are scaled like the volumes.
    """
    return {
        name: _delivered(organ, int(count) * grid.voxel_volume / 1000)
        for (name, organ), count in zip(organs.items(), counts, strict=True)
    }


def _delivered(organ: OrganMeasures, volume: float) -> OrganMeasures:
    low, high = organ.interval_ml
    if not volume:
        return OrganMeasures(
            0.0, (0.0, high), None, None, None, organ.votes, organ.spread_mm, False, 0.0
        )
    if math.isclose(volume, organ.volume_ml, rel_tol=1e-9):  # the same grid, but for rounding
        return organ
    scale = volume / organ.volume_ml if organ.volume_ml else 1.0
    return replace(
        organ,
        volume_ml=volume,
        # Rounding must not put the volume outside.
        interval_ml=(min(low * scale, volume), max(high * scale, volume)),
    )


def _one(
    counts: OrganCounts, o: int, grid: Grid, voting: NDArray[np.float64], showing: int
) -> OrganMeasures:
    """Measure an organ by the keypoints that voted for it, and the atlases that show it."""
    count = int(counts.voxels[o])
    centred = voting - voting.mean(axis=0) if len(voting) else voting
    spread = float(np.sqrt((centred**2).sum(axis=1).mean())) if len(voting) else None
    if not count:
        return OrganMeasures(0.0, (0.0, 0.0), None, None, None, len(voting), spread, False, 0.0)
    ml = grid.voxel_volume / 1000

    possible, whole, firm, sure = counts.above[o].tolist()
    whole = max(whole, count)
    low, high = (count * ml * max(1 + e / _radius(count * ml), 0) ** 3 for e in _BORDER_ERRORS)
    confidence = float(counts.overlap[o])
    if math.isnan(confidence):
        agreeing = np.count_nonzero(counts.weights[o]) / max(showing, 1)
        confidence = 2 * firm / (whole + firm) * max(1 - BORDER / _radius(count * ml), 0) * agreeing
    corners = [_point(grid, counts.low[o]), _point(grid, counts.high[o])]
    last = np.array(grid.shape) - 1
    at_border = counts.cut[o] or (counts.low[o] <= 0).any() or (counts.high[o] >= last).any()
    return OrganMeasures(
        volume_ml=count * ml,
        interval_ml=(min(sure * ml, low), max(possible * ml, high)),
        mean_hu=int(counts.hu[o]) / count,
        centroid=_point(grid, counts.indices[o] / count),
        extent=(corners[0], corners[1]),
        votes=len(voting),
        spread_mm=spread,
        at_border=bool(at_border),
        confidence=confidence,
        # Whole numbers as far as they go: a difference of large sums is small.
        sd_hu=math.sqrt(count * int(counts.hu_squared[o]) - int(counts.hu[o]) ** 2) / count,
    )


def _radius(ml: float) -> float:
    """Radius of a ball, mm."""
    return float(np.cbrt(3000 * ml / (4 * np.pi)))


def _point(grid: Grid, index: NDArray[Any]) -> tuple[float, float, float]:
    z, y, x = (float(c) for c in grid.to_mm(index[None].astype(np.float64))[0])
    return z, y, x
