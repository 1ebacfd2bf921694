"""Placement of voxels by a header: its ambiguities, and grids that no scan has.

A NIfTI header may hold two placements, the sform and the qform, each with a code that is 0 where
it is absent; the sform is used where there is one, as nibabel does. Lengths are in the unit that
the header names: metres, millimetres or microns.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from kpt_dask.errors import ScanFormatError
from kpt_dask.grid import Grid
from kpt_dask.remote import Remote

SMALLEST_SPACING = 1e-4
LARGEST_EXTENT = 1e5
"""Limits of what may be a scan, mm; beyond them the header is damaged."""

UNITS = {1: ("metres", 1e3), 3: ("microns", 1e-3)}
"""Units of length by their code in ``xyzt_units``, and mm in each; all others count as mm."""

USUAL_EXTENT = 5.0, 3000.0
"""Least and largest size, mm, of a scan without a warning; metres taken for mm make it smaller."""

DIFFERENT_SPACING = 0.1
"""Relative difference from which the sform's spacing contradicts the header's own (a shear, as of
a tilted gantry, makes an axis a few hundredths longer)."""

AT_RIGHT_ANGLES = 1e-4
"""How far the cosine of the angle between two axes may be from 0 for a qform."""

FROM_RAS_XYZ = np.array(
    [[0.0, 0, 1, 0], [0, -1.0, 0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1.0]],
)
"""Takes (x, y, z, 1) RAS to (z, y, x, 1) LPS."""

FROM_IJK = np.array([[0.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
"""Takes (k, j, i, 1) to (i, j, k, 1), and back."""

_nib: Any = nibabel


def place(path: Path, header: Any) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Find where a header places its voxels.

    Parameters
    ----------
    path : Path
        Path to name in messages.
    header : nibabel.Nifti1Header or nibabel.Nifti2Header
        Its ``pixdim[0]`` becomes 1 or -1: readers agree that 0, which should not occur, means 1.

    Returns
    -------
    affine : ndarray (4, 4), float64
        From (k, j, i, 1) to (z, y, x, 1) in mm, LPS.
    doubts : tuple of str
        Doubts about the placement, one sentence each.

    Raises
    ------
    ScanFormatError
        If a spacing is not positive.
    """
    zooms = np.asarray(header["pixdim"][1:4], np.float64)
    if not np.isfinite(zooms).all() or (zooms <= 0).any():
        raise ScanFormatError(
            f"{path} has voxel spacing {listed(zooms)} mm, which must be positive;"
            " repair its header."
        )
    if header["pixdim"][0] not in (1, -1):
        header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    affine = np.asarray(header.get_best_affine(), np.float64)
    doubts = []
    if not sform and not qform:
        doubts.append(
            f"{path} has neither sform nor qform, so its orientation is a guess (axes to the left,"
            " front and head) and left and right may be exchanged; make it anew from the DICOM"
            " series."
        )
    elif sform and qform:
        doubts += _contradictions(path, header, affine)
    elif sform and np.isfinite(affine).all():
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        if (np.abs(spacing / zooms - 1) > DIFFERENT_SPACING).any():
            doubts.append(
                f"{path} has the voxel spacing {listed(zooms)} in pixdim and {listed(spacing)} in"
                " its sform; the sform is used, other programs may read it differently."
            )
    scale = np.diag([*(3 * [UNITS.get(int(header["xyzt_units"]) & 7, ("mm", 1.0))[1]]), 1.0])
    return FROM_RAS_XYZ @ scale @ affine @ FROM_IJK, tuple(doubts)


def check_extent(path: Path, header: Any, grid: Grid) -> None:
    """Refuse a grid that no scan has; see `check_grid`."""
    unit = UNITS.get(int(header["xyzt_units"]) & 7)
    check_grid(path, grid, f" (its unit of length is given as {unit[0]})" if unit else "")


