"""Label maps in memory, deflated in pieces of planes: about 1 % of their voxels.

Pieces are deflated in any task, and the formats whose data are deflated take them as they are: see
`kpt_dask.scans.nifti_writer`.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import isal.isal_zlib
import numpy as np
from numpy.typing import NDArray

from kpt_dask.scans.nifti_writer import Packed, pack, planes_at_once

_isal_zlib: Any = isal.isal_zlib

# Without names or times: the same labels give the same bytes.
_GZIP_HEADER = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
_ZLIB_HEADER = b"\x78\x01"
_LAST_BLOCK = b"\x03\x00"


@dataclass(frozen=True, eq=False)
class PackedLabels:
    """A label map, deflated.

    Attributes
    ----------
    shape : tuple of int
        (k, j, i).
    dtype : dtype
        uint8 or uint16.
    pieces : tuple of Packed
        All planes, in order.

    Raises
    ------
    ValueError
        If the pieces do not fill the shape.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    pieces: tuple[Packed, ...]

    def __post_init__(self) -> None:
        """Refuse other types, and pieces that do not fill the shape."""
        if self.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"labels must be uint8 or uint16, not {self.dtype}")
        planes = sum(piece.size for piece in self.pieces) / self._plane_bytes
        if planes != self.shape[0]:
            raise ValueError(f"{planes:g} planes were given for a label map of {self.shape[0]}")

    @classmethod
    def of(
        cls, shape: tuple[int, int, int], dtype: np.dtype[Any], slabs: Iterable[NDArray[Any]]
    ) -> "PackedLabels":
        """Deflate slabs (n, j, i) of this dtype: the same pieces, however the map is cut."""
        step = planes_at_once(shape, dtype)
        pieces = []
        waiting = np.zeros((0, *shape[1:]), dtype)
        for slab in slabs:
            if slab.dtype != dtype or slab.shape[1:] != shape[1:]:
                raise ValueError(f"slab {slab.dtype}{slab.shape} does not fit {dtype}{shape}")
            waiting = np.concatenate([waiting, slab]) if len(waiting) else slab
            whole = len(waiting) - len(waiting) % step
            pieces += [pack(waiting[z : z + step]) for z in range(0, whole, step)]
            waiting = waiting[whole:]
        if len(waiting):
            pieces.append(pack(waiting))
        return cls(shape, dtype, tuple(pieces))

    @property
    def _plane_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def slabs(self, wanted: slice | None = None) -> Iterator[NDArray[Any]]:
        """Inflate planes in order, piece by piece: read-only arrays (n, j, i).

        Parameters
        ----------
        wanted : slice, optional
            First plane and end of those that are wanted; pieces without any are not inflated.
        """
        first = 0
        for piece in self.pieces:
            n = piece.size // self._plane_bytes
            a, b = (0, n) if wanted is None else (wanted.start - first, wanted.stop - first)
            if b > 0 and a < n:
                yield self.planes(piece)[max(a, 0) : b]
            first += n

    def planes(self, piece: Packed) -> NDArray[Any]:
        """Inflate the planes (n, j, i) of a piece, read-only."""
        labels = np.frombuffer(self.inflated(piece), self.dtype.newbyteorder("<"))
        return labels.astype(self.dtype, copy=False).reshape(-1, *self.shape[1:])

    def mask(self, value: int, along: slice) -> "PackedLabels":
        """Mask of a label, uint8, which occurs in no planes but those of a slice."""
        nowhere: dict[int, Packed] = {}
        pieces, first = [], 0
        for piece in self.pieces:
            number = piece.size // self._plane_bytes
            if along.start < first + number and first < along.stop:
                pieces.append(pack(np.equal(self.planes(piece), value).view(np.uint8)))
            else:
                if number not in nowhere:
                    nowhere[number] = pack(np.zeros((number, *self.shape[1:]), np.uint8))
                pieces.append(nowhere[number])
            first += number
        return PackedLabels(self.shape, np.dtype(np.uint8), tuple(pieces))

    def counts(self, size: int) -> NDArray[np.int64]:
        """Count the voxels of each label below `size`; those of the background count as 0."""
        found = np.zeros(size, np.int64)
        for slab in self.slabs():
            found += np.bincount(slab.reshape(-1), minlength=size)
        found[0] = 0
        return found

    def inflated(self, piece: Packed) -> bytes:
        """Inflate a piece: labels in C order, little-endian."""
        plain: bytes = _isal_zlib.decompress(piece.data + _LAST_BLOCK, -zlib.MAX_WBITS, piece.size)
        return plain

    def write_gzip(self, file: BinaryIO) -> None:
        """Write the voxels as one gzip member; some readers stop after the first."""
        crc = size = 0
        file.write(_GZIP_HEADER)
        for piece in self.pieces:
            file.write(piece.data)
            crc = _isal_zlib.crc32_combine(crc, piece.crc, piece.size)
            size += piece.size
        file.write(
            _LAST_BLOCK + crc.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little")
        )

    def write_zlib(self, file: BinaryIO) -> None:
        """Write the voxels as one zlib stream, of `zlib_size` bytes."""
        adler = 1
        file.write(_ZLIB_HEADER)
        for piece in self.pieces:
            file.write(piece.data)
            adler = zlib.adler32(self.inflated(piece), adler)
        file.write(_LAST_BLOCK + adler.to_bytes(4, "big"))

    @property
    def zlib_size(self) -> int:
        """Bytes that `write_zlib` writes."""
        around = len(_ZLIB_HEADER) + len(_LAST_BLOCK) + 4
        return around + sum(len(piece.data) for piece in self.pieces)
