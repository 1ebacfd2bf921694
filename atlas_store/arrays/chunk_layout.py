"""How the chunks of an array lie in files, decided from its ``zarr.json`` alone.

The specification fixes how a description is written; how a library holds it in memory changes
with each release. Every field may be extended, so an array with anything unknown here is left to
Zarr itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import numpy as np
from numcodecs.blosc import compress, list_compressors  # type: ignore[import-untyped]
from numpy.typing import NDArray

_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
_COMPRESSORS = frozenset(list_compressors())
_BLOSC = {"cname", "clevel", "shuffle", "typesize", "blocksize"}
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE = [{"name": "bytes"}, {"name": "bytes", "configuration": {}}]
_INDEX_CODECS = [_LITTLE, {"name": "crc32c"}]
_DATA_TYPES = frozenset(
    [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)] + ["float32", "float64"]
)
_FIELDS = {
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "fill_value",
    "attributes",
    "dimension_names",
    "storage_transformers",
}
"""Fields that the description of an array may have."""


class Layout(NamedTuple):
    """How chunks of little-endian numbers, compressed by blosc, lie in files; missing ones are 0.

    Attributes
    ----------
    prefix, separator : str
        A chunk's file is the prefix and its number along each axis, joined by the separator.
    dtype : dtype
    chunks : tuple of int
        Shape of a chunk.
    shards : tuple of int, optional
        Shape of a shard, if chunks lie together in shards.
    pack : callable
        Compresses a chunk: ndarray → bytes.
    """

    prefix: str
    separator: str
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    pack: Callable[[NDArray[Any]], bytes]

    @property
    def unit(self) -> tuple[int, ...]:
        """Shape of the part of the array in one file: a shard, or a chunk."""
        return self.shards or self.chunks

    @property
    def per_shard(self) -> tuple[int, ...]:
        """Chunks of a shard along each axis."""
        return tuple(unit // chunk for unit, chunk in zip(self.unit, self.chunks, strict=True))

    def path(self, numbers: tuple[int, ...]) -> str:
        """Path of the file of a chunk, or of a shard."""
        return self.separator.join((self.prefix, *map(str, numbers)))


def layout_of(document: Mapping[str, Any]) -> Layout | None:
    """Decide how an array's chunks lie, without its folder; None if anything is unknown.

    Parameters
    ----------
    document : mapping
        The ``zarr.json``, parsed.
    """
    grid = _configuration(document.get("chunk_grid"), "regular")
    keys = _configuration(document.get("chunk_key_encoding"), "default")
    name, fill, shape = (document.get(field) for field in ("data_type", "fill_value", "shape"))
    if (
        document.keys() - _FIELDS
        or (document.get("zarr_format"), document.get("node_type")) != (3, "array")
        or document.get("storage_transformers")
        or not isinstance(name, str)
        or name not in _DATA_TYPES
        or type(fill) not in (int, float)
        or str(fill) not in ("0", "0.0")
        or not _is_shape(shape)
        or grid is None
        or grid.keys() != {"chunk_shape"}
        or keys not in ({}, {"separator": "/"}, {"separator": "."})
    ):
        return None
    dtype, unit, chunks = np.dtype(name), grid["chunk_shape"], grid["chunk_shape"]
    codecs = _list(document.get("codecs"))
    sharding = _configuration(codecs[0], "sharding_indexed") if len(codecs) == 1 else None
    if sharding is not None:
        if (
            sharding.keys() - {"chunk_shape", "codecs", "index_codecs", "index_location"}
            or sharding.get("index_location", "end") != "end"
            or _list(sharding.get("index_codecs")) != _INDEX_CODECS
        ):
            return None
        chunks, codecs = sharding.get("chunk_shape"), _list(sharding.get("codecs"))
    if not (_is_shape(unit) and _is_shape(chunks) and len(unit) == len(chunks) == len(shape)):
        return None
    pack = _packer(codecs, dtype)
    if pack is None or any(outer % inner for outer, inner in zip(unit, chunks, strict=True)):
        return None
    shards = None if sharding is None else tuple(unit)
    separator = cast(dict[str, str], keys).get("separator", "/")
    return Layout("c", separator, dtype, tuple(chunks), shards, pack)


def _packer(codecs: list[Any], dtype: np.dtype[Any]) -> Callable[[NDArray[Any]], bytes] | None:
    """Make a blosc compressor of little-endian numbers; None if the codecs are others."""
    blosc = _configuration(codecs[1], "blosc") if len(codecs) == 2 else None
    if blosc is None or blosc.keys() != _BLOSC:
        return None
    plain = codecs[0] == _LITTLE or (codecs[0] in _ONE_BYTE and dtype.itemsize == 1)
    names = blosc["cname"], blosc["shuffle"]
    sizes = blosc["clevel"], blosc["typesize"], blosc["blocksize"]
    if (
        not plain
        or not all(isinstance(name, str) for name in names)
        or not all(type(size) is int and size >= 0 for size in sizes)
        or names[0] not in _COMPRESSORS
        or names[1] not in _SHUFFLES
        or sizes[0] > 9
        or sizes[1] == 0
    ):
        return None
    level, typesize, block = sizes
    settings = names[0].encode(), level, _SHUFFLES[names[1]], block, typesize
    return lambda chunk: cast(bytes, compress(chunk, *settings))


def _configuration(extension: Any, name: str) -> dict[str, Any] | None:
    """Get the configuration of an extension of this name; None if it is another."""
    if not isinstance(extension, dict) or extension.get("name") != name:
        return None
    found = extension.get("configuration", {})
    known = extension.keys() <= {"name", "configuration"} and isinstance(found, dict)
    return found if known else None


def _list(items: Any) -> list[Any]:
    return list(items) if isinstance(items, list | tuple) else []


def _is_shape(sizes: Any) -> TypeGuard[Sequence[int]]:
    listed = isinstance(sizes, list | tuple) and len(sizes) > 0
    return listed and all(type(size) is int and size > 0 for size in sizes)
