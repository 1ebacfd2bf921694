"""Read and write the chunks of local Zarr arrays without Zarr's event loop.

One event loop serves all threads of a process, so threads that read and write chunks of a
millisecond each mostly wait for it. Here each thread does its own I/O. Arrays of any other layout
than this project's are left to Zarr. Chunks have the same bytes either way; in shards written here
they lie in C order.
"""

import asyncio
import math
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync
from zarr.storage import LocalStore

from atlas_store.arrays.boxes import Region
from atlas_store.arrays.chunk_files import missing_chunk, read_file, replace_file
from atlas_store.arrays.chunk_gather import RegionRows
from atlas_store.arrays.chunk_layout import Layout, layout_of
from atlas_store.arrays.chunk_rows import unpack_into
from atlas_store.errors import DamagedChunkError

_INDEX_ENTRY = 16
"""Bytes of a chunk's entry in a shard's index: offset and length."""
_CHECKSUM = 4
"""Bytes of the index's CRC-32C."""
_NO_CHUNK = 2**64 - 1
"""Offset and length of a chunk that is not stored."""
_GATHERED = 8
"""Chunks gathered at a time: few enough to stay in the processor's cache."""
_CACHED_LAYOUTS = 64
"""Arrays whose layout is cached."""

COMPLETE = "all_chunks_written"
"""Attribute of arrays that store every chunk, or shard, even if it holds only 0: a missing file
was deleted, and does not mean 0."""

_UNPACKING = (ValueError, RuntimeError, EOFError, zlib.error)
"""Errors of Zarr's codecs about damaged chunks."""


def can_bypass_zarr(array: "zarr.Array[Any]") -> bool:
    """Whether the calling thread reads and writes this array itself."""
    return _layout(array) is not None


