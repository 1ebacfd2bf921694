"""Label maps as DICOM segmentations (SEG): a binary segment for each organ that occurs.

Binary, because readers know it longer than label maps. Only planes from the first to the last that
shows an organ are stored; they are in memory at once, with one or two bytes for each voxel. UIDs
and times are new for each file, as DICOM wants it.
"""

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from highdicom import seg
from highdicom.sr import CodedConcept
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.valuerep import format_number_as_ds

from atlas_store import Organ
from kpt_dask.label_files.codes import ANATOMY, Code, codes_of
from kpt_dask.label_files.dicom_source import (
    PATIENT_AND_STUDY,
    Source,
    orientation_of,
    position_of,
    source_of,
)
from kpt_dask.label_files.label_map import LabelMap

_highdicom: Any = highdicom

SERIES_NUMBER = 9000
"""Number of the series, far from those of a scanner."""

ALGORITHM = "kpt-dask"


def write_segmentation(path: Path, label_map: LabelMap) -> None:
    """Write a label map as DICOM SEG, which refers to the source series if there is one.

    Parameters
    ----------
    path : Path
        File to write.
    label_map : LabelMap
        Organs that do not occur get no segment; if none does, all get one, in a single empty frame.
    """
    source = source_of(label_map)
    extents = label_map.extents()
    organs = [organ for organ in label_map.organs if organ.value in extents]
    planes = slice(
        min((box[0].start for box in extents.values()), default=0),
        max((box[0].stop for box in extents.values()), default=1),
    )
    shown = organs or label_map.organs
    software = version("kpt-dask")
    with warnings.catch_warnings():
        # The values' forms are those of the scan.
        warnings.simplefilter("ignore")
        made = seg.Segmentation(
            source_images=_source_images(label_map, source, planes),
            pixel_array=_numbered(label_map, shown, planes),
            segmentation_type=seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_described(n, organ) for n, organ in enumerate(shown, 1)],
            series_instance_uid=uid.generate_uid(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=uid.generate_uid(),
            instance_number=1,
            manufacturer=ALGORITHM,
            manufacturer_model_name=ALGORITHM,
            software_versions=software,
            device_serial_number=software,
            # Where all are empty, one stays.
            omit_empty_frames=bool(organs),
            content_label="ORGANS",
            content_description="Organs by keypoint transfer",
            series_description="Organs by keypoint transfer",
        )
        # Whatever the scan says of the patient: the library would refuse what is not quite right.
        made.update(source.about)
        _refer(made, source)
        made.save_as(path)


def _numbered(label_map: LabelMap, organs: Sequence[Organ], planes: slice) -> Any:
    """Give the planes with numbers of segments, from 1, for labels."""
    number = np.zeros(np.iinfo(label_map.voxels.dtype).max + 1, label_map.voxels.dtype)
    for n, organ in enumerate(organs, 1):
        number[organ.value] = n
    parts, first = [], 0
    for slab in label_map.voxels.slabs():
        wanted = slice(max(planes.start - first, 0), max(planes.stop - first, 0))
        parts.append(number[slab[wanted]])
        first += len(slab)
    return np.concatenate(parts)


def _described(number: int, organ: Organ) -> Any:
    code, side = codes_of(organ)
    description = seg.SegmentDescription(
        segment_number=number,
        segment_label=organ.name,
        segmented_property_category=_concept(ANATOMY),
        segmented_property_type=_concept(code),
        algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=_highdicom.AlgorithmIdentificationSequence(
            name=ALGORITHM,
            family=_concept(Code("123110", "DCM", "Artificial Intelligence")),
            version=version("kpt-dask"),
        ),
        tracking_uid=uid.generate_uid(),
        tracking_id=organ.name,
        display_color=_highdicom.color.CIELabColor.from_rgb(*organ.colour),
    )
    if side is not None:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(side)]
    return description


def _concept(code: Code) -> Any:
    return CodedConcept(code.value, code.scheme, code.meaning)


def _source_images(label_map: LabelMap, source: Source, planes: slice) -> list[Dataset]:
    """Describe the planes as slices of a CT, which is all that the segmentation needs of them."""
    grid = label_map.grid
    across = np.cross(grid.affine[:3, 1], grid.affine[:3, 2])
    thickness = abs(float(across @ grid.affine[:3, 0])) / float(np.sqrt(across @ across))
    series = source.series or uid.generate_uid()
    images = []
    for plane in range(planes.start, planes.stop):
        image = Dataset()
        for keyword, nothing in PATIENT_AND_STUDY.items():
            setattr(image, keyword, nothing)
        image.StudyInstanceUID = source.about.StudyInstanceUID
        image.FrameOfReferenceUID = source.about.FrameOfReferenceUID
        image.SOPClassUID = uid.CTImageStorage
        image.SOPInstanceUID = _stand_in(series, plane)
        image.SeriesInstanceUID = series
        image.Modality = "CT"
        image.Rows, image.Columns = grid.shape[1:]
        image.ImageOrientationPatient = _decimals(orientation_of(grid))
        image.ImagePositionPatient = _decimals(position_of(grid, plane).tolist())
        image.PixelSpacing = _decimals(grid.spacing[1:].tolist())
        image.SliceThickness = image.SpacingBetweenSlices = format_number_as_ds(thickness)
        images.append(image)
    return images


def _stand_in(series: str, plane: int) -> str:
    """UID of a plane until `_refer` replaces it by that of its file, which may hold several."""
    return str(uid.generate_uid(entropy_srcs=[series, str(plane)]))


def _decimals(numbers: Sequence[float]) -> list[str]:
    return [format_number_as_ds(number) for number in numbers]


def _refer(made: Dataset, source: Source) -> None:
    """Let it refer to the files of the series, or to none."""
    stood_in = {_stand_in(source.series, k): one for k, one in enumerate(source.slices)}
    files = {}
    for group in made.PerFrameFunctionalGroupsSequence:
        if not stood_in:
            del group.DerivationImageSequence
            continue
        for item in group.DerivationImageSequence[0].SourceImageSequence:
            one = stood_in.get(item.ReferencedSOPInstanceUID)
            if one is None:
                # Frames of one plane share the item, which refers to the file already.
                continue
            item.ReferencedSOPClassUID = one.sop_class
            item.ReferencedSOPInstanceUID = one.instance
            if one.frame is not None:
                item.ReferencedFrameNumber = one.frame
            files[one.instance] = one.sop_class
    if not stood_in:
        del made.ReferencedSeriesSequence
        return
    instances = []
    for instance, sop_class in files.items():
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
        instances.append(item)
    made.ReferencedSeriesSequence[0].ReferencedInstanceSequence = instances
