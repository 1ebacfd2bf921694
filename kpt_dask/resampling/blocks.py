"""Trilinear interpolation between any two grids, block by block.

A pure function plans which part of the source a block needs, and kernels interpolate; the caller
reads and writes.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.grid import Grid
from kpt_dask.kernels.jit import kernel

Region = tuple[slice, slice, slice]

LABEL_TIE = 1e-5
"""Label weights (0 to 1) that differ by less are a tie; rounding errors are far smaller."""

ROUNDING = 1e-6
"""Tolerance between two computations of the same index, voxels."""


@dataclass(frozen=True, eq=False)
class Window:
    """A block of a target grid and the part of a source array that it needs.

    Attributes
    ----------
    block : tuple of slice
        The block.
    region : tuple of slice
        The part of the source array to read.
    source_shape : tuple of int
        Shape of the whole source array.
    affine : ndarray (4, 4), float64
        Source index of a target index, both of the whole arrays: where a block begins
        must not matter.
    """

    block: Region
    region: Region
    source_shape: tuple[int, int, int]
    affine: NDArray[np.float64]


class Geometry(NamedTuple):
    """Way from the voxels of a block to the samples of a part, for kernels.

    Attributes
    ----------
    origin : int64 array (3)
        Index of the first voxel of the part in the source.
    start : int64 array (3)
        Index of the first voxel of the block in the target.
    shape : int64 array (3)
        Shape of the whole source.
    affine : float64 array (4, 4)
        Source index of a target index.
    """

    origin: NDArray[np.int64]
    start: NDArray[np.int64]
    shape: NDArray[np.int64]
    affine: NDArray[np.float64]

    @classmethod
    def of(cls, plan: Window) -> "Geometry":
        """Geometry of a window."""
        return cls(
            np.array([s.start for s in plan.region]),
            np.array([s.start for s in plan.block]),
            np.array(plan.source_shape),
            plan.affine,
        )


def window(source: Grid, target: Grid, block: Region) -> Window:
    """Plan the interpolation of a block of the target from an array on the source grid."""
    affine = np.linalg.inv(source.affine) @ target.affine
    corners = np.array(list(product(*((s.start, s.stop - 1) for s in block))), np.float64)
    last = np.array(source.shape) - 1
    reached = np.clip(corners @ affine[:3, :3].T + affine[:3, 3], 0, last)
    # The kernel adds in another order, so it may find a corner on the other side of a voxel.
    begin = np.maximum(np.floor(reached.min(axis=0) - ROUNDING), 0).astype(int)
    end = np.minimum(np.floor(reached.max(axis=0) + ROUNDING) + 2, last + 1).astype(int)
    z, y, x = (slice(int(b), int(e)) for b, e in zip(begin, end, strict=True))
    return Window(block, (z, y, x), source.shape, affine)


def interpolate(part: NDArray[np.float32], plan: Window) -> NDArray[np.float32]:
    """Trilinear values of a block of the target; outside the source its nearest edge counts.

    Parameters
    ----------
    part : ndarray (z, y, x), float32
        The source array's ``plan.region``.
    plan : Window
        From `window`.

    Returns
    -------
    ndarray (z, y, x), float32
        Values of ``plan.block``.
    """
    out = np.empty([s.stop - s.start for s in plan.block], np.float32)
    _interpolate(np.ascontiguousarray(part), Geometry.of(plan), out)
    return out


def interpolate_labels(part: NDArray[Any], plan: Window) -> NDArray[Any]:
    """Labels of a block of the target: the one with most trilinear weight, the lower in a tie.

    Farther than one voxel outside the source there is background (0). Parameters as for
    `interpolate`.
    """
    out = np.zeros([s.stop - s.start for s in plan.block], part.dtype)
    _interpolate_labels(np.ascontiguousarray(part), Geometry.of(plan), out)
    return out


@kernel
def find_row(geometry: Any, z: Any, y: Any, at: Any) -> None:
    """Write to `at` (3) the source index of a row of the block, without the part along x."""
    affine, start = geometry.affine, geometry.start
    for a in range(3):
        at[a] = affine[a, 3] + affine[a, 0] * (start[0] + z) + affine[a, 1] * (start[1] + y)


@kernel
def neighbours(geometry: Any, at: Any, x: Any) -> Any:
    """Find the `_neighbours_on_axis` z, y and x around voxel x of the row at `at`."""
    affine, shape, origin = geometry.affine, geometry.shape, geometry.origin
    i = geometry.start[2] + x
    return (
        _neighbours_on_axis(at[0] + affine[0, 2] * i, shape[0], origin[0]),
        _neighbours_on_axis(at[1] + affine[1, 2] * i, shape[1], origin[1]),
        _neighbours_on_axis(at[2] + affine[2, 2] * i, shape[2], origin[2]),
    )


@kernel
def _neighbours_on_axis(position: Any, n: Any, origin: Any) -> Any:
    """Find the two samples around a position on an axis of n samples.

    Returns
    -------
    low, high : int
        Indices of the samples, counted from `origin`.
    fraction : float32
        Fraction of the way from one to the other.
    outside : float
        Distance of the position from the axis, voxels; 0 inside.
    """
    inside = min(max(position, 0.0), n - 1.0)
    low = int(inside)
    outside = abs(position - inside)
    return low - origin, min(low + 1, n - 1) - origin, np.float32(inside - low), outside


@kernel
def trilinear(part: Any, z: Any, y: Any, x: Any) -> Any:
    """Trilinear value between eight samples, given the `neighbours` on each axis."""
    z0, z1, dz, _ = z
    y0, y1, dy, _ = y
    x0, x1, dx, _ = x
    one = np.float32(1)
    v00 = (one - dx) * part[z0, y0, x0] + dx * part[z0, y0, x1]
    v01 = (one - dx) * part[z0, y1, x0] + dx * part[z0, y1, x1]
    v10 = (one - dx) * part[z1, y0, x0] + dx * part[z1, y0, x1]
    v11 = (one - dx) * part[z1, y1, x0] + dx * part[z1, y1, x1]
    low = (one - dy) * v00 + dy * v01
    high = (one - dy) * v10 + dy * v11
    return (one - dz) * low + dz * high


@kernel
def _interpolate(part: Any, geometry: Any, out: Any) -> None:
    at = np.empty(3)
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            find_row(geometry, z, y, at)
            for x in range(out.shape[2]):
                on_z, on_y, on_x = neighbours(geometry, at, x)
                out[z, y, x] = trilinear(part, on_z, on_y, on_x)


@kernel
def _heaviest(labels: Any, weights: Any, sums: Any) -> Any:
    """Label with the largest sum of weights, the lowest one in a tie."""
    winner = labels[0]
    best = sums[0] * 0
    for c in range(8):
        sums[c] = 0
        for d in range(8):
            if labels[d] == labels[c]:
                sums[c] += weights[d]
        best = max(best, sums[c])
        winner = max(winner, labels[c])
    for c in range(8):
        if sums[c] >= best - LABEL_TIE:
            winner = min(winner, labels[c])
    return winner


@kernel
def _interpolate_labels(part: Any, geometry: Any, out: Any) -> None:
    at = np.empty(3)
    labels = np.empty(8, part.dtype)
    weights = np.empty(8, np.float32)
    sums = np.empty(8, np.float32)
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            find_row(geometry, z, y, at)
            for x in range(out.shape[2]):
                on_z, on_y, on_x = neighbours(geometry, at, x)
                z0, z1, dz, outside_z = on_z
                y0, y1, dy, outside_y = on_y
                x0, x1, dx, outside_x = on_x
                if max(outside_z, outside_y, outside_x) > 1:
                    continue
                first = part[z0, y0, x0]
                if (
                    (part[z0, y0, x1] == first)
                    & (part[z0, y1, x0] == first)
                    & (part[z0, y1, x1] == first)
                    & (part[z1, y0, x0] == first)
                    & (part[z1, y0, x1] == first)
                    & (part[z1, y1, x0] == first)
                    & (part[z1, y1, x1] == first)
                ):
                    out[z, y, x] = first
                    continue
                for c in range(8):
                    labels[c] = part[z1 if c & 4 else z0, y1 if c & 2 else y0, x1 if c & 1 else x0]
                    weights[c] = (
                        (dz if c & 4 else 1 - dz)
                        * (dy if c & 2 else 1 - dy)
                        * (dx if c & 1 else 1 - dx)
                    )
                out[z, y, x] = _heaviest(labels, weights, sums)
