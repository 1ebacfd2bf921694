"""Bytes by key, on a local path or an object store: the only module that tells them apart.

The rest of the package calls `read`, `write_new` or `delete_folder`, whatever the kind of store.
Keys are relative to the root of the store, with ``/``.
"""

import asyncio
import errno
import os
import shutil
import stat
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from atlas_store.arrays import chunk_rows
from atlas_store.errors import StoreFormatError
from atlas_store.storage.full_disk import naming
from atlas_store.storage.unreachable import reaching

T = TypeVar("T")

PARTIAL_SUFFIX = ".partial"
"""Ending of a local file's name while it is written; the file is renamed when complete."""

MAX_OBJECT = 1 << 29
"""Limit of an object, bytes; the largest of an atlas have a few MiB."""

MAX_DOCUMENT = 1 << 24
"""Limit of a marker or a ``zarr.json``, bytes; that of a whole body at 0.5 mm has 2 MB."""

_DELETE_ATTEMPTS = 10
_SYNCING_THREADS = 8


class Objects:
    """The objects of one zarr store, read and written synchronously.

    Parameters
    ----------
    store : zarr.abc.store.Store
        Zarr store that holds the objects.
    url : str
        Name of the store in messages.
    """

    def __init__(self, store: Store, url: str) -> None:
        self.store = store
        self.url = url

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> "Objects":
        """Objects below a local path or an fsspec URL; neither reads nor writes.

        Raises
        ------
        StoreUnreachableError
            If the URL's scheme is unknown, or its library is missing; so do all that read and
            write, if there is no network, no bucket, or no right to it.
        """
        text = os.fspath(url).removeprefix("file://")
        if "://" in text:
            # Other processes write too: a cached listing would hide their objects.
            with reaching(text):
                return cls(FsspecStore.from_url(text, {"use_listings_cache": False}), text)
        return cls(LocalStore(Path(text).absolute()), text)

    def is_vacant(self) -> bool:
        """Whether the store is empty: it does not exist, or is an empty folder."""
        if isinstance(self.store, LocalStore):
            root = self.store.root
            return not root.exists() or (root.is_dir() and not any(root.iterdir()))
        return not self.names("")

    def path_of(self, key: str) -> str | None:
        """Path of the file that holds an object; None in an object store."""
        return f"{self.store.root}/{key}" if isinstance(self.store, LocalStore) else None

    def read(self, key: str, limit: int = MAX_OBJECT) -> bytes | None:
        """Read one object of at most `limit` bytes; None if there is none.

        Raises
        ------
        StoreFormatError
            If it is larger, or no regular file.
        """
        path = self.path_of(key)
        if path is not None:
            # 20 times faster for small objects than through zarr's event loop.
            return read_file(path, f"{self.url}/{key}", limit)
        return self._sync(self._get(key, limit))

    @property
    def is_local(self) -> bool:
        """Whether objects are files."""
        return isinstance(self.store, LocalStore)

    def read_many(self, keys: Iterable[str], limit: int = MAX_OBJECT) -> list[bytes | None]:
        """Read objects, in order; those of an object store all at once."""
        if self.is_local:
            return [self.read(key, limit) for key in keys]

        async def gather() -> list[bytes | None]:
            return await asyncio.gather(*(self._get(key, limit) for key in keys))

        return self._sync(gather())

    async def _get(self, key: str, limit: int) -> bytes | None:
        """Read an object of an object store; no more than tells that it is too large."""
        within = RangeByteRequest(0, limit + 1)
        buffer = await self.store.get(key, default_buffer_prototype(), within)
        if buffer is None:
            return None
        check_size(f"{self.url}/{key}", len(buffer), limit)
        return buffer.to_bytes()

    def unpack(self, wanted: Sequence[chunk_rows.ChunkRows], out: NDArray[Any]) -> None:
        """Decompress rows of blosc chunks one after another, along the first axis of `out`.

        Raises
        ------
        ValueError
            If a chunk is missing or damaged.
        """
        if isinstance(self.store, LocalStore):
            root = self.store.root
            files = [rows._replace(key=f"{root}/{rows.key}") for rows in wanted]
            chunk_rows.unpack_files(files, out)
        else:
            chunk_rows.unpack_all(wanted, self.read_many(rows.key for rows in wanted), out)

    def write(self, key: str, data: bytes) -> None:
        """Write an object atomically, replacing an existing one."""
        self._sync(self.store.set(key, _buffer(data)))

    def write_new(self, key: str, data: bytes) -> bool:
        """Write an object only if there is none; of several writers at once, one succeeds.

        `data` must differ from what any other writer would write there.

        Returns
        -------
        bool
            Whether this call wrote it.
        """
        if isinstance(self.store, FsspecStore):
            # FsspecStore.set_if_not_exists is not atomic: two writers may both succeed.
            path = f"{self.store.path}/{key}"
            try:
                self._sync(self.store.fs._pipe_file(path, data, mode="create"))
            except FileExistsError:
                return False
            return True
        # set_if_not_exists does not report whether it wrote; the content now there shows it.
        self._sync(self.store.set_if_not_exists(key, _buffer(data)))
        return self.read(key) == data

    def settle(self, path: str) -> None:
        """Sync an object, or all below a folder, to disk, so that it survives a loss of power.

        Object stores are durable once they confirm a write; file systems only after a sync.

        What lies below a folder gets the folder's permissions: workers write it too, and may have
        another umask than who made the folder.
        """
        if not isinstance(self.store, LocalStore):
            return
        root = self.store.root / path
        mode = stat.S_IMODE(root.stat().st_mode) if root.is_dir() else None
        paths = [root, root.parent]
        for parent, folders, names in os.walk(root):
            paths += [Path(parent, name) for name in (*folders, *names)]
        with ThreadPoolExecutor(_SYNCING_THREADS) as threads:
            if mode is not None:
                list(threads.map(partial(_permit, mode), paths[2:]))
            list(threads.map(_sync_to_disk, paths))

    def exists(self, key: str) -> bool:
        """Whether there is an object with this key."""
        return self._sync(self.store.exists(key))

    def delete(self, key: str) -> None:
        """Delete an object; nothing happens if there is none."""
        self._sync(self.store.delete(key))

    def delete_folder(self, folder: str) -> None:
        """Delete every object below a folder; nothing happens if there is none.

        Of a folder that is a link, as to another disk, both go.
        """
        path = self.path_of(folder)
        for _ in range(_DELETE_ATTEMPTS):
            try:
                if path is not None and os.path.islink(path):
                    return _delete_link(path)
                return self._sync(self.store.delete_dir(folder))
            except FileNotFoundError:
                # Another process deletes the same folder: delete what is left.
                continue

    def names(self, folder: str) -> list[str]:
        """Names of the objects and folders directly in a folder, in no order."""
        if isinstance(self.store, LocalStore):
            try:
                return os.listdir(self.store.root / folder)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return self._sync(_collect(self.store.list_dir(folder)))

    def keys(self, folder: str) -> list[str]:
        """Keys of all objects below a folder, relative to it, sorted."""
        if isinstance(self.store, LocalStore):
            # LocalStore.list_prefix cuts the root out of the middle of a key as well, so that
            # the keys of a store in /c or /image come out wrong.
            root = self.store.root / folder
            paths = (
                Path(parent) / name
                for parent, _, names in os.walk(root, followlinks=True)
                for name in names
            )
            return sorted(path.relative_to(root).as_posix() for path in paths)
        keys = self._sync(_collect(self.store.list_prefix(f"{folder}/")))
        return sorted(key.removeprefix(f"{folder}/") for key in keys)

    def _sync(self, wanted: Coroutine[Any, Any, T]) -> T:
        """Wait for the store."""
        with reaching(self.url), naming(self.url):
            return sync(wanted)


