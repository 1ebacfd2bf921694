"""Crop of an atlas: HU and labels of the box around its organs, which the transfer reads.

Array ``surroundings`` (z, y, x): one number per voxel for both, in chunks of whole planes: few
reads suffice, and each chunk is decompressed straight into the result. Written from image and label
map when the atlas is added.
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
from atlas_store.arrays import chunk_io, chunk_rows
from atlas_store.arrays.boxes import Box, enclosing, shape_of
from atlas_store.arrays.chunk_rows import describe_mismatch
from atlas_store.arrays.regions import Region, blocks_of, open_array, write_region
from atlas_store.marker import check_encoding
from atlas_store.storage.guard import MAX_CHUNK

CROP_MARGIN_MM = 40.0
"""Margin of the crop around the box of all organs, mm."""

PLANES = 16
"""Planes per chunk. The transfer's blocks are slabs, so few planes are read needlessly."""

NAME = "surroundings"
ENCODING_TYPE = "kpt-atlas-crop"
ENCODING_VERSION = "1"
_UNMARKED = {"encoding-type": ENCODING_TYPE, "encoding-version": "1", "first_hu": -1000}
"""Attributes of arrays that earlier versions wrote without any: there was one encoding."""

_COMPRESSOR = BloscCodec(cname="lz4hc", clevel=5, shuffle="shuffle")
"""Compressed once, decompressed for every scan: slow to compress, fast to decompress."""


@dataclass(frozen=True)
class Coding:
    """Bits of the number that holds HU and label of a voxel.

    Attributes
    ----------
    dtype : numpy.dtype
        Type of the number n.
    hu : (int, int, int)
        Shift, mask and first HU: HU = ``(n >> shift & mask) + first``.
    label : (int, int)
        Shift and mask: code of the label = ``n >> shift & mask``.
    labels : tuple of int, optional
        Labels with the codes 1, 2, …; if not given, a label is its own code.
    """

    dtype: np.dtype[Any]
    hu: tuple[int, int, int]
    label: tuple[int, int]
    labels: tuple[int, ...] | None = None

    def number_of(self, label: int) -> int:
        """Code of a label; `ABSENT`, which no voxel has, for a label that does not occur."""
        if self.labels is None:
            return label
        return self.labels.index(label) + 1 if label in self.labels else ABSENT


WIDE = Coding(np.dtype(np.int32), (16, -1, 0), (0, 0xFFFF))
"""32 bits: any HU and any label of a volume."""
ABSENT = 0xFFFF
"""Code of labels that a `narrow` coding does not have."""


def narrow(labels: Sequence[int], air_hu: int) -> Coding:
    """Coding of 16 bits: up to 15 labels, and 12 bits of HU from `air_hu` on.

    Half the memory of `WIDE`, and reading memory takes most of the transfer's time. Enough for
    scanners without an extended HU scale.
    """
    return Coding(np.dtype(np.uint16), (0, 0xFFF, air_hu), (12, 0xF), tuple(labels))


def crop_box(atlas: Atlas) -> Box:
    """Box of an atlas's crop, in voxels of the atlas: the range of `read_planes`."""
    return _box_around(atlas.organs, atlas.info.shape, float(atlas.info.spacing[0]))


def _box_around(
    organs: Mapping[str, OrganInfo], shape: tuple[int, int, int], spacing: float
) -> Box:
    """Box around all organs, `CROP_MARGIN_MM` wider on each side, within the atlas."""
    box = enclosing([info.bounding_box for info in organs.values()])
    assert box is not None
    margin = math.ceil(CROP_MARGIN_MM / spacing)
    z, y, x = (
        (max(a - margin, 0), min(b + margin, n)) for (a, b), n in zip(box, shape, strict=True)
    )
    return z, y, x


def write_crop(
    group: zarr.Group,
    image: zarr.Array[Any],
    labels: zarr.Array[Any],
    found: Mapping[str, OrganInfo],
    organs: OrganTable,
    spacing: float,
    air_hu: int,
) -> tuple[Box, Coding]:
    """Write the crop of an atlas: array ``surroundings`` (z, y, x).

    Parameters
    ----------
    group : zarr.Group
        The atlas's data.
    image, labels : zarr.Array (z, y, x)
        Level 0 of its volume, whole HU within int16, and its label map.
    found : mapping of str to OrganInfo
        Bounding boxes by organ name.
    organs : OrganTable
        Table of the labels.
    spacing : float
        Voxel size of the working grid, mm.
    air_hu : int
        Least HU of a volume.

    Returns
    -------
    Box
        The crop, in voxels of the atlas.
    Coding
        Coding of its numbers.
    """
    depth, height, width = image.shape
    box = _box_around(found, (depth, height, width), spacing)
    shape = shape_of(box)
    parts = [
        (
            tuple(slice(a + r.start, a + r.stop) for (a, _), r in zip(box, region, strict=True)),
            region,
        )
        for region in blocks_of(shape, _chunks(shape))
    ]
    coding = narrow([organs.by_name(name).value for name in found], air_hu)
    if len(found) > coding.label[1] or not all(
        _fits(chunk_io.read(image, part), coding) for part, _ in parts
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
        # Empty chunks are written too, so that a missing chunk is always damage.
        config={"write_empty_chunks": True},
    )
    for part, region in parts:
        hu, values = chunk_io.read(image, part), chunk_io.read(labels, part)
        write_region(array, region, _coded(hu, values, coding))
    return box, coding


