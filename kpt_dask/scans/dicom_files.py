"""Files of a DICOM scan, wherever they lie: one file, a folder with all below it, or a zip.

Reads nothing of their content but the four letters that mark DICOM.
"""

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from kpt_dask.errors import ScanFormatError

ENDINGS = ".dcm", ".dicom", ".ima"
"""Endings of files that must be DICOM; the content of other files decides."""

MOST_FILES = 200_000
"""Limit of the files of one scan; a folder with more was given by mistake."""

LARGEST_MEMBER = 256 << 20
"""Limit of a file in a zip, bytes: it is decompressed in memory."""

MOST_COMPRESSED = 1032
"""Deflate cannot shrink data more than this."""

_MARK, _MARK_AT = b"DICM", 128
_SHORT = 1 << 16
_BARE = b"\x02\x00", b"\x08\x00"
"""First bytes of a data set without a preamble: group 2 or 8."""

DAMAGE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
"""Errors of reading a file or a member of a zip."""

Open = Callable[[str], BinaryIO]


@dataclass(frozen=True)
class DicomFiles:
    """The files that may belong to a scan.

    Attributes
    ----------
    path : Path
        The file, folder or zip.
    names : tuple of str
        Names of files, relative to `path`; "" for a single file.
    """

    path: Path
    names: tuple[str, ...]

    def shown(self, name: str) -> str:
        """Name a file in a sentence."""
        return str(self.path / name) if name else str(self.path)

    @contextmanager
    def reading(self) -> Iterator[Open]:
        """Yield a function that opens a file by its name, as a stream that can seek."""
        if not is_zip(self.path):
            yield lambda name: open_bounded(self.path / name if name else self.path)
            return
        with zipfile.ZipFile(self.path) as archive:
            yield lambda name: cast(BinaryIO, archive.open(name))

    def whole(self, opener: Open, name: str) -> BinaryIO:
        """Open a file for random access: a member of a zip is decompressed first."""
        file = opener(name)
        if not is_zip(self.path):
            return file
        with file:
            return BytesIO(file.read(LARGEST_MEMBER))


class _Bounded(BufferedReader):
    """A file whose reads ask for memory for no more than is left of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        # A short read is common and its memory is nothing: it need not know its place.
        if size is not None and size > _SHORT:
            size = min(size, max(0, self._size - self.tell()))
        return super().read(size)


def open_bounded(path: Path) -> BinaryIO:
    """Open a file for a reader that believes its lengths.

    A read of a file in Python takes the memory that is asked for before it looks how much is left,
    so that one damaged length of DICOM would take up to 4 GiB.
    """
    return cast(BinaryIO, _Bounded(path))


def is_zip(path: Path) -> bool:
    """Whether a path names a zip."""
    return path.name.lower().endswith(".zip")


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr group or array."""
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs", ".zarray"))


def is_dicom(path: Path) -> bool:
    """Whether a file that exists is DICOM, by its name or by its mark."""
    if path.name.lower().endswith(ENDINGS):
        return True
    try:
        with path.open("rb") as file:
            return looks_like_dicom(file.read(_MARK_AT + len(_MARK)))
    except OSError:
        return False


def looks_like_dicom(start: bytes) -> bool:
    """Whether the first bytes of a file, 132 or more, are those of DICOM."""
    return start[_MARK_AT:].startswith(_MARK) or start.startswith(_BARE)


def find_files(path: Path) -> DicomFiles:
    """List what may belong to a scan; links to folders are not followed.

    Raises
    ------
    ScanFormatError
        If a folder or a zip holds no file or too many, or a zip is damaged, encrypted or claims
        more data than deflate can compress to its size.
    """
    if is_zip(path):
        names = _in_zip(path)
    elif path.is_dir():
        names = _in_folder(path)
    else:
        return DicomFiles(path, ("",))
    if not names:
        what = "zip" if is_zip(path) else "folder"
        raise ScanFormatError(f"{path} is a {what} that holds no file; give a DICOM series.")
    return DicomFiles(path, tuple(sorted(names)))


def _in_folder(path: Path) -> list[str]:
    names = []

    def fail(error: OSError) -> None:
        raise ScanFormatError(
            f"{error.filename} cannot be read ({error.strerror}), so slices may be missing."
        ) from error

    for folder, below, files in os.walk(path, onerror=fail):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files:
            file = Path(folder, name)
            if _hidden(name):
                continue
            try:
                regular = stat.S_ISREG(file.stat().st_mode)
            except OSError as error:
                if name.lower().endswith(ENDINGS):
                    raise ScanFormatError(
                        f"{file} cannot be read ({error.strerror}), so a slice may be missing."
                    ) from error
                continue
            if regular:
                names.append(str(file.relative_to(path)))
        if len(names) > MOST_FILES:
            raise ScanFormatError(
                f"More than {MOST_FILES} files lie below {path}; give the folder of one series."
            )
    return names


def _in_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [
                member
                for member in archive.infolist()
                if not member.is_dir() and not _hidden(member.filename)
            ]
        size = path.stat().st_size
    except DAMAGE as error:
        raise ScanFormatError(f"{path} is no zip, or damaged ({error}); get a new copy.") from error
    except ValueError as error:
        raise ScanFormatError(f"{path} is damaged ({error}); get a new copy.") from error
    if any(member.flag_bits & 1 for member in members):
        raise ScanFormatError(f"{path} is encrypted; unpack it and give the folder.")
    if len(members) > MOST_FILES:
        raise ScanFormatError(f"{path} holds more than {MOST_FILES} files; give one series.")
    if sum(member.file_size for member in members) > MOST_COMPRESSED * size:
        raise ScanFormatError(f"{path} says that it unpacks to more than a zip can; it is damaged.")
    for member in members:
        if member.file_size > LARGEST_MEMBER:
            raise ScanFormatError(
                f"{path}/{member.filename} is larger than {LARGEST_MEMBER >> 20} MiB; unpack the"
                " zip and give the folder."
            )
    return [member.filename for member in members]


def _hidden(name: str) -> bool:
    """Whether a file is one of those that systems leave everywhere, or a directory of DICOM."""
    path = PurePosixPath(name)
    return (
        path.name.startswith(".")
        or "__MACOSX" in path.parts
        or path.name.upper() in ("DICOMDIR", "THUMBS.DB")
    )
