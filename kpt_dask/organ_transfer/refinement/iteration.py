"""Steps of an iteration of the refinement, each on one plane of a lattice.

Sampling, local correlation, force, smoothing, step; `sweep` does them plane after plane. Arrays of
a plane are float32 and flat: points (y, x) in C order. Kernels visit runs, int64 arrays (run, 2):
half-open ranges of points of one row. What they read beyond a run must exist, so lattices have
`PAD` points more on every side.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import inlined_kernel, kernel

BOX = 2
"""Lattice points on each side of the middle one of the box of local correlation."""
WIDTH = 2 * BOX + 1
"""Lattice points along a side of the box."""
UNITS = 8192
"""Steps per unit of an atlas's intensities, int16."""
NOISE = np.float32(1e-3)
"""ε, added to variances: squared intensity of noise."""
SMOOTHNESS = 1.5
"""Standard deviation of the Gaussian on the force, lattice points."""
RADIUS = 5
"""Points on each side that it reaches."""
TAPS = 2 * RADIUS + 1
"""Points along an axis that it reaches."""
DIFFUSION = 0.15
"""κ: how far neighbours draw the correction in each iteration, no unit; at most 1/6."""
PAD = BOX + RADIUS
"""Points by which a lattice's arrays are wider than the lattice, on every side."""
_POINTS = np.float32(1 / WIDTH**3)


class PointMap(NamedTuple):
    """Map of the lattice's points to voxels: first + step · point + scale · (start + v)(point).

    Attributes
    ----------
    first : float32 array (3)
        Index in the image of the arrays' first point.
    step : float32
        Voxels from one lattice point to the next.
    scale : float32
        Voxels per mm.
    start, v : float32 arrays (3, plane, point)
        Displacement of each point: u⁰ and the correction, mm.
    shape : (int, int, int)
        Points along z, y and x.
    """

    first: NDArray[np.float32]
    step: np.float32
    scale: np.float32
    start: NDArray[np.float32]
    v: NDArray[np.float32]
    shape: tuple[int, int, int]


class Window(NamedTuple):
    """Planes that sums over boxes need.

    Attributes
    ----------
    m : float32 array (WIDTH, point)
        The moved image; each plane at its number modulo `WIDTH`.
    rows : float32 array (WIDTH, 3, point)
        Sums along x and y of m, f · m and m · m; each plane at its number modulo `WIDTH`.
    sums : float32 array (3, point)
        Sums along x; later sums over boxes.
    """

    m: NDArray[np.float32]
    rows: NDArray[np.float32]
    sums: NDArray[np.float32]


def taps(sigma: float, radius: int) -> NDArray[np.float32]:
    """One half of a normalized Gaussian, from its middle outwards."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.asarray((weights / weights.sum())[radius:], np.float32)


def runs_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Find the runs of the points that are marked: int64 array (run, 2), in order.

    Parameters
    ----------
    mask : bool array (z, y, x)
        False at both ends of each row.
    """
    flat = mask.reshape(-1)
    return (np.flatnonzero(flat[1:] != flat[:-1]) + 1).reshape(-1, 2)


