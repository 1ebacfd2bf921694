"""DICOM: a series of slices as one volume, in HU, decoded slice by slice.

Slope and intercept of each slice map stored values to HU. MONOCHROME1 concerns the display and
changes no value. Padding becomes air.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom import encaps, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.utils import pixel_array

from kpt_dask.errors import ScanFormatError
from kpt_dask.grid import Grid
from kpt_dask.runtime import progress
from kpt_dask.scans import jpeg_lossless, voxel_stream
from kpt_dask.scans.dicom_files import DAMAGE, ENDINGS, DicomFiles, find_files
from kpt_dask.scans.dicom_frames import Frame
from kpt_dask.scans.dicom_header import (
    NATIVE,
    UNDEFINED,
    Header,
    padding_of,
    quiet,
    read_header,
)
from kpt_dask.scans.dicom_series import choose_series, in_order
from kpt_dask.scans.placement import check_grid, header_of

AIR = -1000.0
"""Value of padding, HU."""

TISSUE = -200.0, 300.0
"""Range of tissue, HU: padding of such a value cannot be told from tissue."""

FLOAT: np.dtype[Any] = np.dtype(np.float32)

CODECS = {
    uid.RLELossless: "pydicom",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
}
"""Which of pydicom's plugins decodes what. GDCM is none of them: damaged data end the process."""

END_OF_IMAGE = b"\xff\xd9"
"""Last bytes of every JPEG, JPEG-LS and JPEG 2000 image."""

STORED_AS = "BitsAllocated", "BitsStored", "PixelRepresentation"
"""Elements that say which numbers the bytes of pixels are."""

LOSSLESS_JPEG = uid.JPEGLossless, uid.JPEGLosslessSV1


