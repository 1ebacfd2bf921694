"""Reading of arrays from an untrusted store, in bounded memory.

Zarr trusts the sizes in an array's description and in its chunks. They are checked here first, so
that no file makes the reader allocate more than `MAX_CHUNK` bytes.
"""

import json
import math
import struct

import numpy as np
from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from atlas_store.errors import StoreFormatError
from atlas_store.marker import MAX_VOXELS
from atlas_store.storage.objects import MAX_OBJECT, check_regular, check_size

MAX_CHUNK = 1 << 28
"""Limit of the bytes of a decompressed chunk; those of an atlas have a few MiB."""

_BLOSC_HEADER = 16


class Guarded(WrapperStore[Store]):
    """A Zarr store that refuses arrays and chunks of absurd size."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object; `StoreFormatError` if decompressing it would take too much memory."""
        if isinstance(self._store, LocalStore):
            check_regular(f"{self._store.root}/{key}", key)
        # No more of an object than tells that it is too large.
        most = RangeByteRequest(0, MAX_OBJECT + 1)
        buffer = await super().get(key, prototype, byte_range or most)
        if buffer is None or byte_range is not None:
            return buffer
        check_size(key, len(buffer))
        if key.endswith("zarr.json"):
            _check_description(key, buffer.to_bytes())
        elif "/c/" in key:
            _check_chunk(key, buffer[:_BLOSC_HEADER].to_bytes(), len(buffer))
        return buffer


def _check_description(key: str, data: bytes) -> None:
    try:
        content = json.loads(data)
        if content["node_type"] != "array":
            return
        shape = content["shape"]
        chunks = content["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = [codec["name"] for codec in content["codecs"]]
        size = np.dtype(content["data_type"]).itemsize
        whole = all(type(n) is int and n >= 0 for n in (*shape, *chunks))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refused(key, f"its description makes no sense ({error!r})") from error
    if not whole or math.prod(shape) > MAX_VOXELS:
        raise _refused(key, f"it has the shape {shape}")
    if math.prod(chunks) * size > MAX_CHUNK:
        raise _refused(key, f"it has chunks of {chunks}")
    # The header of a blosc chunk states its decompressed size; other codecs may not.
    if codecs != ["bytes", "blosc"]:
        raise _refused(key, f"it has the codecs {codecs}")


def _check_chunk(key: str, header: bytes, length: int) -> None:
    if len(header) < _BLOSC_HEADER:
        raise _refused(key, "it is too short")
    unpacked, packed = struct.unpack_from("<I", header, 4) + struct.unpack_from("<I", header, 12)
    if packed != length or unpacked > MAX_CHUNK:
        raise _refused(key, f"it would unpack {packed} bytes to {unpacked}")


def _refused(key: str, what: str) -> StoreFormatError:
    return StoreFormatError(f"{key} is damaged, {what}: remove the atlas and add it again.")
