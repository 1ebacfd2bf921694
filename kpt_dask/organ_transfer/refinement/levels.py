"""Refinement on one level: the scan there, the points that move, and the iterations."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.organ_transfer.refinement import iteration
from kpt_dask.organ_transfer.refinement.iteration import BOX, PAD, PointMap
from kpt_dask.organ_transfer.refinement.lattice import Lattice

FOLLOWED = 0.99
"""Fraction of points that one iteration moves by at most half a lattice spacing."""
LEAST_CORRELATION = 0.02
"""Lower bound of a local correlation, no unit."""
TINY = 1e-12
"""Largest length of a force that counts as 0, 1/mm."""


@dataclass(frozen=True)
class ScanLevel:
    """The scan on the lattice of a level, which all atlases are compared with.

    Attributes
    ----------
    lattice : Lattice
    iterations : int
    fixed : float32 array (3, point)
        Intensity F at the points of the padded lattice; its mean and variance with ε over boxes
        where organs may lie.
    wanted : Region
        Points where organs may lie.
    """

    lattice: Lattice
    iterations: int
    fixed: NDArray[np.float32]
    wanted: "Region"

    @classmethod
    def of(
        cls,
        lattice: Lattice,
        iterations: int,
        image: NDArray[np.float32],
        wanted: NDArray[np.bool_],
    ) -> "ScanLevel":
        """Pad an image (z, y, x) on a lattice by repeating its edge, and compute its moments.

        `wanted` marks the points of the padded lattice where organs may lie.
        """
        f = np.pad(image, PAD, mode="edge").reshape(-1)
        region = Region.around(wanted)
        fixed = np.zeros((3, f.size), np.float32)
        fixed[0] = f
        scratch = np.empty_like(fixed), np.empty_like(fixed)
        sums = sum_boxes(f, f, region, lattice.padded, scratch)
        iteration.moments(sums, region.points, fixed)
        return cls(lattice, iterations, fixed, region)


class Region(NamedTuple):
    """Points of a padded lattice, and those that what is computed there depends on.

    Attributes
    ----------
    mask : bool array (z, y, x)
        The points.
    points : int64 array (run, 2)
        Runs of the points.
    z, zy : int64 arrays (run, 2)
        Runs of the points and of `BOX` more along z, and along z and y: sums over boxes are taken
        along one axis after the other.
    moved : int64 array (run, 2)
        Runs of the points and of `BOX` more on every side.
    fringe : int64 array (run, 2)
        Runs of these and of one more on every side.
    """

    mask: NDArray[np.bool_]
    points: NDArray[np.int64]
    z: NDArray[np.int64]
    zy: NDArray[np.int64]
    moved: NDArray[np.int64]
    fringe: NDArray[np.int64]

    @classmethod
    def around(cls, mask: NDArray[np.bool_]) -> "Region":
        """Find the runs of the points that are marked in a padded lattice (z, y, x)."""
        z = grown(mask, (BOX, 0, 0))
        zy = grown(z, (0, BOX, 0))
        moved = grown(zy, (0, 0, BOX))
        masks = mask, z, zy, moved, grown(moved, (1, 1, 1))
        return cls(mask, *(iteration.runs_of(one) for one in masks))


def grown(mask: NDArray[np.bool_], radii: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Mark all points of a box around each one that is marked, so many along z, y and x.

    Points near the edge must not be marked: rows are taken as one after the other.
    """
    out = mask.reshape(-1)
    for axis, radius in enumerate(radii):
        stride = math.prod(mask.shape[axis + 1 :])
        before, out = out, out.copy()
        for step in range(stride, (radius + 1) * stride, stride):
            out[step:] |= before[:-step]
            out[:-step] |= before[step:]
    return out.reshape(mask.shape)


def sum_boxes(
    f: NDArray[np.float32],
    m: NDArray[np.float32],
    region: Region,
    shape: tuple[int, int, int],
    scratch: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Sum m, f · m and m · m over boxes around the points: the first scratch array (3, point)."""
    _, ny, nx = shape
    one, two = scratch
    iteration.sum_along_x(f, m, region.zy, one)
    iteration.sum_along(one, nx, region.z, two)
    iteration.sum_along(two, ny * nx, region.points, one)
    return one


def iterate(level: ScanLevel, region: Region, image: NDArray[np.int16], where: PointMap) -> None:
    """Do all iterations of a level; `where.v` is changed in the region."""
    lattice = level.lattice
    shape, fixed, v = lattice.padded, level.fixed, where.v
    _, ny, nx = shape
    strides = ny * nx, nx, 1
    h = np.float32(lattice.spacing)
    taps = iteration.taps(iteration.SMOOTHNESS, iteration.RADIUS)
    m, after = np.empty_like(v[0]), np.empty_like(v)
    iteration.copy(v, region.fringe, after)
    # Only points that move are written: these arrays stay 0 beyond.
    one, two = (np.zeros(v.shape, np.float32) for _ in range(2))
    for _ in range(level.iterations):
        iteration.sample(image, where._replace(v=v), region.moved, m)
        sums = sum_boxes(fixed[0], m, region, shape, (one, two))
        iteration.clear(region.moved, two)
        iteration.force(fixed, m, sums, h, strides, region.points, two)
        iteration.smooth(two, strides[2], taps, region.moved, one)
        iteration.smooth(one, strides[1], taps, region.moved, two)
        iteration.smooth(two, strides[0], taps, region.moved, one)
        length = iteration.largest(one, region.points, FOLLOWED)
        if not length > TINY:
            break
        factor = np.float32(0.5 * h / length)
        iteration.add_step(v, one, factor, strides, region.moved, after)
        v, after = after, v
    if v is not where.v:
        iteration.copy(v, region.moved, where.v)


def local_correlation(
    level: ScanLevel, image: NDArray[np.int16], where: PointMap
) -> NDArray[np.float32]:
    """Correlation cc of the scan and a warped atlas where organs may lie, float32 array (point)."""
    lattice = level.lattice
    m = np.empty(level.fixed.shape[1], np.float32)
    one, two = (np.empty_like(where.v) for _ in range(2))
    wanted = level.wanted
    iteration.sample(image, where, wanted.moved, m)
    sums = sum_boxes(level.fixed[0], m, wanted, lattice.padded, (one, two))
    iteration.correlation(level.fixed, sums, wanted.points, m)
    return np.maximum(m, np.float32(LEAST_CORRELATION), out=m)
