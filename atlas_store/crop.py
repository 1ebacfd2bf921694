"""What the transfer reads of an atlas: HU and labels of the box around its organs.

One number per voxel for both, in chunks of whole planes: few reads, each unpacked where it
belongs. Derived from image and label map when the atlas is added.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from atlas_store import Atlas, OrganInfo, OrganTable, StoreFormatError
from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import Box, enclosing, shape_of
from atlas_store.arrays.chunk_io import misfit
from atlas_store.arrays.regions import Region, open_array, regions, write_region
from atlas_store.marker import check_encoding
from atlas_store.storage.guard import MAX_CHUNK

AROUND = 40.0
"""How far beyond the box around all its organs an atlas is kept for the transfer, mm."""

PLANES = 16
"""Of a chunk; blocks of the transfer are slabs, so few planes are read in vain."""

NAME = "surroundings"
ENCODING_TYPE = "kpt-atlas-crop"
ENCODING_VERSION = "1"
_UNMARKED = {"encoding-type": ENCODING_TYPE, "encoding-version": "1", "first_hu": -1000}
"""What the array of an earlier program does not say of itself, as it was always so."""

_COMPRESSOR = BloscCodec(cname="lz4hc", clevel=5, shuffle="shuffle")
"""Packed once and unpacked for every scan: slower to pack than others, and faster to unpack."""


@dataclass(frozen=True)
class Coding:
    """How one number holds HU and label of a voxel.

    Attributes
    ----------
    dtype : numpy.dtype
        Of the number n.
    hu : (int, int, int)
        Shift, mask and first: HU are ``(n >> shift & mask) + first``.
    label : (int, int)
        Shift and mask, likewise.
    labels : tuple of int, optional
        Labels that 1, 2, … stand for; a label stands for itself if not given.
    """

    dtype: np.dtype[Any]
    hu: tuple[int, int, int]
    label: tuple[int, int]
    labels: tuple[int, ...] | None = None

    def number_of(self, label: int) -> int:
        """Give what stands for a label; for one that does not occur, what no voxel has."""
        if self.labels is None:
            return label
        return self.labels.index(label) + 1 if label in self.labels else ABSENT


WIDE = Coding(np.dtype(np.int32), (16, -1, 0), (0, 0xFFFF))
"""Takes whatever a volume may hold."""
ABSENT = 0xFFFF
"""Stands for labels that a `narrow` one does not name."""


def narrow(labels: Sequence[int], air_hu: int) -> Coding:
    """Code in half the memory, which is what the transfer spends most of its time on.

    Takes 15 labels, and 12 bits of HU from that of air on: what scanners give, but for those that
    tell apart metals.
    """
    return Coding(np.dtype(np.uint16), (0, 0xFFF, air_hu), (12, 0xF), tuple(labels))


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
    organs: OrganTable,
    spacing: float,
    air_hu: int,
) -> tuple[Box, Coding]:
    """Write ``surroundings`` (z, y, x) of an atlas, one number for HU and label of a voxel.

    Parameters
    ----------
    group : zarr.Group
        The atlas's data.
    image, labels : zarr.Array (z, y, x)
        Level 0 of its volume, whole HU within int16, and its label map.
    found : mapping of str to OrganInfo
        Bounding boxes by organ name.
    organs : OrganTable
        What the labels stand for.
    spacing : float
        Of the working grid, mm.
    air_hu : int
        The least HU that a volume holds.

    Returns
    -------
    Box
        The voxels of the atlas that it holds.
    Coding
        How.
    """
    depth, height, width = image.shape
    box = box_around(found, (depth, height, width), spacing)
    shape = shape_of(box)
    places = [
        (
            tuple(slice(a + r.start, a + r.stop) for (a, _), r in zip(box, region, strict=True)),
            region,
        )
        for region in regions(shape, _chunks(shape))
    ]
    coding = narrow([organs.by_name(name).value for name in found], air_hu)
    if len(found) > coding.label[1] or not all(
        _fits(chunk_io.read(image, part), coding) for part, _ in places
    ):
        coding = WIDE
    attributes: dict[str, Any] = {
        "encoding-type": ENCODING_TYPE,
        "encoding-version": ENCODING_VERSION,
        "first_hu": coding.hu[2],
    }
    if coding.labels is not None:
        attributes["labels"] = list(coding.labels)
    array = group.create_array(
        NAME,
        shape=shape,
        dtype=coding.dtype,
        chunks=_chunks(shape),
        compressors=_COMPRESSOR,
        dimension_names=("z", "y", "x"),
        attributes=attributes,
        # A chunk that is not there is damage, never nothing.
        config={"write_empty_chunks": True},
    )
    for part, region in places:
        voxels = chunk_io.read(image, part), chunk_io.read(labels, part)
        write_region(array, region, _packed(*voxels, coding))
    return box, coding


def _fits(hu: Any, coding: Coding) -> bool:
    _, mask, first = coding.hu
    values = np.asarray(hu)
    return bool(values.min() >= first and values.max() <= first + mask)


def _packed(hu: Any, labels: Any, coding: Coding) -> NDArray[Any]:
    """Pack HU, which are whole, and labels of voxels."""
    numbers = np.asarray(labels).astype(np.uint16)
    if coding.labels is not None:
        table = np.zeros(1 << 16, np.uint16)
        table[list(coding.labels)] = np.arange(1, len(coding.labels) + 1)
        numbers = table[numbers]
    packed = (np.asarray(hu).astype(np.int32) - coding.hu[2]) << coding.hu[0]
    packed |= numbers.astype(np.int32) << coding.label[0]
    return packed.astype(coding.dtype)


def read_planes(
    atlas: Atlas, first: int, stop: int, room: "Room | None" = None
) -> tuple[NDArray[Any], Box, Coding]:
    """Read the chunks of an atlas's `surroundings_of` that hold planes ``first`` to ``stop``.

    Atlases of earlier versions have no such chunks: theirs are made from image and label map.

    Parameters
    ----------
    first, stop : int
        Planes of the atlas's volume, inside the box.
    room : Room, optional
        Where to put them.

    Returns
    -------
    planes : uint16 or int32 array (z, y, x)
        HU and labels.
    held : Box
        The voxels that `planes` begins with; what lies beyond is no voxel of the box.
    coding : Coding
        How `planes` holds them.

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
    wanted = [chunk_io.Rows(f"{folder}/c/{c}/0/0", depth, chunk) for c in range(low, high)]
    z = begin + low * depth, min(begin + high * depth, end)
    with reading(atlas, NAME):
        if WIDE.dtype.itemsize * math.prod(chunks) > MAX_CHUNK:
            raise ValueError(f"its organs tell of chunks of {chunks}")
        description = json.loads(atlas.sealed.read(f"{folder}/zarr.json") or b"null")
        stored = _coding(description, shape, chunks, f"{atlas.objects.url}/{folder}")
        coding = stored or WIDE
        size = (high - low) * math.prod(chunks) * coding.dtype.itemsize
        planes = (room or Room()).of(size).view(coding.dtype).reshape(-1, *plane)
        if stored is None:
            region = slice(*z), slice(*sides[0]), slice(*sides[1])
            planes[: z[1] - z[0]] = _packed(*_image_and_labels(atlas, region), coding)
        else:
            atlas.sealed.unpack(wanted, planes)
    return planes, (z, sides[0], sides[1]), coding


