"""Read and write the chunks of local Zarr arrays without Zarr's event loop.

One loop serves all threads of a process, so that two threads which read and write chunks of a
millisecond each mostly wait for each other. Here a thread does its own. What is not laid out as
this project lays it out is left to Zarr; the bytes on disk are the same either way.
"""

import json
import os
import struct
import uuid
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.blosc import compress, decompress  # type: ignore[import-untyped]
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec
from zarr.core.chunk_key_encodings import DefaultChunkKeyEncoding
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore

_HEADER = 16
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


def unpack_all(chunks: Sequence[bytes | None], out: NDArray[Any]) -> None:
    """Unpack chunks one after another, along the first axis of an array of as many.

    Raises
    ------
    ValueError
        If a chunk is missing or damaged.
    """
    step = len(out) // max(len(chunks), 1)
    for i, chunk in enumerate(chunks):
        if chunk is None:
            raise ValueError("a chunk is missing")
        unpack_into(chunk, out[i * step : (i + 1) * step])


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
    for key, inside, outside in _chunks(array, region):
        try:
            chunk = (folder / key).read_bytes()
        except FileNotFoundError:
            out[outside] = array.fill_value
            continue
        part = out[outside]
        if part.shape == array.chunks and part.flags.c_contiguous:
            unpack_into(chunk, part)
        else:
            whole = np.empty(array.chunks, array.dtype)
            unpack_into(chunk, whole)
            part[...] = whole[inside]
    return out


def write(array: "zarr.Array[Any]", region: Region, data: NDArray[Any]) -> None:
    """Write a region of whole chunks, like ``array[region] = data``."""
    folder = _folder(array)
    if folder is None:
        array[region] = data
        return
    data = data.astype(array.dtype, copy=False)
    assert isinstance(array.metadata, ArrayV3Metadata)
    codec = array.metadata.codecs[1]
    assert isinstance(codec, BloscCodec)
    settings = codec.cname.value.encode(), codec.clevel, _SHUFFLES[codec.shuffle.value]
    for key, inside, outside in _chunks(array, region):
        path = folder / key
        part = data[outside]
        if not array.config.write_empty_chunks and not part.any():
            path.unlink(missing_ok=True)
            continue
        if part.shape != array.chunks:
            whole = np.full(array.chunks, array.fill_value, array.dtype)
            whole[inside] = part
            part = whole
        packed = compress(np.ascontiguousarray(part), *settings, codec.blocksize, codec.typesize)
        _replace(path, packed)


def _folder(array: "zarr.Array[Any]") -> Path | None:
    """Where the array lies, if its chunks are local files, packed as this project packs them."""
    if not isinstance(array.store, LocalStore) or not isinstance(array.metadata, ArrayV3Metadata):
        return None
    codecs = array.metadata.codecs
    plain = (
        len(codecs) == 2
        and isinstance(codecs[0], BytesCodec)
        and (codecs[0].endian is None or codecs[0].endian.value == "little")
        and isinstance(codecs[1], BloscCodec)
        and isinstance(array.metadata.chunk_key_encoding, DefaultChunkKeyEncoding)
        and array.dtype.isnative
        and array.fill_value == 0
    )
    return Path(array.store.root, array.path) if plain else None


def _chunks(
    array: "zarr.Array[Any]", region: Region
) -> Iterator[tuple[str, tuple[slice, ...], tuple[slice, ...]]]:
    """Key of each chunk that a region touches, its part of the chunk, and of the region."""
    assert isinstance(array.metadata, ArrayV3Metadata)
    key_of = array.metadata.chunk_key_encoding.encode_chunk_key
    axes = []
    for part, size in zip(region, array.chunks, strict=True):
        axis = []
        for c in range(part.start // size, -(-part.stop // size)):
            start, stop = max(part.start, c * size), min(part.stop, (c + 1) * size)
            inside = slice(start - c * size, stop - c * size)
            axis.append((c, inside, slice(start - part.start, stop - part.start)))
        axes.append(axis)
    for each in product(*axes):
        numbers, inside, outside = zip(*each, strict=True)
        yield key_of(numbers), inside, outside


def _replace(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        file = open(partial, "xb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(partial, "xb")  # noqa: SIM115
    with file:
        file.write(data)
    os.replace(partial, path)