def read(array: "zarr.Array[Any]", region: Region, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Read a region, like ``array[region]``, into `out` if it is given.

    The result is C-contiguous, as kernels need it; Zarr's own depends on its configuration.

    Raises
    ------
    DamagedChunkError
        If a chunk is damaged.
    MissingChunkError
        If a chunk is missing of an array with the attribute `COMPLETE`.
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
    for numbers, within, outside in _split_by_chunk(region, layout.unit):
        path, target = layout.path(numbers), out[outside]
        try:
            if layout.shards:
                _read_shard(layout, path, within, target)
            else:
                _unpack_part(layout, read_file(path), within, target)
        except FileNotFoundError:
            if array.metadata.attributes.get(COMPLETE):
                raise missing_chunk(path) from None
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
    """Refuse an array with the attribute `COMPLETE` that lacks a chunk.

    Raises
    ------
    MissingChunkError
        If a chunk is missing, or the description of the array.
    """
    layout = _layout(array)
    whole = tuple(slice(0, n) for n in array.shape)
    if not array.metadata.attributes.get(COMPLETE):
        return
    if layout is None:
        check_objects(array, whole)
        return
    paths = [layout.path(numbers) for numbers, _, _ in _split_by_chunk(whole, layout.unit)]
    for path in (f"{_folder(layout)}/zarr.json", *paths):
        if not os.path.exists(path):
            raise missing_chunk(path)


def check_objects(array: "zarr.Array[Any]", region: Region) -> None:
    """Refuse a region of such an array that Zarr reads, as in an object store: it gives 0.

    Raises
    ------
    MissingChunkError
        If a chunk, or shard, of the region is missing.
    """
    if _layout(array) is not None or not array.metadata.attributes.get(COMPLETE):
        return
    touched = _split_by_chunk(region, array.shards or array.chunks)
    names = [array.metadata.encode_chunk_key(numbers) for numbers, _, _ in touched]
    keys = [f"{array.path}/{name}".lstrip("/") for name in names]

    async def ask() -> list[bool]:
        return await asyncio.gather(*map(array.store.exists, keys))

    for key, exists in zip(keys, sync(ask()), strict=True):
        if not exists:
            raise missing_chunk(f"{array.store}/{key}")


def write_empty(array: "zarr.Array[Any]") -> None:
    """Write every chunk, or shard, of an array with the attribute `COMPLETE`, all of them 0."""
    layout = _layout(array)
    if layout is None or not array.metadata.attributes.get(COMPLETE):
        return
    if layout.shards:
        empty = _Shard(layout, False).packed(complete=True)
    else:
        empty = [layout.pack(np.zeros(layout.chunks, layout.dtype))]
    for numbers, _, _ in _split_by_chunk(tuple(slice(0, n) for n in array.shape), layout.unit):
        replace_file(layout.path(numbers), empty, _folder(layout))


def _read_shard(layout: Layout, path: str, within: Region, out: NDArray[Any]) -> None:
    """Read a region of a shard; ValueError if it is damaged."""
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
        for numbers, inside, outside in _split_by_chunk(within, layout.chunks):
            offset, length = table[numbers].tolist()
            if offset == length == _NO_CHUNK:
                out[outside] = 0
                continue
            if offset + length > size:
                raise ValueError("a shard's index points beyond its end")
            file.seek(offset)
            _unpack_part(layout, file.read(length), inside, out[outside])


def _unpack_part(layout: Layout, chunk: bytes, inside: Region, out: NDArray[Any]) -> None:
    """Decompress a region of a chunk."""
    if out.shape == layout.chunks and out.dtype == layout.dtype and out.flags.c_contiguous:
        unpack_into(chunk, out)
    else:
        whole = np.empty(layout.chunks, layout.dtype)
        unpack_into(chunk, whole)
        out[...] = whole[inside]


def write(array: "zarr.Array[Any]", region: Region, data: NDArray[Any]) -> None:
    """Write a region, like ``array[region] = data``.

    Chunks, or shards, that the region touches hold nothing else afterwards.
    """
    with writing(array) as writer:
        writer.add(region, data)


@contextmanager
def writing(array: "zarr.Array[Any]") -> Iterator["Writer"]:
    """Write several regions, as `write` does; no two may touch the same chunk.

    Shards are written when the context ends, each once, with all regions in it.
    """
    writer = Writer(array)
    yield writer
    writer.finish()


class Writer:
    """Writer of several regions, from `writing`; buffers the compressed chunks of shards."""

    def __init__(self, array: "zarr.Array[Any]") -> None:
        self._array = array
        self._layout = _layout(array)
        self._shards: dict[str, _Shard] = {}

    def add(
        self, region: Region, data: NDArray[Any], rows: NDArray[np.bool_] | None = None
    ) -> None:
        """Write a region, or compress it for its shard.

        Parameters
        ----------
        region : tuple of slice
        data : ndarray
            Values, in the region's shape.
        rows : bool array, shape ``data.shape[:-1]``, optional
            False marks rows known to be all 0.
        """
        layout, every = self._layout, self._array.config.write_empty_chunks
        complete = bool(self._array.metadata.attributes.get(COMPLETE))
        if layout is None:
            self._array[region] = data
            return
        data = data.astype(layout.dtype, copy=False)
        if rows is None:
            rows = np.ones(data.shape[:-1], np.bool_)
        for numbers, within, outside in _split_by_chunk(region, layout.unit):
            path = layout.path(numbers)
            if not layout.shards:
                packed = _pack(layout, within, data[outside], every or complete)
                replace_file(path, packed, _folder(layout))
                continue
            if path not in self._shards:
                self._shards[path] = _Shard(layout, every)
            self._shards[path].add(within, data[outside], rows[outside[:-1]])

    def finish(self) -> None:
        """Write the shards."""
        for path, shard in self._shards.items():
            complete = bool(self._array.metadata.attributes.get(COMPLETE))
            replace_file(path, shard.packed(complete=complete), shard.folder)


class _Shard:
    """Compressed chunks of a shard, and its index."""

    def __init__(self, layout: Layout, every: bool) -> None:
        self._layout = layout
        self.folder = _folder(layout)
        self._every = every
        self._table = np.full((*layout.per_shard, 2), _NO_CHUNK, "<u8")
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, within: Region, data: NDArray[Any], filled: NDArray[np.bool_]) -> None:
        """Compress the chunks of a region that are to be stored; `filled` marks rows with data."""
        layout = self._layout
        first = [part.start // size for part, size in zip(within, layout.chunks, strict=True)]
        rows = RegionRows.of(data, within, layout.chunks, filled)
        kept = rows.occupied()
        if self._every:
            kept[...] = True
        chosen = np.argwhere(kept)
        buffer = np.empty((min(len(chosen), _GATHERED), *layout.chunks), layout.dtype)
        for begin in range(0, len(chosen), _GATHERED):
            some = chosen[begin : begin + _GATHERED]
            rows.gather(some, buffer)
            for number, whole in zip((some + first).tolist(), buffer, strict=False):
                chunk = layout.pack(whole)
                self._table[tuple(number)] = self._size, len(chunk)
                self._chunks.append(chunk)
                self._size += len(chunk)

    def packed(self, *, complete: bool) -> list[bytes] | None:
        """Content of the file; None if no chunk is stored and the array is not `complete`."""
        index = self._table.tobytes()
        checksum = google_crc32c.value(index).to_bytes(_CHECKSUM, "little")
        return [*self._chunks, index, checksum] if self._chunks or complete else None


def _pack(layout: Layout, within: Region, data: NDArray[Any], every: bool) -> list[bytes] | None:
    """Compress a region of a chunk; None if it is all 0 and need not be stored."""
    if not every and not data.any():
        return None
    if data.shape != layout.chunks:
        whole = np.zeros(layout.chunks, layout.dtype)
        whole[within] = data
        data = whole
    return [layout.pack(np.ascontiguousarray(data))]


def _layout(array: "zarr.Array[Any]") -> Layout | None:
    """How the array lies in local files; None if Zarr must read and write it."""
    if not isinstance(array.store, LocalStore) or sys.byteorder != "little":
        return None
    metadata = array.metadata
    known = _layouts.get(id(metadata))
    # Writing the metadata out as a document takes longer than reading a small chunk.
    if known is None or known[0] is not metadata:
        known = metadata, layout_of(metadata.to_dict())
        if len(_layouts) >= _CACHED_LAYOUTS:
            _layouts.clear()
        _layouts[id(metadata)] = known
    layout = known[1]
    return layout and layout._replace(prefix=f"{array.store.root}/{array.path}/c")


_layouts: dict[int, tuple[object, Layout | None]] = {}
"""Layouts of arrays used lately, by the identity of their metadata."""


def _split_by_chunk(
    region: Region, unit: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], Region, Region]]:
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
