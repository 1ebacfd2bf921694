"""NIfTI files: headers to grids, voxels streamed in slabs of planes.

Knows the file format and nothing of what the voxels mean. NIfTI stores index (i, j, k) in
Fortran order, so the bytes read in C order are (k, j, i), slowest axis first. Its world is
RAS (x, y, z); ours is LPS (z, y, x).
"""

import gzip
import math
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO, cast

import isal.igzip
import isal.isal_zlib
import nibabel
import numpy as np
from numpy.typing import NDArray

from kpt_dask.errors import ScanFormatError
from kpt_dask.grid import Grid
from kpt_dask.scans.gzip_stream import GzipStream
from kpt_dask.scans.placement import check_extent, listed, place, unusual_unit

SLAB_BYTES = 4 << 20
"""About how much is read at a time, as stored."""

SLABS_AHEAD = 3
"""How many slabs the decoding thread may be ahead of the reader."""

MOST_COMPRESSED = 1032
"""Deflate cannot shrink data more than this; less data than the header promises is no scan."""

# Neither package is typed.
_igzip: Any = isal.igzip
_isal_zlib: Any = isal.isal_zlib
_nib: Any = nibabel

_DAMAGE = (OSError, ValueError, zlib.error, _isal_zlib.error)


@dataclass(frozen=True, eq=False)
class NiftiFile:
    """A 3-D NIfTI file whose header has been read and found usable.

    Attributes
    ----------
    path : Path
        The file, ``.nii`` or ``.nii.gz``.
    header : nibabel.Nifti1Header or nibabel.Nifti2Header
        The header as stored; written back with label maps.
    grid : Grid
        Where the voxels lie; shape (k, j, i).
    dtype : dtype
        Of a stored voxel, with its byte order.
    slope, intercept : float
        Value = stored × slope + intercept.
    doubts : tuple of str
        What the header leaves open, one sentence each.
    """

    path: Path
    header: Any
    grid: Grid
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    doubts: tuple[str, ...] = ()

    def slabs(self) -> Iterator[NDArray[Any]]:
        """Stream the stored voxels, in order, as arrays (n, j, i) of about 4 MB.

        Decoding runs in a thread of its own, a few slabs ahead.

        Raises
        ------
        ScanFormatError
            If the file is truncated or damaged.
        """
        planes, *plane = self.grid.shape
        step = max(1, SLAB_BYTES // (plane[0] * plane[1] * self.dtype.itemsize))
        sizes = iter([min(step, planes - first) for first in range(0, planes, step)])
        with open_stream(self.path) as stream, ThreadPoolExecutor(1) as decoder:
            ahead: deque[Future[NDArray[Any]]] = deque()
            self._skip_to_data(stream)
            for n in sizes:
                ahead.append(decoder.submit(self._read, stream, (n, plane[0], plane[1])))
                if len(ahead) > SLABS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
            self._check_end(stream)

    def _skip_to_data(self, stream: BinaryIO) -> None:
        left = data_offset(self.path, self.header)
        while left > 0:
            skipped = len(_guarded(self.path, stream.read, min(left, SLAB_BYTES)))
            if skipped == 0:
                raise _truncated(self.path)
            left -= skipped

    def _read(self, stream: BinaryIO, shape: tuple[int, int, int]) -> NDArray[Any]:
        slab = np.empty(shape, self.dtype)
        view = slab.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            n = _guarded(self.path, cast(BufferedIOBase, stream).readinto, view[done:])
            if n == 0:
                raise _truncated(self.path)
            done += n
        return slab

    def _check_end(self, stream: BinaryIO) -> None:
        """Read on past the voxels: only at its end does gzip compare the checksum.

        What follows that is no gzip is none of the file's; but further planes mean that the
        header tells the wrong shape or type.
        """
        rows, columns = self.grid.shape[1:]
        plane = rows * columns * self.dtype.itemsize
        further = 0
        try:
            while further < plane and (n := len(_guarded(self.path, stream.read, plane))):
                further += n
        except ScanFormatError:
            if not isinstance(stream, GzipStream) or stream.verified < _needed(self):
                raise
        if further >= plane:
            raise _too_long(self)


def open_nifti(path: Path) -> NiftiFile:
    """Read a NIfTI header and check that the file can be used as a scan.

    Raises
    ------
    ScanFormatError
        If the file is no NIfTI, or not one 3-D volume of real numbers on a usable grid.
    """
    header = _read_header(path)
    try:
        with np.errstate(all="ignore"):
            shape = _shape(path, header)
            dtype = header.get_data_dtype()
            slope, intercept = header.get_slope_inter()
            affine, doubts = place(path, header)
    except ScanFormatError:
        raise
    except Exception as error:  # nibabel raises many kinds on hostile headers
        raise ScanFormatError(f"{path} has a damaged NIfTI header ({error}).") from error
    if dtype.kind not in "iuf":
        raise ScanFormatError(
            f"{path} holds {_kind(dtype)} voxels, not real numbers; convert it to a CT in HU."
        )
    _check_bits(path, header, dtype)
    grid = Grid(shape, affine)
    check_extent(path, header, grid)
    doubts += unusual_unit(path, header, grid)
    if slope is None:
        slope, intercept = 1.0, 0.0
    file = NiftiFile(path, header, grid, dtype, float(slope), float(intercept), doubts)
    _check_size(file)
    return file


def open_stream(path: Path) -> BinaryIO:
    """Open the file for reading, decompressed if its name ends in ``.gz``."""
    try:
        if path.name.lower().endswith(".gz"):
            return cast(BinaryIO, GzipStream(path))
        return path.open("rb")
    except OSError as error:
        raise ScanFormatError(f"{path} cannot be opened ({error.strerror}).") from error


def data_offset(path: Path, header: Any) -> int:
    """Where in the (decompressed) file the voxels begin, bytes."""
    offset = float(header["vox_offset"])
    smallest = header.single_vox_offset
    if offset == 0:
        return int(smallest)
    if not np.isfinite(offset) or offset < smallest:
        raise ScanFormatError(f"{path} has a damaged NIfTI header (voxels begin at {offset}).")
    return int(offset)


def _read_header(path: Path) -> Any:
    start = b""
    with open_stream(path) as stream:
        # A member of a gzip file may hold less.
        while more := _guarded(path, stream.read, _nib.Nifti2Header.sizeof_hdr - len(start)):
            start += more
    for kind in (_nib.Nifti1Header, _nib.Nifti2Header):
        block = start[: kind.sizeof_hdr]
        sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
        if len(block) < kind.sizeof_hdr or kind.sizeof_hdr not in sizes:
            continue
        header = kind(block, check=False)
        if header["magic"].item().rstrip(b"\0\r\n\x1a") == kind.single_magic.rstrip(b"\0\r\n\x1a"):
            return header
        if header["magic"].item().rstrip(b"\0\r\n\x1a") == kind.pair_magic.rstrip(b"\0\r\n\x1a"):
            raise ScanFormatError(
                f"{path} is half of a .hdr/.img pair; convert it to a single .nii.gz file."
            )
    raise ScanFormatError(f"{path} is not a NIfTI file.")


def _shape(path: Path, header: Any) -> tuple[int, int, int]:
    shape = [int(n) for n in header.get_data_shape()]
    if not shape or min(shape) < 1:
        raise ScanFormatError(f"{path} has shape {listed(shape)}: there are no voxels in it.")
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 3:
        raise ScanFormatError(
            f"{path} is {len(shape)}-dimensional ({listed(shape)}); give one 3-D volume."
        )
    return shape[2], shape[1], shape[0]


def _check_bits(path: Path, header: Any, dtype: np.dtype[Any]) -> None:
    """Refuse a type and a number of bits that contradict each other; 0 bits say nothing."""
    bits = int(header["bitpix"])
    if bits not in (0, dtype.itemsize * 8):
        raise ScanFormatError(
            f"{path} has a damaged NIfTI header: it says that voxels are {dtype.name} (datatype"
            f" {int(header['datatype'])}) and have {bits} bits (bitpix); get a new copy."
        )


def _check_size(file: NiftiFile) -> None:
    """Refuse early, and before memory is asked for, what cannot hold just these voxels."""
    size = file.path.stat().st_size
    compressed = file.path.name.lower().endswith(".gz")
    needed = _needed(file)
    if needed > (size * MOST_COMPRESSED if compressed else size):
        raise _truncated(file.path)
    if not compressed and size - needed >= (needed - _begin(file)) // file.grid.shape[0]:
        raise _too_long(file)


def _begin(file: NiftiFile) -> int:
    return data_offset(file.path, file.header)


def _needed(file: NiftiFile) -> int:
    """Bytes from the beginning of the (decompressed) file to the end of its last voxel."""
    return _begin(file) + math.prod(file.grid.shape) * file.dtype.itemsize


def _guarded(path: Path, read: Any, argument: Any) -> Any:
    """Call a stream's method, and say what is wrong with the file where it fails."""
    try:
        return read(argument)
    except EOFError as error:
        raise _truncated(path) from error
    except gzip.BadGzipFile as error:
        raise ScanFormatError(f"{path} is not a gzip file, or damaged ({error}).") from error
    except _DAMAGE as error:
        raise ScanFormatError(f"{path} is damaged ({error}); get a new copy.") from error


def _truncated(path: Path) -> ScanFormatError:
    return ScanFormatError(f"{path} is truncated: it ends before its last voxel; get a new copy.")


def _too_long(file: NiftiFile) -> ScanFormatError:
    return ScanFormatError(
        f"{file.path} is longer than its header says ({listed(file.grid.shape[::-1])} voxels of"
        f" {file.dtype.name}): its shape or type is wrong; repair its header."
    )


def _kind(dtype: np.dtype[Any]) -> str:
    return {"c": "complex", "V": "RGB or unknown"}.get(dtype.kind, str(dtype))
