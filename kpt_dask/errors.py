"""Errors of the program, one class for each kind that a caller may want to catch.

::

    KptError                       base of all
    ├── ScanNotFoundError          FileNotFoundError
    ├── ScanFormatError            ValueError
    ├── GridMismatchError          ValueError
    ├── LabelError                 ValueError
    ├── ParameterError             ValueError
    ├── OutputExistsError          FileExistsError
    ├── OutputVanishedError        FileNotFoundError
    ├── UnreachableError           ConnectionError
    └── ClusterError               RuntimeError
    atlas_store.AtlasStoreError    base of those of a store; see `atlas_store.errors`

Each class also inherits the builtin on its right. Every message is one sentence that names the
file, says what is wrong and what to do. `USER_ERRORS` catches all of them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


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
    """A run's partial output was deleted by somebody else before the run was done."""


class UnreachableError(KptError, ConnectionError):
    """A URL cannot be read or written: no network, no bucket, no right to it, or no library."""


if TYPE_CHECKING:
    USER_ERRORS: tuple[type[Exception], ...]
    """Errors with one clear sentence for the user; all others are faults of the program."""


def __getattr__(name: str) -> Any:
    """Make `USER_ERRORS` when it is first used: `kpt --help` needs no store."""
    if name != "USER_ERRORS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _user_errors()


def _user_errors() -> tuple[type[Exception], ...]:
    from atlas_store.errors import AtlasStoreError

    return KptError, AtlasStoreError


class KptWarning(UserWarning):
    """An input or an answer is doubtful, though it can be used; the output keeps the sentence."""


def some_of(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """List names for a sentence: the first `most` of them, and how many more there are.

    Examples
    --------
    >>> some_of(["liver", "spleen", "aorta"], 2)
    'liver, spleen and 1 more'
    """
    more = len(names) - most
    return between.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def sentence_of(error: Exception) -> str:
    """Say an error in one sentence; one of no class above may be a fault of the program.

    Examples
    --------
    >>> sentence_of(FileNotFoundError(2, "No such file or directory", "scan.nii.gz"))
    'scan.nii.gz: No such file or directory.'
    """
    if isinstance(error, _user_errors()):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}."
    if isinstance(error, MemoryError):
        return "out of memory: give the program more, or less to do by --memory."
    if isinstance(error, ValueError) and "dask config file" in str(error):
        return f"{error} Mend the file, or move it away."
    return (
        f"{type(error).__name__}: {error}. This is a fault of the program: set KPT_DEBUG=1 to"
        " see where it is, and report it."
    )