@kernel
def sample(image: Any, where: Any, z: Any, runs: Any, out: Any) -> None:
    """Sample an image at mapped points of a plane, trilinearly; beyond it its edge repeats.

    Parameters
    ----------
    image : int16 array (z, y, x)
        In 1/`UNITS`.
    where : PointMap
    z : int
        The plane.
    runs : int64 array (run, 2)
    out : float32 array (point)
        Changed.
    """
    at, step, scale, start, v, (_, _, nx) = where
    dz, dy, dx = image.shape
    flat = image.reshape(-1)
    zero, unit = np.float32(0), np.float32(1 / UNITS)
    lz, ly, lx = np.float32(dz - 1), np.float32(dy - 1), np.float32(dx - 1)
    mz, my, mx = np.float32(max(dz - 2, 0)), np.float32(max(dy - 2, 0)), np.float32(max(dx - 2, 0))
    height, width = np.int32(dy), np.int32(dx)
    near = np.empty(nx, np.int32)
    fz, fy, fx = np.empty(nx, np.float32), np.empty(nx, np.float32), np.empty(nx, np.float32)
    # Unsigned, or each index would be checked for counting from the end.
    up = np.uint64(dy * dx if dz > 1 else 0)
    across = np.uint64(dx if dy > 1 else 0)
    along = np.uint64(1 if dx > 1 else 0)
    for r in range(runs.shape[0]):
        i, end = runs[r, 0], runs[r, 1]
        n = end - i
        row = i // nx
        z0 = at[0] + step * np.float32(z)
        y0 = at[1] + step * np.float32(row)
        x0 = at[2] + step * np.float32(i - row * nx)
        a, b = start[0, z, i:end], v[0, z, i:end]
        for k in range(n):
            p = min(max(z0 + scale * (a[k] + b[k]), zero), lz)
            q = np.int32(min(p, mz))
            fz[k] = p - np.float32(q)
            near[k] = q * height
        a, b = start[1, z, i:end], v[1, z, i:end]
        for k in range(n):
            p = min(max(y0 + scale * (a[k] + b[k]), zero), ly)
            q = np.int32(min(p, my))
            fy[k] = p - np.float32(q)
            near[k] = (near[k] + q) * width
        a, b = start[2, z, i:end], v[2, z, i:end]
        for k in range(n):
            x = x0 + step * np.float32(np.int32(k))
            p = min(max(x + scale * (a[k] + b[k]), zero), lx)
            q = np.int32(min(p, mx))
            fx[k] = p - np.float32(q)
            near[k] += q
        line = out[i:end]
        for k in range(n):
            j = np.uint64(near[k])
            a0, a1 = np.float32(flat[j]), np.float32(flat[j + along])
            b0, b1 = np.float32(flat[j + across]), np.float32(flat[j + across + along])
            j += up
            d0, d1 = np.float32(flat[j]), np.float32(flat[j + along])
            e0, e1 = np.float32(flat[j + across]), np.float32(flat[j + across + along])
            g = fx[k]
            p, q = a0 + g * (a1 - a0), b0 + g * (b1 - b0)
            s, t = d0 + g * (d1 - d0), e0 + g * (e1 - e0)
            g = fy[k]
            p, s = p + g * (q - p), s + g * (t - s)
            line[k] = unit * (p + fz[k] * (s - p))


@kernel
def sum_along_x(f: Any, m: Any, runs: Any, out: Any) -> None:
    """Sum m, f · m and m · m over five points along x.

    Parameters
    ----------
    f, m : float32 arrays (point)
    runs : int64 array (run, 2)
    out : float32 array (3, point)
        Changed.
    """
    for r in range(runs.shape[0]):
        i, end = runs[r, 0], runs[r, 1]
        a, b, c = m[i - 2 : end - 2], m[i - 1 : end - 1], m[i:end]
        d, e = m[i + 1 : end + 1], m[i + 2 : end + 2]
        p, q, s = f[i - 2 : end - 2], f[i - 1 : end - 1], f[i:end]
        t, u = f[i + 1 : end + 1], f[i + 2 : end + 2]
        line = out[0, i:end]
        for k in range(end - i):
            line[k] = a[k] + b[k] + c[k] + d[k] + e[k]
        line = out[1, i:end]
        for k in range(end - i):
            line[k] = p[k] * a[k] + q[k] * b[k] + s[k] * c[k] + t[k] * d[k] + u[k] * e[k]
        line = out[2, i:end]
        for k in range(end - i):
            line[k] = a[k] * a[k] + b[k] * b[k] + c[k] * c[k] + d[k] * d[k] + e[k] * e[k]


@inlined_kernel
def _add_five(a: Any, b: Any, c: Any, d: Any, e: Any, out: Any) -> None:
    for k in range(out.size):
        out[k] = a[k] + b[k] + c[k] + d[k] + e[k]


@kernel
def sum_along_y(values: Any, nx: Any, runs: Any, out: Any) -> None:
    """Sum over five points along y.

    Parameters
    ----------
    values : float32 array (3, point)
    nx : int
        Points of a row.
    runs : int64 array (run, 2)
    out : float32 array (3, point)
        Changed.
    """
    s, s2 = nx, 2 * nx
    for r in range(runs.shape[0]):
        i, end = runs[r, 0], runs[r, 1]
        for channel in range(3):
            own = values[channel]
            a, b, c = own[i - s2 : end - s2], own[i - s : end - s], own[i:end]
            d, e = own[i + s : end + s], own[i + s2 : end + s2]
            _add_five(a, b, c, d, e, out[channel, i:end])


