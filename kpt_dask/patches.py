"""What the transfer needs of an atlas: of each organ, its HU inside its bounding box.

One int16 array per organ, `OUTSIDE` where the voxel is not the organ's: mask and image in
one read, of no more than the organ's own box. Derived from the atlas's image and label map
when it is added.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store import Atlas, OrganInfo, OrganTable, StoreFormatError
from kpt_dask.omezarr import COMPRESSOR, Region, open_array, regions, write_region

OUTSIDE = np.iinfo(np.int16).min
"""No HU: volumes are clipped well above it."""

CHUNKS = (64, 64, 64)


def write_patches(
    group: zarr.Group,
    image: zarr.Array[Any],
    labels: zarr.Array[Any],
    found: Mapping[str, OrganInfo],
    organs: OrganTable,
) -> None:
    """Write the patches of an atlas as ``patches/<organ>``.

    Parameters
    ----------
    group : zarr.Group
        The atlas's data.
    image, labels : zarr.Array (z, y, x)
        Level 0 of its volume, whole HU, and its label map.
    found : mapping of str to OrganInfo
        Bounding boxes by organ name.
    organs : OrganTable
        Label values by name.
    """
    patches = group.create_group("patches")
    for name, info in found.items():
        box = info.slices
        shape = tuple(s.stop - s.start for s in box)
        patch = patches.create_array(
            name,
            shape=shape,
            dtype=np.int16,
            chunks=tuple(min(n, c) for n, c in zip(shape, CHUNKS, strict=True)),
            compressors=COMPRESSOR,
            fill_value=OUTSIDE,
            dimension_names=("z", "y", "x"),
        )
        for region in regions(shape, CHUNKS):
            part = tuple(
                slice(b.start + r.start, b.start + r.stop) for b, r in zip(box, region, strict=True)
            )
            inside = np.asarray(labels[part]) == organs.by_name(name).value
            values = np.where(inside, np.asarray(image[part]), OUTSIDE)
            write_region(patch, region, values.astype(np.int16))


def read_patch(atlas: Atlas, organ: str, region: Region) -> NDArray[np.int16]:
    """Read a region (z, y, x) of one organ's patch; voxel 0 is that of its bounding box.

    Raises
    ------
    StoreFormatError
        If it is not there or damaged.
    """
    with reading(atlas, organ):
        return np.asarray(open_array(atlas.group, f"patches/{organ}")[region], np.int16)


@contextmanager
def reading(atlas: Atlas, what: str) -> Iterator[None]:
    """Say of an atlas's voxels that cannot be read what to do about it.

    Raises
    ------
    AtlasNotFoundError
        If the atlas was removed.
    StoreFormatError
        If what is read in the context is not there or damaged.
    """
    try:
        yield
    except (KeyError, ValueError, RuntimeError) as error:
        atlas.ensure_present()
        raise StoreFormatError(
            f"{atlas.objects.url}: the {what} of the atlas {atlas.id!r} cannot be read"
            f" ({error}); remove the atlas and add it again."
        ) from error
