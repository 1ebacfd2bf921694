"""Iterations of the refinement, plane after plane: what a step needs of others is still in cache.

Each step of `iteration` follows a few planes behind the one that it needs. So only the correction
and its step have a value for each point of the lattice; all between lies in a few planes.
"""

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import inlined_kernel, kernel
from kpt_dask.organ_transfer.refinement.iteration import (
    BINS,
    BOX,
    RADIUS,
    TAPS,
    WIDTH,
    Window,
    add_step,
    clear,
    copy,
    correlation,
    count_lengths,
    force,
    moments,
    sample,
    smooth,
    smooth_along_z,
    sum_along_x,
    sum_along_y,
    sum_along_z,
)


class Runs(NamedTuple):
    """Runs of points of a lattice, plane by plane.

    Attributes
    ----------
    of : int64 array (run, 2)
        Half-open ranges of points of one row, counted from the first point of the plane.
    first : int64 array (plane + 1)
        Those of plane z are ``first[z]`` to ``first[z + 1]``.
    """

    of: NDArray[np.int64]
    first: NDArray[np.int64]

    @classmethod
    def split(cls, runs: NDArray[np.int64], shape: tuple[int, int, int]) -> Self:
        """Split the runs (run, 2) of a whole lattice of a shape (z, y, x), in order."""
        nz, ny, nx = shape
        plane = runs[:, :1] // (ny * nx)
        return cls(runs - ny * nx * plane, np.searchsorted(plane[:, 0], np.arange(nz + 1)))


class Planes(NamedTuple):
    """Points that change, and those that what is computed there depends on.

    Attributes
    ----------
    points : Runs
        Points that have a force.
    z, zy : Runs
        These and `BOX` more along z, and along z and y: sums over boxes are taken along one axis
        after the other.
    moved : Runs
        These and `BOX` more on every side.
    fringe : Runs
        These and one more on every side.
    """

    points: Runs
    z: Runs
    zy: Runs
    moved: Runs
    fringe: Runs


@kernel
def _window(points: Any) -> Any:
    """Make the planes that sums over boxes need, for lattices of so many points in a plane."""
    return Window(
        np.empty((WIDTH, points), np.float32),
        np.empty((WIDTH, 3, points), np.float32),
        np.empty((3, points), np.float32),
    )


@inlined_kernel
def _in(runs: Any, z: Any) -> Any:
    """Select the runs of a plane."""
    return runs.of[runs.first[z] : runs.first[z + 1]]


@kernel
def _sum_plane(f: Any, m: Any, nx: Any, z: Any, planes: Any, window: Any) -> None:
    """Sum m, f · m and m · m of plane z along x and y."""
    sum_along_x(f, m, _in(planes.zy, z), window.sums)
    sum_along_y(window.sums, nx, _in(planes.z, z), window.rows[z % WIDTH])


@kernel
def _step_plane(before: Any, d: Any, z: Any, factor: Any, nx: Any, planes: Any, v: Any) -> None:
    """Add the step in plane z, and keep what was there in `before`, for the next plane."""
    copy(v, z, _in(planes.fringe, z), before[z % 2])
    add_step(before, d, z, factor, nx, _in(planes.moved, z), v)


@kernel
def take_moments(nx: Any, planes: Any, fixed: Any) -> None:
    """Mean and variance with ε of an image over boxes.

    Parameters
    ----------
    nx : int
        Points of a row.
    planes : Planes
    fixed : float32 array (3, plane, point)
        The image, its mean, its variance; the latter are changed.
    """
    count = fixed.shape[1]
    window = _window(fixed.shape[2])
    for z in range(count):
        _sum_plane(fixed[0, z], fixed[0, z], nx, z, planes, window)
        middle = z - BOX
        if middle >= 0:
            points = _in(planes.points, middle)
            sum_along_z(window.rows, middle, points, window.sums)
            moments(window.sums, points, fixed[1, middle], fixed[2, middle])


