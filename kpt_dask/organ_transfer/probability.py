"""The array of probabilities: one chunked volume for each organ, all organs of a place in one file.

Knows Zarr and the grid; no mode, no votes.
"""

from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from atlas_store import OrganTable
from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import Box, aligned, box_of, overlap, shape_of
from atlas_store.arrays.regions import Region
from kpt_dask.grid import Grid
from kpt_dask.options import MODES


class Tiling(NamedTuple):
    """How the probabilities are cut into files, and these into chunks; voxels (z, y, x).

    Attributes
    ----------
    shard : (int, int, int)
        One file of all organs, and one chunk of the label map. Large: to create a file takes as
        long as to compress 1 MB.
    chunk : (int, int, int)
        Inner chunk of a shard, of one organ. Empty chunks are not stored, and half of an organ's
        box is empty, so small chunks save space.
    """

    shard: tuple[int, int, int] = (32, 256, 256)
    chunk: tuple[int, int, int] = (32, 32, 32)

    def region(self, box: Box, shape: tuple[int, int, int]) -> Region:
        """Smallest region of whole shards around a box, within a volume of a shape."""
        return aligned(box, self.shard, shape)

    def slabs(self, region: Region) -> list[Region]:
        """Cut a region of whole shards, from below, into slabs one shard deep.

        A slab and its shares are filled, decided and written while they are in the cache.
        """
        z, y, x = region
        begins = range(z.start, z.stop, self.shard[0])
        return [(slice(a, min(a + self.shard[0], z.stop)), y, x) for a in begins]

    def slab_shape(self, box: Box) -> tuple[int, int, int]:
        """Shape of the slabs of a box that begins where a shard does."""
        depth, height, width = shape_of(box)
        return min(depth, self.shard[0]), height, width

    def cut_in_slabs(self, box: Box, shape: tuple[int, int, int]) -> list[Box]:
        """Cut a box of a volume of a shape where its slabs end."""
        parts = (overlap(box, box_of(slab)) for slab in self.slabs(self.region(box, shape)))
        return [part for part in parts if part is not None]


TILING = Tiling()
"""Tiling of every segmentation."""

_COMPRESSOR = BloscCodec(cname="lz4", shuffle="noshuffle")
"""No byte shuffle: it gains nothing on probabilities and doubles the time to compress them."""


def create_probability(
    group: zarr.Group, grid: Grid, organs: OrganTable, mode: str, tiling: Tiling = TILING
) -> zarr.Array[Any]:
    """Create ``probability`` (organ, z, y, x) float32 in a group, all 0, for a mode.

    An array of this name is replaced. Every shard is written: one that is missing later was lost.

    Parameters
    ----------
    group : zarr.Group
    grid : Grid
        The working grid.
    organs : OrganTable
        The organs, in their order along the first axis.
    mode : str
        One of `kpt_dask.options.MODES`; its description becomes an attribute.
    tiling : Tiling
    """
    chunks = [min(n, c) for n, c in zip(grid.shape, tiling.chunk, strict=True)]
    sizes = [min(n, s) for n, s in zip(grid.shape, tiling.shard, strict=True)]
    probability = group.create_array(
        "probability",
        shape=(len(organs), *grid.shape),
        dtype=np.float32,
        chunks=(1, *chunks),
        shards=(len(organs), *(-(-n // c) * c for n, c in zip(sizes, chunks, strict=True))),
        # All files in one folder: to create a folder takes as long as to create a file.
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=_COMPRESSOR,
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