def _delete_link(path: str) -> None:
    """Delete a link to a folder, and the folder: first, as without the link nobody finds it."""
    target = os.path.realpath(path)
    if os.path.exists(target):
        shutil.rmtree(target)
    os.unlink(path)


def read_file(path: str, key: str, limit: int) -> bytes | None:
    """Read an untrusted file; see `Objects.read`."""
    try:
        # O_NONBLOCK, as opening a pipe without a writer would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _no_file(key) from error
        raise
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            return None
        if not regular(status):
            raise _no_file(key)
        check_size(key, status.st_size, limit)
        return os.read(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def regular(status: os.stat_result) -> bool:
    """Whether it is a file, and no pipe, device or socket."""
    return stat.S_ISREG(status.st_mode)


def check_regular(path: str, key: str) -> None:
    """Refuse a path that exists but is neither a file nor a folder, before it is opened."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _no_file(key) from error
        return
    if not regular(status) and not stat.S_ISDIR(status.st_mode):
        raise _no_file(key)
    check_size(key, status.st_size)


def check_size(key: str, size: int, limit: int = MAX_OBJECT) -> None:
    """Refuse an object that would take too much memory, before it is read."""
    if size > limit:
        raise StoreFormatError(
            f"{key} is damaged, it has more than {limit} bytes: restore it from a copy, or remove"
            " the atlas and add it again."
        )


def _no_file(key: str) -> StoreFormatError:
    return StoreFormatError(
        f"{key} is no file but a device, a pipe, a socket or a link that leads nowhere: restore it"
        " from a copy, or remove the atlas and add it again."
    )


def _permit(mode: int, path: Path) -> None:
    """Give a file or folder the permissions of a folder of this mode; a link stays as it is."""
    # It may be gone, or belong to another user.
    with suppress(OSError):
        now = path.lstat().st_mode
        wanted = mode & (0o777 if stat.S_ISDIR(now) else 0o666)
        if (stat.S_ISDIR(now) or stat.S_ISREG(now)) and now & 0o777 != wanted:
            path.chmod(stat.S_IMODE(now) & ~0o777 | wanted)


def _sync_to_disk(path: Path) -> None:
    # A folder cannot be opened everywhere (Windows), nor synced on every file system.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _buffer(data: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(data)


async def _collect(names: AsyncIterator[str]) -> list[str]:
    return [name async for name in names]


def finish_writes() -> None:
    """Wait until Zarr's event loop has finished all writes.

    An interruption of the main thread does not stop them: they could make a part of a folder again
    that is being removed.
    """

    async def finish() -> None:
        this_task = asyncio.current_task()
        assert this_task is not None
        # Two calls at once must not wait for each other.
        _finishing.add(this_task)
        try:
            await asyncio.gather(*(asyncio.all_tasks() - _finishing), return_exceptions=True)
        finally:
            _finishing.discard(this_task)

    sync(finish())


_finishing: set[asyncio.Task[Any]] = set()
"""Running tasks of `finish_writes`; used on Zarr's event loop only."""
