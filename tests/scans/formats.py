"""Every format of scans: how a test writes it, and who judges what was read."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK
import zarr
from numpy.typing import NDArray
from ome_zarr_models import v04, v05
from pydicom import uid

from kpt_dask.scans.omezarr_scan import DIRECTIONS
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
    oblique : bool
        Whether axes need not be those of the body.
    """

    name: str
    ending: str
    write: Callable[[Path, Array, Array], None]
    judge: Callable[[Path], tuple[Array, Array]]
    sheared: bool = False
    oblique: bool = True

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


def omezarr(version: str) -> Callable[[Path, Array, Array], None]:
    """Write as other programs do: axes along those of the body, directions by RFC-4."""

    def write(path: Path, values: Array, affine: Array) -> None:
        steps = (REVERSED @ affine @ REVERSED)[:3]
        axes, scale, translation = [], [], []
        for column, name in enumerate("zyx"):
            row = int(np.abs(steps[:, column]).argmax())
            sign = int(np.sign(steps[row, column]))
            direction = {towards: key for key, towards in DIRECTIONS.items()}[
                tuple(sign * (a == row) for a in range(3))
            ]
            about = {"type": "anatomical", "value": direction}
            axes.append({"name": name, "type": "space", "unit": "millimeter", "orientation": about})
            scale.append(abs(steps[row, column]))
            translation.append(sign * steps[row, 3])
        group = zarr.create_group(str(path), zarr_format=2 if version == "0.4" else 3)
        array = group.create_array(
            "0",
            shape=values.shape,
            dtype=values.dtype,
            chunks=(2, 64, 64),
            compressors=None,
            dimension_names=None if version == "0.4" else ("z", "y", "x"),
        )
        array[...] = values
        image = {
            "axes": axes,
            "datasets": [
                {
                    "path": "0",
                    "coordinateTransformations": [
                        {"type": "scale", "scale": [float(length) for length in scale]},
                        {"type": "translation", "translation": [float(t) for t in translation]},
                    ],
                }
            ],
        }
        if version == "0.4":
            group.attrs["multiscales"] = [image | {"version": "0.4"}]
        else:
            group.attrs["ome"] = {"version": version, "multiscales": [image]}

    return write


def by_ome_zarr_models(path: Path) -> tuple[Array, Array]:
    group = zarr.open_group(str(path), mode="r")
    model = v04.Image if group.metadata.zarr_format == 2 else v05.Image
    attributes = model.from_zarr(group).attributes
    image = getattr(attributes, "ome", attributes).multiscales[0]
    scale, translation = image.datasets[0].coordinateTransformations
    affine = np.eye(4)
    for column, axis in enumerate(
        group.attrs.asdict().get("ome", group.attrs)["multiscales"][0]["axes"]
    ):
        towards = np.array(DIRECTIONS[axis["orientation"]["value"]])
        affine[:3, column] = towards * scale.scale[column]
        affine[:3, 3] += towards * translation.translation[column]
    return np.asarray(group["0"]), REVERSED @ affine @ REVERSED


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
    Format("OME-Zarr 0.4", ".zarr", omezarr("0.4"), by_ome_zarr_models, oblique=False),
    Format("OME-Zarr 0.5", ".zarr", omezarr("0.5"), by_ome_zarr_models, oblique=False),
]
