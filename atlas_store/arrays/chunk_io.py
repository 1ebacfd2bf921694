"""Read and write the chunks of local Zarr arrays without Zarr's event loop.

One loop serves all threads of a process, so that two threads which read and write chunks of a
millisecond each mostly wait for each other. Here a thread does its own. What is not laid out as
this project lays it out is left to Zarr. Chunks are the same bytes either way; in shards of ours
they lie in C order.
"""

import json
import math
import os
import struct
import sys
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedWriter
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zarr
from numcodecs.blosc import decompress  # type: ignore[import-untyped]
from numpy.typing import NDArray
from zarr.storage import LocalStore

from atlas_store.arrays.chunk_layout import Layout, layout_of
from atlas_store.arrays.flat import flat
from atlas_store.arrays.jit import kernel
from atlas_store.errors import DamagedChunkError, MissingChunkError

_HEADER = 16
_COPIED = 2
"""Flag of a blosc chunk whose bytes are as they were."""
_INDEX_ENTRY = 16
_CHECKSUM = 4
_NO_CHUNK = 2**64 - 1
_TOGETHER = 8
"""Chunks that are gathered at a time: so few that they stay in the cache."""
_PIECES = 1024
"""That are written with one call: the most that Linux takes."""
_REMEMBERED = 64
"""Arrays whose layout is kept."""

COMPLETE = "all_chunks_written"
"""Attribute of arrays of which every chunk, or shard, is a file, also if it holds only 0: one
that is missing was deleted, and is no data."""

_UNPACKING = (ValueError, RuntimeError, EOFError, zlib.error)
"""What Zarr's codecs say of damaged chunks."""

Region = tuple[slice, ...]
"""One slice with plain bounds per axis."""


def misfit(
    document: Any, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype[Any]
) -> str | None:
    """Say what of a parsed ``zarr.json`` is not that of such an array, or nothing if all is.

    Little-endian, packed by blosc, without shards.
    """
    if not isinstance(document, dict):
        return "no description"
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    }
    for field, value in expected.items():
        if document.get(field) != value:
            return f"{field} {document.get(field)!r}, not {value!r}"
    codecs = document.get("codecs")
    named = isinstance(codecs, list) and all(isinstance(codec, dict) for codec in codecs)
    stages = [codec.get("name") for codec in codecs or []] if named else None
    if stages != ["bytes", "blosc"] or '"big"' in json.dumps(codecs):
        return f"the codecs {codecs!r}"
    return None


def unpack_into(chunk: bytes, out: NDArray[Any]) -> None:
    """Unpack a blosc chunk into a contiguous array.

    Raises
    ------
    ValueError
        If it would unpack to another size, or cannot be unpacked.
    """
    sizes = struct.unpack_from("<I4xI", chunk, 4) if len(chunk) >= _HEADER else (0, 0)
    if sizes != (out.nbytes, len(chunk)):
        raise ValueError(f"a chunk unpacks {sizes[1]} bytes to {sizes[0]}, not to {out.nbytes}")
    try:
        decompress(chunk, out)
    except RuntimeError as error:
        raise ValueError(f"a chunk cannot be unpacked: {error}") from error


class Rows(NamedTuple):
    """Rows of a blosc chunk that are wanted.

    Attributes
    ----------
    key : str
        Where the chunk lies: key of an object, path of a file.
    chunk : int
        How many rows the chunk has.
    spans : sequence of (int, int)
        The first row, and the one after the last.
    """

    key: str
    chunk: int
    spans: Sequence[tuple[int, int]]


def unpack_files(wanted: Sequence[Rows], out: NDArray[Any]) -> None:
    """Unpack rows of chunks that are files, one after another, along the first axis of an array.

    Raises
    ------
    ValueError
        If a chunk is missing or damaged.
    """
    for rows, part in zip(wanted, _parts(wanted, out), strict=True):
        try:
            _unpack_file(rows, part)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ValueError("a chunk is missing") from error


def unpack_all(wanted: Sequence[Rows], chunks: Sequence[bytes | None], out: NDArray[Any]) -> None:
    """Do what `unpack_files` does, for chunks that have been read."""
    for rows, chunk, part in zip(wanted, chunks, _parts(wanted, out), strict=True):
        if chunk is None:
            raise ValueError("a chunk is missing")
        _unpack_rows(rows, chunk, part)


