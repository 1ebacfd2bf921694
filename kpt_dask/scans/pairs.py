"""Scans and the label maps that belong to them: found by name, checked before the long work."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from atlas_store import OrganTable
from atlas_store.marker import natural_order
from kpt_dask.errors import LabelError, ParameterError, ScanNotFoundError
from kpt_dask.options import LABELS, SCANS
from kpt_dask.runtime import progress
from kpt_dask.scans.scan import Scan

_ID = "{id}"


@dataclass(frozen=True)
class Pair:
    """A scan and the label map that belongs to it.

    Attributes
    ----------
    id : str
        Text at ``{id}`` in both names.
    scan, labels : Path
        The files, or folders.
    values : mapping of int to str, optional
        Names of the values of the labels, where they are not those of the store.
    series : str, optional
        Which DICOM series of the scan it is.
    """

    id: str
    scan: Path
    labels: Path
    values: Mapping[int, str] | None = None
    series: str | None = None


def find_pairs(
    folder: str | Path, scan_pattern: str = SCANS, labels_pattern: str = LABELS
) -> list[Pair]:
    """Find the scans of a folder; whether their label maps exist is not checked.

    Parameters
    ----------
    folder : str or Path
        Folder to search.
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
        If the folder does not exist, or nothing in it fits the pattern of the scans.
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


def labelled_organs(labels: Scan, organs: OrganTable) -> tuple[str, ...]:
    """Name the organs that a label map shows, in the order of the table.

    Raises
    ------
    LabelError
        If there is no label, or one that the table does not know.
    ScanFormatError
        If the file is damaged or holds anything but labels.
    """
    occurs = np.zeros(1 << 16, bool)
    with progress.stage("Checking labels", total=labels.grid.shape[0]) as advance:
        for slab in labels.label_slabs():
            occurs[slab] = True
            advance(len(slab))
    values = set(np.flatnonzero(occurs).tolist()) - {0}
    if not values:
        raise LabelError(f"{labels.path} holds no label; give the label map of the scan.")
    unknown = sorted(values - set(organs.values))
    if unknown:
        known = ", ".join(f"{organ.value} {organ.name}" for organ in organs)
        raise LabelError(
            f"{labels.path} holds labels that the organ table does not know:"
            f" {', '.join(map(str, unknown))}; the store knows {known}."
        )
    return tuple(organ.name for organ in organs if organ.value in values)


def _matching(folder: Path, pattern: str) -> dict[str, Path]:
    """Files and folders of the folder by what stands for ``{id}``."""
    parts = [re.escape(part) for part in PurePath(pattern).as_posix().split(_ID)]
    expression = re.compile(f"{parts[0]}(?P<id>[^/]+){'(?P=id)'.join(parts[1:])}")
    depth = len(PurePath(pattern).parts)
    found = {}
    for path in folder.glob("/".join(["*"] * depth)):
        match = expression.fullmatch(path.relative_to(folder).as_posix())
        if match and path.exists():
            found[match["id"]] = path
    return found
