"""Headers of label maps: the geometry of a scan's header, and the run that a map belongs to."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

_nib: Any = nibabel

DESCRIPTION = "kpt-dask label map"
RUN = "kpt-dask run "
"""Begins the description of a label map that belongs to an OME-Zarr of the same run."""


def header_like(like: Any, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> Any:
    """Make the header of a label map on a scan's grid.

    Parameters
    ----------
    like : nibabel.Nifti1Header or nibabel.Nifti2Header
        Header of the scan: its affines, their codes, spacings and units are kept bit by bit.
    shape : tuple of int
        (k, j, i).
    dtype : dtype
        Type of the labels.

    Returns
    -------
    nibabel.Nifti1Header or nibabel.Nifti2Header
        Little-endian, of the same class as `like`.
    """
    header = like.as_byteswapped("<")
    header["dim"] = [3, shape[2], shape[1], shape[0], 1, 1, 1, 1]
    header["pixdim"][4:] = 1
    header.set_data_dtype(dtype)
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"] = header["cal_max"] = 0
    header["slice_code"] = header["slice_start"] = header["slice_end"] = 0
    header.set_intent("label")
    header["aux_file"] = b""
    header["descrip"] = DESCRIPTION.encode()
    return header


def run_of(path: Path) -> str | None:
    """Run that a label map belongs to; None if it is none of this program's, or of no run."""
    try:
        said: bytes = _nib.load(path).header["descrip"].item()
    # Libraries raise many kinds of errors for files that are no NIfTI.
    except Exception:
        return None
    description = said.decode("utf-8", "replace")
    return description.removeprefix(RUN) if description.startswith(RUN) else None
