"""Places that are no paths: URLs of object stores and web servers, and what goes wrong there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import zarr

from atlas_store.errors import StoreUnreachableError
from atlas_store.storage.objects import Objects
from atlas_store.storage.unreachable import reaching as reaching_store
from kpt_dask.errors import UnreachableError

SCHEMES = "s3", "gs", "az", "abfs", "http", "https"
"""Schemes of URLs under which an OME-Zarr image may lie."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


@dataclass(frozen=True)
class Remote:
    """A URL; like a path, it has a name, and is told as it was given.

    Examples
    --------
    >>> Remote("s3://bucket/scans/anna.zarr/").name
    'anna.zarr'
    """

    url: str

    def __str__(self) -> str:
        """Give the URL."""
        return self.url

    def __fspath__(self) -> str:
        """Give the URL, as those who take paths or URLs want it."""
        return self.url

    @property
    def name(self) -> str:
        """Name of the last folder."""
        return self.url.partition("?")[0].rstrip("/").rpartition("/")[2]


def scheme_of(place: str) -> str | None:
    """Scheme of a URL; None for a path, and for a ``file://`` URL, which is one."""
    found = _URL.match(place)
    return None if found is None or found[1] == "file" else found[1].lower()


def open_group(place: str | PathLike[str], mode: Any = "r") -> zarr.Group:
    """Open a Zarr v3 group in a folder or at a URL; the errors are Zarr's, or those of `reaching`.

    Parameters
    ----------
    place : str, Path or Remote
        Folder or URL.
    mode : str
        "r" to read, "r+" to write as well.
    """
    with reaching(place):
        return zarr.open_group(Objects.at(fspath(place)).store, mode=mode, zarr_format=3)


@contextmanager
def reaching(place: str | PathLike[str]) -> Iterator[None]:
    """Say in one sentence why a URL cannot be read or written; errors about paths pass.

    Raises
    ------
    UnreachableError
        If there is no network, no server, no bucket, no right to it, or no library for it.
    """
    url = fspath(place)
    if scheme_of(url) is None:
        yield
        return
    try:
        with reaching_store(url, UnreachableError):
            yield
    except StoreUnreachableError as error:
        raise UnreachableError(str(error)) from error
