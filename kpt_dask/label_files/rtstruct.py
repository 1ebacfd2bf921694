"""Label maps as DICOM structure sets (RTSTRUCT): closed contours in the planes of the scan.

A contour runs half-way between the centres of voxels inside and outside, so who asks which centres
lie inside gets the same voxels again. A hole is joined to the contour around it by a channel of no
width, as DICOM describes it (PS3.3, C.8.8.6.3, "keyhole").
"""

from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag

from atlas_store import Organ
from kpt_dask.errors import ScanFormatError
from kpt_dask.grid import Grid
from kpt_dask.label_files.codes import Code, codes_of
from kpt_dask.label_files.dicom_source import Slice, Source, source_of
from kpt_dask.label_files.label_map import Extent, LabelMap

AXIAL = 1e-3
"""Tolerance of the planes' normal to the body's axis, as a direction cosine."""

CONTOUR_DATA = Tag("ContourData")

SOP_CLASS = uid.RTStructureSetStorage
_STUDY_COMPONENT = "1.2.840.10008.3.1.2.3.1"

Points = NDArray[np.float64]


def check_planes(path: Path, grid: Grid) -> None:
    """Refuse a scan whose stored planes are not axial: programs of radiotherapy know no others.

    Raises
    ------
    ScanFormatError
        If that is so.
    """
    normal = np.cross(grid.affine[:3, 1], grid.affine[:3, 2])
    if abs(abs(normal[0]) / np.sqrt(normal @ normal) - 1) > AXIAL:
        raise ScanFormatError(
            f"{path} cannot be written: an RTSTRUCT has contours in axial planes, and those of the"
            " scan are others; write a DICOM SEG (.dcm) instead."
        )


def write_structure_set(path: Path, label_map: LabelMap) -> None:
    """Write a label map as RTSTRUCT: a region for each organ, empty where it does not occur."""
    check_planes(path, label_map.grid)
    source = source_of(label_map)
    now = datetime.now()
    made = _header(now)
    made.update(source.about)
    made.StructureSetLabel = "ORGANS"
    made.StructureSetDate, made.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(source)]
    made.StructureSetROISequence = []
    made.ROIContourSequence = []
    made.RTROIObservationsSequence = []
    contours = _contours(label_map, source)
    for number, organ in enumerate(label_map.organs, 1):
        roi = Dataset()
        roi.ROINumber = number
        roi.ReferencedFrameOfReferenceUID = source.about.FrameOfReferenceUID
        roi.ROIName = organ.name
        roi.ROIGenerationAlgorithm = "AUTOMATIC"
        made.StructureSetROISequence.append(roi)
        outline = Dataset()
        outline.ROIDisplayColor = list(organ.colour)
        outline.ReferencedROINumber = number
        if found := contours.get(organ.value):
            outline.ContourSequence = found
        made.ROIContourSequence.append(outline)
        made.RTROIObservationsSequence.append(_observed(number, organ))
    made.save_as(path, enforce_file_format=True)


def _header(now: datetime) -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID = SOP_CLASS
    # Explicit lengths of coordinates end at 64 KiB, about 2000 points.
    made.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    made.file_meta.ImplementationVersionName = "KPT-DASK"
    made.SOPClassUID = SOP_CLASS
    made.SOPInstanceUID = uid.generate_uid()
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.InstanceCreationDate = now.strftime("%Y%m%d")
    made.InstanceCreationTime = now.strftime("%H%M%S")
    made.Modality = "RTSTRUCT"
    made.Manufacturer = made.ManufacturerModelName = "kpt-dask"
    made.SoftwareVersions = version("kpt-dask")
    made.SeriesInstanceUID = uid.generate_uid()
    made.SeriesNumber, made.InstanceNumber = 9001, 1
    made.SeriesDescription = "Organs by keypoint transfer"
    made.OperatorsName = ""
    made.ApprovalStatus = "UNAPPROVED"
    return made


def _frame_of_reference(source: Source) -> Dataset:
    frame = Dataset()
    frame.FrameOfReferenceUID = source.about.FrameOfReferenceUID
    if source.slices:
        series, study = Dataset(), Dataset()
        series.SeriesInstanceUID = source.series
        files = {one.instance: one for one in source.slices}
        series.ContourImageSequence = [_file(one) for one in files.values()]
        study.ReferencedSOPClassUID = _STUDY_COMPONENT
        study.ReferencedSOPInstanceUID = source.about.StudyInstanceUID
        study.RTReferencedSeriesSequence = [series]
        frame.RTReferencedStudySequence = [study]
    return frame


