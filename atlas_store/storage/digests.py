"""SHA-256 of bytes, and the canonical bytes of a JSON value, of which a digest can be kept."""

import hashlib
import json
from pathlib import Path
from typing import Any

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
    """SHA-256 of a file; None of a folder, of what is no local file, or of what cannot be read."""
    if not isinstance(path, Path):
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
