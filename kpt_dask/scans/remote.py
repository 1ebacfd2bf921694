"""Places of scans that are no paths: URLs of object stores and web servers."""

import re
from dataclasses import dataclass

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
