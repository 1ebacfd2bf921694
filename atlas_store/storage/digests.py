"""SHA-256 of bytes, and the canonical bytes of a JSON value, of which a digest can be kept."""

import hashlib
import json
from pathlib import Path
from typing import Any

LARGEST_FOLDER = 8 << 30
"""Size of a folder, bytes, up to which its files are digested: others hold more than one scan."""

Json = Any
"""A JSON value: None, bool, int, float, str, lists and string-keyed dicts of these."""


def canonical(content: Json) -> bytes:
    """One spelling of a JSON value; ValueError for what JSON cannot say, such as NaN."""
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of_file(path: object) -> str | None:
    """SHA-256 of a file, or of the names and SHA-256 of all files in a folder.

    None if it is no local file, a folder of more than `LARGEST_FOLDER`, or cannot be read any more.
    """
    if not isinstance(path, Path):
        return None
    try:
        if not path.is_dir():
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        files = sorted(found for found in path.rglob("*") if found.is_file())
        if sum(one.stat().st_size for one in files) > LARGEST_FOLDER:
            return None
        total = hashlib.sha256()
        for one in files:
            with open(one, "rb") as file:
                own = hashlib.file_digest(file, "sha256").digest()
            name = one.relative_to(path).as_posix().encode("utf-8", "surrogateescape")
            total.update(len(name).to_bytes(8, "big") + name + own)
        return total.hexdigest()
    except OSError:
        return None
