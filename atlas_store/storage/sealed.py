"""Objects that are read as they were written, or not at all: each is compared with its SHA-256.

The data of an atlas never changes. Its group holds the SHA-256 of every other object in it, and
the atlas's marker that of the group. SHA-256 takes less than a hundredth of a segmentation, so
that no second, faster checksum has to be kept.
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
"""Atlases whose digests a process keeps: a few hundred bytes for each of their objects."""
_CHECKED = 1 << 16
"""Files that a process knows to be whole."""


class Sealed(Objects):
    """The objects of an atlas; keys are those of the store.

    Parameters
    ----------
    objects : Objects
        The store.
    folder : str
        Where the data of the atlas lie.
    seal : str
        SHA-256 of the folder's ``zarr.json``.
    name : str
        What to call the atlas in messages.

    Raises
    ------
    StoreFormatError
        By each method that reads, if an object is missing, is another than was added, or was not
        added at all.
    """

    def __init__(self, objects: Objects, folder: str, seal: str, name: str) -> None:
        super().__init__(objects.store, objects.url)
        self._folder = folder
        self._seal = seal
        self._name = name

    def group(self) -> zarr.Group:
        """Open the Zarr group of the data, read-only, for whatever zarr itself is to read."""
        self._digests()
        return zarr.open_group(_Checked(self.store, self), path=self._folder, mode="r")

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
        """Unpack rows of blosc chunks one after another, along the first axis of `out`.

        A file of which only a part is wanted is compared as a whole when a process first reads
        it, and again if it has changed since.

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
        """Give back what was read at a key, once it is known to be what was added."""
        root = f"{self._folder}/{ROOT}"
        expected = self._seal if key == root else self._digests().get(self._within(key))
        if expected == (None if data is None else digest(data)):
            return data
        if data is None:
            what = "is missing"
        else:
            what = "is not part of it" if expected is None else "is damaged"
        raise StoreFormatError(
            f"{self.url}: {self._within(key)} of {self._name} {what}: remove the atlas and add it"
            " again, or restore it from a copy."
        )

    def _within(self, key: str) -> str:
        return key.removeprefix(f"{self._folder}/")

    def _digests(self) -> Mapping[str, str]:
        """SHA-256 of each object by its key below the folder."""
        here = f"{self.url}/{self._folder} {self._seal}"
        known = _known.get(here)
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
            _known.keep(here, known)
        return known


class _Checked(Guarded):
    """What zarr reads of an atlas, each object compared with its digest."""

    def __init__(self, store: Store, sealed: Sealed) -> None:
        super().__init__(store)
        self._sealed = sealed

    def _with_store(self, store: Store) -> Self:
        return type(self)(store, self._sealed)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object; `StoreFormatError` if it is not what was added."""
        # No array of an atlas has shards, so zarr asks for whole objects.
        buffer = await super().get(key, prototype)
        self._sealed.checked(key, None if buffer is None else buffer.to_bytes())
        if buffer is None or byte_range is None:
            return buffer
        return await super().get(key, prototype, byte_range)


class _Recent(Generic[T]):
    """The last things that a process has found out, by name."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> T | None:
        return self._found.get(name)

    def keep(self, name: str, value: T) -> None:
        with self._lock:
            self._found[name] = value
            if len(self._found) > self._most:
                self._found.popitem(last=False)


def _state(path: str) -> tuple[int, ...] | None:
    """Get what changes when a file does; None if it is no regular file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not regular(found):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


_known: _Recent[Mapping[str, str]] = _Recent(_KNOWN)
_checked: _Recent[tuple[int, ...]] = _Recent(_CHECKED)