@kernel
def sum_along_z(values: Any, z: Any, runs: Any, out: Any) -> None:
    """Sum over five points along z.

    Parameters
    ----------
    values : float32 array (WIDTH, 3, point)
        Plane z and the two before and after it, each at its number modulo `WIDTH`.
    z : int
        The plane.
    runs : int64 array (run, 2)
    out : float32 array (3, point)
        Changed.
    """
    p, q, s = values[(z - 2) % WIDTH], values[(z - 1) % WIDTH], values[z % WIDTH]
    t, u = values[(z + 1) % WIDTH], values[(z + 2) % WIDTH]
    for r in range(runs.shape[0]):
        i, end = runs[r, 0], runs[r, 1]
        for channel in range(3):
            a, b, c = p[channel, i:end], q[channel, i:end], s[channel, i:end]
            d, e = t[channel, i:end], u[channel, i:end]
            _add_five(a, b, c, d, e, out[channel, i:end])


@kernel
def moments(sums: Any, runs: Any, mean: Any, variance: Any) -> None:
    """Mean and variance with ε, arrays (point), from rows 0 and 2 of sums over boxes."""
    for r in range(runs.shape[0]):
        for k in range(runs[r, 0], runs[r, 1]):
            own = sums[0, k] * _POINTS
            mean[k] = own
            variance[k] = sums[2, k] * _POINTS - own * own + NOISE


@kernel
def _covariances(mean: Any, sums: Any, i: Any, end: Any, stats: Any) -> None:
    """Mean of m, covariance a of f and m, and variance c of m, with ε, of a run."""
    f = mean[i:end]
    own, m = sums[0, i:end], stats[0]
    for k in range(end - i):
        m[k] = own[k] * _POINTS
    own, a = sums[1, i:end], stats[1]
    for k in range(end - i):
        a[k] = own[k] * _POINTS - f[k] * m[k]
    own, c = sums[2, i:end], stats[2]
    for k in range(end - i):
        c[k] = own[k] * _POINTS - m[k] * m[k] + NOISE


@kernel
def correlation(fixed: Any, z: Any, sums: Any, runs: Any, out: Any) -> None:
    """Local correlation a / √(bc) of two images in a plane, from their sums over boxes.

    `out` is a float32 array (point); the other parameters are as for `force` and `moments`.
    """
    stats = np.empty((3, out.size), np.float32)
    mean, variance = fixed[1, z], fixed[2, z]
    for r in range(runs.shape[0]):
        i, end = runs[r, 0], runs[r, 1]
        _covariances(mean, sums, i, end, stats)
        a, b, c, line = stats[1], variance[i:end], stats[2], out[i:end]
        for k in range(end - i):
            line[k] = a[k] / np.sqrt(b[k] * c[k])


@inlined_kernel
def _push(strength: Any, after: Any, before: Any, m_after: Any, m_before: Any, out: Any) -> None:
    for k in range(out.size):
        out[k] = strength[k] * ((after[k] - before[k]) + (m_after[k] - m_before[k]))


@kernel
def force(
    fixed: Any, window: Any, z: Any, h: Any, nx: Any, runs: Any, stats: Any, out: Any
) -> None:
    """Force that increases the local correlation of two images, in a plane.

    With a = ⟨fm⟩ − f̄m̄, b = ⟨ff⟩ − f̄² + ε and c = ⟨mm⟩ − m̄² + ε over boxes of 5 × 5 × 5 points
    it is a/(bc) · [(f − f̄) − (a/c)(m − m̄)] · ½(∇f + ∇m), per mm.

    Parameters
    ----------
    fixed : float32 array (3, plane, point)
        f, f̄ and b.
    window : Window
        m of plane z and of those beside it, and the sums over boxes of plane z.
    z : int
        The plane.
    h : float32
        Spacing, mm.
    nx : int
        Points of a row.
    runs : int64 array (run, 2)
    stats : float32 array (4, longest run)
        Scratch.
    out : float32 array (3, point)
        Changed.
    """
    m = window.m
    strength = stats[3]
    per = np.float32(0.25) / h
    f, mean, variance, own = fixed[0, z], fixed[1, z], fixed[2, z], m[z % WIDTH]
    f_after, f_before = fixed[0, (z + 1) % fixed.shape[1]], fixed[0, z - 1]
    m_after, m_before = m[(z + 1) % WIDTH], m[(z - 1) % WIDTH]
    for r in range(runs.shape[0]):
        i, end = runs[r, 0], runs[r, 1]
        _covariances(mean, window.sums, i, end, stats)
        mm, a, c = stats[0], stats[1], stats[2]
        fr, fm, b, mr = f[i:end], mean[i:end], variance[i:end], own[i:end]
        for k in range(end - i):
            q = a[k] / c[k]
            strength[k] = per * q / b[k] * ((fr[k] - fm[k]) - q * (mr[k] - mm[k]))
        line = out[0, i:end]
        _push(strength, f_after[i:end], f_before[i:end], m_after[i:end], m_before[i:end], line)
        for axis, s in ((1, nx), (2, 1)):
            line = out[axis, i:end]
            after, before = f[i + s : end + s], f[i - s : end - s]
            _push(strength, after, before, own[i + s : end + s], own[i - s : end - s], line)