def _fits(hu: Any, coding: Coding) -> bool:
    _, mask, first = coding.hu
    values = np.asarray(hu)
    return bool(values.min() >= first and values.max() <= first + mask)


def _coded(hu: Any, labels: Any, coding: Coding) -> NDArray[Any]:
    """Code whole HU and labels of voxels."""
    codes = np.asarray(labels).astype(np.uint16)
    if coding.labels is not None:
        table = np.zeros(1 << 16, np.uint16)
        table[list(coding.labels)] = np.arange(1, len(coding.labels) + 1)
        codes = table[codes]
    coded = (np.asarray(hu).astype(np.int32) - coding.hu[2]) << coding.hu[0]
    coded |= codes.astype(np.int32) << coding.label[0]
    return coded.astype(coding.dtype)


def read_planes(
    atlas: Atlas, first: int, stop: int, buffer: "CropBuffer | None" = None
) -> tuple[NDArray[Any], Box, Coding]:
    """Read the chunks of an atlas's crop that hold planes ``first`` to ``stop``.

    Atlases of earlier versions have no crop: it is made from image and label map.

    Parameters
    ----------
    first, stop : int
        Planes of the atlas's volume, inside `crop_box`.
    buffer : CropBuffer, optional
        Memory to reuse; the planes of its previous call are overwritten.

    Returns
    -------
    planes : uint16 or int32 array (z, y, x)
        HU and labels; planes beyond `held` are padding.
    held : Box
        Box of `planes`, without padding, in voxels of the atlas.
    coding : Coding
        Coding of the numbers in `planes`.

    Raises
    ------
    AtlasNotFoundError
        If the atlas was removed.
    StoreFormatError
        If the crop is damaged.
    """
    (begin, end), *sides = box = crop_box(atlas)
    shape = shape_of(box)
    depth, *plane = chunks = _chunks(shape)
    low, high = (first - begin) // depth, -((begin - stop) // depth)
    folder = f"{atlas.path}/{NAME}"
    chunk = [(0, depth)]
    wanted = [chunk_rows.ChunkRows(f"{folder}/c/{c}/0/0", depth, chunk) for c in range(low, high)]
    z = begin + low * depth, min(begin + high * depth, end)
    with reading(atlas, NAME):
        if WIDE.dtype.itemsize * math.prod(chunks) > MAX_CHUNK:
            raise ValueError(f"its organs need chunks of {chunks}")
        description = json.loads(atlas.sealed.read(f"{folder}/zarr.json") or b"null")
        stored = _coding(description, shape, chunks, f"{atlas.objects.url}/{folder}")
        coding = stored or WIDE
        size = (high - low) * math.prod(chunks) * coding.dtype.itemsize
        planes = (buffer or CropBuffer()).take(size).view(coding.dtype).reshape(-1, *plane)
        if stored is None:
            region = slice(*z), slice(*sides[0]), slice(*sides[1])
            planes[: z[1] - z[0]] = _from_volume(atlas, region, coding)
        else:
            atlas.sealed.unpack(wanted, planes)
    return planes, (z, sides[0], sides[1]), coding


def _coding(
    document: Any, shape: tuple[int, int, int], chunks: tuple[int, int, int], where: str
) -> Coding | None:
    """Find how the stored crop is coded, from a parsed ``zarr.json``; None if there is none."""
    wide = describe_mismatch(document, shape, chunks, WIDE.dtype) is None
    if not wide and describe_mismatch(document, shape, chunks, np.dtype(np.uint16)) is not None:
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


def _from_volume(atlas: Atlas, region: Region, coding: Coding) -> NDArray[Any]:
    """Make a part of the crop from image and label map."""
    image = open_array(atlas.image, "0")
    return _coded(chunk_io.read(image, region), chunk_io.read(atlas.labels, region), coding)


class CropBuffer:
    """Memory reused from crop to crop: page faults of new memory cost as much as reading it."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, size: int) -> NDArray[np.uint8]:
        """Return a view of `size` bytes; it overlaps all earlier views."""
        if self._bytes.size < size:
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size]


@contextmanager
def reading(atlas: Atlas, what: str) -> Iterator[None]:
    """Turn errors of reading an atlas's voxels into one that names the atlas and the remedy.

    Raises
    ------
    AtlasNotFoundError
        If the atlas was removed.
    StoreFormatError
        If an object read in the context is missing, damaged, or of a newer version.
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
