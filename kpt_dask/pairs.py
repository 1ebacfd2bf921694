"""Scans of a folder and the label maps that belong to them, found by their names."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from atlas_store.info import natural_order
from kpt_dask.errors import ParameterError, ScanNotFoundError

SCANS = "{id}_ct.nii.gz"
LABELS = "{id}_seg.nii.gz"
"""How files are named unless told otherwise."""

_ID = "{id}"


@dataclass(frozen=True)
class Pair:
    """A scan and the label map that should be there.

    Attributes
    ----------
    id : str
        What stands for ``{id}`` in both names.
    scan, labels : Path
        The files.
    """

    id: str
    scan: Path
    labels: Path


def find_pairs(
    folder: str | Path, scan_pattern: str = SCANS, labels_pattern: str = LABELS
) -> list[Pair]:
    """Find the scans of a folder; whether their label maps exist is not looked at.

    Parameters
    ----------
    folder : str or Path
        Where to look.
    scan_pattern, labels_pattern : str
        Paths in the folder with ``{id}`` once or more, such as ``{id}/ct.nii.gz``. What fits
        the pattern of the labels is no scan.

    Returns
    -------
    list of Pair
        In natural order of the ids.

    Raises
    ------
    ParameterError
        If a pattern has no ``{id}``, leaves the folder, or both are the same.
    ScanNotFoundError
        If the folder does not exist, or no file in it fits the pattern of the scans.
    """
    folder = Path(folder)
    for pattern in (scan_pattern, labels_pattern):
        parts = PurePath(pattern)
        if _ID not in pattern or parts.is_absolute() or ".." in parts.parts:
            raise ParameterError(
                f"The pattern {pattern!r} cannot be used; write a path in the folder with {_ID}"
                f" where the names differ, such as {SCANS}."
            )
    if scan_pattern == labels_pattern:
        raise ParameterError(
            f"Scans and labels have the same pattern {scan_pattern!r}; give each its own."
        )
    if not folder.is_dir():
        raise ScanNotFoundError(f"{folder} is no folder; give the one that holds the scans.")
    labels = set(_matching(folder, labels_pattern).values())
    found = [
        Pair(name, path, folder / labels_pattern.replace(_ID, name))
        for name, path in _matching(folder, scan_pattern).items()
        if path not in labels
    ]
    if not found:
        raise ScanNotFoundError(
            f"{folder} holds no scan named {scan_pattern}; check the folder and the pattern."
        )
    return sorted(found, key=lambda pair: natural_order(pair.id))


def _matching(folder: Path, pattern: str) -> dict[str, Path]:
    """Files of the folder by what stands for ``{id}``."""
    parts = [re.escape(part) for part in PurePath(pattern).as_posix().split(_ID)]
    expression = re.compile(f"{parts[0]}(?P<id>[^/]+){'(?P=id)'.join(parts[1:])}")
    depth = len(PurePath(pattern).parts)
    found = {}
    for path in folder.glob("/".join(["*"] * depth)):
        match = expression.fullmatch(path.relative_to(folder).as_posix())
        if match and path.is_file():
            found[match["id"]] = path
    return found
