"""What mode `local` reads of an atlas: HU and labels of the box around its organs.

One int16 array for both, in chunks of whole planes: few reads, and a half of the bytes of the
atlas's own volume. Derived from image and label map when the atlas is added.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store import Atlas, OrganInfo
from kpt_dask.boxes import Box, enclosing, shape_of
from kpt_dask.omezarr import COMPRESSOR, open_array, regions, write_region
from kpt_dask.patches import reading

AROUND = 40.0
"""How far beyond the box around all its organs an atlas is kept for the transfer, mm."""

PLANES = 32
"""Of a chunk; blocks of the transfer are slabs, so few planes are read in vain."""

NAME = "surroundings"


def box_around(organs: Mapping[str, OrganInfo], shape: tuple[int, int, int], spacing: float) -> Box:
    """Box around all organs, `AROUND` wider on each side, in voxels of the atlas."""
    box = enclosing([info.bounding_box for info in organs.values()])
    assert box is not None
    wider = math.ceil(AROUND / spacing)
    z, y, x = ((max(a - wider, 0), min(b + wider, n)) for (a, b), n in zip(box, shape, strict=True))
    return z, y, x


def write_surroundings(
    group: zarr.Group,
    image: zarr.Array[Any],
    labels: zarr.Array[Any],
    found: Mapping[str, OrganInfo],
    spacing: float,
) -> None:
    """Write ``surroundings`` (2, z, y, x) int16 of an atlas: HU, and the bits of uint16 labels.

    Parameters
    ----------
    group : zarr.Group
        The atlas's data.
    image, labels : zarr.Array (z, y, x)
        Level 0 of its volume, whole HU, and its label map.
    found : mapping of str to OrganInfo
        Bounding boxes by organ name.
    spacing : float
        Of the working grid, mm.
    """
    depth, height, width = image.shape
    box = box_around(found, (depth, height, width), spacing)
    shape = shape_of(box)
    array = group.create_array(
        NAME,
        shape=(2, *shape),
        dtype=np.int16,
        chunks=(2, min(PLANES, shape[0]), *shape[1:]),
        compressors=COMPRESSOR,
        dimension_names=("c", "z", "y", "x"),
    )
    for region in regions(shape, (PLANES, *shape[1:])):
        part = tuple(slice(a + r.start, a + r.stop) for (a, _), r in zip(box, region, strict=True))
        hu = np.asarray(image[part]).astype(np.int16)
        label = np.asarray(labels[part]).astype(np.uint16).view(np.int16)
        write_region(array, (slice(0, 2), *region), np.stack([hu, label]))


def read_surroundings(atlas: Atlas, box: Box) -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
    """Read HU and labels of a box of an atlas, which lies inside its `box_around`.

    Raises
    ------
    StoreFormatError
        If they are not there or damaged.
    """
    whole = surroundings_of(atlas)
    z, y, x = (slice(a - f, b - f) for (a, b), (f, _) in zip(box, whole, strict=True))
    with reading(atlas, NAME):
        both = np.asarray(open_array(atlas.group, NAME)[:, z, y, x])
        if both.dtype != np.int16 or both.shape != (2, *shape_of(box)):
            raise ValueError(f"{both.dtype} {both.shape} is not what its organs tell")
    return both[0], both[1].view(np.uint16)


def surroundings_of(atlas: Atlas) -> Box:
    """Box of an atlas's voxels that `read_surroundings` can read."""
    return box_around(atlas.organs, atlas.info.shape, float(atlas.info.spacing[0]))
