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
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedWriter
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import google_crc32c
import numpy as np
import zarr
from numcodecs.blosc import compress, decompress  # type: ignore[import-untyped]
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.chunk_key_encodings import DefaultChunkKeyEncoding
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore

from atlas_store.arrays.flat import flat
from atlas_store.arrays.jit import kernel

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
_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}

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
    return _folder(array) is not None


def read(array: "zarr.Array[Any]", region: Region, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Read a region, like ``array[region]``, into `out` if it is given.

    Raises
    ------
    ValueError
        If a chunk is damaged.
    """
    if out is None:
        out = np.empty([part.stop - part.start for part in region], array.dtype)
    folder = _folder(array)
    if folder is None:
        out[...] = array[region]
        return out
    for numbers, within, outside in _cut(region, array.shards or array.chunks):
        path, target = f"{folder}/{_key(array, numbers)}", out[outside]
        try:
            if array.shards:
                _read_shard(array, path, within, target)
            else:
                _unpack_part(array, _contents(path), within, target)
        except FileNotFoundError:
            target[...] = array.fill_value
    return out


def _contents(path: str) -> bytes:
    """Read a file: with few calls, after each of which a thread may have to wait for others."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, os.fstat(file).st_size)
    finally:
        os.close(file)


def _read_shard(array: "zarr.Array[Any]", path: str, within: Region, out: NDArray[Any]) -> None:
    """Read a region of a shard; raises ValueError if it is damaged."""
    per_axis = _chunks_per_shard(array)
    with open(path, "rb") as file:
        index = _INDEX_ENTRY * math.prod(per_axis) + _CHECKSUM
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - index, 0))
        ends = file.read()
        places, checksum = ends[:-_CHECKSUM], ends[-_CHECKSUM:]
        if len(ends) != index or google_crc32c.value(places) != int.from_bytes(checksum, "little"):
            raise ValueError("a shard's index is damaged")
        table = np.frombuffer(places, "<u8").reshape(*per_axis, 2)
        for numbers, inside, outside in _cut(within, array.chunks):
            offset, length = table[numbers].tolist()
            if offset == length == _NO_CHUNK:
                out[outside] = array.fill_value
                continue
            if offset + length > size:
                raise ValueError("a shard's index points beyond its end")
            file.seek(offset)
            _unpack_part(array, file.read(length), inside, out[outside])


def _unpack_part(array: "zarr.Array[Any]", chunk: bytes, inside: Region, out: NDArray[Any]) -> None:
    """Unpack a region of a chunk."""
    if out.shape == array.chunks and out.dtype == array.dtype and out.flags.c_contiguous:
        unpack_into(chunk, out)
    else:
        whole = np.empty(array.chunks, array.dtype)
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
        self._folder = _folder(array)
        self._shards: dict[str, _Shard] = {}

    def add(
        self, region: Region, data: NDArray[Any], rows: NDArray[np.bool_] | None = None
    ) -> None:
        """Write a region, or pack it.

        If `rows` is given, of the shape of `data` but for the last axis, it says which rows hold
        anything but 0, if any do.
        """
        array = self._array
        if self._folder is None:
            array[region] = data
            return
        data = data.astype(array.dtype, copy=False)
        if rows is None:
            rows = np.ones(data.shape[:-1], np.bool_)
        for numbers, within, outside in _cut(region, array.shards or array.chunks):
            path = f"{self._folder}/{_key(array, numbers)}"
            if not array.shards:
                _put(path, _pack(array, within, data[outside]))
                continue
            if path not in self._shards:
                self._shards[path] = _Shard(array)
            self._shards[path].add(within, data[outside], rows[outside[:-1]])

    def finish(self) -> None:
        """Write the shards."""
        for path, shard in self._shards.items():
            _put(path, shard.packed())


