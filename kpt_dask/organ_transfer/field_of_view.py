"""Field of view of an oblique scan: its working grid is a box around it, with corners beyond it.

The scan's edge is repeated there (`kpt_dask.resampling.stream`), so that filters see no edge.
Nobody has seen what is there, so nothing is labelled there.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atlas_store.arrays.boxes import Box
from kpt_dask.grid import Grid


@dataclass(frozen=True)
class FieldOfView:
    """The part of a working grid that the scan shows.

    Attributes
    ----------
    grid : Grid
        The working grid.
    source_grid : Grid
        The scan's own grid.
    """

    grid: Grid
    source_grid: Grid

    @classmethod
    def on(cls, grid: Grid, source_grid: Grid) -> "FieldOfView | None":
        """Take that of a scan on an axis-aligned grid around it; None if it is all of it."""
        return cls(grid, source_grid) if source_grid.axis_permutation() is None else None

    @property
    def spacing(self) -> float:
        """Edge length of a voxel of the working grid, mm."""
        return float(self.grid.spacing[0])

    @property
    def reach(self) -> float:
        """How far outside, mm, shares are needed to interpolate those of the scan's voxels."""
        return math.sqrt(3) * self.spacing

    def depth(self, box: Box) -> NDArray[np.float32]:
        """Measure how deep the voxels of a box of the working grid lie in the field of view.

        Returns
        -------
        float32 array (z, y, x)
            Distance of a voxel's centre from the nearest face, mm; negative outside.

        Examples
        --------
        >>> import numpy as np
        >>> from kpt_dask.grid import Grid
        >>> scan = Grid.isotropic((2, 2, 2), 3.0, (0, 0, 0))
        >>> FieldOfView(scan, scan).depth(((-1, 2), (0, 1), (0, 1))).ravel().tolist()
        [-1.5, 1.5, 1.5]
        """
        inverse = np.linalg.inv(self.source_grid.affine)
        to_index = inverse @ self.grid.affine
        along = [np.arange(a, b, dtype=np.float64) for a, b in box]
        found = np.full([len(part) for part in along], np.inf, np.float32)
        for axis, n in enumerate(self.source_grid.shape):
            z, y, x = (to_index[axis, a] * part for a, part in enumerate(along))
            index = z[:, None, None] + y[:, None] + x + to_index[axis, 3]
            mm = 1 / np.linalg.norm(inverse[axis, :3])
            half = (n / 2 - np.abs(index - (n - 1) / 2)) * mm
            np.minimum(found, half.astype(np.float32), out=found)
        return found