def check_grid(path: Path | Remote, grid: Grid, told: str = "") -> None:
    """Refuse a grid that no scan has.

    Parameters
    ----------
    path : Path
        Path to name in messages.
    grid : Grid
        As the header gives it.
    told : str
        Addition to the message about an absurd size.

    Raises
    ------
    ScanFormatError
        If axes vanish or coincide, or the grid is absurdly large or far away.
    """
    if not np.isfinite(grid.affine).all() or not _is_regular(grid.affine[:3, :3]):
        raise ScanFormatError(
            f"{path} has an affine that does not place its voxels in space (singular or not"
            " finite); repair its header."
        )
    extent = grid.spacing * grid.shape
    if extent.max() > LARGEST_EXTENT or np.abs(grid.origin).max() > LARGEST_EXTENT:
        raise ScanFormatError(
            f"{path} says it is {listed(extent)} mm large at {listed(grid.origin)} mm{told}, which"
            " no scan is; repair its header."
        )


def header_of(grid: Grid, dtype: Any = np.int16) -> Any:
    """Make the NIfTI header of voxels on a grid, as for label maps of a scan that is no NIfTI.

    Returns
    -------
    nibabel.Nifti1Header or nibabel.Nifti2Header
        Little-endian, of a single file. With an sform, and with a qform too unless the grid is
        sheared, which a qform cannot express.
    """
    large = max(grid.shape) > np.iinfo(np.int16).max
    header = (_nib.Nifti2Header if large else _nib.Nifti1Header)(endianness="<")
    header.set_data_dtype(dtype)
    header.set_data_shape(grid.shape[::-1])
    header.set_xyzt_units("mm")
    affine = FROM_RAS_XYZ.T @ grid.affine @ FROM_IJK
    cosines = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    orthogonal = np.abs(cosines.T @ cosines - np.eye(3)).max() < AT_RIGHT_ANGLES
    header.set_qform(affine, code="scanner" if orthogonal else "unknown")
    header.set_sform(affine, code="scanner")
    header["vox_offset"] = header.single_vox_offset
    return header


def unusual_unit(path: Path, header: Any, grid: Grid) -> tuple[str, ...]:
    """Doubt a unit by which the scan has the size of no patient."""
    return doubt_size(path, UNITS.get(int(header["xyzt_units"]) & 7, ("mm", 1.0))[0], grid)


def doubt_size(path: Path, unit: str, grid: Grid) -> tuple[str, ...]:
    """Doubt the unit that lengths are given in if by it a scan has the size of no patient."""
    extent = (grid.spacing * grid.shape).max()
    if USUAL_EXTENT[0] <= extent <= USUAL_EXTENT[1]:
        return ()
    return (
        f"{path} gives its lengths in {unit}, which makes it {extent:g} mm large; correct the unit"
        " or the spacing in its header.",
    )


def listed(values: Iterable[Any]) -> str:
    """Spell lengths along axes."""
    return " × ".join(f"{value:g}" for value in values)


def _contradictions(path: Path, header: Any, sform: NDArray[np.float64]) -> list[str]:
    """Describe sform and qform that place a voxel apart by more than its largest edge."""
    other = "the sform is used, other programs may use the qform; compare with the DICOM series."
    try:
        qform = np.asarray(header.get_qform(), np.float64)
    except _nib.spatialimages.HeaderDataError:
        return [f"{path} has a damaged qform; the sform is used."]
    if not (np.isfinite(sform).all() and np.isfinite(qform).all()):
        return []
    ends = np.array(header.get_data_shape()[:3], np.float64) - 0.5
    corners = np.array(np.meshgrid(*([-0.5, end] for end in ends), indexing="ij")).reshape(3, -1)
    difference = (sform - qform) @ np.vstack([corners, np.ones(corners.shape[1])])
    apart = np.sqrt((difference[:3] ** 2).sum(axis=0)).max()
    if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        return [f"{path} has an sform and a qform that mirror each other; {other}"]
    edge = np.sqrt((sform[:3, :3] ** 2).sum(axis=0)).max()
    if apart > edge:
        return [
            f"{path} has an sform and a qform that place voxels up to {apart / edge:.3g} voxels"
            f" apart; {other}"
        ]
    return []


def _is_regular(matrix: NDArray[np.float64]) -> bool:
    """Whether no axis vanishes and no two nearly coincide, whatever their lengths."""
    with np.errstate(all="ignore"):
        lengths = np.sqrt((matrix**2).sum(axis=0))
        return bool(
            (lengths > SMALLEST_SPACING).all() and abs(np.linalg.det(matrix / lengths)) > 1e-3
        )
