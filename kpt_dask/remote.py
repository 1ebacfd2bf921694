"""Places that are no paths: URLs of object stores and web servers, and what goes wrong there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import zarr

from atlas_store.errors import AtlasStoreError
from atlas_store.storage.objects import Objects
from kpt_dask.errors import KptError, UnreachableError

SCHEMES = "s3", "gs", "az", "abfs", "http", "https"
"""Schemes of URLs under which an OME-Zarr image may lie."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_CLIENTS = frozenset({"botocore", "aiobotocore", "aiohttp"})
"""Libraries whose own errors are about the network, credentials or a server."""


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
        yield
    except (KptError, AtlasStoreError):
        raise
    except ImportError as error:
        raise UnreachableError(
            f"{url} cannot be reached without a library ({error}); for s3:// install kpt-dask[s3]."
        ) from error
    except FileNotFoundError as error:
        if _code(error) != "NoSuchBucket":
            raise
        raise UnreachableError(
            f"{url} cannot be reached, as there is no such bucket; create it, or correct the name."
        ) from error
    except PermissionError as error:
        raise UnreachableError(
            f"{url} is refused by its server ({_said(error)}); check your credentials and what they"
            " allow."
        ) from error
    except ValueError as error:
        if "endpoint" not in str(error):
            raise
        raise UnreachableError(
            f"{url} cannot be reached ({_said(error)}); the address in AWS_ENDPOINT_URL must begin"
            " with http:// or https://."
        ) from error
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library not in _CLIENTS and not isinstance(error, OSError):
            raise
        raise UnreachableError(
            f"{url} cannot be reached ({_said(error)}); check the network, the name, and your"
            " credentials."
        ) from error


def _code(error: BaseException) -> str | None:
    """Code of an object store's answer, which s3fs keeps in the cause of its error."""
    answer: Any = getattr(error.__cause__, "response", None) or {}
    code = answer.get("Error", {}).get("Code")
    return code if isinstance(code, str) else None


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
