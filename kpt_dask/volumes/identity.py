"""Which scan a volume is made from, known by its voxels: file names are only labels.

The digest of a volume is that of level 0, so neither the compression of the file, nor its type of
voxels, nor the order and direction in which it stores its axes play a part; nor does where the scan
lies in the world. A volume of another spacing has another digest.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store.arrays.regions import Region

BRICK = (32, 128, 128)
"""Part (z, y, x) of a volume that is digested at a time, as int16, in C order. Part of the format:
another one would give all volumes other digests."""


class VoxelDigest:
    """SHA-256 of the SHA-256 of a volume's bricks, which may come in any order.

    A context manager: hashing runs in a thread of its own, one region behind.

    Parameters
    ----------
    shape : tuple of int
        (z, y, x) of the volume.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._bricks: dict[tuple[int, ...], bytes] = {}
        self._hashing: Future[None] | None = None

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread = ThreadPoolExecutor(1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread."""
        self._thread.shutdown()

    def add(self, region: Region, values: NDArray[Any]) -> None:
        """Take the values of a region, whole HU, which must not change until the next is given.

        Parameters
        ----------
        region : tuple of slice
            Begins and ends at multiples of `BRICK`, or where the volume ends.
        values : ndarray (z, y, x)
            Voxels, in the region's shape.
        """
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._thread.submit(self._hash, region, values)

    def hexdigest(self) -> str:
        """Digest of the volume; all of it must have been added."""
        if self._hashing is not None:
            self._hashing.result()
        total = hashlib.sha256(repr(tuple(map(int, self._shape))).encode())
        ends = (range(0, n, step) for n, step in zip(self._shape, BRICK, strict=True))
        for corner in product(*ends):
            total.update(self._bricks[corner])
        return total.hexdigest()

    def _hash(self, region: Region, values: NDArray[Any]) -> None:
        starts = [part.start for part in region]
        ends = (range(0, n, step) for n, step in zip(values.shape, BRICK, strict=True))
        for corner in product(*ends):
            part = tuple(slice(c, c + step) for c, step in zip(corner, BRICK, strict=True))
            brick = np.ascontiguousarray(values[part], dtype="<i2")
            place = tuple(s + c for s, c in zip(starts, corner, strict=True))
            self._bricks[place] = hashlib.sha256(brick.data).digest()


def digest_of(group: zarr.Group) -> str:
    """Digest of a volume: as it says itself, or of its voxels if an older version made it.

    Parameters
    ----------
    group : zarr.Group
        The OME-Zarr image.
    """
    about: Any = group.attrs.get("kpt", {})
    known = about.get("source", {}).get("digest")
    return known if isinstance(known, str) else digest_voxels(group["0"])


def digest_voxels(level: Any) -> str:
    """Digest level 0 of a volume, (z, y, x), whole HU."""
    with VoxelDigest(level.shape) as total:
        for z in range(0, level.shape[0], BRICK[0]):
            planes = np.asarray(level[z : z + BRICK[0]])
            total.add((slice(z, z + len(planes)), *(slice(0, n) for n in level.shape[1:])), planes)
        return total.hexdigest()
