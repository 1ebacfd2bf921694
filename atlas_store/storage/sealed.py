"""Objects whose content is verified on reading: each is compared with its SHA-256.

The data of an atlas never changes. Its group holds the SHA-256 of every other object in it, and
the atlas's marker that of the group. SHA-256 takes less than 1 % of a segmentation, so a second,
faster checksum would gain nothing.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar

import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype

from atlas_store.arrays import chunk_rows
from atlas_store.errors import StoreFormatError
from atlas_store.layout import ROOT
from atlas_store.marker import parse_json
from atlas_store.storage.digests import digest
from atlas_store.storage.guard import Guarded
from atlas_store.storage.objects import MAX_DOCUMENT, MAX_OBJECT, Objects, regular

T = TypeVar("T")

_KNOWN = 256
"""Atlases whose digests a process caches, at a few hundred bytes per object."""
_CHECKED = 1 << 16
"""Verified files that a process remembers."""


class Sealed(Objects):
    """The objects of an atlas; keys are those of the store.

    Parameters
    ----------
    objects : Objects
        The store.
    folder : str
        Folder of the atlas's data.
    seal : str
        SHA-256 of the folder's ``zarr.json``.
    name : str
        Name of the atlas in messages.

    Raises
    ------
    StoreFormatError
        By each method that reads, if an object is missing, was changed, or is not part of the
        atlas.
    """

    def __init__(self, objects: Objects, folder: str, seal: str, name: str) -> None:
        super().__init__(objects.store, objects.url)
        self._folder = folder
        self._seal = seal
        self._name = name

    def group(self) -> zarr.Group:
        """Open the Zarr group of the data, read-only."""
        self._digests()
        return zarr.open_group(_Checked(self.store, self), path=self._folder, mode="r")

    def contents(self) -> list[str]:
        """Keys of the objects that were added, below the folder, sorted; without its own."""
        return sorted(self._digests())

    def digests(self) -> dict[str, str]:
        """SHA-256 of the objects that were added, by their keys below the folder."""
        return dict(self._digests())

    def read(self, key: str, limit: int = MAX_DOCUMENT) -> bytes | None:
        """Read one object; None if none was added."""
        return self.checked(key, super().read(key, limit))

    def read_many(self, keys: Iterable[str], limit: int = MAX_OBJECT) -> list[bytes | None]:
        """Read objects, in order; None for those that were not added."""
        keys = list(keys)
        if self.is_local:
            return [self.read(key, limit) for key in keys]
        each = zip(keys, super().read_many(keys, limit), strict=True)
        return [self.checked(key, data) for key, data in each]

    def unpack(self, wanted: Sequence[chunk_rows.ChunkRows], out: NDArray[Any]) -> None:
        """Decompress rows of blosc chunks one after another, along the first axis of `out`.

        A process hashes the whole file when it first reads a part of it, and again after the file
        has changed.

        Raises
        ------
        ValueError
            If a chunk is missing or damaged.
        """
        begin = 0
        for rows in wanted:
            end = begin + sum(b - a for a, b in rows.spans)
            path = self.path_of(rows.key)
            state = None if path is None else _state(path)
            if path is not None and state is not None and _checked.get(path) == state:
                chunk_rows.unpack_files([rows._replace(key=path)], out[begin:end])
            else:
                chunk = self.checked(rows.key, Objects.read(self, rows.key))
                chunk_rows.unpack_all([rows], [chunk], out[begin:end])
                if path is not None and state is not None and _state(path) == state:
                    _checked.keep(path, state)
            begin = end

    def checked(self, key: str, data: bytes | None) -> bytes | None:
        """Return the data read at a key, after comparing it with its digest."""
        root = f"{self._folder}/{ROOT}"
        expected = self._seal if key == root else self._digests().get(self._within(key))
        if expected == (None if data is None else digest(data)):
            return data
        if data is None:
            fault = "is missing"
        else:
            fault = "is not part of it" if expected is None else "is damaged"
        raise StoreFormatError(
            f"{self.url}: {self._within(key)} of {self._name} {fault}: remove the atlas and add it"
            " again, or restore it from a copy."
        )

    def _within(self, key: str) -> str:
        return key.removeprefix(f"{self._folder}/")

    def _digests(self) -> Mapping[str, str]:
        """SHA-256 of each object by its key below the folder."""
        cache_key = f"{self.url}/{self._folder} {self._seal}"
        known = _known.get(cache_key)
        if known is None:
            key = f"{self._folder}/{ROOT}"
            data = self.checked(key, Objects.read(self, key, MAX_DOCUMENT))
            assert data is not None
            try:
                known = dict(parse_json(data, f"{self.url}/{key}")["attributes"]["digests"])
            except (KeyError, TypeError, ValueError) as error:
                raise StoreFormatError(
                    f"{self.url}: {ROOT} of {self._name} holds no digests: remove the atlas and add"
                    " it again."
                ) from error
            _known.keep(cache_key, known)
        return known


class _Checked(Guarded):
    """A Zarr store of an atlas that compares each object with its digest."""

    def __init__(self, store: Store, sealed: Sealed) -> None:
        super().__init__(store)
        self._sealed = sealed

    def _with_store(self, store: Store) -> Self:
        return type(self)(store, self._sealed)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object; `StoreFormatError` if it differs from its digest."""
        # No array of an atlas has shards, so zarr reads whole objects.
        buffer = await super().get(key, prototype)
        self._sealed.checked(key, None if buffer is None else buffer.to_bytes())
        if buffer is None or byte_range is None:
            return buffer
        return await super().get(key, prototype, byte_range)


class _Recent(Generic[T]):
    """A cache of the last entries of a process, by name."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> T | None:
        return self._entries.get(name)

    def keep(self, name: str, value: T) -> None:
        with self._lock:
            self._entries[name] = value
            if len(self._entries) > self._most:
                self._entries.popitem(last=False)


def _state(path: str) -> tuple[int, ...] | None:
    """Get device, inode, size and times of a regular file, which any change alters; else None."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not regular(status):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


_known: _Recent[Mapping[str, str]] = _Recent(_KNOWN)
_checked: _Recent[tuple[int, ...]] = _Recent(_CHECKED)
