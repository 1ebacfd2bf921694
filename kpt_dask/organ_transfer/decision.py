"""Shares of the votes: what the probabilities hold, how a slab is finished, what decides.

What all modes have in common, once a mode has summed the votes of a slab.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import zarr
from distributed import Client
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from atlas_store import OrganTable
from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import (
    Box,
    aligned,
    begin_of,
    box_of,
    overlap,
    shape_of,
    slices,
    within,
)
from atlas_store.arrays.flat import flat
from atlas_store.arrays.regions import Region, write_region
from kpt_dask.grid import Grid
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.views import row_of
from kpt_dask.options import MODES
from kpt_dask.organ_transfer.measures import Tally, count_labels, count_row, levels_of
from kpt_dask.runtime import cluster

SHARD = (32, 256, 256)
"""A file of all organs' probabilities, and a chunk of the label map. Large: to make a file takes as
long as to pack a MB."""
PACKED = BloscCodec(cname="lz4", shuffle="noshuffle")
"""How probabilities are packed: of what is not 0, bytes of one kind are no more alike than others,
and to put them side by side takes as long as to pack them."""
CHUNKS = (32, 32, 32)
"""What of an organ's probabilities is packed together. Those without it are not stored. Small: of
an organ's bounding box as much is empty as not."""

VANISHING = 6.0
"""Standard deviations from which on the intensity likelihood is 0."""

Share = tuple[int, Box, NDArray[np.float32]]
"""Index of an organ, where it may be, and its share there, (z, y, x)."""


