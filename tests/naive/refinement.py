"""Dense refinement the plain way, written from the equations in the docstrings, in float64."""

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

Array = NDArray[Any]


def interpolated(values: Array, at: Any) -> float:
    """Value at an index that need not be whole, edges repeat."""
    total = 0.0
    low = [int(np.floor(a)) for a in at]
    for corner in product(range(2), repeat=3):
        weight, index = 1.0, []
        for a, first, one, n in zip(at, low, corner, values.shape, strict=True):
            weight *= a - first if one else 1 - (a - first)
            index.append(min(max(first + one, 0), n - 1))
        total += weight * float(values[tuple(index)])
    return total


def sampled(image: Array, first: Array, step: float, u: Array, scale: float) -> Array:
    """The image where a map takes the points of a lattice."""
    out = np.zeros(u.shape[1:])
    limit = np.array(image.shape) - 1
    for x in np.ndindex(*out.shape):
        at = first + step * np.array(x) + scale * u[(slice(None), *x)]
        out[x] = interpolated(image, np.clip(at, 0, limit))
    return out


def around(x: Any, shape: Any) -> tuple[slice, ...]:
    return tuple(slice(max(i - 2, 0), min(i + 3, n)) for i, n in zip(x, shape, strict=True))


def box_mean(values: Array) -> Array:
    """Over 5 × 5 × 5 points, as many of them as there are."""
    return np.array(
        [values[around(x, values.shape)].mean() for x in np.ndindex(*values.shape)]
    ).reshape(values.shape)


def correlation(f: Array, m: Array) -> tuple[Array, Array, Array]:
    """a, b and c of local correlation: covariance, and both variances, with ε = 10⁻³."""
    f, m = f.astype(float), m.astype(float)
    a = box_mean(f * m) - box_mean(f) * box_mean(m)
    b = box_mean(f * f) - box_mean(f) ** 2 + 1e-3
    c = box_mean(m * m) - box_mean(m) ** 2 + 1e-3
    return a, b, c


def gradient(values: Array, h: float) -> Array:
    """Central differences, one-sided at the edges, per mm."""
    return np.array(np.gradient(values.astype(float), h))


def force(f: Array, m: Array, h: float, inside: Array) -> Array:
    a, b, c = correlation(f, m)
    strength = a / (b * c) * ((f - box_mean(f)) - a / c * (m - box_mean(m)))
    both = (gradient(f, h) + gradient(m, h)) / 2
    return np.where(inside, strength * both, 0)


def blurred(values: Array, sigma: float, radius: int) -> Array:
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    out = values.astype(float)
    for axis in range(3):
        out = correlate1d(out, weights, axis, mode="nearest")
    return out


def composed(u: Array, start: Array, step: Array, h: float) -> Array:
    """v(x) = u(x + d) + d − u⁰(x)."""
    out = np.zeros(u.shape)
    limit = np.array(u.shape[1:]) - 1
    for x in np.ndindex(*u.shape[1:]):
        d = step[(slice(None), *x)]
        at = np.clip(np.array(x) + d / h, 0, limit)
        for axis in range(3):
            out[(axis, *x)] = interpolated(u[axis], at) + d[axis] - start[(axis, *x)]
    return out


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
    start, inside : callable
        Give u⁰ (3, z, y, x) and whether there is a force, for a lattice spacing and a shape.
    levels
        Spacing in mm and iterations of each.
    """
    f_image, m_image = intensity(scan), intensity(atlas)
    v, before = None, 0.0
    for h, iterations in levels:
        step = h / spacing
        shape = tuple(int(np.ceil((n - 1) / step)) + 1 for n in scan.shape)
        u0 = start(h, shape)
        nothing = np.zeros((3, *shape))
        f = sampled(f_image, np.zeros(3), step, nothing, 1.0)
        if v is None:
            v = nothing
        else:
            v = np.array([sampled(one, np.zeros(3), h / before, nothing, 1.0) for one in v])
        before = h
        # All that is inside, and three points more.
        hit = np.argwhere(inside(h, shape))
        low, high = np.maximum(hit.min(axis=0) - 3, 0), np.minimum(hit.max(axis=0) + 4, shape)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        own = (slice(None), *box)
        for _ in range(iterations):
            m = sampled(m_image, np.zeros(3), step, u0 + v, 1 / spacing)
            d = force(f[box], m[box], h, inside(h, shape)[box])
            d = np.array([blurred(one, 1.5, 5) for one in d])
            length = np.linalg.norm(d, axis=0)[inside(h, shape)[box]]
            d *= 0.5 * h / np.quantile(length, 0.99, method="inverted_cdf")
            moved = composed((u0 + v)[own], u0[own], d, h)
            v[own] = np.array([blurred(one, 0.5, 2) for one in moved])
    assert v is not None
    a, b, c = correlation(f, sampled(m_image, np.zeros(3), step, u0 + v, 1 / spacing))
    return u0 + v, a / np.sqrt(b * c)