def _parts(wanted: Sequence[Rows], out: NDArray[Any]) -> Iterator[NDArray[Any]]:
    begin = 0
    for rows in wanted:
        end = begin + sum(b - a for a, b in rows.spans)
        yield out[begin:end]
        begin = end


def _unpack_rows(rows: Rows, chunk: bytes, out: NDArray[Any]) -> None:
    if rows.spans == [(0, rows.chunk)]:
        unpack_into(chunk, out)
        return
    whole = np.empty((rows.chunk, *out.shape[1:]), out.dtype)
    unpack_into(chunk, whole)
    np.concatenate([whole[a:b] for a, b in rows.spans], out=out)


def _unpack_file(rows: Rows, out: NDArray[Any]) -> None:
    """Unpack rows of a file; of one whose bytes are as they were, no others are read."""
    row = out.nbytes // max(len(out), 1)
    with open(rows.key, "rb", buffering=0) as file:
        size, whole = os.fstat(file.fileno()).st_size, rows.chunk * row
        if size > _HEADER + whole:
            raise ValueError(f"a chunk has {size} bytes, too many for {whole}")
        header = file.read(_HEADER)
        copied = len(header) == _HEADER and header[2] & _COPIED and size == _HEADER + whole
        if not copied or struct.unpack_from("<I4xI", header, 4) != (whole, size):
            file.seek(0)
            _unpack_rows(rows, file.read(size), out)
            return
        begin = 0
        for a, b in rows.spans:
            file.seek(_HEADER + a * row)
            part = memoryview(out[begin : begin + b - a].data).cast("B")
            if file.readinto(part) != part.nbytes:
                raise ValueError("a chunk is cut off")
            begin += b - a


def serves(array: "zarr.Array[Any]") -> bool:
    """Whether the calling thread reads and writes such an array itself."""
    return _layout(array) is not None


def read(array: "zarr.Array[Any]", region: Region, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Read a region, like ``array[region]``, into `out` if it is given.

    Kernels take what this gives: in C order, which what Zarr gives is only if it is so configured.

    Raises
    ------
    DamagedChunkError
        If a chunk is damaged.
    MissingChunkError
        If a chunk is missing of an array that says it has all.
    """
    if out is None:
        out = np.empty([part.stop - part.start for part in region], array.dtype)
    layout = _layout(array)
    if layout is None:
        try:
            out[...] = array[region]
        except _UNPACKING as error:
            raise _damaged(f"{array.store_path}", error) from error
        return out
    for numbers, within, outside in _cut(region, layout.unit):
        path, target = layout.path(numbers), out[outside]
        try:
            if layout.shards:
                _read_shard(layout, path, within, target)
            else:
                _unpack_part(layout, _contents(path), within, target)
        except FileNotFoundError:
            if array.metadata.attributes.get(COMPLETE):
                raise _gone(path) from None
            target[...] = 0
        except ValueError as error:
            raise _damaged(path, error) from error
    return out


def _damaged(path: str, error: Exception) -> DamagedChunkError:
    return DamagedChunkError(
        f"{path} is damaged ({str(error) or type(error).__name__}): restore it from a copy, or"
        " make anew what holds it."
    )


def check_complete(array: "zarr.Array[Any]") -> None:
    """Refuse an array that says it has all chunks and lacks one.

    Raises
    ------
    MissingChunkError
        If a chunk is missing, or the description of the array.
    """
    layout = _layout(array)
    if layout is None or not array.metadata.attributes.get(COMPLETE):
        return
    whole = tuple(slice(0, n) for n in array.shape)
    paths = [layout.path(numbers) for numbers, _, _ in _cut(whole, layout.unit)]
    for path in (f"{_folder(layout)}/zarr.json", *paths):
        if not os.path.exists(path):
            raise _gone(path)


def write_empty(array: "zarr.Array[Any]") -> None:
    """Write every chunk, or shard, of an array that says it has all: with nothing in it."""
    layout = _layout(array)
    if layout is None or not array.metadata.attributes.get(COMPLETE):
        return
    if layout.shards:
        empty = _Shard(layout, False).packed(complete=True)
    else:
        empty = [layout.pack(np.zeros(layout.chunks, layout.dtype))]
    for numbers, _, _ in _cut(tuple(slice(0, n) for n in array.shape), layout.unit):
        _put(layout.path(numbers), empty, _folder(layout))


def _contents(path: str) -> bytes:
    """Read a file: with few calls, after each of which a thread may have to wait for others."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, os.fstat(file).st_size)
    finally:
        os.close(file)


def _read_shard(layout: Layout, path: str, within: Region, out: NDArray[Any]) -> None:
    """Read a region of a shard; raises ValueError if it is damaged."""
    per_axis = layout.per_shard
    with open(path, "rb") as file:
        index = _INDEX_ENTRY * math.prod(per_axis) + _CHECKSUM
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - index, 0))
        ends = file.read()
        places, checksum = ends[:-_CHECKSUM], ends[-_CHECKSUM:]
        if len(ends) != index or google_crc32c.value(places) != int.from_bytes(checksum, "little"):
            raise ValueError("a shard's index is damaged")
        table = np.frombuffer(places, "<u8").reshape(*per_axis, 2)
        for numbers, inside, outside in _cut(within, layout.chunks):
            offset, length = table[numbers].tolist()
            if offset == length == _NO_CHUNK:
                out[outside] = 0
                continue
            if offset + length > size:
                raise ValueError("a shard's index points beyond its end")
            file.seek(offset)
            _unpack_part(layout, file.read(length), inside, out[outside])