@dataclass(frozen=True, eq=False)
class DicomFile:
    """A CT series whose headers have been read; see `kpt_dask.scans.contract.ScanFile`.

    Attributes
    ----------
    path : Path
        The folder, file or zip.
    grid : Grid
        Grid of the voxels; sheared for a tilted gantry.
    frames : list of Frame
        The slices, in order.
    files : DicomFiles
        Files that hold them.
    doubts : tuple of str
        Doubts about the headers, one sentence each.
    """

    path: Path
    grid: Grid
    frames: list[Frame]
    files: DicomFiles
    doubts: tuple[str, ...]
    dtype: np.dtype[Any] = FLOAT
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def worlds(self) -> frozenset[str]:
        """UIDs of the frames of reference that its positions are given in."""
        told = (frame.header.text("FrameOfReferenceUID") for frame in self.frames)
        return frozenset(filter(None, told))

    @property
    def header(self) -> Any:
        """NIfTI header for label maps on this grid."""
        return header_of(self.grid)

    def slabs(self) -> Iterator[NDArray[np.float32]]:
        """Stream HU; see `kpt_dask.scans.contract.ScanFile`."""
        planes, rows, columns = self.grid.shape
        step = max(1, voxel_stream.SLAB_BYTES // (rows * columns * 4))
        with self.files.reading() as opener:
            opened: Header | None = None
            file: BinaryIO | None = None
            try:
                for begin in range(0, planes, step):
                    group = self.frames[begin : begin + step]
                    slab = np.empty((len(group), rows, columns), np.float32)
                    for plane, frame in zip(slab, group, strict=True):
                        if frame.header is not opened:
                            if file is not None:
                                file.close()
                            file = _open(self.files, opener, frame)
                            opened = frame.header
                        assert file is not None
                        _decode(file, frame, plane)
                    yield slab
            finally:
                if file is not None:
                    file.close()


def open_dicom(path: Path, series: str | None = None) -> DicomFile:
    """Read the headers of a CT series.

    Parameters
    ----------
    path : Path
        A folder with everything below it, a zip, or one file.
    series : str, optional
        UID of the series, needed where there are several.

    Raises
    ------
    ScanFormatError
        If no single CT series on a regular grid is found; the slice at fault is named.
    """
    files = find_files(path)
    headers = _headers(files)
    chosen, doubts = choose_series(path, headers, series)
    frames, grid, copies, more = in_order(path, chosen)
    check_grid(path, grid)
    _check_copies(files, copies)
    doubts += [*more, *_open_questions(path, frames)]
    return DicomFile(path, grid, frames, files, tuple(doubts))


def _headers(files: DicomFiles) -> list[Header]:
    headers = []
    # A single file must be DICOM, whatever its name.
    with (
        files.reading() as opener,
        progress.stage("Reading headers", total=len(files.names)) as advance,
    ):
        for name in files.names:
            must = not name or name.lower().endswith(ENDINGS)
            shown = files.shown(name)
            try:
                with opener(name) as file:
                    header = read_header(file, name, shown, must=must)
            except DAMAGE as error:
                raise ScanFormatError(f"{shown} cannot be read ({error}).") from error
            if header is not None:
                headers.append(header)
            advance(1)
    return headers


def _check_copies(files: DicomFiles, copies: Iterable[tuple[Frame, Frame]]) -> None:
    """Refuse slices of one UID and place that are not the same."""
    met: dict[Frame, tuple[object, ...]] = {}
    frames = sorted(set(chain.from_iterable(copies)), key=lambda frame: frame.header.name)
    with files.reading() as opener:
        for _, group in groupby(frames, key=lambda frame: frame.header):
            first, *others = group
            with _open(files, opener, first) as file:
                for frame in (first, *others):
                    with _naming(frame):
                        pixels = hashlib.sha256(_encoded(file, frame)).digest()
                    header = frame.header
                    as_hu = frame.slope, frame.intercept, padding_of(header)
                    stored = (header.whole(keyword, 0) for keyword in STORED_AS)
                    met[frame] = pixels, header.syntax, *as_hu, *stored
    for kept, other in copies:
        if met[kept] != met[other]:
            raise ScanFormatError(
                f"{kept.shown} and {other.shown} have one SOPInstanceUID and one place, but not"
                " the same pixels; keep the one that belongs to the scan."
            )


def _open_questions(path: Path, frames: list[Frame]) -> list[str]:
    doubts = []
    first = frames[0].header
    kinds = {frame.header.text("RescaleType") for frame in frames} - {"", "HU"}
    if kinds:
        doubts.append(f"{path} says that its values are {', '.join(sorted(kinds))}, not HU.")
    if not frames[0].calibrated:
        doubts.append(
            f"{path} has no RescaleIntercept, so its values are taken for HU as they stand."
        )
    padding = padding_of(first)
    if padding is not None:
        low, high = (value * frames[0].slope + frames[0].intercept for value in padding)
        if min(low, high) < TISSUE[1] and max(low, high) > TISSUE[0]:
            doubts.append(
                f"{path} says that {low:g} HU is padding, which becomes air, but tissue has such"
                " values too."
            )
    return doubts


def _open(files: DicomFiles, opener: Any, frame: Frame) -> BinaryIO:
    try:
        return files.whole(opener, frame.header.name)
    except DAMAGE as error:
        raise ScanFormatError(f"{frame.header.shown} cannot be read ({error}).") from error


def _decode(file: BinaryIO, frame: Frame, out: NDArray[np.float32]) -> None:
    """Decode a frame into HU."""
    header = frame.header
    with _naming(frame):
        data = _encoded(file, frame)
        stored = _native(data, header) if header.syntax in NATIVE else _decompressed(data, frame)
    if stored.shape != out.shape:
        raise ScanFormatError(
            f"{frame.shown} unpacks to {stored.shape[0]} × {stored.shape[1]} pixels, its header"
            f" says {out.shape[0]} × {out.shape[1]}; get a new copy."
        )
    values = stored.astype(np.float32)
    values *= np.float32(frame.slope)
    values += np.float32(frame.intercept)
    padding = padding_of(header)
    if padding is not None:
        values[(stored >= padding[0]) & (stored <= padding[1])] = AIR
    out[...] = values


@contextmanager
def _naming(frame: Frame) -> Iterator[None]:
    """Name the slice whose pixels cannot be read or decoded."""
    try:
        yield
    except ScanFormatError:
        raise
    except Exception as error:  # decoders raise many kinds on damaged files
        said = " ".join(str(error).split())[:200]
        raise ScanFormatError(f"{frame.shown} has damaged pixels ({said}).") from error


def _encoded(file: BinaryIO, frame: Frame) -> bytes:
    """Read the bytes of a frame, as they are stored."""
    header = frame.header
    if header.syntax not in NATIVE:
        if header.length != UNDEFINED:
            raise ScanFormatError(f"{frame.shown} has pixels that are not compressed as it says.")
        file.seek(header.offset)
        return encaps.get_frame(file, frame.index, number_of_frames=header.n_frames)
    rows, columns = header.whole("Rows"), header.whole("Columns")
    size = rows * columns * header.whole("BitsAllocated") // 8
    if header.length != UNDEFINED and header.length < (frame.index + 1) * size:
        raise ScanFormatError(
            f"{frame.shown} holds {header.length} bytes of pixels, less than {rows} × {columns};"
            " get a new copy."
        )
    file.seek(header.offset + frame.index * size)
    data = file.read(size)
    if len(data) < size:
        raise ScanFormatError(
            f"{frame.shown} is truncated: it ends before its last pixel; get a new copy."
        )
    return data


def _native(data: bytes, header: Header) -> NDArray[Any]:
    bits, stored_bits = header.whole("BitsAllocated"), header.whole("BitsStored")
    order = ">" if header.syntax == uid.ExplicitVRBigEndian else "<"
    kind = "i" if header.whole("PixelRepresentation", 0) else "u"
    values = np.frombuffer(data, f"{order}{kind}{bits // 8}")
    values = values.reshape(header.whole("Rows"), header.whole("Columns"))
    return _sign_extended(values, bits - stored_bits)


def _sign_extended(values: NDArray[Any], unused: int) -> NDArray[Any]:
    """Clear the bits above those stored, which overlays may use."""
    if unused == 0:
        return values
    native = values.astype(values.dtype.newbyteorder("="))
    return (native << unused) >> unused


def _decompressed(data: bytes, frame: Frame) -> NDArray[Any]:
    header = frame.header
    rows, columns = header.whole("Rows"), header.whole("Columns")
    # Codecs invent pixels where data are cut off.
    if header.syntax != uid.RLELossless and not data.rstrip(b"\0").endswith(END_OF_IMAGE):
        raise ScanFormatError(
            f"{frame.shown} is truncated: its compressed image has no end; get a new copy."
        )
    if header.syntax != uid.RLELossless and (said := _codestream_size(data)) != (rows, columns):
        found = "damaged" if said is None else f"{said[0]} × {said[1]} pixels"
        raise ScanFormatError(
            f"{frame.shown} holds a compressed image that is {found}, its header says"
            f" {rows} × {columns}; get a new copy."
        )
    if header.syntax in LOSSLESS_JPEG:
        return _lossless_jpeg(data, header)
    single = Dataset()
    single.file_meta = FileMetaDataset()
    single.file_meta.TransferSyntaxUID = uid.UID(header.syntax)
    single.Rows, single.Columns = rows, columns
    single.SamplesPerPixel = 1
    single.PhotometricInterpretation = "MONOCHROME2"
    single.BitsAllocated = header.whole("BitsAllocated")
    single.BitsStored = header.whole("BitsStored")
    single.HighBit = single.BitsStored - 1
    single.PixelRepresentation = header.whole("PixelRepresentation", 0)
    single.PixelData = encaps.encapsulate([data])
    single["PixelData"].VR = "OB"
    quiet()
    values = pixel_array(single, raw=True, decoding_plugin=CODECS[uid.UID(header.syntax)])
    return _sign_extended(values, single.BitsAllocated - single.BitsStored)


def _lossless_jpeg(data: bytes, header: Header) -> NDArray[Any]:
    bits, stored_bits = header.whole("BitsAllocated"), header.whole("BitsStored")
    if bits > 16:
        raise ValueError(f"lossless JPEG of {bits} bits")
    values = jpeg_lossless.decode(data).astype(f"u{bits // 8}")
    if header.whole("PixelRepresentation", 0):
        values = values.view(f"i{bits // 8}")
    return _sign_extended(values, bits - stored_bits)


def _codestream_size(data: bytes) -> tuple[int, int] | None:
    """Read the rows and columns from the data of a JPEG, JPEG-LS or JPEG 2000 image."""

    def number(position: int, size: int) -> int:
        return int.from_bytes(data[position : position + size], "big")

    position = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    if position >= 0:
        right, bottom, left, top = (number(position + 8 + 4 * i, 4) for i in range(4))
        return bottom - top, right - left
    position = 2
    while data[:2] == b"\xff\xd8" and position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return number(position + 5, 2), number(position + 7, 2)
        else:
            position += 2 + max(2, number(position + 2, 2))
    return None
