"""Strips of an atlas's organs: their voxels in runs along x, for modes that move whole organs.

A strip is `STRIP` voxels of a row, which a kernel adds as one vector: no test for the ends of rows,
and no voxel around the organ is read. Cut out of the crop when the atlas is added.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from atlas_store import Atlas, OrganInfo, OrganTable
from atlas_store.arrays import chunk_io, chunk_rows
from atlas_store.arrays.boxes import Box, enclosing, joined, overlap, shape_of, within
from atlas_store.arrays.chunk_rows import describe_mismatch
from atlas_store.arrays.jit import kernel
from atlas_store.arrays.regions import open_array, write_region
from atlas_store.crop import NAME as CROP
from atlas_store.crop import Coding, read_planes, reading
from atlas_store.marker import check_encoding
from atlas_store.storage.guard import MAX_CHUNK

STRIP = 16
"""Voxels of a strip."""
SHORT = 8
"""Voxels of a short strip: two of them fill one vector."""
HEADER_COLUMNS = 3
"""Columns of a strip before its voxels: z, y and x of the first one in the organ's bounding box."""
NOT_ORGAN = np.iinfo(np.int16).min
"""Value of a strip's voxels outside of the organ. No HU: volumes are clipped well above it."""

NAME = "strips"
ENCODING_TYPE = "kpt-atlas-organ-strips"
ENCODING_VERSION = "1"
_UNMARKED = {"encoding-type": ENCODING_TYPE, "encoding-version": "1"}
"""Attributes of arrays that earlier versions wrote without any."""
CHUNK = 1 << 15
"""Strips per chunk: few chunks, as opening a file takes as long as reading 1000 strips."""
PLANES = 64
"""Planes of the crop that are cut into strips at a time."""
_COMPRESSOR = BloscCodec(cname="lz4", clevel=0)
"""Stored uncompressed: every block reads strips, and they are 5 % of an atlas."""


class Strips(NamedTuple):
    """An organ of an atlas, for kernels.

    Attributes
    ----------
    values : int16 array (n, `HEADER_COLUMNS` + `STRIP`)
        One row per strip: z, y and x of its first voxel, then HU, or `NOT_ORGAN`. An organ's
        strips are ordered by plane; `values` may hold those of other organs too.
    planes : int64 array (depth + 1)
        Strips ``planes[p]:planes[p + 1]`` are those of plane p of the organ's bounding box; none
        where a plane was not read.
    short_strips : int64 array (depth + 1)
        Strips of plane p from ``short_strips[p]`` on have at most `SHORT` voxels.
    """

    values: NDArray[np.int16]
    planes: NDArray[np.int64]
    short_strips: NDArray[np.int64]

    def dense(self, shape: tuple[int, int, int]) -> NDArray[np.int16]:
        """Fill the organ's bounding box: HU, and `NOT_ORGAN` outside of the organ.

        Parameters
        ----------
        shape : (int, int, int)
            Shape of the bounding box.

        Returns
        -------
        int16 array (z, y, x + `STRIP`), C order
            Columns past the box hold `NOT_ORGAN`.
        """
        out = np.empty((*shape[:2], shape[2] + STRIP), np.int16)
        fill(self.values[self.planes[0] : self.planes[-1]], 0, out)
        return out


def write_strips(
    group: zarr.Group,
    held: Box,
    coding: Coding,
    found: Mapping[str, OrganInfo],
    organs: OrganTable,
) -> None:
    """Write ``strips`` (n, `HEADER_COLUMNS` + `STRIP`) int16 of an atlas, one organ after another.

    Parameters
    ----------
    group : zarr.Group
        The atlas's data, with its crop.
    held, coding
        Box and coding of the crop, from `atlas_store.crop.write_crop`.
    found : mapping of str to OrganInfo
        Bounding boxes by organ name.
    organs : OrganTable
        Table of the labels.
    """
    (begin, end), *sides = held
    crop = open_array(group, CROP)
    parts: dict[str, list[NDArray[np.int16]]] = {name: [] for name in found}
    for first in range(begin, end, PLANES):
        slab = (first, min(first + PLANES, end)), sides[0], sides[1]
        packed = chunk_io.read(crop, within(slab, held))
        for name, info in found.items():
            box = overlap(info.bounding_box, slab)
            if box is not None:
                value, start = organs.by_name(name).value, box[0][0] - info.bounding_box[0][0]
                parts[name].append(_cut_out(packed[within(box, slab)], coding, start, value))
    strips = [_ordered(np.concatenate(parts[name])) for name in found]
    values = np.concatenate(strips)
    ends = np.cumsum([0, *map(len, strips)]).tolist()
    shapes = [shape_of(info.bounding_box) for info in found.values()]
    begins = _planes_of(values, list(pairwise(ends)), shapes)
    planes = {name: _checked(both)[0].tolist() for name, both in zip(found, begins, strict=True)}
    array = group.create_array(
        NAME,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(min(CHUNK, len(values)), values.shape[1]),
        compressors=_COMPRESSOR,
        attributes={
            "encoding-type": ENCODING_TYPE,
            "encoding-version": ENCODING_VERSION,
            "planes": planes,
        },
        # Empty chunks are written too, so that a missing chunk is always damage.
        config={"write_empty_chunks": True},
    )
    write_region(array, tuple(slice(0, size) for size in values.shape), values)


