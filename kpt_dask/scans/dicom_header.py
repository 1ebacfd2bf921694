"""Header of one DICOM file: what kind of image it holds, and where its pixels begin."""

import logging
import struct
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset

from kpt_dask.errors import ScanFormatError
from kpt_dask.scans.dicom_files import looks_like_dicom

LARGEST_NUMBER = 1e9
"""Largest number, in mm or HU, that an element may hold."""

MOST_PIXELS = 1 << 26
"""Limit of the pixels of one plane; no scanner makes more."""

UNDEFINED = 0xFFFFFFFF
"""Length of pixel data that are encapsulated."""

NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
COMPRESSED = (
    uid.RLELossless,
    uid.JPEGBaseline8Bit,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEGLSNearLossless,
    uid.JPEG2000Lossless,
    uid.JPEG2000,
)
"""Transfer syntaxes that are read; deflated data sets are none of them."""

ENHANCED = (uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage)
CT = (uid.CTImageStorage, *ENHANCED)

TAGS = [
    "SpecificCharacterSet",
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "PatientID",
    "FrameOfReferenceUID",
    "SeriesDescription",
    "SeriesInstanceUID",
    "SliceThickness",
    "SpacingBetweenSlices",
    "AcquisitionNumber",
    "KVP",
    "ConvolutionKernel",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]
"""Tags that are read of a data set."""

MEDIA = "MediaStorageSOPClassUID"

_DEFLATED = str(uid.DeflatedExplicitVRLittleEndian).encode()
_PIXEL_DATA = 0x7FE0, 0x0010


@dataclass(frozen=True, eq=False)
class Header:
    """Header of one file with an image in it.

    Attributes
    ----------
    name, shown : str
        Name of the file: to open it, and for messages.
    dataset : Dataset
        The tags of `TAGS`, and the file meta information.
    offset, length : int
        Offset of the value of the pixel data in the file, and its length, bytes.
    """

    name: str
    shown: str
    dataset: Dataset
    offset: int
    length: int

    def text(self, keyword: str) -> str:
        """Get an element as text, "" where it is absent or empty."""
        try:
            value = self.dataset.get(keyword)
        except Exception as error:  # pydicom decodes on access, and raises many kinds
            raise self.damaged(keyword, error) from error
        return "" if value is None else " ".join(str(value).split())

    def raw(self, keyword: str) -> object:
        """Get an element as it is stored, which need not make sense; None where it is absent."""
        item = self.dataset.get_item(keyword)
        return None if item is None else item.value

    def whole(self, keyword: str, default: int | None = None) -> int:
        """Get an element that is one whole number."""
        values = numbers(self, self.dataset, keyword, 1)
        if values is None:
            if default is None:
                raise ScanFormatError(f"{self.shown} has no {keyword}; get a new copy.")
            return default
        return int(values[0])

    def damaged(self, keyword: str, error: object) -> ScanFormatError:
        """Make the error for an element that cannot be used."""
        said = " ".join(str(error).split())[:200]
        return ScanFormatError(f"{self.shown} has a damaged {keyword} ({said}); get a new copy.")

    @property
    def series(self) -> str:
        """UID of the series."""
        return self.text("SeriesInstanceUID")

    @property
    def sop_class(self) -> str:
        """UID of the class of object, from the data set or else from the file meta information."""
        return self.text("SOPClassUID") or str(
            self.dataset.file_meta.get("MediaStorageSOPClassUID", "")
        )

    @property
    def instance(self) -> str:
        """UID of the object, from the data set or else from the file meta information."""
        return self.text("SOPInstanceUID") or str(
            self.dataset.file_meta.get("MediaStorageSOPInstanceUID", "")
        )

    @property
    def syntax(self) -> str:
        """UID of the transfer syntax."""
        return str(self.dataset.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian))

    @property
    def is_ct(self) -> bool:
        """Whether it is an image of a CT, not one derived from it."""
        return self.text("Modality") == "CT" and self.sop_class in ("", *CT)

    @property
    def is_localizer(self) -> bool:
        """Whether it is an overview image, for planning a scan."""
        return "LOCALIZER" in self.text("ImageType").upper()

    @property
    def n_frames(self) -> int:
        """Number of frames, as stated."""
        return self.whole("NumberOfFrames", 1)