@inlined_kernel
def _weigh(half: Any, v: Any, before: Any, after: Any, out: Any) -> None:
    """Sum v and five arrays on each side of it, from the nearest on, weighted as by `taps`."""
    a1, a2, a3, a4, a5 = before
    b1, b2, b3, b4, b5 = after
    h0, h1, h2, h3, h4, h5 = half[0], half[1], half[2], half[3], half[4], half[5]
    for k in range(out.size):
        out[k] = (
            h0 * v[k]
            + h1 * (a1[k] + b1[k])
            + h2 * (a2[k] + b2[k])
            + h3 * (a3[k] + b3[k])
            + h4 * (a4[k] + b4[k])
            + h5 * (a5[k] + b5[k])
        )


@kernel
def smooth(values: Any, stride: Any, half: Any, runs: Any, out: Any) -> None:
    """Smooth vectors along x or y by a symmetric filter of eleven taps.

    Parameters
    ----------
    values : float32 array (3, point)
    stride : int
        From one point to the next.
    half : float32 array (6)
        From `taps`.
    runs : int64 array (run, 2)
    out : float32 array (3, point)
        Changed.
    """
    s = stride
    for channel in range(3):
        own = values[channel]
        for r in range(runs.shape[0]):
            i, end = runs[r, 0], runs[r, 1]
            v = own[i:end]
            a1, b1 = own[i - s : end - s], own[i + s : end + s]
            a2, b2 = own[i - 2 * s : end - 2 * s], own[i + 2 * s : end + 2 * s]
            a3, b3 = own[i - 3 * s : end - 3 * s], own[i + 3 * s : end + 3 * s]
            a4, b4 = own[i - 4 * s : end - 4 * s], own[i + 4 * s : end + 4 * s]
            a5, b5 = own[i - 5 * s : end - 5 * s], own[i + 5 * s : end + 5 * s]
            before, after = (a1, a2, a3, a4, a5), (b1, b2, b3, b4, b5)
            _weigh(half, v, before, after, out[channel, i:end])


@kernel
def smooth_along_z(values: Any, z: Any, half: Any, runs: Any, out: Any) -> None:
    """Smooth vectors along z by a symmetric filter of eleven taps.

    Parameters
    ----------
    values : float32 array (TAPS, 3, point)
        Plane z and the five before and after it, each at its number modulo `TAPS`.
    z : int
        The plane.
    half : float32 array (6)
        From `taps`.
    runs : int64 array (run, 2)
    out : float32 array (3, plane, point)
        Changed in plane z.
    """
    p0 = values[z % TAPS]
    p1, q1 = values[(z - 1) % TAPS], values[(z + 1) % TAPS]
    p2, q2 = values[(z - 2) % TAPS], values[(z + 2) % TAPS]
    p3, q3 = values[(z - 3) % TAPS], values[(z + 3) % TAPS]
    p4, q4 = values[(z - 4) % TAPS], values[(z + 4) % TAPS]
    p5, q5 = values[(z - 5) % TAPS], values[(z + 5) % TAPS]
    for channel in range(3):
        for r in range(runs.shape[0]):
            i, end = runs[r, 0], runs[r, 1]
            v = p0[channel, i:end]
            a1, b1 = p1[channel, i:end], q1[channel, i:end]
            a2, b2 = p2[channel, i:end], q2[channel, i:end]
            a3, b3 = p3[channel, i:end], q3[channel, i:end]
            a4, b4 = p4[channel, i:end], q4[channel, i:end]
            a5, b5 = p5[channel, i:end], q5[channel, i:end]
            before, after = (a1, a2, a3, a4, a5), (b1, b2, b3, b4, b5)
            _weigh(half, v, before, after, out[channel, z, i:end])