class _Shard:
    """Chunks of a shard, packed, and where each lies."""

    def __init__(self, array: "zarr.Array[Any]") -> None:
        self._array = array
        self._compressed = _compressor(array)
        self._table = np.full((*_chunks_per_shard(array), 2), _NO_CHUNK, "<u8")
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, within: Region, data: NDArray[Any], filled: NDArray[np.bool_]) -> None:
        """Pack what is to keep of a region, of which some rows are filled."""
        array = self._array
        first = [part.start // size for part, size in zip(within, array.chunks, strict=True)]
        rows = _Rows.of(data, within, array.chunks, filled)
        kept = rows.occupied()
        if array.config.write_empty_chunks:
            kept[...] = True
        chosen = np.argwhere(kept)
        room = np.empty((min(len(chosen), _TOGETHER), *array.chunks), array.dtype)
        for begin in range(0, len(chosen), _TOGETHER):
            some = chosen[begin : begin + _TOGETHER]
            rows.gather(some, room)
            for number, whole in zip((some + first).tolist(), room, strict=False):
                chunk = self._compressed(whole)
                self._table[tuple(number)] = self._size, len(chunk)
                self._chunks.append(chunk)
                self._size += len(chunk)

    def packed(self) -> list[bytes] | None:
        """Give what the file holds; nothing if there is nothing to keep."""
        index = self._table.tobytes()
        checksum = google_crc32c.value(index).to_bytes(_CHECKSUM, "little")
        return [*self._chunks, index, checksum] if self._chunks else None


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


def _pack(array: "zarr.Array[Any]", within: Region, data: NDArray[Any]) -> list[bytes] | None:
    """Pack a region of a chunk; nothing if there is nothing to keep."""
    if not array.config.write_empty_chunks and not data.any():
        return None
    if data.shape != array.chunks:
        whole = np.full(array.chunks, array.fill_value, array.dtype)
        whole[within] = data
        data = whole
    return [_compressor(array)(np.ascontiguousarray(data))]


def _compressor(array: "zarr.Array[Any]") -> Callable[[NDArray[Any]], bytes]:
    codec = _stages(array)[1]
    assert isinstance(codec, BloscCodec)
    how = codec.cname.value.encode(), codec.clevel, _SHUFFLES[codec.shuffle.value], codec.blocksize
    return lambda chunk: cast(bytes, compress(chunk, *how, codec.typesize))


def _folder(array: "zarr.Array[Any]") -> str | None:
    """Where the array lies, if its chunks are local files, packed as this project packs them."""
    if not isinstance(array.store, LocalStore) or not isinstance(array.metadata, ArrayV3Metadata):
        return None
    stages = _stages(array)
    plain = (
        len(stages) == 2
        and isinstance(stages[0], BytesCodec)
        and (stages[0].endian is None or stages[0].endian.value == "little")
        and isinstance(stages[1], BloscCodec)
        and isinstance(array.metadata.chunk_key_encoding, DefaultChunkKeyEncoding)
        and array.dtype.isnative
        and array.fill_value == 0
    )
    return f"{array.store.root}/{array.path}" if plain else None


def _stages(array: "zarr.Array[Any]") -> Sequence[Any]:
    """List what a chunk goes through; nothing if its shard is laid out in another way than ours."""
    assert isinstance(array.metadata, ArrayV3Metadata)
    stages = array.metadata.codecs
    if not array.shards:
        return stages
    [sharding] = stages
    assert isinstance(sharding, ShardingCodec)
    index: Sequence[Any] = sharding.index_codecs
    plain = (
        sharding.index_location.value == "end"
        and [type(codec) for codec in index] == [BytesCodec, Crc32cCodec]
        and index[0].endian is not None
        and index[0].endian.value == "little"
    )
    return sharding.codecs if plain else ()


def _chunks_per_shard(array: "zarr.Array[Any]") -> tuple[int, ...]:
    assert array.shards is not None
    return tuple(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))


def _key(array: "zarr.Array[Any]", numbers: tuple[int, ...]) -> str:
    assert isinstance(array.metadata, ArrayV3Metadata)
    return array.metadata.chunk_key_encoding.encode_chunk_key(numbers)


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


def _put(path: str, data: Sequence[bytes] | None) -> None:
    """Write a file, there whole or not at all; without data there is none."""
    if data is None:
        Path(path).unlink(missing_ok=True)
        return
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        file = open(partial, "xb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(partial, "xb")  # noqa: SIM115
    with file:
        _write_pieces(file, data)
    os.replace(partial, path)


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
