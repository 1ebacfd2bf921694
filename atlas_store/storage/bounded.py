"""Reading of arrays that anybody wrote, in memory that their descriptions justify.

Codecs unpack whatever a chunk holds: a few kilobytes may become gigabytes. A chunk is looked at
before it gets to its codec. Blosc and Zstandard say in a header how large it becomes; what gzip,
zlib, bzip2 and xz become is found by unpacking piece by piece, and dropping the pieces.
"""

import bz2
import lzma
import struct
from collections.abc import Callable
from typing import Any

import isal.isal_zlib
from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from atlas_store.errors import DamagedChunkError

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
_BLOSC_HEADER = 16
_HEADERS, _INDEX = 4096, 8
"""How much larger a chunk or shard may be than its voxels: by the bytes of headers, and by an
eighth for the index of a shard of small chunks. Little: a file's beginning is read into as much."""
_PIECE = 1 << 18
"""Bytes unpacked at a time."""

# Unpacks twice as fast as Python's own.
_zlib: Any = isal.isal_zlib

_STREAMS: tuple[tuple[bytes, Callable[[], Any], tuple[type[Exception], ...]], ...] = (
    (b"\x1f\x8b", lambda: _zlib.decompressobj(31), (_zlib.error,)),
    (b"\x78", lambda: _zlib.decompressobj(), (_zlib.error,)),
    (b"BZh", bz2.BZ2Decompressor, (OSError, ValueError)),
    (b"\xfd7zXZ\x00", lzma.LZMADecompressor, (lzma.LZMAError,)),
)
"""First bytes of streams, how they are unpacked, and what is raised if they are none."""


class Bounded(WrapperStore[Store]):
    """A Zarr store that refuses chunks that are, or unpack to, more than is expected.

    Parameters
    ----------
    store : zarr.abc.store.Store
    most : int
        Bytes of a chunk, or shard, of the array that is read.
    """

    def __init__(self, store: Store, most: int) -> None:
        super().__init__(store)
        self._most = most

    def with_read_only(self, read_only: bool = False) -> "Bounded":
        """Give the same store, read-only or not; Zarr's own way knows no other parameter."""
        return type(self)(self._store.with_read_only(read_only), self._most)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object; `DamagedChunkError` if decompressing it would take too much memory."""
        if key.endswith(_METADATA):
            return await super().get(key, prototype, byte_range)
        # No more of an object than tells that it is too large.
        limit = self._most + self._most // _INDEX + _HEADERS
        buffer = await super().get(key, prototype, byte_range or RangeByteRequest(0, limit + 1))
        if buffer is not None:
            if len(buffer) > limit:
                raise _refused(key, f"has more than {limit} bytes")
            if unpacks_to_more(buffer.to_bytes(), self._most):
                raise _refused(key, f"unpacks to more than {self._most} bytes")
        return buffer


def unpacks_to_more(packed: bytes, most: int) -> bool:
    """Whether a chunk unpacks to more than so many bytes; False if it is not packed.

    Examples
    --------
    >>> import zlib
    >>> packed = zlib.compress(bytes(1000))
    >>> unpacks_to_more(packed, 1000), unpacks_to_more(packed, 999)
    (False, True)
    """
    if len(packed) >= _BLOSC_HEADER and packed[0] <= 2:
        # Bytes that say of themselves how many they are; others are no blosc.
        size, length = struct.unpack_from("<I", packed, 4) + struct.unpack_from("<I", packed, 12)
        if length == len(packed):
            return bool(size > most)
    if packed.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd_size(packed) > most
    for magic, unpacker, errors in _STREAMS:
        if packed.startswith(magic):
            try:
                return _stream_is_longer(packed, unpacker(), most)
            except errors:
                # No such stream, or a damaged one, of which its codec will tell.
                return False
    return False


def _stream_is_longer(packed: bytes, unpacker: Any, most: int) -> bool:
    total, data = 0, packed
    while not unpacker.eof:
        piece = unpacker.decompress(data, _PIECE)
        total += len(piece)
        if total > most:
            return True
        # zlib gives back what it did not look at; the others keep it.
        data = getattr(unpacker, "unconsumed_tail", b"")
        if not piece and not data:
            return False
    return False


def _zstd_size(packed: bytes) -> int:
    """Size that a Zstandard frame's header states (RFC 8878); 0 if it states none."""
    if len(packed) < 18:
        return 0
    descriptor = packed[4]
    single, flag = descriptor >> 5 & 1, descriptor >> 6
    width = (1 if single else 0, 2, 4, 8)[flag]
    begin = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    stated = int.from_bytes(packed[begin : begin + width], "little")
    return stated + 256 if width == 2 else stated


def _refused(key: str, what: str) -> DamagedChunkError:
    return DamagedChunkError(f"{key} {what}, which is no chunk of its array: get a new copy.")