@kernel
def take_correlation(image: Any, where: Any, planes: Any, fixed: Any, out: Any) -> None:
    """Local correlation of the scan and a moved image.

    Parameters
    ----------
    image : int16 array (z, y, x)
    where : PointMap
    planes : Planes
    fixed : float32 array (3, plane, point)
        From `take_moments`.
    out : float32 array (plane, point)
        Changed.
    """
    nx = where.shape[2]
    window = _window(fixed.shape[2])
    for z in range(fixed.shape[1]):
        m = window.m[z % WIDTH]
        sample(image, where, z, _in(planes.moved, z), m)
        _sum_plane(fixed[0, z], m, nx, z, planes, window)
        middle = z - BOX
        if middle >= 0:
            points = _in(planes.points, middle)
            sum_along_z(window.rows, middle, points, window.sums)
            correlation(fixed, middle, window.sums, points, out[middle])


@kernel
def step_and_take_forces(
    image: Any, where: Any, planes: Any, fixed: Any, h: Any, half: Any, factor: Any, d: Any
) -> Any:
    """Add the step to the correction, and compute the next one: the smoothed force.

    Parameters
    ----------
    image : int16 array (z, y, x)
    where : PointMap
        Its `v` is changed.
    planes : Planes
    fixed : float32 array (3, plane, point)
        From `take_moments`.
    h : float32
        Spacing, mm.
    half : float32 array (6)
        From `iteration.taps`.
    factor : float32
        Scale of the step, mm; 0 if there is none yet.
    d : float32 array (3, plane, point)
        The step, and then the next one; 0 beyond the points that move.

    Returns
    -------
    int32 array (BINS)
        Histogram of the lengths of the next step where forces arise, for `iteration.quantile`.
    """
    nx = where.shape[2]
    _, count, points = fixed.shape
    window = _window(points)
    stats = np.empty((4, nx), np.float32)
    # What is beyond the points that move must be 0, for these planes are smoothed: each is
    # cleared once it has been used.
    raw, along_x = np.zeros((3, points), np.float32), np.zeros((3, points), np.float32)
    along_y = np.zeros((TAPS, 3, points), np.float32)
    counts = np.zeros(BINS, np.int32)
    before = np.empty((2, 3, points), np.float32)
    for z in range(count + BOX):
        if z < count:
            if factor > 0:
                _step_plane(before, d, z, factor, nx, planes, where.v)
            m = window.m[z % WIDTH]
            sample(image, where, z, _in(planes.moved, z), m)
            _sum_plane(fixed[0, z], m, nx, z, planes, window)
        middle = z - BOX
        if middle >= 0:
            own, moved = _in(planes.points, middle), _in(planes.moved, middle)
            sum_along_z(window.rows, middle, own, window.sums)
            force(fixed, window, middle, h, nx, own, stats, raw)
            smooth(raw, 1, half, moved, along_x)
            clear(own, raw)
            last = along_y[middle % TAPS]
            if middle >= TAPS:
                clear(_in(planes.moved, middle - TAPS), last)
            smooth(along_x, nx, half, moved, last)
            clear(moved, along_x)
        behind = middle - RADIUS
        if behind >= 0:
            smooth_along_z(along_y, behind, half, _in(planes.moved, behind), d)
            count_lengths(d, behind, _in(planes.points, behind), stats[0], counts)
    return counts


@kernel
def step(d: Any, factor: Any, nx: Any, planes: Any, v: Any) -> None:
    """Add a step to the correction, and let the sum diffuse, where points move.

    Parameters
    ----------
    d : float32 array (3, plane, point)
        From `step_and_take_forces`.
    factor : float32
        Scale of the step, mm.
    nx : int
        Points of a row.
    planes : Planes
    v : float32 array (3, plane, point)
        Correction, mm; changed.
    """
    _, count, points = v.shape
    before = np.empty((2, 3, points), np.float32)
    for z in range(count):
        _step_plane(before, d, z, factor, nx, planes, v)
