"""Every format of scans: how a test writes it, and who judges what was read."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK
from numpy.typing import NDArray
from pydicom import uid

from tests.scans.dicom_writer import write_enhanced, write_folder, write_zip

Array = NDArray[Any]

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Takes (x, y, z) RAS to LPS, and back."""
REVERSED = np.eye(4)[[2, 1, 0, 3]]
"""Reverses the order of axes."""


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes
    ----------
    name : str
        Of the test.
    ending : str
        Of the file.
    write : callable
        Takes path, values (k, j, i) int16 and affine from (i, j, k) to (x, y, z) LPS.
    judge : callable
        Takes the path; gives values (k, j, i) and affine as another program reads them.
    sheared : bool
        Whether axes need not be orthogonal.
    """

    name: str
    ending: str
    write: Callable[[Path, Array, Array], None]
    judge: Callable[[Path], tuple[Array, Array]]
    sheared: bool = False

    def __str__(self) -> str:
        return self.name


def by_nibabel(path: Path) -> tuple[Array, Array]:
    image = nib.load(path)
    return np.asarray(image.dataobj).T, LPS @ image.affine


def nifti(kind: Any) -> Callable[[Path, Array, Array], None]:
    def write(path: Path, values: Array, affine: Array) -> None:
        image = kind(values.T, LPS @ affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, path)

    return write


def by_simpleitk(path: Path) -> tuple[Array, Array]:
    if path.is_dir():
        names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
        image = SimpleITK.ReadImage(names)
    else:
        image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image), affine


def by_simpleitk_unzipped(path: Path) -> tuple[Array, Array]:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(path.with_suffix(".d"))
    return by_simpleitk(path.with_suffix(".d") / "DICOM")


def simpleitk(compressed: bool) -> Callable[[Path, Array, Array], None]:
    def write(path: Path, values: Array, affine: Array) -> None:
        image = SimpleITK.GetImageFromArray(values)
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        image.SetSpacing(spacing.tolist())
        image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(affine[:3, 3].tolist())
        SimpleITK.WriteImage(image, str(path), compressed)

    return write


def in_jpeg(path: Path, values: Array, affine: Array) -> None:
    # GDCM crashes where it makes tiny images of JPEG 2000, but none of this.
    write_folder(path, values, affine, uid.JPEGLosslessSV1)


FORMATS = [
    Format("nifti", ".nii", nifti(nib.Nifti1Image), by_nibabel, sheared=True),
    Format("nifti gz", ".nii.gz", nifti(nib.Nifti1Image), by_nibabel, sheared=True),
    Format("nifti 2", ".nii", nifti(nib.Nifti2Image), by_nibabel, sheared=True),
    Format("pair", ".img", nifti(nib.Nifti1Pair), by_nibabel, sheared=True),
    Format("pair, by its header", ".hdr", nifti(nib.Nifti1Pair), by_nibabel, sheared=True),
    Format("pair gz", ".img.gz", nifti(nib.Nifti1Pair), by_nibabel, sheared=True),
    Format("nrrd", ".nrrd", simpleitk(False), by_simpleitk),
    Format("nrrd gz", ".nrrd", simpleitk(True), by_simpleitk),
    Format("nhdr", ".nhdr", simpleitk(False), by_simpleitk),
    Format("nhdr gz", ".nhdr", simpleitk(True), by_simpleitk),
    Format("mha", ".mha", simpleitk(False), by_simpleitk),
    Format("mha zlib", ".mha", simpleitk(True), by_simpleitk),
    Format("mhd", ".mhd", simpleitk(False), by_simpleitk),
    Format("mhd zlib", ".mhd", simpleitk(True), by_simpleitk),
    Format("DICOM folder", "", write_folder, by_simpleitk),
    Format("DICOM folder, JPEG", "", in_jpeg, by_simpleitk),
    Format("DICOM zip", ".zip", write_zip, by_simpleitk_unzipped),
    Format("DICOM enhanced", ".dcm", write_enhanced, by_simpleitk),
]
