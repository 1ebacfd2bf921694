"""What an output of this program holds: how it is known, and what in it is not this program's."""

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OWN = frozenset({"kpt-volume"})
"""``encoding-type`` of folders that this program writes and may replace."""
STORE = "kpt-atlas-store"
"""``encoding-type`` of atlas stores, to which only the store itself writes."""
EVALUATION = "kpt-evaluation"
"""``encoding-type`` of folders of an evaluation, in their ``results.json``."""

_ENTRIES = re.compile(r"zarr\.json|\d+|coarse|labels|probability|keypoints|matches|votes|own_axes")
"""Names in an output of this program; `coarse` held levels in some."""
_LABELS = frozenset({"zarr.json", "organs"})
_EVALUATION_ENTRIES = re.compile(r"index\.html|measures\.csv|limited_view\.csv|results\.json")
"""Names in the folder of an evaluation."""
_LITTER = frozenset({".DS_Store", "Thumbs.db"})
"""Files that file managers put into every folder."""

ROOT = "zarr.json"
"""Name of the object that makes a folder a Zarr group."""
LARGEST_ROOT = 16 << 20
"""Bytes of it that are read at most."""
UNKNOWN = "it does not say of itself that it is an output of kpt"
"""Why what somebody else wrote is not replaced."""


def encoding_of(folder: Path) -> str | None:
    """Read the attribute ``encoding-type`` of a Zarr group, if it has one."""
    return encoding_in(_document(folder))


def encoding_in(document: bytes | None) -> str | None:
    """Find the attribute ``encoding-type`` in a ``zarr.json``, if it has one."""
    kind = (_attributes(document) or {}).get("encoding-type")
    return kind if isinstance(kind, str) else None


def run_of(folder: Path) -> str | None:
    """Read the id of the run that wrote an output folder; None if it is incomplete."""
    provenance = (_attributes(_document(folder)) or {}).get("kpt")
    run = provenance.get("run") if isinstance(provenance, dict) else None
    return run if isinstance(run, str) else None


def foreign(folder: Path) -> str | None:
    """Find why a folder must not be replaced: it holds files of others; None if it may be."""
    entries = set(os.listdir(folder)) - _LITTER
    if not entries:
        return None
    if _is_evaluation(folder):
        others = sorted(name for name in entries if not _EVALUATION_ENTRIES.fullmatch(name))
        return f"{others[0]} in it is not written by kpt evaluate" if others else None
    if encoding_of(folder) not in OWN:
        return UNKNOWN
    labels = folder / "labels"
    return stranger(entries, os.listdir(labels) if labels.is_dir() else ())


def stranger(entries: Iterable[str], labels: Iterable[str]) -> str | None:
    """Name what kpt segment does not write.

    Parameters
    ----------
    entries, labels : iterable of str
        Names in an output, and in its folder ``labels``.
    """
    others = sorted(name for name in {*entries} - _LITTER if not _ENTRIES.fullmatch(name))
    others += sorted(f"labels/{name}" for name in {*labels} - _LABELS - _LITTER)
    return f"{others[0]} in it is not written by kpt segment" if others else None


def _is_evaluation(folder: Path) -> bool:
    """Whether the results in a folder begin as those of an evaluation do; they may be long."""
    beginning = f'{{\n  "encoding-type": "{EVALUATION}"'.encode()
    try:
        with open(folder / "results.json", "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return regular and file.read(len(beginning)) == beginning
    except OSError:
        return False


def _document(folder: Path) -> bytes | None:
    try:
        with open(folder / ROOT, "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return file.read(LARGEST_ROOT) if regular else None
    except OSError:
        return None


def _attributes(document: bytes | None) -> dict[str, Any] | None:
    try:
        attributes = json.loads(document or b"")["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return attributes if isinstance(attributes, dict) else None
