"""NIfTI files written in pieces: compressed in any task, and concatenated in order.

The number of planes of a piece does not depend on the number of threads, so the same voxels give
the same bytes. All pieces are one gzip member, as some readers stop after the first one: each ends
with a flush, at a whole byte, as in pigz. The header is written last, into space reserved for it,
because its description may depend on the voxels.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import isal.isal_zlib
import numpy as np
from numpy.typing import NDArray

_isal_zlib: Any = isal.isal_zlib

PIECE_BYTES = 4 << 20
"""Bytes compressed at once, typical; below some 100 kB the file would grow."""

# Deflate without names or times: the same voxels give the same bytes.
_GZIP_HEADER = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
_LAST_BLOCK = b"\x03\x00"
_LARGEST_STORED = 65535
"""Bytes of a block that is not compressed at most."""


class Packed(NamedTuple):
    """Planes, ready to be written.

    Attributes
    ----------
    data : bytes
        Deflated, up to a whole byte.
    crc : int
        CRC-32 of what was deflated.
    size : int
        Number of bytes before compression.
    """

    data: bytes
    crc: int
    size: int


def planes_at_once(shape: tuple[int, int, int], dtype: np.dtype[Any]) -> int:
    """Count the planes of a piece of a file of this shape (k, j, i)."""
    return max(1, PIECE_BYTES // (shape[1] * shape[2] * dtype.itemsize))


def pack(planes: NDArray[Any]) -> Packed:
    """Deflate the planes (n, j, i) of one piece."""
    plain = np.ascontiguousarray(planes, planes.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    deflate = _isal_zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = deflate.compress(plain.data) + deflate.flush(zlib.Z_SYNC_FLUSH)
    return Packed(data, _isal_zlib.crc32(plain.data), plain.size)


class NiftiWriter:
    """A NIfTI file that is being written; complete when the `with` ends.

    Parameters
    ----------
    path : Path
        Compressed if the name ends in ``.gz``.
    header : nibabel.Nifti1Header or nibabel.Nifti2Header
        Header of a single little-endian file, with the shape and dtype of the voxels:
        from `kpt_dask.scans.placement.header_of` or `kpt_dask.scans.label_header.header_like`.
    extension : bytes
        Header extensions, with their sizes and codes; a multiple of 16 bytes.

    Attributes
    ----------
    description : str
        Text of the header's ``descrip``, 79 bytes at most; may be changed until the end.
    """

    def __init__(self, path: Path, header: Any, extension: bytes = b"") -> None:
        self.description = header["descrip"].item().decode()
        self._path, self._compressed = path, path.name.lower().endswith(".gz")
        self._header, self._extension = header, extension
        header["vox_offset"] = int(header.single_vox_offset) + len(extension)
        columns, rows, self._planes = header.get_data_shape()
        self._plane_bytes = columns * rows * header.get_data_dtype().itemsize
        self._crc = self._written = 0

    def __enter__(self) -> Self:
        """Open the file."""
        with self._named():
            self._file: BinaryIO = self._path.open("wb")
        self._put(self._front())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Write the header, unless something failed."""
        try:
            if error is None:
                self._finish()
        finally:
            # After a full disk, flushing the rest of the buffer fails once more.
            with suppress(OSError):
                self._file.close()

    def _finish(self) -> None:
        planes = self._written / self._plane_bytes
        if planes != self._planes:
            raise ValueError(f"{planes:g} planes were given for a file of {self._planes}")
        if self._compressed:
            header = self._header_bytes()
            crc = _isal_zlib.crc32_combine(zlib.crc32(header), self._crc, self._written)
            size = len(header) + self._written & 0xFFFFFFFF
            self._put(_LAST_BLOCK + crc.to_bytes(4, "little") + size.to_bytes(4, "little"))
        with self._named():
            self._file.seek(0)
            self._file.write(self._front())
            self._file.flush()

    def write(self, piece: Packed) -> None:
        """Append the planes that follow."""
        self._put(
            piece.data if self._compressed else zlib.decompress(piece.data + _LAST_BLOCK, -15)
        )
        self._crc = _isal_zlib.crc32_combine(self._crc, piece.crc, piece.size)
        self._written += piece.size

    def _front(self) -> bytes:
        """Everything before the voxels; always as long."""
        header = self._header_bytes()
        if not self._compressed:
            return header
        front = _GZIP_HEADER
        for first in range(0, len(header), _LARGEST_STORED):
            part = header[first : first + _LARGEST_STORED]
            size = len(part).to_bytes(2, "little")
            front += b"\0" + size + bytes(255 - byte for byte in size) + part
        return front

    def _header_bytes(self) -> bytes:
        self._header["descrip"] = self.description.encode()
        block: bytes = self._header.binaryblock
        # The first of the bytes between says whether extensions follow.
        between = bytes([bool(self._extension)]).ljust(
            self._header.single_vox_offset - len(block), b"\0"
        )
        return block + between + self._extension

    def _put(self, data: bytes) -> None:
        with self._named():
            self._file.write(data)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Add the file's name to an error: that of a full disk has none."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
