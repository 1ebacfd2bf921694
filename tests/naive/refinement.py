"""Dense refinement the plain way, written from the equations in the docstrings, in float64.

Arrays of a level have `PAD` points more than its lattice on every side.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import (
    binary_dilation,
    convolve,
    correlate1d,
    map_coordinates,
    uniform_filter,
)

Array = NDArray[Any]

PAD = 7


def interpolated(values: Array, at: Array) -> Array:
    """Values at indices (3, …) that need not be whole; edges repeat."""
    found: Array = map_coordinates(values.astype(float), at, order=1, mode="nearest")
    return found


def sampled(image: Array, first: Array, step: float, u: Array, scale: float) -> Array:
    """The image where a map takes the points of a lattice."""
    points = np.indices(u.shape[1:])
    return interpolated(image, first[:, None, None, None] + step * points + scale * u)


def box_mean(values: Array) -> Array:
    """Over 5 × 5 × 5 points, wherever these exist."""
    found: Array = uniform_filter(values.astype(float), 5)
    return found


def correlation(f: Array, m: Array) -> tuple[Array, Array, Array]:
    """a, b and c of local correlation: covariance, and both variances, with ε = 10⁻³."""
    f, m = f.astype(float), m.astype(float)
    a = box_mean(f * m) - box_mean(f) * box_mean(m)
    b = box_mean(f * f) - box_mean(f) ** 2 + 1e-3
    c = box_mean(m * m) - box_mean(m) ** 2 + 1e-3
    return a, b, c


def force(f: Array, m: Array, h: float, inside: Array) -> Array:
    a, b, c = correlation(f, m)
    strength = a / (b * c) * ((f - box_mean(f)) - a / c * (m - box_mean(m)))
    slopes = np.array(np.gradient(f.astype(float), h)) + np.array(np.gradient(m.astype(float), h))
    return np.where(inside, strength * slopes / 2, 0)


def grown(mask: Array, points: int) -> Array:
    """All points of a cube around each that is marked."""
    found: Array = binary_dilation(mask, np.ones(3 * (2 * points + 1,)))
    return found


def smoothed(d: Array, moved: Array) -> Array:
    """By a Gaussian of 1.5 points, along z, y and x in turn from x on; 0 beyond what moves."""
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights /= weights.sum()
    for axis in (2, 1, 0):
        d = moved * correlate1d(d, weights, axis, mode="constant")
    return d


def stepped(v: Array, d: Array, moved: Array) -> Array:
    """The sum diffuses where points move."""
    near = np.zeros((3, 3, 3))
    near[[0, 2, 1, 1, 1, 1], [1, 1, 0, 2, 1, 1], [1, 1, 1, 1, 0, 2]] = 0.15
    near[1, 1, 1] = 0.1
    return np.where(moved, [convolve(one, near, mode="nearest") for one in v + d], v)


def intensity(hu: Array) -> Array:
    return np.interp(hu, (-1000, -200, 0, 200, 1200), (-1.6, -1, 0, 1, 2))


def refined(
    scan: Array, atlas: Array, start: Any, inside: Any, levels: Any, spacing: float
) -> tuple[Array, Array]:
    """The refined map and the local correlation on the finest lattice.

    Parameters
    ----------
    scan, atlas : ndarray
        HU, whose first voxels coincide.
    start : callable
        Gives u⁰ (3, z, y, x) for a lattice spacing and the shape of the padded arrays.
    inside : callable
        Gives where there is a force, for a lattice spacing and the shape of the lattice.
    levels
        Spacing in mm and iterations of each.
    """
    f_image, m_image = intensity(scan), intensity(atlas)
    v, before = None, 0.0
    for h, iterations in levels:
        step = h / spacing
        shape = tuple(int(np.ceil((n - 1) / step)) + 1 for n in scan.shape)
        wide = tuple(n + 2 * PAD for n in shape)
        nothing = np.zeros((3, *wide))
        u0 = start(h, wide)
        f = sampled(f_image, np.zeros(3), step, np.zeros((3, *shape)), 1.0)
        f = np.pad(f, PAD, mode="edge")
        if v is None:
            v = nothing
        else:
            first = np.full(3, PAD - PAD * h / before)
            v = np.array([sampled(one, first, h / before, nothing, 1.0) for one in v])
        before = h
        force_in = np.pad(inside(h, shape), PAD)
        moved = grown(force_in, 2)
        where = np.full(3, -PAD * step), step
        for _ in range(iterations):
            d = force(f, sampled(m_image, *where, u0 + v, 1 / spacing), h, force_in)
            d = np.array([smoothed(one, moved) for one in d])
            length = np.linalg.norm(d, axis=0)[force_in]
            d *= 0.5 * h / np.quantile(length, 0.99, method="inverted_cdf")
            v = stepped(v, d, moved)
    assert v is not None
    a, b, c = correlation(f, sampled(m_image, *where, u0 + v, 1 / spacing))
    core = (..., *(3 * (slice(PAD, -PAD),)))
    return (u0 + v)[core], (a / np.sqrt(b * c))[core]
