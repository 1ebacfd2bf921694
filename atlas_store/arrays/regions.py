"""Regions of Zarr arrays: cut an array into them, and the one safe way to write one."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import zarr
from numpy.typing import NDArray

from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import Region as Region


def write_region(array: zarr.Array[Any], region: Region, data: NDArray[Any]) -> None:
    """Write a region that owns all chunks (shards, if there are any) it touches.

    Two writers of one chunk each read it, change their part and write it back, and one part
    is lost without an error. So a region must begin and end where chunks do, or end where
    the array does.

    Parameters
    ----------
    array : zarr.Array
        Array to write to.
    region : tuple of slice
        One slice with plain bounds per axis.
    data : ndarray
        Values, in the region's shape.

    Raises
    ------
    ValueError
        If the region is not aligned, or `data` has another shape.
    """
    unit = array.shards or array.chunks
    if len(region) != array.ndim:
        raise ValueError(f"region {region} has not the {array.ndim} axes of {array.path}")
    for axis, (part, size, step) in enumerate(zip(region, array.shape, unit, strict=True)):
        whole = part.step in (None, 1) and 0 <= part.start < part.stop <= size
        if not whole or part.start % step or (part.stop % step and part.stop != size):
            raise ValueError(
                f"region {part} of axis {axis} (length {size}) does not begin and end at"
                f" multiples of {step}: writing it could destroy a neighbour's voxels"
            )
    if data.shape != tuple(part.stop - part.start for part in region):
        raise ValueError(f"data of shape {data.shape} does not fill region {region}")
    chunk_io.write(array, region, data)


def blocks_of(shape: Sequence[int], block: Sequence[int]) -> Iterator[tuple[slice, slice, slice]]:
    """Cut an array (z, y, x) into blocks, in C order; the last of each axis may be smaller."""
    cuts = (
        [slice(first, min(first + step, n)) for first in range(0, n, step)]
        for n, step in zip(shape, block, strict=True)
    )
    yield from ((z, y, x) for z, y, x in product(*cuts))


def open_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Open an array of a group.

    Raises
    ------
    KeyError
        If there is none of that name.
    """
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(f"{name} is not an array")
    return array
