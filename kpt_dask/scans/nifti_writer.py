"""Label maps written as NIfTI: compressed in pieces, in any task, and concatenated.

The number of planes of a piece does not depend on the number of threads, so the same labels give
the same bytes. All pieces are one gzip member, as some readers stop after the first one: each ends
with a flush, at a whole byte, as in pigz. The header is written last, into space reserved for it,
because its description may depend on the labels.
"""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import isal.isal_zlib
import nibabel
import numpy as np
from numpy.typing import NDArray

_isal_zlib: Any = isal.isal_zlib
_nib: Any = nibabel

PIECE_BYTES = 4 << 20
"""Bytes compressed at once, typical; below some 100 kB the file would grow."""

DESCRIPTION = "kpt-dask label map"
RUN = "kpt-dask run "
"""Begins the description of a label map that belongs to an OME-Zarr of the same run."""

# Deflate without names or times: the same labels give the same bytes.
_GZIP_HEADER = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
_LAST_BLOCK = b"\x03\x00"


class Packed(NamedTuple):
    """Planes of labels, ready to be written.

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
    """Count the planes of a piece of a label map of this shape (k, j, i)."""
    return max(1, PIECE_BYTES // (shape[1] * shape[2] * dtype.itemsize))


def pack(planes: NDArray[Any]) -> Packed:
    """Deflate the planes (n, j, i) of one piece, uint8 or uint16."""
    plain = np.ascontiguousarray(planes, planes.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    deflate = _isal_zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = deflate.compress(plain.data) + deflate.flush(zlib.Z_SYNC_FLUSH)
    return Packed(data, _isal_zlib.crc32(plain.data), plain.size)


class LabelFile:
    """A NIfTI label map that is being written; complete when the `with` ends.

    Parameters
    ----------
    path : Path
        Compressed if the name ends in ``.gz``.
    like : nibabel.Nifti1Header or nibabel.Nifti2Header
        Its affines, their codes, spacings and units are kept bit by bit.
    shape : tuple of int
        (k, j, i).
    dtype : dtype
        uint8 or uint16.

    Attributes
    ----------
    description : str
        Text of the header's ``descrip``, 79 bytes at most; may be changed until the end.
    """

    def __init__(
        self, path: Path, like: Any, shape: tuple[int, int, int], dtype: np.dtype[Any]
    ) -> None:
        if dtype not in (np.uint8, np.uint16):
            raise ValueError(f"labels must be uint8 or uint16, not {dtype}")
        self.description = DESCRIPTION
        self._path, self._compressed = path, path.name.lower().endswith(".gz")
        self._header = _label_header(like, shape, dtype)
        self._planes, self._plane_bytes = shape[0], shape[1] * shape[2] * dtype.itemsize
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
            raise ValueError(f"{planes:g} planes were given for a label map of {self._planes}")
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
        """Everything before the labels; always as long."""
        header = self._header_bytes()
        if not self._compressed:
            return header
        size = len(header).to_bytes(2, "little")
        stored = b"\0" + size + bytes(255 - byte for byte in size) + header
        return _GZIP_HEADER + stored

    def _header_bytes(self) -> bytes:
        self._header["descrip"] = self.description.encode()
        block: bytes = self._header.binaryblock
        return block + bytes(self._header.single_vox_offset - len(block))

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


def run_of(path: Path) -> str | None:
    """Tell which run a label map is of; None if it is none of this program's, or of no run."""
    try:
        said: bytes = _nib.load(path).header["descrip"].item()
    # Libraries raise many kinds of errors for files that are no NIfTI.
    except Exception:
        return None
    description = said.decode("utf-8", "replace")
    return description.removeprefix(RUN) if description.startswith(RUN) else None


def write_nifti(
    path: Path, like: Any, shape: tuple[int, int, int], slabs: Iterable[NDArray[Any]]
) -> None:
    """Write planes of labels as NIfTI with the geometry of another file's header.

    Parameters
    ----------
    path, like, shape
        As for `LabelFile`.
    slabs : iterable of ndarray (n, j, i), uint8 or uint16
        All planes in order; the file has the dtype of the first.

    Raises
    ------
    ValueError
        If the slabs do not fill the shape, or change dtype.
    """
    iterator = iter(slabs)
    first = next(iterator)
    step = planes_at_once(shape, first.dtype)
    with LabelFile(path, like, shape, first.dtype) as file:
        waiting = first[:0]
        for slab in _chain(first, iterator):
            if slab.dtype != first.dtype or slab.shape[1:] != shape[1:]:
                raise ValueError(f"slab {slab.dtype}{slab.shape} does not fit {first.dtype}{shape}")
            waiting = np.concatenate([waiting, slab]) if len(waiting) else slab
            whole = len(waiting) - len(waiting) % step
            for z in range(0, whole, step):
                file.write(pack(waiting[z : z + step]))
            waiting = waiting[whole:]
        if len(waiting):
            file.write(pack(waiting))


def _chain(first: NDArray[Any], rest: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    yield first
    yield from rest


def _label_header(like: Any, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> Any:
    header = like.as_byteswapped("<")
    header["dim"] = [3, shape[2], shape[1], shape[0], 1, 1, 1, 1]
    header["pixdim"][4:] = 1
    header.set_data_dtype(dtype)
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"] = header["cal_max"] = 0
    header["slice_code"] = header["slice_start"] = header["slice_end"] = 0
    header.set_intent("label")
    header["aux_file"] = b""
    return header
