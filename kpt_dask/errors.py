"""What can go wrong, one class for each kind a caller may want to catch.

Every message is one sentence that names the file, says what is wrong and what to do.
Each class also inherits the builtin that a Python programmer would expect.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing to a full disk, over a quota or over a limit of the shell ends with."""


class KptError(Exception):
    """Base of every error that the user can do something about."""


class ScanNotFoundError(KptError, FileNotFoundError):
    """A scan, label map or volume does not exist."""


class ScanFormatError(KptError, ValueError):
    """A scan or label map cannot be read, or holds what cannot be used."""


class GridMismatchError(KptError, ValueError):
    """A scan and its labels do not lie on the same grid."""


class LabelError(KptError, ValueError):
    """A label map holds no label, or labels that the organ table does not know."""


class OutputExistsError(KptError, FileExistsError):
    """The output is there already and overwriting was not asked for."""


class ParameterError(KptError, ValueError):
    """An option has a value that cannot be used."""


class ClusterError(KptError, RuntimeError):
    """Workers cannot be reached, went away, or do not see the data."""


class OutputVanishedError(KptError, FileNotFoundError):
    """What a run had written was deleted by somebody else before the run was done."""


class KptWarning(UserWarning):
    """An input or an answer is doubtful, though it can be used; the output keeps the sentence."""


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an error of a full disk name what was being written, as most libraries leave it out."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