Wanted = Mapping[str, Sequence[tuple[int, int]]]
"""Planes wanted of each organ: sorted, disjoint half-open ranges within its bounding box."""


def read_strips(
    wanted: Sequence[tuple[Atlas, Wanted]], organs: OrganTable
) -> list[dict[str, Strips]]:
    """Read organs of atlases, all into one array.

    Atlases of earlier versions have no strips: these are cut out of the crop.

    Parameters
    ----------
    wanted : sequence of (Atlas, Wanted)
        Atlases, and the organs and planes of each.
    organs : OrganTable
        Table of the atlases' labels.

    Raises
    ------
    AtlasNotFoundError
        If an atlas was removed.
    StoreFormatError
        If the strips or the crop are damaged.
    """
    sources: list[_Stored | dict[str, NDArray[np.int16]]] = []
    for atlas, planes in wanted:
        with reading(atlas, NAME):
            stored = _find(atlas, planes)
        sources.append(_from_crop(atlas, planes, organs) if stored is None else stored)
    rows = [
        source.rows if isinstance(source, _Stored) else sum(map(len, source.values()))
        for source in sources
    ]
    values = np.empty((sum(rows), HEADER_COLUMNS + STRIP), np.int16)
    begins = np.cumsum([0, *rows]).tolist()
    spans: list[dict[str, tuple[int, int]]] = []
    for (atlas, _), source, begin, end in zip(wanted, sources, begins, begins[1:], strict=False):
        if isinstance(source, _Stored):
            with reading(atlas, NAME):
                atlas.sealed.unpack(source.chunks, values[begin:end])
            spans.append({name: (begin + a, begin + b) for name, (a, b) in source.spans.items()})
        else:
            spans.append({})
            for name, strips in source.items():
                spans[-1][name] = begin, begin + len(strips)
                values[begin : begin + len(strips)] = strips
                begin += len(strips)
    shapes = [
        shape_of(atlas.organs[name].bounding_box)
        for (atlas, _), each in zip(wanted, spans, strict=True)
        for name in each
    ]
    ends = [span for each in spans for span in each.values()]
    begin_of_planes = iter(_planes_of(values, ends, shapes))
    strips_of: list[dict[str, Strips]] = []
    for (atlas, _), each in zip(wanted, spans, strict=True):
        with reading(atlas, NAME):
            strips_of.append(
                {name: Strips(values, *_checked(next(begin_of_planes))) for name in each}
            )
    return strips_of


