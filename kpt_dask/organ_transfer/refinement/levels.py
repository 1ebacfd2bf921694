"""Refinement on one level: the scan there, the points that move, and the iterations."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.organ_transfer.refinement import iteration, sweep
from kpt_dask.organ_transfer.refinement.iteration import BOX, PAD, PointMap
from kpt_dask.organ_transfer.refinement.lattice import Lattice
from kpt_dask.organ_transfer.refinement.sweep import Planes, Runs

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
    fixed : float32 array (3, plane, point)
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
        region = Region.around(wanted)
        nz, ny, nx = lattice.padded
        fixed = np.zeros((3, nz, ny * nx), np.float32)
        fixed[0] = np.pad(image, PAD, mode="edge").reshape(nz, -1)
        sweep.take_moments(nx, region.planes, fixed)
        return cls(lattice, iterations, fixed, region)


class Region(NamedTuple):
    """Points of a padded lattice, and those that what is computed there depends on.

    Attributes
    ----------
    mask : bool array (z, y, x)
        The points.
    points : int64 array (run, 2)
        Runs of the points.
    moved : int64 array (run, 2)
        Runs of the points and of `BOX` more on every side.
    fringe : int64 array (run, 2)
        Runs of these and of one more on every side.
    planes : Planes
        The same plane by plane, for the iterations.
    """

    mask: NDArray[np.bool_]
    points: NDArray[np.int64]
    moved: NDArray[np.int64]
    fringe: NDArray[np.int64]
    planes: Planes

    @classmethod
    def around(cls, mask: NDArray[np.bool_]) -> "Region":
        """Find the runs of the points that are marked in a padded lattice (z, y, x)."""
        z = grown(mask, (BOX, 0, 0))
        zy = grown(z, (0, BOX, 0))
        moved = grown(zy, (0, 0, BOX))
        masks = mask, z, zy, moved, grown(moved, (1, 1, 1))
        runs = [iteration.runs_of(one) for one in masks]
        depth, height, width = mask.shape
        planes = Planes._make(Runs.split(one, (depth, height, width)) for one in runs)
        return cls(mask, runs[0], runs[3], runs[4], planes)


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


def iterate(level: ScanLevel, region: Region, image: NDArray[np.int16], where: PointMap) -> None:
    """Do all iterations of a level; `where.v` is changed in the region."""
    fixed, planes, v = level.fixed, region.planes, where.v
    _, _, nx = level.lattice.padded
    h = np.float32(level.lattice.spacing)
    taps = iteration.taps(iteration.SMOOTHNESS, iteration.RADIUS)
    # Only points that move are written: this array stays 0 beyond.
    d = np.zeros_like(v)
    factor = np.float32(0)
    for _ in range(level.iterations):
        counts = sweep.step_and_take_forces(image, where, planes, fixed, h, taps, factor, d)
        length = iteration.quantile(counts, FOLLOWED)
        factor = np.float32(0.5 * h / length) if length > TINY else np.float32(0)
        if factor == 0:
            break
    if factor > 0:
        sweep.step(d, factor, nx, planes, v)


def local_correlation(
    level: ScanLevel, image: NDArray[np.int16], where: PointMap
) -> NDArray[np.float32]:
    """Correlation cc of the scan and a warped atlas where organs may lie, float32 array (point)."""
    out = np.empty(level.fixed.shape[1:], np.float32)
    sweep.take_correlation(image, where, level.wanted.planes, level.fixed, out)
    return np.maximum(out, np.float32(LEAST_CORRELATION), out=out).reshape(-1)
