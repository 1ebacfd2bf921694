"""Formats of label maps, by the ending of the file's name.

To add a format: write a module with a function ``(path, label_map)`` that fills a new file, name
its ending in `FORMATS`, and let another program judge it in ``tests/label_files``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from kpt_dask.errors import ScanFormatError
from kpt_dask.grid import RIGHT_ANGLE, Grid
from kpt_dask.label_files.itksnap import write_label_description
from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.label_files.metaimage import write_metaimage
from kpt_dask.label_files.nifti import write_nifti
from kpt_dask.label_files.nrrd import write_nrrd, write_slicer
from kpt_dask.runtime import notices

Writer = Callable[[Path, LabelMap], None]
Check = Callable[[Path, Grid], None]

RTSTRUCT = "rtstruct:"
"""Before the path of a DICOM file: a structure set instead of a segmentation."""


def _write_segmentation(path: Path, label_map: LabelMap) -> None:
    # Importing the library takes as long as writing a small file.
    from kpt_dask.label_files.dicom_seg import write_segmentation

    write_segmentation(path, label_map)


def _write_structure_set(path: Path, label_map: LabelMap) -> None:
    from kpt_dask.label_files.rtstruct import write_structure_set

    write_structure_set(path, label_map)


def _check_planes(path: Path, grid: Grid) -> None:
    from kpt_dask.label_files.rtstruct import check_planes

    check_planes(path, grid)


def _check_orthogonal(path: Path, grid: Grid) -> None:
    """Refuse a sheared grid."""
    if not grid.is_orthogonal:
        raise ScanFormatError(
            f"{path} cannot be written: the axes of the scan are not at right angles (its gantry"
            " was tilted), which MetaImage cannot say; write .seg.nrrd or .dcm instead."
        )


def _doubt_shear(path: Path, grid: Grid) -> None:
    """Warn of a sheared grid, which NIfTI can say, but many programs do not read."""
    if not grid.is_orthogonal:
        notices.warn(
            f"{path}: the axes of the scan are not at right angles (its gantry was tilted), and"
            " ITK-SNAP and others read no such NIfTI; write .seg.nrrd or .dcm for them."
        )


def _check_right_angles(path: Path, grid: Grid) -> None:
    """Refuse a plane whose rows and columns are no right angle."""
    cosines = grid.affine[:3, 1:3] / grid.spacing[1:]
    if abs(float(cosines[:, 0] @ cosines[:, 1])) > RIGHT_ANGLE:
        raise ScanFormatError(
            f"{path} cannot be written: rows and columns of the scan are not at right angles, which"
            " DICOM cannot say; write .seg.nrrd instead."
        )


@dataclass(frozen=True)
class Format:
    """A format of label maps.

    Attributes
    ----------
    write : callable
        Fills a new file with a label map.
    checks : tuple of callable
        Each refuses a grid that the format cannot say, or doubts it, before any work.
    """

    write: Writer
    checks: tuple[Check, ...] = ()


FORMATS: dict[str, Format] = {
    ".nii.gz": Format(write_nifti, (_doubt_shear,)),
    ".nii": Format(write_nifti, (_doubt_shear,)),
    ".seg.nrrd": Format(write_slicer),
    ".nrrd": Format(write_nrrd),
    ".mha": Format(write_metaimage, (_check_orthogonal,)),
    ".dcm": Format(_write_segmentation, (_check_right_angles,)),
    ".label": Format(write_label_description),
}
"""Formats by the ending of a name, longer ones first."""

STRUCTURE_SET = Format(_write_structure_set, (_check_right_angles, _check_planes))


@dataclass(frozen=True)
class LabelFile:
    """A label file that is asked for.

    Attributes
    ----------
    path : str
        Path of the file.
    format : Format
    """

    path: str
    format: Format

    @classmethod
    def parse(cls, asked: str | PathLike[str]) -> "LabelFile":
        """Choose the format of a file by its name, or by ``rtstruct:`` before it.

        Raises
        ------
        ScanFormatError
            If no format has this ending.

        Examples
        --------
        >>> LabelFile.parse("rtstruct:organs.dcm").path
        'organs.dcm'
        """
        text = fspath(asked)
        if text.startswith(RTSTRUCT):
            path = text.removeprefix(RTSTRUCT)
            if not path.lower().endswith(".dcm"):
                raise ScanFormatError(f"{path} is a structure set and must end in .dcm.")
            return cls(path, STRUCTURE_SET)
        found = next((FORMATS[end] for end in FORMATS if text.lower().endswith(end)), None)
        if found is None:
            raise ScanFormatError(
                f"{text} has an unknown extension; label files end in {', '.join(FORMATS)}, and"
                f" {RTSTRUCT}FILE.dcm is an RTSTRUCT."
            )
        return cls(text, found)

    def check(self, grid: Grid) -> None:
        """Refuse a grid on which the format has no label map; `ScanFormatError` then."""
        for check in self.format.checks:
            check(Path(self.path), grid)