def _coding(
    document: Any, shape: tuple[int, int, int], chunks: tuple[int, int, int], where: str
) -> Coding | None:
    """Find how the stored crop is coded, from a parsed ``zarr.json``; None if there is none."""
    wide = misfit(document, shape, chunks, WIDE.dtype) is None
    if not wide and misfit(document, shape, chunks, np.dtype(np.uint16)) is not None:
        return None
    attributes = _UNMARKED | document["attributes"]
    check_encoding(attributes, ENCODING_TYPE, ENCODING_VERSION, where)
    if wide:
        return WIDE
    labels, first = attributes["labels"], attributes["first_hu"]
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"its labels are described as {labels!r}")
    if type(first) is not int or abs(first) > np.iinfo(np.int16).max:
        raise ValueError(f"its least HU are described as {first!r}")
    return narrow(labels, first)


def _image_and_labels(atlas: Atlas, region: Region) -> tuple[Any, Any]:
    image = open_array(atlas.image, "0")
    return chunk_io.read(image, region), chunk_io.read(atlas.labels, region)


class Room:
    """Memory that reading one atlas after another uses again: new pages cost as much as reading."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def of(self, size: int) -> NDArray[np.uint8]:
        """Give room for so many bytes; what it held before is lost."""
        if self._bytes.size < size:
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size]


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
        If what is read in the context is not there, damaged, or of a newer version.
    """
    try:
        yield
    except StoreFormatError:
        atlas.ensure_present()
        raise
    except (LookupError, ArithmeticError, TypeError, ValueError, RuntimeError) as error:
        atlas.ensure_present()
        raise StoreFormatError(
            f"{atlas.objects.url}: the {what} of the atlas {atlas.id!r} cannot be read"
            f" ({error}); remove the atlas and add it again."
        ) from error


def _chunks(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    return min(PLANES, shape[0]), shape[1], shape[2]