def hu_of_organs(atlas: Atlas, organs: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the HU of organs in an atlas, of those that it shows.

    Raises
    ------
    AtlasNotFoundError
        If the atlas was removed.
    StoreFormatError
        If its strips or its crop are damaged.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> from atlas_store.organ_strips import hu_of_organs
    >>> mean, deviation = hu_of_organs(AtlasStore.open("atlases")["body_1"], ["liver"])["liver"]
    >>> round(mean)
    101
    """
    wanted = {
        name: [(0, shape_of(atlas.organs[name].bounding_box)[0])]
        for name in organs
        if name in atlas.organs
    }
    [strips_of] = read_strips([(atlas, wanted)], atlas.organ_table)
    found = {}
    for name, strips in strips_of.items():
        hu = strips.values[strips.planes[0] : strips.planes[-1], HEADER_COLUMNS:]
        inside = hu[hu != NOT_ORGAN]
        found[name] = float(inside.mean()), float(inside.std())
    return found


@dataclass(frozen=True)
class _Stored:
    """Strips of an atlas in its store.

    Attributes
    ----------
    chunks : list of ChunkRows
        Rows to read of each chunk.
    rows : int
        Number of these rows.
    spans : dict of str to (int, int)
        Range of each organ among these rows.
    """

    chunks: list[chunk_rows.ChunkRows]
    rows: int
    spans: dict[str, tuple[int, int]]


def _find(atlas: Atlas, wanted: Wanted) -> _Stored | None:
    """Find the rows of the wanted planes; None if the atlas has no strips."""
    folder = f"{atlas.path}/{NAME}"
    description = atlas.sealed.read(f"{folder}/zarr.json")
    if description is None:
        return None
    document = json.loads(description)
    attributes = _UNMARKED | document["attributes"]
    check_encoding(attributes, ENCODING_TYPE, ENCODING_VERSION, f"{atlas.objects.url}/{folder}")
    n, columns = document["shape"][0], HEADER_COLUMNS + STRIP
    chunk: int = document["chunk_grid"]["configuration"]["chunk_shape"][0]
    if fault := describe_mismatch(document, (n, columns), (chunk, columns), np.dtype(np.int16)):
        raise ValueError(f"it is described with {fault}")
    if not 0 < 2 * chunk * columns <= MAX_CHUNK:
        raise ValueError(f"it has chunks of {chunk}")
    planes: dict[str, list[int]] = attributes["planes"]
    depths = {name: shape_of(atlas.organs[name].bounding_box)[0] for name in wanted}
    if any(len(planes[name]) != depth + 1 for name, depth in depths.items()):
        raise ValueError("its planes are described wrongly")
    parts: dict[int, list[tuple[int, int]]] = {}
    rows, end, spans = 0, 0, {}
    for name in sorted(wanted, key=lambda name: planes[name][0]):
        before = rows
        for first, stop in wanted[name]:
            begin, behind, end = planes[name][first], end, planes[name][stop]
            if type(begin) is not int or type(end) is not int or not behind <= begin <= end <= n:
                raise ValueError("its planes are described wrongly")
            for c in range(begin // chunk, -(-end // chunk)) if begin < end else ():
                part = max(begin - c * chunk, 0), min(end - c * chunk, chunk)
                parts.setdefault(c, []).append(part)
            rows += end - begin
        if rows - before > atlas.organs[name].voxels:
            raise ValueError("it has more strips than its organs have voxels")
        spans[name] = before, rows
    chunks = [
        chunk_rows.ChunkRows(f"{folder}/c/{c}/0", chunk, joined(spans_in_chunk))
        for c, spans_in_chunk in parts.items()
    ]
    return _Stored(chunks, rows, spans)


def _from_crop(atlas: Atlas, wanted: Wanted, organs: OrganTable) -> dict[str, NDArray[np.int16]]:
    parts: dict[str, list[tuple[int, Box]]] = {}
    for name, planes in wanted.items():
        (begin, _), y, x = atlas.organs[name].bounding_box
        parts[name] = [(a, ((begin + a, begin + b), y, x)) for a, b in planes]
    cut = {name: [np.empty((0, HEADER_COLUMNS + STRIP), np.int16)] for name in wanted}
    whole = enclosing([box for pieces in parts.values() for _, box in pieces])
    if whole is not None:
        packed, held, coding = read_planes(atlas, *whole[0])
        for name, pieces in parts.items():
            value = organs.by_name(name).value
            for first, box in pieces:
                cut[name].append(_cut_out(packed[within(box, held)], coding, first, value))
    return {name: np.concatenate(strips) for name, strips in cut.items()}


def _planes_of(
    values: NDArray[np.int16],
    spans: Sequence[tuple[int, int]],
    shapes: Sequence[tuple[int, int, int]],
) -> list[NDArray[np.int64] | None]:
    """Find `Strips.planes` and `Strips.short_strips` of several organs, in one call.

    Parameters
    ----------
    values : int16 array (n, `HEADER_COLUMNS` + `STRIP`)
    spans, shapes
        Range of each organ's strips in `values`, and shape of its bounding box.

    Returns
    -------
    list of int64 array (2, depth + 1) or None
        None where strips lie outside of the box, or are not ordered by plane.
    """
    ends = np.cumsum([0, *(shape[0] + 1 for shape in shapes)])
    planes, good = np.empty((2, ends[-1]), np.int64), np.empty(len(shapes), np.bool_)
    ranges, sizes = np.array(spans, np.int64), np.array(shapes, np.int64)
    _find_planes(values, ranges.reshape(-1, 2), sizes.reshape(-1, 3), ends, planes, good)
    pieces = zip(good.tolist(), ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    return [planes[:, a:b] if fine else None for fine, a, b in pieces]


def _checked(planes: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Refuse damaged strips: kernels do not test that voxels lie in the bounding box."""
    if planes is None:
        raise ValueError("strips lie outside of the organ, or are not in order")
    return planes


@kernel
def _find_planes(
    values: NDArray[np.int16],
    spans: NDArray[np.int64],
    shapes: NDArray[np.int64],
    ends: NDArray[np.int64],
    planes: NDArray[np.int64],
    good: NDArray[np.bool_],
) -> None:
    """Do what `_planes_of` does; organ n has ``planes[:, ends[n]:ends[n + 1]]``."""
    for n in range(spans.shape[0]):
        begin, stop = spans[n, 0], spans[n, 1]
        depth, height, width = shapes[n, 0], shapes[n, 1], shapes[n, 2]
        begins, short_strips = planes[0, ends[n] : ends[n + 1]], planes[1, ends[n] : ends[n + 1]]
        plane = 0
        good[n] = True
        for i in range(begin, stop):
            z, y, x = values[i, 0], values[i, 1], values[i, 2]
            if z < max(plane - 1, 0) or z >= depth or not (0 <= y < height and 0 <= x < width):
                good[n] = False
                break
            for _ in range(plane, z + 1):
                begins[plane] = i
                plane += 1
        begins[plane:] = stop
        short_strips[depth] = stop
        for plane in range(depth if good[n] else 0):
            short = begins[plane + 1]
            while short > begins[plane] and _is_short(values, short - 1):
                short -= 1
            short_strips[plane] = short


@kernel
def _is_short(values: NDArray[np.int16], strip: int) -> bool:
    """Whether a strip has voxels of the organ among its first `SHORT` ones only."""
    more = False
    for lane in range(SHORT, STRIP):
        more |= values[strip, HEADER_COLUMNS + lane] != NOT_ORGAN
    return not more


def _ordered(strips: NDArray[np.int16]) -> NDArray[np.int16]:
    """Put the short strips of each plane last: a kernel adds two of them as one vector."""
    short = (strips[:, HEADER_COLUMNS + SHORT :] == NOT_ORGAN).all(axis=1)
    return strips[np.lexsort((short, strips[:, 0]))]


def _cut_out(packed: NDArray[Any], coding: Coding, first: int, value: int) -> NDArray[np.int16]:
    """Cut an organ out of planes of its bounding box, from the `first` on."""
    number = coding.number_of(value)
    none = np.empty((0, HEADER_COLUMNS + STRIP), np.int16)
    count = _strips(packed, coding.hu, coding.label, number, first, none)
    out = np.empty((count, HEADER_COLUMNS + STRIP), np.int16)
    _strips(packed, coding.hu, coding.label, number, first, out)
    return out


@kernel
def _strips(
    packed: NDArray[Any],
    hu: tuple[int, int, int],
    label: tuple[int, int],
    number: int,
    first: int,
    out: NDArray[np.int16],
) -> int:
    """Cut voxels of a label into strips; count them, and write as many as `out` has rows."""
    depth, height, width = packed.shape
    n = 0
    for z in range(depth):
        for y in range(height):
            x = 0
            while x < width:
                if np.int32(packed[z, y, x]) >> label[0] & label[1] != number:
                    x += 1
                    continue
                if n < out.shape[0]:
                    out[n, 0] = first + z
                    out[n, 1] = y
                    out[n, 2] = x
                    for lane in range(STRIP):
                        one = np.int32(packed[z, y, x + lane] if x + lane < width else 0)
                        is_organ = x + lane < width and one >> label[0] & label[1] == number
                        out[n, HEADER_COLUMNS + lane] = (
                            (one >> hu[0] & hu[1]) + hu[2] if is_organ else NOT_ORGAN
                        )
                n += 1
                x += STRIP
    return n


@kernel
def fill(strips: NDArray[np.int16], first: int, out: NDArray[np.int16]) -> None:
    """Do what `Strips.dense` does for planes from the `first` on."""
    out[...] = NOT_ORGAN
    for i in range(strips.shape[0]):
        z, y, x = strips[i, 0] - first, strips[i, 1], strips[i, 2]
        for lane in range(STRIP):
            out[z, y, x + lane] = strips[i, HEADER_COLUMNS + lane]