@kernel
def copy(values: Any, z: Any, runs: Any, out: Any) -> None:
    """Copy runs, int64 array (run, 2), of plane z of an array (3, plane, point) to (3, point)."""
    for channel in range(3):
        for r in range(runs.shape[0]):
            i, end = runs[r, 0], runs[r, 1]
            out[channel, i:end] = values[channel, z, i:end]


@kernel
def clear(runs: Any, out: Any) -> None:
    """Set what is in runs, int64 array (run, 2), of an array (3, point) to 0."""
    for channel in range(3):
        for r in range(runs.shape[0]):
            out[channel, runs[r, 0] : runs[r, 1]] = np.float32(0)


@kernel
def add_step(before: Any, d: Any, z: Any, factor: Any, nx: Any, runs: Any, v: Any) -> None:
    """Add a step to the correction, and let the sum w diffuse: w(x) + κ Σ_y (w(y) − w(x)).

    Parameters
    ----------
    before : float32 array (2, 3, point)
        Correction of plane z and the one before it as it was, each at its number modulo 2, mm.
    d : float32 array (3, plane, point)
        Step before it is scaled.
    z : int
        The plane.
    factor : float32
        Scale of the step, mm.
    nx : int
        Points of a row.
    runs : int64 array (run, 2)
    v : float32 array (3, plane, point)
        Correction, mm, of the next plane as it was; changed in plane z.
    """
    near, own = np.float32(DIFFUSION), np.float32(1 - 6 * DIFFUSION)
    below = (z + 1) % v.shape[1]
    for channel in range(3):
        w, w_above, w_below = (
            before[z % 2, channel],
            before[(z - 1) % 2, channel],
            v[channel, below],
        )
        step, step_above, step_below = d[channel, z], d[channel, z - 1], d[channel, below]
        for r in range(runs.shape[0]):
            i, end = runs[r, 0], runs[r, 1]
            line = v[channel, z, i:end]
            a, b, c = w[i:end], w[i - 1 : end - 1], w[i + 1 : end + 1]
            e, f = w[i - nx : end - nx], w[i + nx : end + nx]
            g, h = w_above[i:end], w_below[i:end]
            for k in range(end - i):
                line[k] = own * a[k] + near * (b[k] + c[k] + (e[k] + f[k]) + (g[k] + h[k]))
            a, b, c = step[i:end], step[i - 1 : end - 1], step[i + 1 : end + 1]
            e, f = step[i - nx : end - nx], step[i + nx : end + nx]
            g, h = step_above[i:end], step_below[i:end]
            for k in range(end - i):
                side = b[k] + c[k] + (e[k] + f[k]) + (g[k] + h[k])
                line[k] += factor * (own * a[k] + near * side)


BINS = 1 << 16
"""Bins of the histogram of lengths."""


@kernel
def count_lengths(d: Any, z: Any, runs: Any, squared: Any, counts: Any) -> None:
    """Count the lengths of vectors of a plane, for `quantile`.

    By the upper bits of the squared length: exact whatever the order.

    Parameters
    ----------
    d : float32 array (3, plane, point)
    z : int
        The plane.
    runs : int64 array (run, 2)
    squared : float32 array (longest run)
        Scratch.
    counts : int32 array (BINS)
        Changed.
    """
    bits = squared.view(np.int32)
    for r in range(runs.shape[0]):
        i, end = runs[r, 0], runs[r, 1]
        a, b, c = d[0, z, i:end], d[1, z, i:end], d[2, z, i:end]
        for k in range(end - i):
            squared[k] = a[k] * a[k] + b[k] * b[k] + c[k] * c[k]
        for k in range(end - i):
            counts[bits[k] >> 15] += 1


@kernel
def quantile(counts: Any, share: Any) -> Any:
    """Quantile of the lengths that `count_lengths` counted, to 0.4 %.

    Parameters
    ----------
    counts : int32 array (BINS)
    share : float
        Fraction of the vectors that are not longer.
    """
    wanted = share * counts.sum()
    below, i = 0, 0
    while i < counts.size and below < wanted:
        below += counts[i]
        i += 1
    one = np.empty(1, np.int32)
    one[0] = i << 15
    return np.sqrt(one.view(np.float32)[0])