def quiet() -> None:
    """Hide the decoders' warnings: the header's values are checked here."""
    # Filtering by module is safe where threads decode; adding a filter again moves it to the front.
    warnings.filterwarnings("ignore", module=r"(pydicom|pylibjpeg|openjpeg|gdcm)\b")
    for name in ("pydicom", "pylibjpeg", "openjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def numbers(header: Header, source: Dataset, keyword: str, n: int) -> NDArray[np.float64] | None:
    """Get an element of `n` numbers, none of them absurd; None where it is absent or empty."""
    try:
        value = source.get(keyword)
        if value is None or value == "" or (hasattr(value, "__len__") and len(value) == 0):
            return None
        values = np.array(value, np.float64).reshape(-1)
    except Exception as error:  # pydicom decodes on access, and raises many kinds
        raise header.damaged(keyword, error) from error
    # The condition is what must hold, because NaN fails every comparison.
    if values.size != n or not (np.abs(values) <= LARGEST_NUMBER).all():
        raise header.damaged(keyword, values.tolist())
    return values


def read_header(file: BinaryIO, name: str, shown: str, *, must: bool) -> Header | None:
    """Read the header of a file; None if it holds no image.

    Parameters
    ----------
    file : BinaryIO
        At its beginning.
    name, shown : str
        See `Header`.
    must : bool
        Whether it is an error if the file is no DICOM.

    Raises
    ------
    ScanFormatError
        If the header is damaged.
    """
    start = file.read(4096)
    if not looks_like_dicom(start):
        if must:
            raise ScanFormatError(f"{shown} is no DICOM file, or its beginning is lost.")
        return None
    if _DEFLATED in start:
        raise ScanFormatError(f"{shown} is deflated; convert it with dcmconv +te.")
    file.seek(0)
    quiet()
    try:
        dataset = pydicom.dcmread(
            file, stop_before_pixels=True, force=True, specific_tags=list(TAGS)
        )
        kind = str(dataset.get("SOPClassUID") or dataset.file_meta.get(MEDIA, ""))
    except Exception as error:  # pydicom raises many kinds on damaged files
        said = " ".join(str(error).split())[:200]
        raise ScanFormatError(f"{shown} has a damaged DICOM header ({said}).") from error
    if "Rows" not in dataset:
        # A slice whose header is cut off must not be taken for something else.
        if kind in ("", *CT):
            raise _cut_off(shown)
        return None
    return Header(name, shown, dataset, *_pixel_data(file, dataset, shown))


def _pixel_data(file: BinaryIO, dataset: Dataset, shown: str) -> tuple[int, int]:
    """Find offset and length of the pixel data; the file is positioned before them."""
    little, implicit = True, False
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is not None:
        little = syntax != uid.ExplicitVRBigEndian
        implicit = syntax == uid.ImplicitVRLittleEndian
    else:
        implicit = True
    order = "<" if little else ">"
    element = file.read(8 if implicit else 12)
    if len(element) < (8 if implicit else 12):
        raise _cut_off(shown)
    if struct.unpack(f"{order}HH", element[:4]) != _PIXEL_DATA:
        raise ScanFormatError(f"{shown} holds no whole numbers as pixels; give a CT in HU.")
    return file.tell(), int(struct.unpack(f"{order}I", element[-4:])[0])


def _cut_off(shown: str) -> ScanFormatError:
    return ScanFormatError(f"{shown} is truncated: it ends before its pixels; get a new copy.")


def padding_of(header: Header) -> tuple[int, int] | None:
    """Get the range (lowest, highest) of stored values that are padding; None if there is none."""
    value = numbers(header, header.dataset, "PixelPaddingValue", 1)
    if value is None:
        return None
    limit = numbers(header, header.dataset, "PixelPaddingRangeLimit", 1)
    ends: list[Any] = [value[0], value[0] if limit is None else limit[0]]
    bits = header.whole("BitsAllocated")
    stored = np.dtype(f"{'i' if header.whole('PixelRepresentation', 0) else 'u'}{bits // 8}")
    # Writers get the sign of this element wrong: the bits count.
    whole = [np.array(int(end) % (1 << bits), f"u{bits // 8}").view(stored).item() for end in ends]
    return min(whole), max(whole)
