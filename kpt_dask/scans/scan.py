"""Scans as they lie on disk: header first, voxels streamed plane by plane.

Chooses the reader by the file's name, and checks which numbers a CT or a label map may hold. Each
format has its own module.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.errors import ScanFormatError, ScanNotFoundError
from kpt_dask.grid import Grid
from kpt_dask.remote import SCHEMES, Remote, scheme_of
from kpt_dask.runtime import notices
from kpt_dask.scans.contract import ScanFile
from kpt_dask.scans.dicom_files import ENDINGS as DICOM_ENDINGS
from kpt_dask.scans.dicom_files import is_dicom, is_zarr, is_zip
from kpt_dask.scans.intensities import Intensities
from kpt_dask.scans.metaimage import open_metaimage
from kpt_dask.scans.nifti import open_nifti
from kpt_dask.scans.nrrd import open_nrrd

READERS: dict[str, Callable[[Path], ScanFile]] = {
    ".nii": open_nifti,
    ".nii.gz": open_nifti,
    ".hdr": open_nifti,
    ".img": open_nifti,
    ".hdr.gz": open_nifti,
    ".img.gz": open_nifti,
    ".nrrd": open_nrrd,
    ".nhdr": open_nrrd,
    ".mha": open_metaimage,
    ".mhd": open_metaimage,
}
"""Readers by the ending of the file's name; all other paths may be OME-Zarr or DICOM."""

ROUNDING, MOST_ROUNDING = 0.05, 0.25
"""Tolerances of a stored label's distance from a whole number: the usual one, and the largest.
Programs that write numbers with decimals into a file of scaled integers round to its steps; then
half a step is allowed, up to the largest."""


@dataclass(frozen=True, eq=False)
class Scan:
    """A CT scan or a label map on disk, of which only the header has been read.

    Attributes
    ----------
    path : Path or Remote
        The file or folder, or the URL.
    grid : Grid
        Grid of its voxels; axes (k, j, i) in stored order, slowest first.
    dtype : dtype
        Type of a stored voxel.
    file : ScanFile
        The reader's view of the file.
    must_be_hu : bool
        Whether values that cannot be HU are refused, instead of told.
    """

    path: Path | Remote
    grid: Grid
    dtype: np.dtype[Any]
    file: ScanFile
    must_be_hu: bool = False

    @property
    def doubts(self) -> tuple[str, ...]:
        """What its header leaves open, one sentence each."""
        return self.file.doubts

    def slabs(self) -> Iterator[NDArray[np.float32]]:
        """Stream the values in HU, in stored order, a few planes (n, j, i) at a time.

        Warns at the end if they can hardly be HU.

        Raises
        ------
        ScanFormatError
            If the file is truncated or damaged, a value is NaN or infinite, or, at the end, the
            values cannot be HU but must be.
        """
        seen = Intensities()
        certain = self.dtype.kind in "iu" and not self._scaled
        for stored in self.file.slabs():
            with np.errstate(over="ignore", invalid="ignore"):
                values = self._values(stored).astype(np.float32, copy=False)
            if not certain and not np.isfinite(values).all():
                raise ScanFormatError(
                    f"{self.path} holds NaN or infinite values; replace them with the HU of air."
                )
            seen.add(values)
            yield values
        fault = seen.fault()
        if self.must_be_hu and fault is not None:
            raise ScanFormatError(
                f"{self.path} {fault}; an atlas must be a CT in HU: convert it anew from the DICOM"
                " series, or leave it out."
            )
        if (doubt := fault or seen.doubt()) is not None:
            notices.warn(
                f"{self.path} {doubt}; organs may be missed or misplaced. Convert it anew from the"
                " DICOM series if it should be in HU."
            )

    def label_slabs(self) -> Iterator[NDArray[np.uint16]]:
        """Stream the values as labels, in stored order, a few planes (n, j, i) at a time.

        Raises
        ------
        ScanFormatError
            If the file is truncated or damaged, or a value is no whole number in 0…65535, but
            for rounding.
        """
        step = abs(self.file.slope) if self.dtype.kind in "iu" else 0.0
        rounding = max(ROUNDING, min(step / 2 * (1 + 1e-6), MOST_ROUNDING))
        for stored in self.file.slabs():
            with np.errstate(over="ignore", invalid="ignore"):
                values = self._values(stored) if self._scaled else stored
                whole = np.rint(values) if values.dtype.kind == "f" else values
                # The condition is what must hold, because NaN fails every comparison.
                usable = bool(whole.min() >= 0 and whole.max() <= np.iinfo(np.uint16).max)
                if usable and values.dtype.kind == "f":
                    usable = bool(np.abs(values - whole).max() <= rounding)
                labels = whole.astype(np.uint16)
            if not usable:
                raise ScanFormatError(
                    f"{self.path} is no label map: its values must be whole numbers from 0 to"
                    " 65535."
                )
            yield labels

    @property
    def _scaled(self) -> bool:
        return (self.file.slope, self.file.intercept) != (1.0, 0.0)

    def _values(self, stored: NDArray[Any]) -> NDArray[Any]:
        if not self._scaled:
            return stored
        exact = np.float32 if self.dtype.kind in "iu" and self.dtype.itemsize <= 2 else np.float64
        values: NDArray[Any] = stored.astype(exact)
        values *= exact(self.file.slope)
        values += exact(self.file.intercept)
        return values


