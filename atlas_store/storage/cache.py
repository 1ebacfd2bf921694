"""The user's cache of data that can be computed again.

An object's name ends with the SHA-256 of its content, so damaged objects are ignored. Nothing is
shared between users, and the program works without a writable cache.
"""

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from atlas_store.storage.digests import digest


def cache_folder() -> Path:
    """Folder of the user's cache: in ``$XDG_CACHE_HOME``, or else in ``~/.cache``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # Not Path.home(), which raises where a user has no home.
    home = Path(os.path.expanduser("~/.cache"))
    return (base if base.is_absolute() else home) / "kpt-dask"


def index_folder(store_uuid: str) -> Path:
    """Folder in which the cache keeps the index of a store."""
    # A digest, because the uuid comes from a store and might hold "../".
    return cache_folder() / "index" / digest(store_uuid.encode())[:32]


def keep(folder: Path, stem: str, suffix: str, data: bytes) -> None:
    """Keep `data` as ``<stem>-<SHA-256><suffix>``, whole or not at all."""
    if not folder.is_absolute():  # of a user without a home
        return
    partial = folder / f"{uuid4().hex}.partial"
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(folder / f"{stem}-{digest(data)}{suffix}")


def recall(path: Path) -> bytes | None:
    """Read an object that `keep` wrote; None if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if path.stem.rpartition("-")[2] == digest(data) else None


def forget(path: Path) -> None:
    """Delete a file of the cache, if possible."""
    with suppress(OSError):
        path.unlink()
