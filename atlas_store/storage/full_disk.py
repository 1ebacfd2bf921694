"""Errors of a full disk, which most libraries raise without a name."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exhausted quota and a file size limit of the shell."""


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add to an error of a full disk what was being written, unless it names a file.

    Examples
    --------
    >>> import errno
    >>> with naming("scan.zarr"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'scan.zarr'
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
