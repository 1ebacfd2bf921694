"""Of whom and what a scan is, for DICOM files that are made from it: patient, study, slices.

A scan that was no DICOM has no patient and no slices to refer to: its identifiers are new, and what
is made from it refers to nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.valuerep import DA, TM

from kpt_dask.errors import ScanFormatError
from kpt_dask.grid import Grid
from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.runtime import notices
from kpt_dask.scans.dicom import DicomFile
from kpt_dask.scans.dicom_header import quiet

PATIENT_AND_STUDY = {
    "PatientID": "",
    "PatientName": "",
    "PatientBirthDate": "",
    "PatientSex": "",
    "StudyDate": "",
    "StudyTime": "",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
    "StudyID": "",
    "PositionReferenceIndicator": "",
}
"""What every DICOM file must say, though it may be nothing, and what it says then."""

DATES = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
"""What must be dates and times; what is none of these is left out."""

COPIED = (
    *PATIENT_AND_STUDY,
    "SpecificCharacterSet",
    "StudyDescription",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
)
"""What a file says of the patient and the study, and shares with the scan."""


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice of the source series.

    Attributes
    ----------
    sop_class, instance : str
        UIDs of its file.
    frame : int or None
        Number of the frame in that file, from 1, if it has several.
    """

    sop_class: str
    instance: str
    frame: int | None


@dataclass(frozen=True, eq=False)
class Source:
    """Source of a DICOM file.

    Attributes
    ----------
    about : Dataset
        Patient and study, and the frame of reference.
    series : str
        UID of the series; "" if there is none.
    slices : tuple of Slice
        One for each plane of the grid, in order; empty if there is no series.
    """

    about: Dataset
    series: str
    slices: tuple[Slice, ...]


def source_of(label_map: LabelMap) -> Source:
    """Read what is known of the scan of a label map; warn if its slices cannot be referred to.

    Raises
    ------
    ScanFormatError
        If the first slice of a series can no longer be read.
    """
    scan = label_map.scan
    about = Dataset()
    series: str = ""
    slices: tuple[Slice, ...] = ()
    if isinstance(scan, DicomFile):
        about = _about(scan)
        headers = [frame.header for frame in scan.frames]
        series = headers[0].series
        slices = tuple(
            Slice(
                header.sop_class or str(uid.CTImageStorage),
                header.instance,
                frame.index + 1 if header.n_frames > 1 else None,
            )
            for frame, header in zip(scan.frames, headers, strict=True)
        )
        if not series or not all(one.instance for one in slices):
            series, slices = "", ()
            notices.warn(
                f"{scan.path} has slices without SeriesInstanceUID or SOPInstanceUID, so DICOM"
                " labels of it refer to no slice: viewers find the scan by its position only, or"
                " not at all; give the slices their UIDs and write the labels again."
            )
    for keyword, value in PATIENT_AND_STUDY.items():
        if keyword not in about:
            setattr(about, keyword, value)
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if not about.get(keyword):
            setattr(about, keyword, uid.generate_uid())
    return Source(about, series, slices)


def _about(scan: DicomFile) -> Dataset:
    first = scan.frames[0].header
    quiet()
    try:
        with scan.files.reading() as opener, opener(first.name) as file:
            read: Any = pydicom.dcmread(
                file, stop_before_pixels=True, force=True, specific_tags=list(COPIED)
            )
            about = Dataset()
            for keyword in COPIED:
                if keyword in read and _is_sound(keyword, read[keyword].value):
                    about[keyword] = read[keyword]
    except Exception as error:  # pydicom raises many kinds on damaged files
        raise ScanFormatError(f"{first.shown} cannot be read again ({error}).") from error
    return about


def _is_sound(keyword: str, value: Any) -> bool:
    if keyword in DATES:
        try:
            DATES[keyword](str(value or ""))
        except ValueError:
            return False
    return True


def orientation_of(grid: Grid) -> list[float]:
    """Give the directions of a row and of a column of a plane, (x, y, z) each, LPS."""
    cosines = grid.affine[:3, :3] / grid.spacing
    return [*cosines[::-1, 2].tolist(), *cosines[::-1, 1].tolist()]


def position_of(grid: Grid, plane: int) -> NDArray[np.float64]:
    """Give the centre of the first voxel of a plane, (x, y, z) in mm, LPS."""
    return grid.to_mm((plane, 0, 0))[::-1]
