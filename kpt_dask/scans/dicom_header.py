"""Header of one DICOM file: its series, and the positions of its frames."""

import logging
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset

from kpt_dask.errors import ScanFormatError
from kpt_dask.scans.dicom_files import looks_like_dicom

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
    "SeriesDescription",
    "SeriesInstanceUID",
    "SliceThickness",
    "SpacingBetweenSlices",
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
    """

    header: "Header"
    index: int
    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    thickness: float
    slope: float
    intercept: float

    @property
    def shown(self) -> str:
        """How a sentence names it."""
        name = self.header.shown
        return f"frame {self.index + 1} of {name}" if self.header.n_frames > 1 else name


@dataclass(frozen=True, eq=False)
class Header:
    """Header of one file with an image in it.

    Attributes
    ----------
    name, shown : str
        Name of the file: to open it, and for messages.
    dataset : Dataset
        The tags of `TAGS`, and the file meta information.
    at, length : int
        Offset of the value of the pixel data in the file, and its length, bytes.
    """

    name: str
    shown: str
    dataset: Dataset
    at: int
    length: int

    def text(self, keyword: str) -> str:
        """Give an element as text, "" where it is absent or empty."""
        try:
            value = self.dataset.get(keyword)
        except Exception as error:  # pydicom decodes on access, and raises many kinds
            raise self.damaged(keyword, error) from error
        return "" if value is None else " ".join(str(value).split())

    def whole(self, keyword: str, default: int | None = None) -> int:
        """Give an element that is one whole number."""
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
        """What kind of object it is; the file meta knows it where the data set does not."""
        return self.text("SOPClassUID") or str(
            self.dataset.file_meta.get("MediaStorageSOPClassUID", "")
        )

    @property
    def instance(self) -> str:
        """UID of the object; the file meta knows it where the data set does not."""
        return self.text("SOPInstanceUID") or str(
            self.dataset.file_meta.get("MediaStorageSOPInstanceUID", "")
        )

    @property
    def syntax(self) -> str:
        """UID of the transfer syntax."""
        return str(self.dataset.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian))

    @property
    def is_ct(self) -> bool:
        """Whether it is of a CT, and no picture that was made of one."""
        return self.text("Modality") == "CT" and self.sop_class in ("", *CT)

    @property
    def is_localizer(self) -> bool:
        """Whether it is an overview, by which a scan was planned."""
        return "LOCALIZER" in self.text("ImageType").upper()

    @property
    def n_frames(self) -> int:
        """How many frames it says it has."""
        return self.whole("NumberOfFrames", 1)

    def frames(self) -> Iterator[Frame]:
        """Give the frames, in the order of the file.

        Raises
        ------
        ScanFormatError
            If a value is missing or damaged, or the image is none of a CT.
        """
        if self.sop_class in ENHANCED:
            yield from self._enhanced()
            return
        if self.n_frames != 1:
            raise ScanFormatError(
                f"{self.shown} has {self.n_frames} frames, but is no enhanced CT that says where"
                " they lie; convert it with dcm2niix."
            )
        yield self._frame(0, [self.dataset])

    def _enhanced(self) -> Iterator[Frame]:
        n = self.n_frames
        try:
            shared = list(self.dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
            frame_groups = list(self.dataset.get("PerFrameFunctionalGroupsSequence") or [])
        except Exception as error:
            raise self.damaged("functional group", error) from error
        if len(frame_groups) != n or n < 1:
            raise ScanFormatError(
                f"{self.shown} has {n} frames, but says of {len(frame_groups)} where they lie; get"
                " a new copy."
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
                    raise self.damaged(macro, error) from error
                sources += found[:1]
            yield self._frame(index, [*sources, self.dataset])

    def _frame(self, index: int, sources: list[Dataset]) -> Frame:
        def find(keyword: str, n: int) -> NDArray[np.float64] | None:
            return next(
                (v for s in sources if (v := numbers(self, s, keyword, n)) is not None), None
            )

        def need(keyword: str, n: int) -> NDArray[np.float64]:
            found = find(keyword, n)
            if found is None:
                raise ScanFormatError(
                    f"{self.shown} has no {keyword}, so nobody knows where it lies; leave it out or"
                    " get a new copy."
                )
            return found

        if any("ModalityLUTSequence" in source for source in sources):
            raise ScanFormatError(
                f"{self.shown} gives HU by a table (ModalityLUTSequence); convert it with dcm2niix."
            )
        position = need("ImagePositionPatient", 3)
        cosines = need("ImageOrientationPatient", 6).reshape(2, 3)
        between_rows, between_columns = need("PixelSpacing", 2)
        lengths = np.sqrt((cosines**2).sum(axis=1))
        if np.abs(lengths - 1).max() > 1e-2 or abs(cosines[0] @ cosines[1]) > 1e-2:
            raise ScanFormatError(
                f"{self.shown} has an ImageOrientationPatient that is none (its axes are not of"
                " length 1 at right angles); get a new copy."
            )
        if min(between_rows, between_columns) <= 0:
            raise ScanFormatError(f"{self.shown} has a PixelSpacing that is not positive.")
        slope, intercept = find("RescaleSlope", 1), find("RescaleIntercept", 1)
        if slope is not None and slope[0] == 0:
            raise ScanFormatError(f"{self.shown} has the RescaleSlope 0; get a new copy.")
        thickness = find("SpacingBetweenSlices", 1)
        if thickness is None:
            thickness = find("SliceThickness", 1)
        return Frame(
            header=self,
            index=index,
            position=position,
            axes=cosines / lengths[:, None] * [[between_columns], [between_rows]],
            thickness=0.0 if thickness is None else abs(float(thickness[0])),
            slope=1.0 if slope is None else float(slope[0]),
            intercept=0.0 if intercept is None else float(intercept[0]),
        )


def quiet() -> None:
    """Hide the decoders' warnings: the header's values are checked here."""
    # Filtering by module is safe where threads decode; adding a filter again moves it to the front.
    warnings.filterwarnings("ignore", module=r"(pydicom|pylibjpeg|openjpeg|gdcm)\b")
    for name in ("pydicom", "pylibjpeg", "openjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def numbers(header: Header, source: Dataset, keyword: str, n: int) -> NDArray[np.float64] | None:
    """Give an element that is so many finite numbers; None where it is absent or empty."""
    try:
        value = source.get(keyword)
        if value is None or value == "" or (hasattr(value, "__len__") and len(value) == 0):
            return None
        values = np.array(value, np.float64).reshape(-1)
    except Exception as error:  # pydicom decodes on access, and raises many kinds
        raise header.damaged(keyword, error) from error
    if values.size != n or not np.isfinite(values).all():
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
    """Give the lowest and the highest stored value that mean no tissue; None if there are none."""
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
