"""What the transfer reads of an atlas: HU and labels of the box around its organs.

One int32 per voxel for both, in chunks of whole planes: few reads, each unpacked where it
belongs. Derived from image and label map when the atlas is added.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from atlas_store import Atlas, OrganInfo, StoreFormatError, direct
from atlas_store.direct import misfit
from atlas_store.guard import MAX_CHUNK
from kpt_dask.boxes import Box, enclosing, shape_of
from kpt_dask.omezarr import open_array, regions, write_region

AROUND = 40.0
"""How far beyond the box around all its organs an atlas is kept for the transfer, mm."""

PLANES = 16
"""Of a chunk; blocks of the transfer are slabs, so few planes are read in vain."""

NAME = "surroundings"
_COMPRESSOR = BloscCodec(cname="lz4hc", clevel=5, shuffle="shuffle")
"""Packed once and unpacked for every scan: slower to pack than others, and faster to unpack."""


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
) -> Box:
    """Write ``surroundings`` (z, y, x) int32 of an atlas: HU · 2¹⁶ + label.

    Parameters
    ----------
    group : zarr.Group
        The atlas's data.
    image, labels : zarr.Array (z, y, x)
        Level 0 of its volume, whole HU within int16, and its label map.
    found : mapping of str to OrganInfo
        Bounding boxes by organ name.
    spacing : float
        Of the working grid, mm.

    Returns
    -------
    Box
        The voxels of the atlas that it holds.
    """
    depth, height, width = image.shape
    box = box_around(found, (depth, height, width), spacing)
    shape = shape_of(box)
    array = group.create_array(
        NAME,
        shape=shape,
        dtype=np.int32,
        chunks=_chunks(shape),
        compressors=_COMPRESSOR,
        dimension_names=("z", "y", "x"),
        # A chunk that is not there is damage, never nothing.
        config={"write_empty_chunks": True},
    )
    for region in regions(shape, _chunks(shape)):
        part = tuple(slice(a + r.start, a + r.stop) for (a, _), r in zip(box, region, strict=True))
        write_region(array, region, _packed(image[part], labels[part]))
    return box


def _packed(hu: Any, labels: Any) -> NDArray[np.int32]:
    """HU · 2¹⁶ + label of voxels; HU are whole."""
    packed: NDArray[np.int32] = np.asarray(hu).astype(np.int32) << 16
    packed |= np.asarray(labels).astype(np.uint16)
    return packed


def read_planes(
    atlas: Atlas, first: int, stop: int, room: NDArray[np.int32] | None = None
) -> tuple[NDArray[np.int32], Box]:
    """Read the chunks of an atlas's `surroundings_of` that hold planes ``first`` to ``stop``.

    Atlases of earlier versions have no such chunks: theirs are made from image and label map.

    Parameters
    ----------
    first, stop : int
        Planes of the atlas's volume, inside the box.
    room : int32 array (n), optional
        Where to put them: at least `room_for` as many planes.

    Returns
    -------
    planes : int32 array (z, y, x)
        HU is the value shifted right by 16 bits, the label its lower 16 bits.
    held : Box
        The voxels that `planes` begins with; what lies beyond is no voxel of the box.

    Raises
    ------
    AtlasNotFoundError
        If the atlas was removed.
    StoreFormatError
        If what is there is damaged.
    """
    (begin, end), *sides = box = surroundings_of(atlas)
    shape = shape_of(box)
    depth, *plane = chunks = _chunks(shape)
    low, high = (first - begin) // depth, -((begin - stop) // depth)
    folder = f"{atlas.path}/{NAME}"
    chunk = [(0, depth)]
    wanted = [direct.Rows(f"{folder}/c/{c}/0/0", depth, chunk) for c in range(low, high)]
    with reading(atlas, NAME):
        if 4 * math.prod(chunks) > MAX_CHUNK:
            raise ValueError(f"its organs tell of chunks of {chunks}")
        if room is None:
            room = np.empty(room_for(atlas, stop - first), np.int32)
        planes = room[: (high - low) * math.prod(chunks)].reshape(-1, *plane)
        description = atlas.objects.read(f"{folder}/zarr.json")
        if misfit(json.loads(description or b"null"), shape, chunks, planes.dtype) is not None:
            stop = min(begin + high * depth, end)
            _pack(atlas, (begin + low * depth, stop), sides, planes)
        else:
            atlas.objects.unpack(wanted, planes)
    z = begin + low * depth, min(begin + high * depth, end)
    return planes, (z, sides[0], sides[1])


def _pack(
    atlas: Atlas, planes: tuple[int, int], sides: Sequence[tuple[int, int]], out: NDArray[np.int32]
) -> None:
    """Make of an atlas's image and label map what `write_surroundings` would have written."""
    region = tuple(slice(*ends) for ends in (planes, *sides))
    hu = open_array(atlas.image, "0")[region]
    out[: planes[1] - planes[0]] = _packed(hu, atlas.labels[region])


class Room:
    """Memory that reading one atlas after another uses again: new pages cost as much as reading."""

    def __init__(self) -> None:
        self._values = np.empty(0, np.int32)

    def of(self, voxels: int) -> NDArray[np.int32]:
        """Give room for so many voxels; what it held before is lost."""
        if self._values.size < voxels:
            self._values = np.empty(voxels, np.int32)
        return self._values[:voxels]


def room_for(atlas: Atlas, planes: int) -> int:
    """Voxels that reading so many planes takes at most: whole chunks are unpacked."""
    depth, height, width = _chunks(shape_of(surroundings_of(atlas)))
    return (planes + 2 * (depth - 1)) * height * width


def surroundings_of(atlas: Atlas) -> Box:
    """Box of an atlas's voxels that `read_planes` can read."""
    return box_around(atlas.organs, atlas.info.shape, float(atlas.info.spacing[0]))


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
    except (LookupError, ArithmeticError, TypeError, ValueError, RuntimeError) as error:
        atlas.ensure_present()
        raise StoreFormatError(
            f"{atlas.objects.url}: the {what} of the atlas {atlas.id!r} cannot be read"
            f" ({error}); remove the atlas and add it again."
        ) from error


def _chunks(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    return min(PLANES, shape[0]), shape[1], shape[2]
