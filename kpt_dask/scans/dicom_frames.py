"""Frames of DICOM files: the place of each plane in space, and how its values become HU."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from kpt_dask.errors import ScanFormatError
from kpt_dask.scans.dicom_header import ENHANCED, Header, numbers
from kpt_dask.scans.placement import SMALLEST_SPACING

SMALLEST_SLOPE = 1e-6
"""Smallest HU of a step between stored values."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A plane of a scan.

    Attributes
    ----------
    header : Header
        Header of the file that holds it.
    index : int
        Index of the frame in the file.
    position : ndarray (3,)
        Centre of the first pixel, (x, y, z) in mm, LPS.
    axes : ndarray (2, 3)
        Steps to the next column and to the next row, mm.
    thickness : float
        Thickness of the slice, or its distance to the next one, mm; 0 if unknown.
    slope, intercept : float
        HU = stored × slope + intercept.
    calibrated : bool
        Whether the file states the intercept.
    """

    header: Header
    index: int
    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    thickness: float
    slope: float
    intercept: float
    calibrated: bool

    @property
    def shown(self) -> str:
        """Name in messages."""
        name = self.header.shown
        return f"frame {self.index + 1} of {name}" if self.header.n_frames > 1 else name


def frames_of(header: Header) -> Iterator[Frame]:
    """Yield the frames of a file, in their order there.

    Raises
    ------
    ScanFormatError
        If a value is missing or damaged, or the image is none of a CT.
    """
    if header.sop_class in ENHANCED:
        yield from _enhanced(header)
        return
    if header.n_frames != 1:
        raise ScanFormatError(
            f"{header.shown} has {header.n_frames} frames, but is no enhanced CT that says where"
            " they lie; convert it with dcm2niix."
        )
    yield _frame(header, 0, [header.dataset])


def _enhanced(header: Header) -> Iterator[Frame]:
    """Yield the frames of an enhanced CT: a frame's own values come before shared ones."""
    n = header.n_frames
    try:
        shared = list(header.dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
        frame_groups = list(header.dataset.get("PerFrameFunctionalGroupsSequence") or [])
    except Exception as error:
        raise header.damaged("functional group", error) from error
    if len(frame_groups) != n or n < 1:
        raise ScanFormatError(
            f"{header.shown} has {n} frames, but gives the places of {len(frame_groups)}; get a"
            " new copy."
        )
    for index, group in enumerate(frame_groups):
        sources = []
        for macro in (
            "PlanePositionSequence",
            "PlaneOrientationSequence",
            "PixelMeasuresSequence",
            "PixelValueTransformationSequence",
        ):
            try:
                found = [*(group.get(macro) or [])] or [
                    item for each in shared for item in each.get(macro) or []
                ]
            except Exception as error:
                raise header.damaged(macro, error) from error
            sources += found[:1]
        yield _frame(header, index, [*sources, header.dataset])


def _frame(header: Header, index: int, sources: list[Dataset]) -> Frame:
    """Make a frame; of several data sets, the first that has an element counts."""

    def find(keyword: str, n: int) -> NDArray[np.float64] | None:
        return next((v for s in sources if (v := numbers(header, s, keyword, n)) is not None), None)

    def need(keyword: str, n: int) -> NDArray[np.float64]:
        found = find(keyword, n)
        if found is None:
            raise ScanFormatError(
                f"{header.shown} has no {keyword}, so its place is unknown; leave it out or get a"
                " new copy."
            )
        return found

    if any("ModalityLUTSequence" in source for source in sources):
        raise ScanFormatError(
            f"{header.shown} gives HU by a table (ModalityLUTSequence); convert it with dcm2niix."
        )
    position = need("ImagePositionPatient", 3)
    cosines = need("ImageOrientationPatient", 6).reshape(2, 3)
    between_rows, between_columns = need("PixelSpacing", 2)
    lengths = np.sqrt((cosines**2).sum(axis=1))
    if np.abs(lengths - 1).max() > 1e-2 or abs(cosines[0] @ cosines[1]) > 1e-2:
        raise ScanFormatError(
            f"{header.shown} has an ImageOrientationPatient whose axes are not of length 1 at right"
            " angles; get a new copy."
        )
    if min(between_rows, between_columns) < SMALLEST_SPACING:
        raise ScanFormatError(
            f"{header.shown} has a PixelSpacing that is not positive, or too small."
        )
    slope, intercept = find("RescaleSlope", 1), find("RescaleIntercept", 1)
    if slope is not None and abs(slope[0]) < SMALLEST_SLOPE:
        raise ScanFormatError(f"{header.shown} has the RescaleSlope {slope[0]:g}; get a new copy.")
    thickness = find("SpacingBetweenSlices", 1)
    if thickness is None:
        thickness = find("SliceThickness", 1)
    return Frame(
        header=header,
        index=index,
        position=position,
        axes=cosines / lengths[:, None] * [[between_columns], [between_rows]],
        thickness=0.0 if thickness is None else abs(float(thickness[0])),
        slope=1.0 if slope is None else float(slope[0]),
        intercept=0.0 if intercept is None else float(intercept[0]),
        calibrated=intercept is not None,
    )
