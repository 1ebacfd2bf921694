"""Gzip files as found in practice: one member or many, zeros or garbage behind the last.

The gzip readers of Python and of ISA-L refuse a file with garbage behind the stream, and lose the
data decoded just before it. The program ``gzip`` ignores the garbage, and so does this module.
"""

import io
from gzip import BadGzipFile
from pathlib import Path
from typing import Any

import isal.igzip_lib

# Not typed.
_igzip_lib: Any = isal.igzip_lib

COMPRESSED_BYTES = 128 << 10
"""Bytes read from the file at a time."""

_MAGIC = b"\x1f\x8b"


class GzipStream(io.RawIOBase):
    """Read a gzip file, from a place on.

    Parameters
    ----------
    path : Path
        The file.
    start : int
        Offset of the first member, bytes.

    Attributes
    ----------
    produced : int
        Bytes that were decoded.
    verified : int
        Number of these in members that ended with the right checksum.

    Raises
    ------
    OSError
        On opening, if the file cannot be read.
    BadGzipFile
        On reading, if it does not begin as gzip does.
    EOFError
        On reading, if it ends within a member.
    isal.isal_zlib.error
        On reading, if it is damaged.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.produced = 0
        self.verified = 0
        self._file = path.open("rb", buffering=0)
        self._file.seek(start)
        self._ahead = b""
        self._member: Any = None
        self._begun = False

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Decode into a buffer; 0 only at the end."""
        with memoryview(buffer).cast("B") as view:
            while len(view):
                if self._member is None and not self._begin_member():
                    return 0
                data = self._next(len(view))
                view[: len(data)] = data
                self.produced += len(data)
                if self._member.eof:
                    self._ahead = self._member.unused_data
                    self._member = None
                    self.verified = self.produced
                if data:
                    return len(data)
        return 0

    def _next(self, size: int) -> bytes:
        member = self._member
        compressed = b""
        if member.needs_input:
            compressed = self._ahead or self._file.read(COMPRESSED_BYTES)
            self._ahead = b""
            if not compressed:
                raise EOFError
        data: bytes = member.decompress(compressed, size)
        return data

    def _begin_member(self) -> bool:
        """Find where the next member begins; what does not begin like one is not looked at."""
        first = not self._begun
        while True:
            if not first:
                self._ahead = self._ahead.lstrip(b"\0")
            if len(self._ahead) >= len(_MAGIC):
                break
            more = self._file.read(COMPRESSED_BYTES)
            if not more:
                break
            self._ahead += more
        if self._ahead.startswith(_MAGIC):
            self._member = _igzip_lib.IgzipDecompressor(flag=_igzip_lib.DECOMP_GZIP)
            self._begun = True
            return True
        if first and self._ahead:
            raise BadGzipFile(f"Not a gzipped file ({self._ahead[:2]!r})")
        return False


class ZlibStream(GzipStream):
    """Read one zlib stream, as MetaImage files hold it; what follows it is not looked at."""

    def _begin_member(self) -> bool:
        if self._begun:
            return False
        self._member = _igzip_lib.IgzipDecompressor(flag=_igzip_lib.DECOMP_ZLIB)
        self._begun = True
        return True
