"""Shares of the votes: what the probabilities hold, how a slab is finished, what decides.

What all modes have in common, once a mode has summed the votes of a slab.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable, direct
from kpt_dask import cluster
from kpt_dask.boxes import Box, box_of, enclosing, shape_of, slices, within
from kpt_dask.grid import Grid
from kpt_dask.jit import kernel
from kpt_dask.measures import Tally, count
from kpt_dask.omezarr import COMPRESSOR, Region

SHARD = (32, 256, 256)
"""A file of one organ's probabilities, and whole chunks of a label map. Large: to make a file
takes as long as to pack a MB."""
CHUNKS = (32, 32, 32)
"""What of a shard is packed together. Those without the organ are not stored, and shards without
any neither. Small: of an organ's bounding box as much is empty as not."""

VANISHING = 6.0
"""Standard deviations from which on the intensity likelihood is 0."""

Part = tuple[Region, NDArray[np.uint16]]
"""A region of the label map and its labels, (z, y, x)."""

Share = tuple[int, Box, NDArray[np.float32]]
"""Index of an organ, where it may be, and its share there, (z, y, x)."""


def create_probability(group: zarr.Group, grid: Grid, organs: OrganTable) -> zarr.Array[Any]:
    """Make ``probability`` (organ, z, y, x) float32; shards without the organ cost nothing."""
    chunks = [min(n, c) for n, c in zip(grid.shape, CHUNKS, strict=True)]
    sizes = [min(n, s) for n, s in zip(grid.shape, SHARD, strict=True)]
    return group.create_array(
        "probability",
        shape=(len(organs), *grid.shape),
        dtype=np.float32,
        chunks=(1, *chunks),
        shards=(1, *(-(-n // c) * c for n, c in zip(sizes, chunks, strict=True))),
        # All in one folder: folders for each organ and plane take as long to make as the files.
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=COMPRESSOR,
        fill_value=0,
        dimension_names=("organ", "z", "y", "x"),
        attributes={"organs": list(organs.names)},
    )


def slabs(region: Region) -> list[Region]:
    """Cut a block, from below, into slabs one shard deep.

    What is done to a slab, and to its shares, is done while it is in the cache.
    """
    z, y, x = region
    cuts = range(z.start, z.stop, SHARD[0])
    return [(slice(a, min(a + SHARD[0], z.stop)), y, x) for a in cuts]


def run_blocks(
    function: Callable[..., tuple[list[Part], Tally]],
    tasks: Sequence[tuple[Any, ...]],
    atlases: Sequence[Atlas],
    organs: OrganTable,
    client: Client,
) -> tuple[list[Part], Tally]:
    """Compute blocks of the transfer, and gather the parts of the label map and what they count.

    Raises
    ------
    AtlasNotFoundError
        If an atlas was removed meanwhile.
    """
    parts: list[Part] = []
    total = Tally.empty(len(organs))
    for _, (own, tally) in cluster.run(client, function, tasks, "Transferring organs"):
        parts += own
        total += tally
    for atlas in atlases:
        atlas.ensure_present()
    return parts, total


def finish_slab(
    probability: zarr.Array[Any],
    shares: Sequence[Share],
    organs: OrganTable,
    smallest: float,
    region: Region,
    scan: tuple[Box, NDArray[np.float32]],
    tally: Tally,
) -> Part:
    """Write the shares of a slab, decide its labels, and count them.

    Parameters
    ----------
    probability : zarr.Array
        From `create_probability`.
    shares
        At most one for each organ, in the order of the table, inside the region.
    organs : OrganTable
    smallest : float
        As for `decide`.
    region : tuple of slice
        The slab: whole shards of `probability`.
    scan : tuple
        A box that holds those of the shares, and its HU (z, y, x).
    tally : Tally
        Changed.
    """
    labels = decide(shares, organs.values, smallest, region)
    around, hu = scan
    for organ, box, share in shares:
        decided, here = labels[within(box, box_of(region))], hu[within(box, around)]
        corner = tuple(start for start, _ in box)
        if count(share, decided, here, organs.values[organ], corner, tally, organ):
            # The slab owns the shards that this touches.
            direct.write(probability, (slice(organ, organ + 1), *slices(box)), share[None])
    return region, labels


def decide(
    shares: Sequence[Share], values: Sequence[int], smallest: float, region: Region
) -> NDArray[np.uint16]:
    """Give each voxel of a region the organ with the largest share.

    Parameters
    ----------
    shares
        In the order of the organ table: ties go to the first.
    values : sequence of int
        Labels of all organs.
    smallest : float
        Voxels whose largest share is below this are 0.

    Returns
    -------
    ndarray (z, y, x), uint16
    """
    block = box_of(region)
    labels = np.zeros(shape_of(block), np.uint16)
    reached = enclosing([box for _, box, _ in shares])
    if reached is None:
        return labels
    below = np.nextafter(np.float32(smallest), np.float32(0))
    largest = np.full(shape_of(reached), below)
    for organ, box, share in shares:
        value = np.uint16(values[organ])
        _claim(share, value, largest[within(box, reached)], labels[within(box, block)])
    return labels


@kernel
def _claim(share: Any, value: Any, largest: Any, labels: Any) -> None:
    """Give voxels to an organ where its share is the largest so far."""
    for z in range(share.shape[0]):
        for y in range(share.shape[1]):
            for x in range(share.shape[2]):
                if share[z, y, x] > largest[z, y, x]:
                    largest[z, y, x] = share[z, y, x]
                    labels[z, y, x] = value


def intensity_table(nu: float) -> NDArray[np.float32]:
    """exp(−d² / 2ν²) for d = 0, 1, 2, … HU; scans hold whole HU, so differences are whole."""
    d = np.arange(int(np.ceil(VANISHING * nu)) + 1)
    table = np.exp(-(d**2) / (2 * nu**2)).astype(np.float32)
    table[-1] = 0
    return table
