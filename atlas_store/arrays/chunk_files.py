"""Files of chunks and shards: read in one call, and replaced whole or not at all."""

import os
import uuid
from collections.abc import Sequence
from io import BufferedWriter
from pathlib import Path

from atlas_store.errors import MissingChunkError

_MAX_PIECES = 1024
"""Pieces written with one system call: the most that Linux takes."""


def replace_file(path: str, data: Sequence[bytes] | None, root: str) -> None:
    """Write a file atomically; None removes it.

    Folders are made only below `root`, the array's folder: if that is missing, it was deleted.

    Raises
    ------
    MissingChunkError
        If the array's folder is gone.
    """
    if data is None:
        Path(path).unlink(missing_ok=True)
        return
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        file = open(partial, "xb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        if not os.path.isdir(root):
            raise missing_chunk(root) from None
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(partial, "xb")  # noqa: SIM115
    with file:
        _write_pieces(file, data)
    try:
        os.replace(partial, path)
    except FileNotFoundError:
        raise missing_chunk(path) from None


def _write_pieces(file: BufferedWriter, data: Sequence[bytes]) -> None:
    """Write pieces in few calls: every return to Python may wait for the GIL."""
    for first in range(0, len(data), _MAX_PIECES):
        some = data[first : first + _MAX_PIECES]
        written = os.writev(file.fileno(), some)
        for piece in some if written < sum(map(len, some)) else ():
            # A short write: too much for one call, or a disk that is nearly full.
            file.write(piece[max(written, 0) :])
            written -= len(piece)
        file.flush()


def read_file(path: str) -> bytes:
    """Read a file in few calls: every return to Python may wait for the GIL."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, os.fstat(file).st_size)
    finally:
        os.close(file)


def missing_chunk(path: str) -> MissingChunkError:
    """Make the error of a file that was written and is gone."""
    return MissingChunkError(
        f"{path} is gone: something deleted it after it was written; run again, where nobody"
        " cleans up meanwhile."
    )
