"""Interface of every reader of a format: `ScanFile`.

To add a format: write `open_<format>(path) -> ScanFile` in a module of its own, name its endings in
`kpt_dask.scans.scan.READERS`, and add a writer to ``tests/scans/formats.py``, by which all tests of
readers run over it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kpt_dask.grid import Grid
from kpt_dask.remote import Remote


class ScanFile(Protocol):
    """A volume in a file or folder, of which only headers have been read and found usable.

    A reader's function of opening raises `ScanFormatError`, with one sentence that names the file,
    for everything that is not one 3-D volume of real numbers on a usable grid, before it asks for
    memory that the file's own size does not justify.
    """

    @property
    def path(self) -> Path | Remote:
        """Path or URL as given by the user."""

    @property
    def grid(self) -> Grid:
        """Grid of the voxels; axes (k, j, i) in stored order, slowest first.

        Orientation is in its affine alone: no reader flips or transposes voxels.
        """

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a voxel as `slabs` yields it: integer or floating point."""

    @property
    def slope(self) -> float:
        """Value = voxel × slope + intercept, in HU for a CT."""

    @property
    def intercept(self) -> float:
        """See `slope`."""

    @property
    def doubts(self) -> tuple[str, ...]:
        """Doubts about the headers, one sentence each."""

    @property
    def header(self) -> Any:
        """NIfTI header whose geometry a label map on this grid gets."""

    def slabs(self) -> Iterator[NDArray[Any]]:
        """Stream the voxels in stored order, as arrays (n, j, i) of about 4 MB or one plane.

        May be called again. Only a few slabs are in memory at a time.

        Raises
        ------
        ScanFormatError
            If the file is truncated or damaged.
        """
        ...