def _file(one: Slice, *, with_frame: bool = False) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = one.sop_class, one.instance
    if with_frame and one.frame is not None:
        item.ReferencedFrameNumber = one.frame
    return item


def _observed(number: int, organ: Organ) -> Dataset:
    observed = Dataset()
    observed.ObservationNumber = observed.ReferencedROINumber = number
    observed.RTROIInterpretedType = "ORGAN"
    observed.ROIInterpreter = ""
    code, side = codes_of(organ)
    kind = _coded(code)
    if side is not None:
        kind.SegmentedPropertyTypeModifierCodeSequence = [_coded(side)]
    observed.RTROIIdentificationCodeSequence = [kind]
    return observed


def _coded(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    return item


def _contours(label_map: LabelMap, source: Source) -> dict[int, list[Dataset]]:
    """Draw the contours of all organs, plane by plane."""
    extents = label_map.extents()
    found: dict[int, list[Dataset]] = {value: [] for value in extents}
    plane = 0
    for slab in label_map.voxels.slabs():
        for labels in slab:
            for value, box in extents.items():
                if box[0].start <= plane < box[0].stop:
                    for outline in outlines(labels == value, box):
                        found[value].append(_contour(outline, plane, label_map.grid, source))
            plane += 1
    return found


def _contour(outline: Points, plane: int, grid: Grid, source: Source) -> Dataset:
    item = Dataset()
    if source.slices:
        item.ContourImageSequence = [_file(source.slices[plane], with_frame=True)]
    item.ContourGeometricType = "CLOSED_PLANAR"
    item.NumberOfContourPoints = len(outline)
    at = np.column_stack([np.full(len(outline), plane), outline])
    item[CONTOUR_DATA] = _coordinates(grid.to_mm(at)[:, ::-1])
    return item


def _coordinates(points: Points) -> RawDataElement:
    """Spell points (n, 3) in mm; as bytes, because pydicom keeps a number in 300 of them."""
    text = "\\".join(f"{mm:.3f}" for mm in points.ravel().tolist()).encode()
    text += b" " * (len(text) % 2)
    return RawDataElement(CONTOUR_DATA, "DS", len(text), text, 0, True, True)


def outlines(mask: NDArray[np.bool_], box: Extent) -> Iterator[Points]:
    """Outline a mask in a plane.

    Parameters
    ----------
    mask : ndarray (j, i), bool
    box : tuple of slice
        (k, j, i), outside of which there is nothing.

    Yields
    ------
    outline : ndarray (n, 2), float64
        (j, i) of the corners of one connected part, its holes joined to it; the last corner is
        joined to the first.
    """
    part = np.pad(mask[box[1], box[2]], 1).astype(np.float64)
    if not part.any():
        return
    generator: Any = contourpy.contour_generator(z=part, fill_type=contourpy.FillType.OuterOffset)
    polygons, offsets = generator.filled(0.5, np.inf)
    corner = np.array([box[1].start - 1, box[2].start - 1])
    for points, ends in zip(polygons, offsets, strict=True):
        # Rings are closed: their last point is the first again.
        rings = [_corners(points[a : b - 1, ::-1]) for a, b in pairwise(ends.tolist())]
        yield _joined(rings[0], rings[1:]) + corner


def _corners(ring: Points) -> Points:
    """Leave out the points of a closed ring at which it goes straight on."""
    come, go = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    corners: Points = ring[come[:, 0] * go[:, 1] != come[:, 1] * go[:, 0]]
    return corners


def _joined(outer: Points, holes: list[Points]) -> Points:
    """Join holes to the ring around them, by channels that are gone there and back."""
    places = [int(((outer - hole[0]) ** 2).sum(axis=1).argmin()) for hole in holes]
    parts, last = [], 0
    for place, hole in sorted(zip(places, holes, strict=True), key=lambda pair: pair[0]):
        parts += [outer[last : place + 1], hole, hole[:1]]
        last = place
    return np.concatenate([*parts, outer[last:]])
