"""Standard streams that never fail: the reader may close them, the encoding may lack letters."""

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EBADF, errno.EIO)
"""Errors of writing to a pipe or a terminal that its reader has closed."""


class _Output(io.FileIO):
    """A file descriptor of the process; output without a reader, or after an error, is dropped."""

    _failed = False

    def write(self, data: Any) -> int:
        """Write some bytes, or drop all of them."""
        try:
            return super().write(data)
        except OSError as error:
            # Raised once: at exit, Python tries again to write the rest.
            if error.errno in GONE or self._failed:
                return len(data)
            self._failed = True
            what = "standard output" if self.fileno() == 1 else "standard error"
            raise OSError(error.errno, error.strerror, what) from error


def keep_streams_open() -> None:
    """Keep failures of standard output and error from ending the program.

    Letters that the encoding lacks are written as escapes. A descriptor that is closed at the
    start is opened on the null device; otherwise the next file would get its number, and receive
    what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        stream = io.TextIOWrapper(
            io.BufferedWriter(_Output(number, "w", closefd=False)),
            encoding=getattr(before, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=number == 2 or os.isatty(number),
        )
        setattr(sys, name, stream)
