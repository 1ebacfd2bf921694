"""Every format of scans: how a test writes it, and who judges what was read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

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


FORMATS = [
    Format("nifti", ".nii", nifti(nib.Nifti1Image), by_nibabel, sheared=True),
    Format("nifti gz", ".nii.gz", nifti(nib.Nifti1Image), by_nibabel, sheared=True),
    Format("nifti 2", ".nii", nifti(nib.Nifti2Image), by_nibabel, sheared=True),
    Format("pair", ".img", nifti(nib.Nifti1Pair), by_nibabel, sheared=True),
    Format("pair, by its header", ".hdr", nifti(nib.Nifti1Pair), by_nibabel, sheared=True),
    Format("pair gz", ".img.gz", nifti(nib.Nifti1Pair), by_nibabel, sheared=True),
]
