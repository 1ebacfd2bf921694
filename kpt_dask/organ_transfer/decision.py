"""From an organ's shares to labels: each slab is decided, written and counted once it is filled.

What all modes have in common once a mode has summed the votes of a slab (eq. 11).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import Box, begin_of, box_of, overlap, shape_of, slices, within
from atlas_store.arrays.flat import Flat, as_flat_view
from atlas_store.arrays.regions import Region, write_region
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.views import flat_row
from kpt_dask.organ_transfer.field_of_view import FieldOfView
from kpt_dask.organ_transfer.job import TransferJob
from kpt_dask.organ_transfer.measures import OrganCounts, count_labels, count_row, levels_of
from kpt_dask.runtime import cluster

Share = tuple[int, Box, NDArray[np.float32]]
"""Index of an organ, the box where it may be, and its share of the votes there, (z, y, x)."""


def run_blocks(
    function: Callable[..., OrganCounts],
    job: TransferJob,
    tasks: Sequence[tuple[Any, ...]],
    client: Client,
) -> OrganCounts:
    """Compute blocks of a job, each by a team of threads, and add up what they count.

    Raises
    ------
    AtlasNotFoundError
        If an atlas was removed meanwhile.
    """
    total = OrganCounts.empty(len(job.organs))
    for _, counts in cluster.run_in_teams(client, function, tasks, "Transferring organs"):
        total += counts
    return total


def finish_slab(
    job: TransferJob, shares: Iterable[Share], region: Region, scan: tuple[Box, NDArray[Any]]
) -> OrganCounts:
    """Write the shares of a slab, decide its labels, write these too, and count them.

    Parameters
    ----------
    job : TransferJob
    shares : iterable of Share
        At most one for each organ, in the order of the table, inside the region. Each is finished
        before the next one is asked for, which may overwrite it.
    region : tuple of slice
        The slab: whole shards of the probabilities, and whole chunks of the label map.
    scan : (Box, ndarray (z, y, x))
        A box that holds those of the shares, some of it in the slab, and its HU.

    Returns
    -------
    OrganCounts
        Counts of the slab.
    """
    organs, labels = job.organs, job.labels
    counts = OrganCounts.empty(len(organs))
    box_of_scan, hu = scan
    slab = box_of(region)
    inside = overlap(box_of_scan, slab)
    assert inside is not None
    decided = BoxLabels(inside, job.threshold, labels.dtype)
    view = FieldOfView.on(job.volume.grid, job.volume.source_grid)
    depth = None if view is None else view.depth(inside)
    # No other slab touches these shards.
    with chunk_io.writing(job.probability) as writer:
        for organ, box, share in shares:
            if view is not None and depth is not None:
                share[depth[within(box, inside)] < -view.reach] = 0
            rows = decided.update(organs.values[organ], box, share, counts.above[organ])
            if rows.any():
                writer.add((slice(organ, organ + 1), *slices(box)), share[None], rows[None])
    if view is not None and depth is not None:
        decided.labels[depth < 0] = 0
        shown = np.unique(decided.labels[depth < view.spacing])
        counts.cut[:] = np.isin(organs.values, shown)
    hu = hu[within(inside, box_of_scan)]
    count_labels(decided.labels, hu, organs.values, begin_of(inside), counts)
    whole = np.zeros(shape_of(slab), labels.dtype)
    whole[within(inside, slab)] = decided.labels
    write_region(labels, region, whole)
    return counts


class BoxLabels:
    """Labels of a box: each voxel's is the organ with the largest share.

    Parameters
    ----------
    box : Box
    threshold : float
        Voxels whose largest share is below this are 0.
    dtype : numpy.dtype
        Type of the labels.

    Attributes
    ----------
    labels : ndarray (z, y, x)
    """

    def __init__(self, box: Box, threshold: float, dtype: Any) -> None:
        self._box = box
        self.labels = np.zeros(shape_of(box), dtype)
        below = np.nextafter(np.float32(threshold), np.float32(0))
        self._largest = np.full(self.labels.shape, below)
        self._levels = levels_of(threshold)

    def update(
        self, value: int, box: Box, share: NDArray[np.float32], above: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Label voxels where an organ's share is the largest so far; ties stay as they are.

        Parameters
        ----------
        value : int
            The organ's label.
        box : Box
            Within the whole one.
        share : float32 array (z, y, x)
            The organ's, in the box.
        above : int64 array (4)
            Row of `OrganCounts.above`; the shares are counted in it.

        Returns
        -------
        bool array (z, y)
            Whether any share of a row is over 0.
        """
        where = within(box, self._box)
        decided = _Decided(as_flat_view(self.labels[where]), as_flat_view(self._largest[where]))
        label = self.labels.dtype.type(value)
        rows = np.zeros(share.shape[:2], np.bool_)
        _update(share.shape, as_flat_view(share), decided, label, self._levels, above, rows)
        return rows


class _Decided(NamedTuple):
    """Labels of a box so far, and the share that each voxel's label has; both flat."""

    labels: Flat
    largest: Flat


@kernel
def _update(
    shape: Any, share: Any, decided: Any, value: Any, levels: Any, above: Any, rows: Any
) -> None:
    """Do what `BoxLabels.update` does."""
    depth, height, width = shape
    for z in range(depth):
        for y in range(height):
            row = flat_row(share, z, y, width)
            positive = 0
            for x in range(width):
                positive += row[x] > 0
            # Most rows hold 0 alone: nothing to count, and no label changes.
            if positive == 0:
                continue
            rows[z, y] = True
            count_row(row, levels, above)
            largest = flat_row(decided.largest, z, y, width)
            larger = 0
            for x in range(width):
                larger += row[x] > largest[x]
            if larger == 0:
                continue
            labels = flat_row(decided.labels, z, y, width)
            for x in range(width):
                if row[x] > largest[x]:
                    labels[x] = value
                    largest[x] = row[x]
