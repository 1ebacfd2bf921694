"""Grids of voxels: index ↔ millimetres.

Indices are (k, j, i) in the order of the array's axes; points are (z, y, x) in millimetres
of the LPS world (x grows to the patient's left, y to the back, z to the head). Pure
functions, no I/O.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RIGHT_ANGLE = 1e-3
"""Largest cosine of an angle between axes that counts as a right one."""
AXIS_ALIGNED_TOLERANCE = 1e-3
"""Tolerance of direction cosines to 0 or ±1 on an axis-aligned grid: 0.5 mm in half a metre."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular grid of voxels in the world.

    Attributes
    ----------
    shape : tuple of int
        Number of voxels along (k, j, i).
    affine : ndarray, shape (4, 4), float64
        Maps (k, j, i, 1) to (z, y, x, 1) in mm, LPS.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @classmethod
    def isotropic(cls, shape: tuple[int, int, int], spacing: float, origin: ArrayLike) -> "Grid":
        """Make an axis-aligned grid; `origin` is the centre of voxel (0, 0, 0), (z, y, x) in mm."""
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = np.asarray(origin, dtype=np.float64)
        return cls(shape, affine)

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Edge lengths of a voxel along (k, j, i), mm."""
        lengths: NDArray[np.float64] = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return lengths

    @property
    def origin(self) -> NDArray[np.float64]:
        """Centre of voxel (0, 0, 0), (z, y, x) in mm."""
        return self.affine[:3, 3].copy()

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel, mm³."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def is_orthogonal(self) -> bool:
        """Whether the axes are at right angles, as they are not if a gantry was tilted."""
        cosines = self.affine[:3, :3] / self.spacing
        return bool(np.abs(cosines.T @ cosines - np.eye(3)).max() <= RIGHT_ANGLE)

    def to_mm(self, index: ArrayLike) -> NDArray[np.float64]:
        """Points (…, 3) in mm of (possibly fractional) indices (…, 3)."""
        mm: NDArray[np.float64] = np.asarray(index, np.float64) @ self.affine[:3, :3].T
        return mm + self.affine[:3, 3]

    def to_index(self, mm: ArrayLike) -> NDArray[np.float64]:
        """Fractional indices (…, 3) of points (…, 3) in mm."""
        offset = np.asarray(mm, np.float64) - self.affine[:3, 3]
        index: NDArray[np.float64] = offset @ np.linalg.inv(self.affine[:3, :3]).T
        return index

    def same_as(self, other: "Grid", tolerance: float = 0.1) -> bool:
        """Whether both have the same shape and no corner is apart by `tolerance` voxels."""
        if self.shape != other.shape:
            return False
        corners = self._corners()
        return bool(np.abs(self.to_index(other.to_mm(corners)) - corners).max() < tolerance)

    def stored_as(self, other: "Grid") -> "Grid | None":
        """Order the axes of this grid as another one does that has the same voxels.

        Returns
        -------
        Grid or None
            The same voxels, axes in the order and direction of `other`; None if it has others.
        """
        to_own = np.linalg.inv(self.affine) @ other.affine
        order = np.rint(to_own[:3, :3])
        if not (np.abs(order).sum(axis=0) == 1).all() or not (np.abs(order).sum(axis=1) == 1).all():
            return None
        n = np.array(self.shape)
        same = np.eye(4)
        same[:3, :3] = order
        # An axis that runs the other way begins at the last voxel.
        same[:3, 3] = np.where(order.sum(axis=1) < 0, n - 1, 0)
        shape = (np.abs(order).T @ n).astype(int).tolist()
        ordered = Grid((shape[0], shape[1], shape[2]), self.affine @ same)
        return ordered if ordered.same_as(other) else None

    def axis_permutation(self) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]] | None:
        """Array axes by world axis, and their directions; None for an oblique grid.

        Returns
        -------
        axes : tuple of int
            ``axes[a]`` is the array axis that runs along world axis a (z, y, x).
        flipped : tuple of bool
            Whether that array axis runs against its world axis.
        """
        cosines = self.affine[:3, :3] / self.spacing
        near_one = np.abs(np.abs(cosines) - 1) < AXIS_ALIGNED_TOLERANCE
        near_zero = np.abs(cosines) < AXIS_ALIGNED_TOLERANCE
        if not (near_one | near_zero).all() or not (near_one.sum(axis=0) == 1).all():
            return None
        axes = tuple(int(np.flatnonzero(near_one[a])[0]) for a in range(3))
        flipped = tuple(bool(cosines[a, axes[a]] < 0) for a in range(3))
        return (axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2])

    def working(self, spacing: float) -> "Grid":
        """Make the axis-aligned isotropic grid that covers this grid's field of view.

        Both start at the same voxel corner, so a grid that is already isotropic at `spacing` is
        its own working grid, whatever the order and direction of its axes.
        """
        corners = self.to_mm(self._corners())
        low, high = corners.min(axis=0), corners.max(axis=0)
        size = np.maximum(np.rint((high - low) / spacing).astype(int), 1)
        return Grid.isotropic(
            (int(size[0]), int(size[1]), int(size[2])), spacing, low + spacing / 2
        )

    def _corners(self) -> NDArray[np.float64]:
        ends = [(-0.5, n - 0.5) for n in self.shape]
        return np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1).T