def _unpack_part(layout: Layout, chunk: bytes, inside: Region, out: NDArray[Any]) -> None:
    """Unpack a region of a chunk."""
    if out.shape == layout.chunks and out.dtype == layout.dtype and out.flags.c_contiguous:
        unpack_into(chunk, out)
    else:
        whole = np.empty(layout.chunks, layout.dtype)
        unpack_into(chunk, whole)
        out[...] = whole[inside]


def write(array: "zarr.Array[Any]", region: Region, data: NDArray[Any]) -> None:
    """Write a region, like ``array[region] = data``.

    What it touches of an array, chunks or shards, holds nothing else afterwards.
    """
    with writing(array) as writer:
        writer.add(region, data)


@contextmanager
def writing(array: "zarr.Array[Any]") -> Iterator["Writer"]:
    """Write several regions, of which none touches a chunk that another does, as `write` does.

    Shards that they touch are written at the end, and hold them together.
    """
    writer = Writer(array)
    yield writer
    writer.finish()


class Writer:
    """What `writing` gives: packs regions as they come, and keeps what is packed of shards."""

    def __init__(self, array: "zarr.Array[Any]") -> None:
        self._array = array
        self._layout = _layout(array)
        self._shards: dict[str, _Shard] = {}

    def add(
        self, region: Region, data: NDArray[Any], rows: NDArray[np.bool_] | None = None
    ) -> None:
        """Write a region, or pack it.

        If `rows` is given, of the shape of `data` but for the last axis, it says which rows hold
        anything but 0, if any do.
        """
        layout, every = self._layout, self._array.config.write_empty_chunks
        complete = bool(self._array.metadata.attributes.get(COMPLETE))
        if layout is None:
            self._array[region] = data
            return
        data = data.astype(layout.dtype, copy=False)
        if rows is None:
            rows = np.ones(data.shape[:-1], np.bool_)
        for numbers, within, outside in _cut(region, layout.unit):
            path = layout.path(numbers)
            if not layout.shards:
                packed = _pack(layout, within, data[outside], every or complete)
                _put(path, packed, _folder(layout))
                continue
            if path not in self._shards:
                self._shards[path] = _Shard(layout, every)
            self._shards[path].add(within, data[outside], rows[outside[:-1]])

    def finish(self) -> None:
        """Write the shards."""
        for path, shard in self._shards.items():
            complete = bool(self._array.metadata.attributes.get(COMPLETE))
            _put(path, shard.packed(complete=complete), shard.folder)