def create_probability(
    group: zarr.Group, grid: Grid, organs: OrganTable, mode: str
) -> zarr.Array[Any]:
    """Make ``probability`` (organ, z, y, x) float32 for a mode; what no organ reaches is free.

    One that is there already is replaced.
    """
    chunks = [min(n, c) for n, c in zip(grid.shape, CHUNKS, strict=True)]
    sizes = [min(n, s) for n, s in zip(grid.shape, SHARD, strict=True)]
    probability = group.create_array(
        "probability",
        shape=(len(organs), *grid.shape),
        dtype=np.float32,
        chunks=(1, *chunks),
        shards=(len(organs), *(-(-n // c) * c for n, c in zip(sizes, chunks, strict=True))),
        # All in one folder: a folder for each takes as long to make as the file.
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=PACKED,
        fill_value=0,
        overwrite=True,
        dimension_names=("organ", "z", "y", "x"),
        attributes={
            "organs": list(organs.names),
            "description": MODES[mode].probability,
            chunk_io.COMPLETE: True,
        },
    )
    chunk_io.write_empty(probability)
    return probability


def slabs(region: Region) -> list[Region]:
    """Cut a block, from below, into slabs one shard deep.

    What is done to a slab, and to its shares, is done while it is in the cache.
    """
    z, y, x = region
    cuts = range(z.start, z.stop, SHARD[0])
    return [(slice(a, min(a + SHARD[0], z.stop)), y, x) for a in cuts]


def cut_in_slabs(box: Box, shape: tuple[int, int, int]) -> list[Box]:
    """Cut a box of a volume of a shape where its slabs end."""
    parts = (overlap(box, box_of(slab)) for slab in slabs(aligned(box, SHARD, shape)))
    return [part for part in parts if part is not None]


def run_blocks(
    function: Callable[..., Tally],
    tasks: Sequence[tuple[Any, ...]],
    organs: OrganTable,
    client: Client,
) -> Tally:
    """Compute blocks of the transfer, each by a team, and gather what they count.

    Raises
    ------
    AtlasNotFoundError
        If an atlas was removed meanwhile.
    """
    total = Tally.empty(len(organs))
    for _, tally in cluster.run_in_teams(client, function, tasks, "Transferring organs"):
        total += tally
    return total


def finish_slab(
    probability: zarr.Array[Any],
    labels: zarr.Array[Any],
    shares: Iterable[Share],
    organs: OrganTable,
    smallest: float,
    region: Region,
    scan: tuple[Box, NDArray[Any]],
) -> Tally:
    """Write the shares of a slab, decide its labels, write these too, and count them.

    Parameters
    ----------
    probability : zarr.Array
        From `create_probability`.
    labels : zarr.Array (z, y, x)
        The label map.
    shares
        At most one for each organ, in the order of the table, inside the region. Each is done
        with before the next one is asked for, which may take its memory.
    organs : OrganTable
    smallest : float
        As for `Decision`.
    region : tuple of slice
        The slab: whole shards of `probability`, and whole chunks of `labels`.
    scan : tuple
        A box that holds those of the shares, some of it in the slab, and its HU (z, y, x).

    Returns
    -------
    Tally
        What is counted of the slab.
    """
    tally = Tally.empty(len(organs))
    around, hu = scan
    slab = box_of(region)
    here = overlap(around, slab)
    assert here is not None
    decision = Decision(here, smallest, labels.dtype)
    # The slab owns the shards that these touch.
    with chunk_io.writing(probability) as writer:
        for organ, box, share in shares:
            rows = decision.claim(organs.values[organ], box, share, tally.above[organ])
            if rows.any():
                writer.add((slice(organ, organ + 1), *slices(box)), share[None], rows[None])
    own = decision.labels, hu[within(here, around)]
    count_labels(*own, organs.values, begin_of(here), tally)
    whole = np.zeros(shape_of(slab), labels.dtype)
    whole[within(here, slab)] = decision.labels
    write_region(labels, region, whole)
    return tally


class Decision:
    """Labels of a box: each voxel's is the organ with the largest share.

    Parameters
    ----------
    box : Box
    smallest : float
        Voxels whose largest share is below this are 0.
    dtype : numpy.dtype
        Of the labels: one that holds them all.

    Attributes
    ----------
    labels : ndarray (z, y, x)
        Of the box.
    """

    def __init__(self, box: Box, smallest: float, dtype: Any) -> None:
        self._block = box
        self.labels = np.zeros(shape_of(self._block), dtype)
        below = np.nextafter(np.float32(smallest), np.float32(0))
        self._largest = np.full(self.labels.shape, below)
        self._levels = levels_of(smallest)

    def claim(
        self, value: int, box: Box, share: NDArray[np.float32], above: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Let an organ claim voxels of a box within; ties go to whichever came first.

        Parameters
        ----------
        value : int
            The organ's label.
        box : Box
        share : float32 array (z, y, x)
            The organ's, of the box.
        above : int64 array (4)
            Row of `Tally.above`; counts the shares.

        Returns
        -------
        bool array (z, y)
            Whether any share of a row is over 0.
        """
        first = begin_of(box) - begin_of(self._block)
        decided = self.labels.dtype.type(value), self._largest, self.labels
        rows = np.zeros(share.shape[:2], np.bool_)
        _claim(share.shape, flat(share), first, *decided, self._levels, above, rows)
        return rows


@kernel
def _claim(
    shape: Any,
    share: Any,
    first: Any,
    value: Any,
    largest: Any,
    labels: Any,
    levels: Any,
    above: Any,
    rows: Any,
) -> None:
    """Do what `Decision.claim` does, from the `first` voxel on."""
    depth, height, width = shape
    for z in range(depth):
        for y in range(height):
            ours = row_of(share, z, y, width)
            some = 0
            for x in range(width):
                some += ours[x] > 0
            # Most rows have none, and none claims a voxel.
            if some == 0:
                continue
            rows[z, y] = True
            count_row(ours, levels, above)
            at = first[0] + z, first[1] + y, first[2]
            best = largest[at[0], at[1], at[2] : at[2] + width]
            over = 0
            for x in range(width):
                over += ours[x] > best[x]
            if over == 0:
                continue
            own = labels[at[0], at[1], at[2] : at[2] + width]
            for x in range(width):
                if ours[x] > best[x]:
                    own[x] = value
                    best[x] = ours[x]