def scan_name(path: Path | Remote) -> str:
    """Name a scan after its file or folder, without the ending that a reader knows."""
    # "." has no name.
    name = path.name or (path.resolve().name if isinstance(path, Path) else "")
    for ending in sorted(
        [*READERS, *DICOM_ENDINGS, ".zip", ".ome.zarr", ".zarr"], key=len, reverse=True
    ):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def open_scan(path: str | Path, *, series: str | None = None) -> Scan:
    """Read the header of a scan, or the headers of its slices.

    Warns of what they leave open.

    Parameters
    ----------
    path : str or Path
        A file that `READERS` know, an OME-Zarr image (its folder, or its URL: s3://, http://, …),
        or DICOM: a folder with all below it, a zip, or one file.
    series : str, optional
        UID of the DICOM series, needed where there are several.

    Returns
    -------
    Scan
        Its grid (mm, LPS) and a stream of its values (HU); no voxel has been read.

    Raises
    ------
    ScanNotFoundError
        If there is no such file.
    ScanFormatError
        If it is none that can be read, or not one 3-D volume of real numbers on a usable grid.

    Examples
    --------
    >>> import kpt_dask
    >>> scan = kpt_dask.open_scan("body_4_ct.nii.gz")
    >>> scan.grid.shape, scan.grid.spacing.tolist()
    ((110, 65, 80), [4.0, 4.0, 4.0])
    """
    scan = open_labels(path, series=series)
    for doubt in scan.doubts:
        notices.warn(doubt)
    return scan


def open_labels(path: str | Path, *, series: str | None = None) -> Scan:
    """Read the header of a label map; as `open_scan`, but without a warning.

    It must lie on the grid of its scan, whose doubts `open_scan` warns of.
    """
    text = os.fspath(path)
    if (scheme := scheme_of(text)) is not None:
        return _open_remote(text, scheme, series)
    path = Path(text.removeprefix("file://"))
    if not path.exists():
        raise ScanNotFoundError(f"{path} does not exist.")
    if not (path.is_file() or path.is_dir()):
        raise ScanFormatError(f"{path} is no regular file; give a file or folder on a disk.")
    name = path.name.lower()
    reader = next((READERS[end] for end in READERS if name.endswith(end)), None)
    file: ScanFile
    if reader is not None and path.is_file():
        if series is not None:
            raise ScanFormatError(f"{path} is no DICOM and has no series; leave --series out.")
        file = reader(path)
    elif path.is_dir() and is_zarr(path):
        from kpt_dask.scans.omezarr_scan import open_omezarr

        file = open_omezarr(path)
    elif path.is_dir() or (path.is_file() and (is_zip(path) or is_dicom(path))):
        # Importing the codecs takes as long as reading the header of any other format.
        from kpt_dask.scans.dicom import open_dicom

        file = open_dicom(path, series)
    else:
        raise ScanFormatError(
            f"{path} is nothing that can be read; known are DICOM (a folder, a zip or a file),"
            " OME-Zarr,"
            f" {', '.join(READERS)}."
        )
    return Scan(path, file.grid, file.dtype, file)


def _open_remote(url: str, scheme: str, series: str | None) -> Scan:
    if scheme not in SCHEMES:
        raise ScanFormatError(
            f"{url} cannot be read: scans are files, or OME-Zarr images at {', '.join(SCHEMES)};"
            " copy it to a disk."
        )
    if series is not None:
        raise ScanFormatError(f"{url} is no DICOM and has no series; leave --series out.")
    from kpt_dask.scans.omezarr_scan import open_omezarr

    place = Remote(url)
    file = open_omezarr(place)
    return Scan(place, file.grid, file.dtype, file)
