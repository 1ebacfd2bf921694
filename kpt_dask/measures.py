"""What a segmentation says of each organ: size, place, density, and how far to trust it.

One pass over the label map, the probabilities and the scan, block by block. What a block
counts is whole numbers, so sums do not depend on how the volume was cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import OrganTable
from kpt_dask import cluster
from kpt_dask.grid import Grid
from kpt_dask.jit import kernel
from kpt_dask.omezarr import Region

BINS = 100
"""Of the histograms of shares, over 0 … 1."""
SURE, POSSIBLE = 1.75, 0.375
"""The interval of a volume: from where the share is so many times the threshold, to where. In
mode local it holds the true volume of nine in ten organs of OpenKBP's patients."""
FIRM = 1.25
"""What the confidence looks at, times the threshold. Of several measures of the shares this one
went best with the true Dice of OpenKBP's patients."""


@dataclass(frozen=True)
class OrganMeasures:
    """What was found of one organ.

    Attributes
    ----------
    volume_ml : float
        0 if the organ was not found; then all others but `votes` say nothing.
    interval_ml : (float, float)
        Volumes where the share is at least `SURE` times the threshold, and at least
        `POSSIBLE` times; overlaps with other organs are not resolved.
    mean_hu : float or None
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
        How little it hangs on the threshold: Dice of the voxels whose share reaches the
        threshold and of those whose share reaches `FIRM` times as much. 0 if it was not found.
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


@dataclass(frozen=True)
class Tally:
    """What one block, or all blocks, count of each organ; whole numbers.

    Attributes
    ----------
    shares : int64 array (organ, BINS + 1)
        Histogram of the shares over 0 of all voxels; bin b holds shares from b / BINS on.
    sums : int64 array (organ, 5)
        Of the organ's voxels: their number, and the sums of HU and indices z, y, x.
    low, high : int64 arrays (organ, 3)
        Lowest and highest indices of the organ's voxels.
    """

    shares: NDArray[np.int64]
    sums: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]

    @classmethod
    def empty(cls, organs: int) -> "Tally":
        """Nothing counted."""
        return cls(
            np.zeros((organs, BINS + 1), np.int64),
            np.zeros((organs, 5), np.int64),
            np.full((organs, 3), np.iinfo(np.int64).max),
            np.full((organs, 3), -1),
        )

    def __add__(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(
            self.shares + other.shares,
            self.sums + other.sums,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )


def measure(
    image: zarr.Array[Any],
    labels: zarr.Array[Any],
    probability: zarr.Array[Any],
    blocks: Sequence[Region],
    organs: OrganTable,
    *,
    client: Client | None = None,
) -> Tally:
    """Count the organs' voxels and shares.

    Parameters
    ----------
    image : float32 zarr.Array (z, y, x)
        The scan on the working grid, whole HU.
    labels : zarr.Array (z, y, x)
        The label map there.
    probability : float32 zarr.Array (organ, z, y, x)
        The organs' shares there.
    blocks : sequence of regions
        Disjoint; where any share may be more than 0.
    organs : OrganTable
    client : distributed.Client, optional
    """
    total = Tally.empty(len(organs))
    tasks = [(image, labels, probability, organs.values, block) for block in blocks]
    with cluster.session(client) as session:
        for _, part in cluster.run(session, measure_block, tasks, "Measuring organs"):
            total += part
    return total


def measure_block(
    image: zarr.Array[Any],
    labels: zarr.Array[Any],
    probability: zarr.Array[Any],
    values: Sequence[int],
    block: Region,
) -> Tally:
    """Count in one block."""
    tally = Tally.empty(len(values))
    here = np.asarray(labels[block])
    hu = np.asarray(image[block], np.float32)
    corner = np.array([s.start for s in block], np.int64)
    z, y, x = block
    for o, value in enumerate(values):
        share = np.asarray(probability[o, z, y, x], np.float32)
        if not share.any():
            continue
        _count(
            share,
            here,
            hu,
            value,
            corner,
            tally.shares[o],
            tally.sums[o],
            tally.low[o],
            tally.high[o],
        )
    return tally


@kernel
def _count(
    share: Any,
    labels: Any,
    hu: Any,
    value: int,
    corner: Any,
    shares: Any,
    sums: Any,
    low: Any,
    high: Any,
) -> None:
    at = np.empty(3, np.int64)
    for z in range(share.shape[0]):
        for y in range(share.shape[1]):
            for x in range(share.shape[2]):
                p = share[z, y, x]
                if p == 0:
                    continue
                b = min(int(p * np.float32(BINS)), BINS)
                shares[b] += 1
                if labels[z, y, x] != value:
                    continue
                sums[0] += 1
                sums[1] += int(hu[z, y, x])
                at[0] = corner[0] + z
                at[1] = corner[1] + y
                at[2] = corner[2] + x
                for a in range(3):
                    sums[2 + a] += at[a]
                    low[a] = min(low[a], at[a])
                    high[a] = max(high[a], at[a])


def organ_measures(
    tally: Tally,
    organs: OrganTable,
    grid: Grid,
    threshold: float,
    keypoints: xr.Dataset,
    votes: xr.Dataset,
) -> dict[str, OrganMeasures]:
    """Say what the counts mean.

    Parameters
    ----------
    tally : Tally
        Of all blocks.
    organs : OrganTable
    grid : Grid
        The working grid.
    threshold : float
        Voxels whose largest share is below this are background.
    keypoints, votes : xarray.Dataset
        From `kpt_dask.extract` and `kpt_dask.vote`.

    Returns
    -------
    dict of str to OrganMeasures
        In the order of the table.
    """
    position = np.asarray(keypoints.position.values, np.float64)
    return {
        organ.name: _one(
            tally, o, grid, threshold, position[np.asarray(votes.label.values) == organ.value]
        )
        for o, organ in enumerate(organs)
    }


def _one(
    tally: Tally, o: int, grid: Grid, threshold: float, voting: NDArray[np.float64]
) -> OrganMeasures:
    count, hu, *sums = tally.sums[o].tolist()
    around = voting - voting.mean(axis=0) if len(voting) else voting
    spread = float(np.sqrt((around**2).sum(axis=1).mean())) if len(voting) else None
    if not count:
        return OrganMeasures(0.0, (0.0, 0.0), None, None, None, len(voting), spread, False, 0.0)
    ml = grid.voxel_volume / 1000

    def voxels(factor: float) -> int:
        least = round(BINS * min(factor * threshold, 1.0))
        return int(tally.shares[o, least:].sum())

    whole, firm = max(voxels(1), count), voxels(FIRM)
    corners = [_point(grid, tally.low[o]), _point(grid, tally.high[o])]
    last = np.array(grid.shape) - 1
    return OrganMeasures(
        volume_ml=count * ml,
        interval_ml=(min(voxels(SURE), count) * ml, max(voxels(POSSIBLE), count) * ml),
        mean_hu=hu / count,
        centroid=_point(grid, np.array(sums) / count),
        extent=(corners[0], corners[1]),
        votes=len(voting),
        spread_mm=spread,
        at_border=bool((tally.low[o] <= 0).any() or (tally.high[o] >= last).any()),
        confidence=2 * firm / (whole + firm),
    )


def _point(grid: Grid, index: NDArray[Any]) -> tuple[float, float, float]:
    z, y, x = (float(c) for c in grid.to_mm(index[None].astype(np.float64))[0])
    return z, y, x