class _Shard:
    """Chunks of a shard, packed, and where each lies."""

    def __init__(self, layout: Layout, every: bool) -> None:
        self._layout = layout
        self.folder = _folder(layout)
        self._every = every
        self._table = np.full((*layout.per_shard, 2), _NO_CHUNK, "<u8")
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, within: Region, data: NDArray[Any], filled: NDArray[np.bool_]) -> None:
        """Pack what is to keep of a region, of which some rows are filled."""
        layout = self._layout
        first = [part.start // size for part, size in zip(within, layout.chunks, strict=True)]
        rows = _Rows.of(data, within, layout.chunks, filled)
        kept = rows.occupied()
        if self._every:
            kept[...] = True
        chosen = np.argwhere(kept)
        room = np.empty((min(len(chosen), _TOGETHER), *layout.chunks), layout.dtype)
        for begin in range(0, len(chosen), _TOGETHER):
            some = chosen[begin : begin + _TOGETHER]
            rows.gather(some, room)
            for number, whole in zip((some + first).tolist(), room, strict=False):
                chunk = layout.pack(whole)
                self._table[tuple(number)] = self._size, len(chunk)
                self._chunks.append(chunk)
                self._size += len(chunk)

    def packed(self, *, complete: bool) -> list[bytes] | None:
        """Give what the file holds; nothing if there is nothing to keep and none need be."""
        index = self._table.tobytes()
        checksum = google_crc32c.value(index).to_bytes(_CHECKSUM, "little")
        return [*self._chunks, index, checksum] if self._chunks or complete else None


class _Rows(NamedTuple):
    """Rows of a region of an array, and how chunks cut them.

    Attributes
    ----------
    memory : ndarray (n)
        That the region's data span.
    step : int
        From one row of the data, along their last axis, to the next.
    filled : bool array (rows)
        Whether each holds anything but 0, if it may.
    shape, begin, unit : tuple of int
        Of the region, its first number in the first chunk that it touches, and of a chunk.
    """

    memory: NDArray[Any]
    step: int
    filled: NDArray[np.bool_]
    shape: tuple[int, ...]
    begin: tuple[int, ...]
    unit: tuple[int, ...]

    @classmethod
    def of(
        cls,
        data: NDArray[Any],
        region: Region,
        unit: tuple[int, ...],
        filled: NDArray[np.bool_],
    ) -> "_Rows":
        """Rows of the data of a region."""
        rows = data.reshape(-1, data.shape[-1])
        try:
            memory, (step, _) = flat(rows)
        except ValueError:
            memory, (step, _) = flat(np.ascontiguousarray(rows))
        begin = tuple(part.start % size for part, size in zip(region, unit, strict=True))
        return cls(memory, step, filled.ravel(), data.shape, begin, unit)

    def occupied(self) -> NDArray[np.bool_]:
        """Whether anything is not 0 in each chunk, along each axis."""
        each = zip(self.begin, self.shape, self.unit, strict=True)
        kept = np.zeros([-(-(a + n) // size) for a, n, size in each], np.bool_)
        _mark(*self, kept.reshape(-1, kept.shape[-1]))
        return kept

    def gather(self, chosen: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Gather some chunks, (n, axis) from the first that is touched; 0 beside the region."""
        _gather(*self, chosen, out.reshape(len(out), -1, self.unit[-1]))


@kernel
def _mark(
    memory: Any, step: Any, filled: Any, shape: Any, begin: Any, unit: Any, kept: Any
) -> None:
    """Do what `_Rows.occupied` does; `kept` has a row for each row of chunks."""
    for row in range(filled.size):
        if not filled[row]:
            continue
        chunks, rest, ahead = 0, row, 1
        for back in range(2, len(shape) + 1):
            at = rest % shape[-back] + begin[-back]
            chunks += ahead * (at // unit[-back])
            ahead *= -(-(begin[-back] + shape[-back]) // unit[-back])
            rest //= shape[-back]
        own, numbers = kept[chunks], memory[row * step : row * step + shape[-1]]
        for c in range(own.size):
            # Most are marked by their first rows.
            if own[c]:
                continue
            first = max(c * unit[-1] - begin[-1], 0)
            found = 0
            for x in range(first, min((c + 1) * unit[-1] - begin[-1], shape[-1])):
                found |= numbers[x] != 0
            own[c] = found != 0


@kernel
def _gather(
    memory: Any,
    step: Any,
    filled: Any,
    shape: Any,
    begin: Any,
    unit: Any,
    chosen: Any,
    out: Any,
) -> None:
    """Do what `_Rows.gather` does; `out` has a row for each of a chunk's."""
    for n in range(chosen.shape[0]):
        # Of the region, and of the chunk, where both begin along the rows, and how long.
        before = chosen[n, -1] * unit[-1] - begin[-1]
        source, target = max(before, 0), max(-before, 0)
        columns = min(shape[-1] - source, unit[-1] - target)
        for row in range(out.shape[1]):
            there, rest, ahead, inside = 0, row, 1, True
            for back in range(2, len(shape) + 1):
                at = chosen[n, -back] * unit[-back] + rest % unit[-back] - begin[-back]
                inside &= (at >= 0) & (at < shape[-back])
                there += ahead * at
                ahead *= shape[-back]
                rest //= unit[-back]
            own = out[n, row]
            inside = inside and filled[there]
            if not inside or columns < own.size:
                own[:] = 0
            if inside:
                place = there * step + source
                own[target : target + columns] = memory[place : place + columns]


def _pack(layout: Layout, within: Region, data: NDArray[Any], every: bool) -> list[bytes] | None:
    """Pack a region of a chunk; nothing if there is nothing to keep."""
    if not every and not data.any():
        return None
    if data.shape != layout.chunks:
        whole = np.zeros(layout.chunks, layout.dtype)
        whole[within] = data
        data = whole
    return [layout.pack(np.ascontiguousarray(data))]


def _layout(array: "zarr.Array[Any]") -> Layout | None:
    """How the array lies in local files; nothing if Zarr is to read and write it."""
    if not isinstance(array.store, LocalStore) or sys.byteorder != "little":
        return None
    metadata = array.metadata
    known = _layouts.get(id(metadata))
    # Written out as a document, metadata take longer than to read a small chunk.
    if known is None or known[0] is not metadata:
        known = metadata, layout_of(metadata.to_dict())
        if len(_layouts) >= _REMEMBERED:
            _layouts.clear()
        _layouts[id(metadata)] = known
    layout = known[1]
    return layout and layout._replace(prefix=f"{array.store.root}/{array.path}/c")


_layouts: dict[int, tuple[object, Layout | None]] = {}
"""Of arrays that were read or written lately, by the identity of their metadata."""


def _cut(region: Region, unit: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Region, Region]]:
    """Yield the number of each unit that a region touches, and its parts of unit and region."""
    axes = []
    for part, size in zip(region, unit, strict=True):
        axis = []
        for c in range(part.start // size, -(-part.stop // size)):
            start, stop = max(part.start, c * size), min(part.stop, (c + 1) * size)
            inside = slice(start - c * size, stop - c * size)
            axis.append((c, inside, slice(start - part.start, stop - part.start)))
        axes.append(axis)
    for each in product(*axes):
        numbers, inside, outside = zip(*each, strict=True)
        yield numbers, inside, outside


def _folder(layout: Layout) -> str:
    """Folder of an array, in which its description lies."""
    return os.path.dirname(layout.prefix)


def _gone(path: str) -> MissingChunkError:
    return MissingChunkError(
        f"{path} is gone: something deleted it after it was written; run again, where nobody"
        " cleans up meanwhile."
    )


def _put(path: str, data: Sequence[bytes] | None, root: str) -> None:
    """Write a file, there whole or not at all; without data there is none.

    Folders are made below the array's own only: that one is missing if somebody deleted it.
    """
    if data is None:
        Path(path).unlink(missing_ok=True)
        return
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        file = open(partial, "xb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        if not os.path.isdir(root):
            raise _gone(root) from None
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(partial, "xb")  # noqa: SIM115
    with file:
        _write_pieces(file, data)
    try:
        os.replace(partial, path)
    except FileNotFoundError:
        raise _gone(path) from None


def _write_pieces(file: BufferedWriter, data: Sequence[bytes]) -> None:
    """Write pieces in few calls: after each a thread may have to wait for others."""
    for first in range(0, len(data), _PIECES):
        some = data[first : first + _PIECES]
        written = os.writev(file.fileno(), some)
        for piece in some if written < sum(map(len, some)) else ():
            # So much at once, or a disk so full, that not all was written.
            file.write(piece[max(written, 0) :])
            written -= len(piece)
        file.flush()
