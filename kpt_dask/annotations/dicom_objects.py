"""DICOM objects that hold labels, segmentations and structure sets: read whole, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from kpt_dask.errors import ScanFormatError
from kpt_dask.scans.dicom_files import open_bounded
from kpt_dask.scans.dicom_header import UNDEFINED, quiet

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation storage, and label map segmentation storage."""

STRUCTURE_SETS = (str(uid.RTStructureSetStorage),)

LARGEST = 4 << 30
"""Bytes of a file that is read whole."""

FARTHEST = 1e6
"""Limit of coordinates and spacings, mm."""

_START = 4096
_DEFLATED = str(uid.DeflatedExplicitVRLittleEndian).encode()


def kind_of(path: Path) -> str | None:
    """Read the UID of a DICOM file's kind; None if it is no DICOM that can be read."""
    quiet()
    try:
        with open_bounded(path) as file:
            found = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SOPClassUID"])
        return str(found.get("SOPClassUID") or found.file_meta.MediaStorageSOPClassUID)
    except Exception:  # pydicom raises many kinds on what is no DICOM
        return None


def read_object(path: Path) -> Dataset:
    """Read a DICOM file, pixels too.

    Raises
    ------
    ScanFormatError
        If it is damaged, deflated or absurdly large.
    """
    quiet()
    try:
        if path.stat().st_size > LARGEST:
            raise ScanFormatError(f"{path} is larger than {LARGEST >> 30} GiB; give a smaller one.")
        with open_bounded(path) as file:
            if _DEFLATED in file.read(_START):
                raise ScanFormatError(f"{path} is deflated; convert it with dcmconv +te.")
            file.seek(0)
            found = pydicom.dcmread(file)
        _check_whole(found)
        return found
    except ScanFormatError:
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files
        raise damaged(path, error) from error


def _check_whole(dataset: Dataset) -> None:
    """Refuse an element that is shorter than it says, which pydicom takes as it is."""
    for tag in list(dataset.keys()):
        raw: Any = dataset.get_item(tag)
        if not isinstance(raw, RawDataElement) or raw.value is None or raw.length == UNDEFINED:
            continue
        if len(raw.value) < raw.length:
            raise ValueError(f"it ends within element {tag}")


def damaged(path: Path, error: object) -> ScanFormatError:
    """Make the error for a file whose elements contradict each other."""
    said = " ".join(str(error).split())[:200]
    return ScanFormatError(f"{path} is a damaged DICOM file ({said}); get a new copy.")


def numbers(values: Any, n: int) -> NDArray[np.float64]:
    """Read so many numbers, none of them absurd; `ValueError` if there are others."""
    found = np.array(values, np.float64).reshape(-1)
    # The condition is what must hold, because NaN fails every comparison.
    if found.size != n or not (np.abs(found) <= FARTHEST).all():
        raise ValueError(f"{found.size} numbers, where {n} of a patient are needed")
    return found
