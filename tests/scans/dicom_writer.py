"""DICOM as scanners write it: slices of a CT series, plain, compressed or in one enhanced file."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

Array = NDArray[Any]

STUDY, SERIES, WORLD = (uid.generate_uid(entropy_srcs=[name]) for name in ("st", "se", "fr"))
INTERCEPT = -1024.0

GDCM = {
    uid.JPEGLossless: "JPEGLosslessProcess14",
    uid.JPEGLosslessSV1: "JPEGLosslessProcess14_1",
}
"""Names of transfer syntaxes that GDCM writes."""


def slices(values: Array, affine: Array, series: str = SERIES) -> list[Dataset]:
    """Datasets of the planes of a volume.

    Parameters
    ----------
    values : ndarray (k, j, i)
        Whole numbers of HU.
    affine : ndarray (4, 4)
        From (i, j, k) to (x, y, z) LPS.
    series : str
        UID.
    """
    return [slice_of(plane, affine, k, series) for k, plane in enumerate(values)]


def common(affine: Array, rows: int, columns: int, series: str) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = uid.CTImageStorage
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientID = "test"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = STUDY, series
    dataset.SeriesDescription = "thorax 1.0"
    dataset.FrameOfReferenceUID = WORLD
    dataset.Rows, dataset.Columns = rows, columns
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    return dataset


def placed(dataset: Dataset, affine: Array, k: int) -> None:
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    cosines = affine[:3, :2] / spacing[:2]
    dataset.ImageOrientationPatient = [f"{c:.12f}"[:16] for c in cosines.T.ravel()]
    dataset.ImagePositionPatient = [f"{p:.10f}"[:16] for p in affine[:3, 3] + k * affine[:3, 2]]
    dataset.PixelSpacing = [float(spacing[1]), float(spacing[0])]


def slice_of(plane: Array, affine: Array, k: int, series: str) -> Dataset:
    dataset = common(affine, *plane.shape, series)
    dataset.SOPInstanceUID = uid.generate_uid(entropy_srcs=[series, str(k)])
    dataset.InstanceNumber = k + 1
    placed(dataset, affine, k)
    dataset.SliceThickness = float(np.sqrt((affine[:3, 2] ** 2).sum()))
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, INTERCEPT, "HU"
    dataset.PixelData = (plane - INTERCEPT).astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def enhanced(values: Array, affine: Array) -> Dataset:
    """Make one file of all planes, in reversed order."""
    dataset = common(affine, *values.shape[1:], SERIES)
    dataset.SOPClassUID = uid.EnhancedCTImageStorage
    dataset.SOPInstanceUID = uid.generate_uid(entropy_srcs=["enhanced"])
    dataset.NumberOfFrames = len(values)
    shared, frames = Dataset(), []
    for k in range(len(values))[::-1]:
        where, frame, position = Dataset(), Dataset(), Dataset()
        placed(where, affine, k)
        position.ImagePositionPatient = where.ImagePositionPatient
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    orientation, measures, rescale = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = where.ImageOrientationPatient
    measures.PixelSpacing = where.PixelSpacing
    measures.SliceThickness = float(np.sqrt((affine[:3, 2] ** 2).sum()))
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, INTERCEPT, "HU"
    shared.PlaneOrientationSequence = [orientation]
    shared.PixelMeasuresSequence = [measures]
    shared.PixelValueTransformationSequence = [rescale]
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.PixelData = (values[::-1] - INTERCEPT).astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def save(dataset: Dataset, path: Path, syntax: str = uid.ExplicitVRLittleEndian) -> Path:
    """Write a file in a transfer syntax."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax in (uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless):
        dataset.compress(syntax, generate_instance_uid=False)
    elif syntax in (uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian):
        dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
    elif syntax == uid.ExplicitVRBigEndian:
        dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
        if "PixelData" in dataset:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)
    if syntax in GDCM:
        with_gdcm(path, syntax)
    return path


def with_gdcm(path: Path, syntax: str) -> None:
    """Compress a file by a codec for which pydicom has no encoder."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, GDCM[syntax])))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def write_folder(
    path: Path, values: Array, affine: Array, syntax: str = uid.ExplicitVRLittleEndian
) -> None:
    """Write a folder of slices whose names are in no order."""
    for k, dataset in enumerate(slices(values, affine)):
        save(dataset, path / f"{(k * 7 + 3) % 1009:04}.dcm", syntax)


def write_zip(path: Path, values: Array, affine: Array) -> None:
    """Write a zip with a folder of slices in it."""
    folder = path.with_suffix("")
    write_folder(folder / "DICOM", values, affine)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.dcm")):
            archive.write(file, file.relative_to(folder))
    shutil.rmtree(folder)


def write_enhanced(path: Path, values: Array, affine: Array) -> None:
    """Write one file with all slices as frames."""
    save(enhanced(values, affine), path)
