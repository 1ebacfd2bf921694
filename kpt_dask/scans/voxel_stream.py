"""Voxels of one file as a stream of slabs: plain, or compressed by gzip, zlib or bzip2.

Knows where the voxels begin and how many there are; every error names the file and the damage.
"""

import bz2
import gzip
import math
import stat
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import isal.isal_zlib
import numpy as np
from numpy.typing import NDArray

from kpt_dask.errors import ScanFormatError
from kpt_dask.scans.gzip_stream import GzipStream, ZlibStream
from kpt_dask.scans.placement import listed

SLAB_BYTES = 4 << 20
"""Stored bytes read at a time, typical."""

SLABS_AHEAD = 3
"""Slabs that the decoding thread may be ahead of the reader."""

MOST_COMPRESSED = 1032
"""Deflate cannot shrink data more than this; less data than the header promises is no scan."""

LARGEST_PLANE = 256 << 20
"""Bytes; a few planes are in memory at once, and no scanner makes larger ones."""

Packing = Literal["none", "gzip", "zlib", "bz2"]

_isal_zlib: Any = isal.isal_zlib

_DAMAGE = (OSError, ValueError, zlib.error, _isal_zlib.error)


@dataclass(frozen=True, eq=False)
class VoxelStream:
    """Position of a volume's voxels in a file, and their compression.

    Attributes
    ----------
    path : Path
        The file that holds them.
    shape : tuple of int
        (k, j, i), slowest axis first, as stored.
    dtype : dtype
        Type of a stored voxel, with its byte order.
    packing : str
        Compression of the data from `start` on.
    start : int
        Offset of the (compressed) data, bytes.
    skip : int
        Bytes of the (decompressed) data before the first voxel.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    packing: Packing = "none"
    start: int = 0
    skip: int = 0

    def check(self) -> None:
        """Refuse a file that cannot hold exactly these voxels, before memory is allocated.

        Raises
        ------
        ScanFormatError
            If the file is too short or too long, or a plane is larger than any scanner's.
        """
        size = self.path.stat().st_size - self.start
        voxels = self._needed - self.skip
        # Deflate has a limit; bzip2 compresses any number of zeros to a few bytes.
        if self.packing != "bz2":
            most = size * (1 if self.packing == "none" else MOST_COMPRESSED)
            if self._needed > most:
                raise truncated(self.path)
        if self.packing == "none" and size - self._needed >= voxels // self.shape[0]:
            raise self._too_long()
        if voxels // self.shape[0] > LARGEST_PLANE:
            raise ScanFormatError(
                f"{self.path} has planes of {self.shape[2]} × {self.shape[1]} voxels"
                f" ({voxels // self.shape[0] / 2**20:.0f} MiB each), larger than any scanner's;"
                " repair its header."
            )

    def slabs(self) -> Iterator[NDArray[Any]]:
        """Stream the stored voxels, in order, as arrays (n, j, i) of about 4 MB.

        Decoding runs in a thread of its own, a few slabs ahead.

        Raises
        ------
        ScanFormatError
            If the file is truncated or damaged.
        """
        planes, *plane = self.shape
        step = max(1, SLAB_BYTES // (plane[0] * plane[1] * self.dtype.itemsize))
        sizes = iter([min(step, planes - first) for first in range(0, planes, step)])
        with (
            open_stream(self.path, self.packing, self.start) as stream,
            ThreadPoolExecutor(1) as decoder,
        ):
            ahead: deque[Future[NDArray[Any]]] = deque()
            self._skip_to_data(stream)
            for n in sizes:
                ahead.append(decoder.submit(self._read, stream, (n, plane[0], plane[1])))
                if len(ahead) > SLABS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
            self._check_end(stream)

    @property
    def _needed(self) -> int:
        """Bytes from the beginning of the (decompressed) data to the end of its last voxel."""
        return self.skip + math.prod(self.shape) * self.dtype.itemsize

    def _skip_to_data(self, stream: BinaryIO) -> None:
        left = self.skip
        while left > 0:
            skipped = len(guarded(self.path, stream.read, min(left, SLAB_BYTES)))
            if skipped == 0:
                raise truncated(self.path)
            left -= skipped

    def _read(self, stream: BinaryIO, shape: tuple[int, int, int]) -> NDArray[Any]:
        slab = np.empty(shape, self.dtype)
        view = slab.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            n = guarded(self.path, cast(BufferedIOBase, stream).readinto, view[done:])
            if n == 0:
                raise truncated(self.path)
            done += n
        return slab

    def _check_end(self, stream: BinaryIO) -> None:
        """Read on past the voxels: only at its end does gzip compare the checksum.

        What follows that is no gzip is none of the file's; but further planes mean that the
        header tells the wrong shape or type.
        """
        rows, columns = self.shape[1:]
        plane = rows * columns * self.dtype.itemsize
        further = 0
        try:
            while further < plane and (n := len(guarded(self.path, stream.read, plane))):
                further += n
        except ScanFormatError:
            if not isinstance(stream, GzipStream) or stream.verified < self._needed:
                raise
        if further >= plane:
            raise self._too_long()

    def _too_long(self) -> ScanFormatError:
        return ScanFormatError(
            f"{self.path} is longer than its header says ({listed(self.shape[::-1])} voxels of"
            f" {self.dtype.name}): its shape or type is wrong; repair its header."
        )


def open_stream(path: Path, packing: Packing, start: int = 0) -> BinaryIO:
    """Open a file for reading from a place on, decompressed.

    Raises
    ------
    ScanFormatError
        If it cannot be opened, or is no regular file.
    """
    try:
        # A pipe or a device would never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ScanFormatError(f"{path} is no regular file; give one on a disk.")
        if packing == "gzip":
            return cast(BinaryIO, GzipStream(path, start))
        if packing == "zlib":
            return cast(BinaryIO, ZlibStream(path, start))
        file = path.open("rb")
        file.seek(start)
    except OSError as error:
        raise ScanFormatError(f"{path} cannot be opened ({error.strerror}).") from error
    return cast(BinaryIO, _ClosingBZ2(file)) if packing == "bz2" else file


class _ClosingBZ2(bz2.BZ2File):
    """A bzip2 stream that closes the file it was given."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._given = file

    def close(self) -> None:
        super().close()
        self._given.close()


def guarded(path: Path, read: Any, argument: Any) -> Any:
    """Call a stream's method; its errors become one that names the file and the damage."""
    try:
        return read(argument)
    except EOFError as error:
        raise truncated(path) from error
    except gzip.BadGzipFile as error:
        raise ScanFormatError(f"{path} is not a gzip file, or damaged ({error}).") from error
    except _DAMAGE as error:
        raise ScanFormatError(f"{path} is damaged ({error}); get a new copy.") from error


def truncated(path: Path) -> ScanFormatError:
    """Make the error for a file that ends too early."""
    return ScanFormatError(f"{path} is truncated: it ends before its last voxel; get a new copy.")
