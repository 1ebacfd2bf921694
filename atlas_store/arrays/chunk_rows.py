"""Whole rows of single chunks, of local files and of objects, without Zarr.

For the formats of an atlas: their chunks are cut along the first axis only, and a caller wants a
few rows of each. A chunk comes from a store that somebody else may have written, so its
description and its sizes are checked before it is decompressed.
"""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numcodecs.blosc import decompress  # type: ignore[import-untyped]
from numpy.typing import NDArray

_HEADER = 16
"""Bytes of a blosc chunk before its data."""
_COPIED = 2
"""Flag of a blosc chunk whose data is stored uncompressed."""


def describe_mismatch(
    document: Any, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype[Any]
) -> str | None:
    """Name the first field of a parsed ``zarr.json`` that is not as expected; None if all are.

    Expected is an array of this shape, chunk shape and dtype: little-endian, compressed by blosc,
    without shards.
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
    """Decompress a blosc chunk into a contiguous array.

    Raises
    ------
    ValueError
        If its size is not that of the array, or it is damaged.
    """
    sizes = struct.unpack_from("<I4xI", chunk, 4) if len(chunk) >= _HEADER else (0, 0)
    if sizes != (out.nbytes, len(chunk)):
        raise ValueError(f"a chunk unpacks {sizes[1]} bytes to {sizes[0]}, not to {out.nbytes}")
    try:
        decompress(chunk, out)
    except RuntimeError as error:
        raise ValueError(f"a chunk cannot be unpacked: {error}") from error


class ChunkRows(NamedTuple):
    """Rows wanted of a blosc chunk.

    Attributes
    ----------
    key : str
        Key of the chunk's object, or path of its file.
    chunk : int
        Number of rows of the whole chunk.
    spans : sequence of (int, int)
        Half-open ranges of rows.
    """

    key: str
    chunk: int
    spans: Sequence[tuple[int, int]]


def unpack_files(wanted: Sequence[ChunkRows], out: NDArray[Any]) -> None:
    """Decompress rows of chunks that are files, one after another along the first axis of `out`.

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


def unpack_all(
    wanted: Sequence[ChunkRows], chunks: Sequence[bytes | None], out: NDArray[Any]
) -> None:
    """Decompress as `unpack_files` does, from chunks in memory; None is a missing chunk."""
    for rows, chunk, part in zip(wanted, chunks, _parts(wanted, out), strict=True):
        if chunk is None:
            raise ValueError("a chunk is missing")
        _unpack_rows(rows, chunk, part)


def _parts(wanted: Sequence[ChunkRows], out: NDArray[Any]) -> Iterator[NDArray[Any]]:
    begin = 0
    for rows in wanted:
        end = begin + sum(b - a for a, b in rows.spans)
        yield out[begin:end]
        begin = end


def _unpack_rows(rows: ChunkRows, chunk: bytes, out: NDArray[Any]) -> None:
    if rows.spans == [(0, rows.chunk)]:
        unpack_into(chunk, out)
        return
    whole = np.empty((rows.chunk, *out.shape[1:]), out.dtype)
    unpack_into(chunk, whole)
    np.concatenate([whole[a:b] for a, b in rows.spans], out=out)


def _unpack_file(rows: ChunkRows, out: NDArray[Any]) -> None:
    """Decompress rows of a file; of an uncompressed one, only these rows are read."""
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
