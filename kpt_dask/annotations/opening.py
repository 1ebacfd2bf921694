"""Opening of labels, whatever they come as: names become the values of the store."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from atlas_store import Organ, OrganTable
from kpt_dask.annotations.drawn import UNNAMED, Canvas, DrawnLabels, RenamedLabels
from kpt_dask.annotations.masks import MaskFolder, mask_files
from kpt_dask.annotations.names import match_names, same_organ
from kpt_dask.annotations.nifti_names import label_names
from kpt_dask.errors import (
    GridMismatchError,
    LabelError,
    ScanFormatError,
    ScanNotFoundError,
    some_of,
)
from kpt_dask.remote import Remote, scheme_of
from kpt_dask.runtime import notices
from kpt_dask.scans.dicom_files import is_dicom, is_zarr
from kpt_dask.scans.nifti import NiftiFile
from kpt_dask.scans.scan import Scan, open_labels, open_scan

NAMED = 12
"""Names at most in a sentence."""


class NamedParts(Protocol):
    """Labels that have names: masks, segments or regions, by number."""

    @property
    def names(self) -> Mapping[int, str]:
        """Names by number."""

    @property
    def worlds(self) -> Mapping[int, str]:
        """UIDs of the frames of reference that they are given in, where that is known."""

    def draw(self, canvas: Canvas, organs: Mapping[int, Organ]) -> None:
        """Draw the parts of some numbers."""


def open_pair(
    scan: str | Path,
    labels: str | Path,
    organs: OrganTable,
    *,
    values: Mapping[int, str] | None = None,
    series: str | None = None,
) -> tuple[Scan, Scan]:
    """Open a scan and its labels.

    Parameters
    ----------
    scan : str or Path
        As for `kpt_dask.open_scan`.
    labels : str or Path
        A label map in a format of scans, with the values of the organs; or a NIfTI label map that
        names its values (as of TotalSegmentator), a folder with a mask for each organ, a
        segmentation of 3D Slicer (``.seg.nrrd``), a DICOM SEG or RTSTRUCT: then the names decide.
        What no organ is called is left out, with a warning.
    organs : OrganTable
        Organs of the store.
    values : mapping of int to str, optional
        Names of the values of a label map, where they are not those of `organs`.
    series : str, optional
        UID of the DICOM series of the scan.

    Returns
    -------
    scan, labels : Scan
        The labels lie on the voxels of the scan, though their axes may be stored in another order,
        and have the values of `organs`.

    Raises
    ------
    GridMismatchError
        If they do not lie on the same voxels.
    LabelError
        If no name is that of an organ, or two are that of one, and not of different parts of it.
    ScanNotFoundError, ScanFormatError
        If one of them cannot be opened.
    """
    source = open_scan(scan, series=series)
    path = Path(labels)
    parts = _named_parts(path) if scheme_of(str(labels)) is None else None
    if parts is not None:
        return source, _drawn(path, parts, source, organs)
    labelled = open_labels(labels)
    if source.grid.stored_as(labelled.grid) is None:
        if source.grid.shape != labelled.grid.shape:
            how = f"shape {_stored_shape(labelled)} against {_stored_shape(source)}"
        else:
            how = "their affines differ"
        raise GridMismatchError(
            f"{labels} does not lie on the grid of {scan} ({how}); resample it to the scan first."
        )
    if values is None and isinstance(labelled.file, NiftiFile):
        values = label_names(labelled.file)
    return source, _renamed(labelled, values, organs) if values else labelled


def has_names_only(labels: str | Path) -> bool:
    """Whether labels are told by names alone: DICOM SEG, RTSTRUCT or a folder of masks.

    Raises
    ------
    ScanNotFoundError, ScanFormatError
        If there is nothing, or it is damaged.
    """
    path = Path(labels)
    # 3D Slicer's segmentations have values as well.
    if scheme_of(str(labels)) is not None or path.name.lower().endswith(".seg.nrrd"):
        return False
    return _named_parts(path) is not None


def _named_parts(path: Path) -> NamedParts | None:
    """Open labels that have names; None for a label map of values, or for nothing."""
    if path.is_dir():
        if is_zarr(path):
            return None
        if mask_files(path):
            return MaskFolder(path)
        # Archives keep a segmentation in a folder of its own, or beside the slices.
        files = sorted(file for file in path.iterdir() if file.is_file() and is_dicom(file))
        found = [(file, kind) for file in files if (kind := _dicom_kind(file)) is not None]
        if len(found) > 1:
            raise ScanFormatError(
                f"{path} holds {len(found)} segmentations or structure sets"
                f" ({some_of([file.name for file, _ in found])}); give one of them."
            )
        return found[0][1](found[0][0]) if found else None
    if not path.exists():
        raise ScanNotFoundError(f"{path} does not exist.")
    if path.name.lower().endswith(".seg.nrrd"):
        from kpt_dask.annotations.slicer import SlicerFile

        return SlicerFile(path)
    kind = _dicom_kind(path) if path.is_file() and is_dicom(path) else None
    return None if kind is None else kind(path)


def _dicom_kind(path: Path) -> Callable[[Path], NamedParts] | None:
    """Find what opens a DICOM file that holds labels; None if it holds something else."""
    # Importing pydicom takes longer than to read most headers.
    from kpt_dask.annotations import dicom_objects
    from kpt_dask.annotations.dicom_seg import SegmentationFile
    from kpt_dask.annotations.rtstruct import StructureFile

    kind = dicom_objects.kind_of(path)
    if kind in dicom_objects.SEGMENTATIONS:
        return SegmentationFile
    if kind in dicom_objects.STRUCTURE_SETS:
        return StructureFile
    return None


def _known(path: Path | Remote, names: Mapping[int, str], organs: OrganTable) -> dict[int, Organ]:
    """Find the organs that numbers mean, and warn of names that mean none.

    Organs of the two sides are named alike by mistake, so only parts of an organ are united.
    """
    found, unknown = match_names(names.values(), organs)
    if not found:
        raise LabelError(
            f"{path} shows {some_of(unknown, NAMED)}, of which the store knows none; it knows"
            f" {', '.join(organs.names)}."
        )
    if (both := same_organ(names.values(), found)) is not None:
        raise LabelError(
            f"{path}: {both[0]} and {both[1]} both mean {found[both[1]].name}, of which there is"
            " one; rename or remove one of them."
        )
    # Who names the background, as SEG and nnU-Net do, means no organ.
    if lost := [name for name in unknown if name.casefold() != "background"]:
        notices.warn(f"{path}: no organ of the store is called {some_of(lost, NAMED)}, left out.")
    return {n: found[name] for n, name in names.items() if name in found}


def _drawn(path: Path, parts: NamedParts, source: Scan, organs: OrganTable) -> Scan:
    known = _known(path, parts.names, organs)
    _doubt_world(path, {parts.names[n]: parts.worlds.get(n, "") for n in known}, source)
    file = DrawnLabels(path, source.grid, organs, lambda canvas: parts.draw(canvas, known))
    return Scan(path, source.grid, file.dtype, file)


def _doubt_world(path: Path, worlds: Mapping[str, str], source: Scan) -> None:
    """Warn of labels, by name, whose positions are given in another frame of reference."""
    if not any(worlds.values()):
        return
    # Importing pydicom takes long.
    from kpt_dask.scans.dicom import DicomFile

    own = source.file.worlds if isinstance(source.file, DicomFile) else ()
    if own and (strange := [name for name, uid in worlds.items() if uid and uid not in own]):
        notices.warn(
            f"{path} was drawn in another frame of reference (FrameOfReferenceUID) than that of"
            f" {source.path} ({some_of(strange)}), perhaps on another scan; see that it fits."
        )


def _renamed(labelled: Scan, values: Mapping[int, str], organs: OrganTable) -> Scan:
    known = _known(labelled.path, values, organs)
    lookup = np.full(1 << 16, UNNAMED, np.int32)
    lookup[0] = 0
    for value in values:
        lookup[value] = known[value].value if value in known else 0
    file = RenamedLabels(labelled.path, labelled.grid, labelled.label_slabs, lookup)
    return Scan(labelled.path, labelled.grid, file.dtype, file)


def _stored_shape(scan: Scan) -> str:
    """Shape as the file's own header gives it, fastest axis first."""
    return " × ".join(map(str, scan.grid.shape[::-1]))
