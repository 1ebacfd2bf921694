"""Dense registration on one lattice: sampling, local correlation, force, smoothing, composition.

Arrays are float32 in C order, (z, y, x) of a lattice whose spacing is h mm along each axis.
A map takes a lattice point x to x + u(x), mm. Outside of an array its edge repeats.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import kernel

BOX = 2
"""Lattice points on each side of the middle one of the box of local correlation."""
NOISE = np.float32(1e-3)
"""ε, added to variances: squared intensity of noise."""
SMOOTHNESS = 1.5
"""Standard deviation of the Gaussian on the force, lattice points."""
ELASTICITY = 0.5
"""Standard deviation of the Gaussian on the displacement, lattice points."""


class PointMap(NamedTuple):
    """Map of the lattice's points to voxels of an image: first + step · point + scale · u(point).

    Attributes
    ----------
    first : float32 array (3)
        Index in the image of the lattice's first point.
    step : float32
        Voxels from one lattice point to the next.
    scale : float32
        Voxels per mm.
    u : float32 array (3, z, y, x)
        Displacement at each point, mm.
    """

    first: NDArray[np.float32]
    step: np.float32
    scale: np.float32
    u: NDArray[np.float32]


def taps(sigma: float, radius: int) -> NDArray[np.float32]:
    """One half of a normalized Gaussian, from its middle outwards."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.asarray((weights / weights.sum())[radius:], np.float32)


@kernel
def sample(image: Any, where: Any, unit: Any, out: Any) -> None:
    """Sample an image at the mapped points of the lattice, trilinearly.

    Parameters
    ----------
    image : array (z, y, x)
    where : PointMap
    unit : float32
        Intensity per step of the image.
    out : float32 array (z, y, x)
        Changed.
    """
    at, step, scale, u = where
    nz, ny, nx = out.shape
    dz, dy, dx = image.shape
    flat = image.reshape(-1)
    zero, one = np.float32(0), np.float32(1)
    lz, ly, lx = np.float32(dz - 1), np.float32(dy - 1), np.float32(dx - 1)
    near = np.empty(nx, np.int64)
    fz, fy, fx = np.empty(nx, np.float32), np.empty(nx, np.float32), np.empty(nx, np.float32)
    up = dy * dx if dz > 1 else 0
    across = dx if dy > 1 else 0
    along = 1 if dx > 1 else 0
    for z in range(nz):
        z0 = at[0] + step * np.float32(z)
        for y in range(ny):
            y0 = at[1] + step * np.float32(y)
            uz, uy, ux = u[0, z, y], u[1, z, y], u[2, z, y]
            row = out[z, y]
            for x in range(nx):
                pz = min(max(z0 + scale * uz[x], zero), lz)
                py = min(max(y0 + scale * uy[x], zero), ly)
                px = min(max(at[2] + step * np.float32(x) + scale * ux[x], zero), lx)
                kz = min(np.int32(pz), np.int32(max(dz - 2, 0)))
                ky = min(np.int32(py), np.int32(max(dy - 2, 0)))
                kx = min(np.int32(px), np.int32(max(dx - 2, 0)))
                fz[x] = pz - np.float32(kz)
                fy[x] = py - np.float32(ky)
                fx[x] = px - np.float32(kx)
                near[x] = (np.int64(kz) * dy + ky) * dx + kx
            for x in range(nx):
                i = near[x]
                gx = fx[x]
                hx = one - gx
                a = hx * np.float32(flat[i]) + gx * np.float32(flat[i + along])
                b = hx * np.float32(flat[i + across]) + gx * np.float32(flat[i + across + along])
                i += up
                c = hx * np.float32(flat[i]) + gx * np.float32(flat[i + along])
                d = hx * np.float32(flat[i + across]) + gx * np.float32(flat[i + across + along])
                e = a + fy[x] * (b - a)
                f = c + fy[x] * (d - c)
                row[x] = unit * (e + fz[x] * (f - e))


@kernel
def _sum_in_plane(plane: Any, rows: Any, out: Any) -> None:
    """Sum a plane over 5 × 5 points, clipped at its edges."""
    ny, nx = plane.shape
    for y in range(ny):
        here, row = plane[y], rows[y]
        for x in range(2, nx - 2):
            row[x] = here[x - 2] + here[x - 1] + here[x] + here[x + 1] + here[x + 2]
        for x in range(nx):
            if 2 <= x < nx - 2:
                continue
            total = np.float32(0)
            for i in range(max(x - 2, 0), min(x + 3, nx)):
                total += here[i]
            row[x] = total
    for y in range(ny):
        line = out[y]
        if 2 <= y < ny - 2:
            a, b, c, d, e = rows[y - 2], rows[y - 1], rows[y], rows[y + 1], rows[y + 2]
            for x in range(nx):
                line[x] = a[x] + b[x] + c[x] + d[x] + e[x]
        else:
            line[:] = np.float32(0)
            for j in range(max(y - 2, 0), min(y + 3, ny)):
                row = rows[j]
                for x in range(nx):
                    line[x] += row[x]


@kernel
def _count(i: Any, n: Any) -> Any:
    return min(i + 3, n) - max(i - 2, 0)


@kernel
def box_moments(values: Any, mean: Any, square: Any) -> None:
    """Mean over 5 × 5 × 5 points, clipped at the edges, of values and of their squares."""
    nz, ny, nx = values.shape
    rows = np.empty((ny, nx), np.float32)
    product = np.empty((ny, nx), np.float32)
    ring = np.zeros((5, 2, ny, nx), np.float32)
    for z in range(nz + 2):
        if z < nz:
            for y in range(ny):
                here, other = values[z, y], product[y]
                for x in range(nx):
                    other[x] = here[x] * here[x]
            _sum_in_plane(values[z], rows, ring[z % 5, 0])
            _sum_in_plane(product, rows, ring[z % 5, 1])
        else:
            ring[z % 5] = np.float32(0)
        k = z - 2
        if k < 0:
            continue
        for y in range(ny):
            tall = np.float32(_count(k, nz) * _count(y, ny))
            m, s = mean[k, y], square[k, y]
            for x in range(nx):
                a = b = np.float32(0)
                for i in range(5):
                    a += ring[i, 0, y, x]
                    b += ring[i, 1, y, x]
                n = tall * np.float32(_count(x, nx))
                m[x] = a / n
                s[x] = b / n


@kernel
def _sum_products(f: Any, m: Any, product: Any, rows: Any, sums: Any) -> None:
    """Sum m, f · m and m · m of a plane over 5 × 5 points."""
    ny, nx = f.shape
    _sum_in_plane(m, rows, sums[0])
    for y in range(ny):
        a, b, c = m[y], f[y], product[y]
        for x in range(nx):
            c[x] = a[x] * b[x]
    _sum_in_plane(product, rows, sums[1])
    for y in range(ny):
        a, c = m[y], product[y]
        for x in range(nx):
            c[x] = a[x] * a[x]
    _sum_in_plane(product, rows, sums[2])


@kernel
def _covariances(ring: Any, y: Any, fixed: Any, n: Any, over: Any, out: Any) -> None:
    """Mean of m, a, b and c of a row: covariance, and variances with ε, over 5 × 5 × 5 points."""
    f_mean, f_square = fixed
    m0, m1, m2, m3, m4 = ring[0, 0, y], ring[1, 0, y], ring[2, 0, y], ring[3, 0, y], ring[4, 0, y]
    mean = out[0]
    for x in range(mean.size):
        mean[x] = (m0[x] + m1[x] + m2[x] + m3[x] + m4[x]) * (n * over[x])
    m0, m1, m2, m3, m4 = ring[0, 1, y], ring[1, 1, y], ring[2, 1, y], ring[3, 1, y], ring[4, 1, y]
    a = out[1]
    for x in range(mean.size):
        a[x] = (m0[x] + m1[x] + m2[x] + m3[x] + m4[x]) * (n * over[x]) - f_mean[x] * mean[x]
    m0, m1, m2, m3, m4 = ring[0, 2, y], ring[1, 2, y], ring[2, 2, y], ring[3, 2, y], ring[4, 2, y]
    b, c = out[2], out[3]
    for x in range(mean.size):
        square = (m0[x] + m1[x] + m2[x] + m3[x] + m4[x]) * (n * over[x])
        c[x] = square - mean[x] * mean[x] + NOISE
        b[x] = f_square[x] - f_mean[x] * f_mean[x] + NOISE


@kernel
def correlation(f: Any, f_mean: Any, f_square: Any, m: Any, out: Any) -> None:
    """Local correlation a / √(bc) of two images, with the parameters of `force`."""
    nz, ny, nx = f.shape
    rows, product = np.empty((ny, nx), np.float32), np.empty((ny, nx), np.float32)
    ring = np.zeros((5, 3, ny, nx), np.float32)
    stats = np.empty((4, nx), np.float32)
    over = np.empty(nx, np.float32)
    for x in range(nx):
        over[x] = np.float32(1) / np.float32(_count(x, nx))
    for z in range(nz + 2):
        if z < nz:
            _sum_products(f[z], m[z], product, rows, ring[z % 5])
        else:
            ring[z % 5] = np.float32(0)
        k = z - 2
        if k < 0:
            continue
        for y in range(ny):
            n = np.float32(1) / np.float32(_count(k, nz) * _count(y, ny))
            _covariances(ring, y, (f_mean[k, y], f_square[k, y]), n, over, stats)
            a, b, c, line = stats[1], stats[2], stats[3], out[k, y]
            for x in range(nx):
                line[x] = a[x] / np.sqrt(b[x] * c[x])


@kernel
def _add_slopes(strength: Any, pairs: Any, per: Any, out: Any) -> None:
    """Write strength · ½(∇f + ∇m) along one axis: the rows after and before, of both images."""
    after, before, m_after, m_before = pairs
    for x in range(out.size):
        out[x] = strength[x] * per * ((after[x] - before[x]) + (m_after[x] - m_before[x]))


@kernel
def force(f: Any, f_mean: Any, f_square: Any, m: Any, h: Any, inside: Any, out: Any) -> None:
    """Force that increases the local correlation of two images.

    With a = ⟨fm⟩ − f̄m̄, b = ⟨ff⟩ − f̄² + ε and c = ⟨mm⟩ − m̄² + ε over boxes of 5 × 5 × 5 points,
    clipped at the edges, it is a/(bc) · [(f − f̄) − (a/c)(m − m̄)] · ½(∇f + ∇m), per mm; 0 outside.

    Parameters
    ----------
    f, m : float32 arrays (z, y, x)
        The fixed and the moved image.
    f_mean, f_square : float32 arrays (z, y, x)
        From `box_moments` of `f`.
    h : float32
        Spacing, mm.
    inside : bool array (z, y, x)
    out : float32 array (3, z, y, x)
        Changed.
    """
    nz, ny, nx = f.shape
    rows, product = np.empty((ny, nx), np.float32), np.empty((ny, nx), np.float32)
    ring = np.zeros((5, 3, ny, nx), np.float32)
    stats = np.empty((4, nx), np.float32)
    over, strength = np.empty(nx, np.float32), np.empty(nx, np.float32)
    for x in range(nx):
        over[x] = np.float32(1) / np.float32(_count(x, nx))
    half = np.float32(0.5) / h
    nothing = np.float32(0)
    for z in range(nz + 2):
        if z < nz:
            _sum_products(f[z], m[z], product, rows, ring[z % 5])
        else:
            ring[z % 5] = nothing
        k = z - 2
        if k < 0:
            continue
        low, high = max(k - 1, 0), min(k + 1, nz - 1)
        for y in range(ny):
            some = False
            own = inside[k, y]
            for x in range(nx):
                some |= own[x]
            if not some:
                for axis in range(3):
                    out[axis, k, y] = nothing
                continue
            n = np.float32(1) / np.float32(_count(k, nz) * _count(y, ny))
            fm, fr, mr = f_mean[k, y], f[k, y], m[k, y]
            _covariances(ring, y, (fm, f_square[k, y]), n, over, stats)
            mm, a, b, c = stats[0], stats[1], stats[2], stats[3]
            for x in range(nx):
                d = a[x] / (b[x] * c[x]) * ((fr[x] - fm[x]) - a[x] / c[x] * (mr[x] - mm[x]))
                strength[x] = d if own[x] else nothing
            per = half / np.float32(max(high - low, 1))
            rows_of = f[high, y], f[low, y], m[high, y], m[low, y]
            _add_slopes(strength, rows_of, per, out[0, k, y])
            front, back = max(y - 1, 0), min(y + 1, ny - 1)
            per = half / np.float32(max(back - front, 1))
            rows_of = f[k, back], f[k, front], m[k, back], m[k, front]
            _add_slopes(strength, rows_of, per, out[1, k, y])
            line = out[2, k, y]
            per = half / np.float32(2)
            for x in range(1, nx - 1):
                line[x] = strength[x] * per * ((fr[x + 1] - fr[x - 1]) + (mr[x + 1] - mr[x - 1]))
            for x in (0, nx - 1):
                i, j = max(x - 1, 0), min(x + 1, nx - 1)
                line[x] = strength[x] * half * ((fr[j] - fr[i]) + (mr[j] - mr[i]))


@kernel
def blur(values: Any, half: Any) -> None:
    """Blur an array in place by a symmetric separable filter; edges repeat."""
    nz, ny, nx = values.shape
    radius = half.size - 1
    wide = np.empty(nx + 2 * radius, np.float32)
    rows = np.empty((ny, nx), np.float32)
    n = 2 * radius + 1
    ring = np.empty((n, ny, nx), np.float32)
    for z in range(nz + radius):
        if z < nz:
            for y in range(ny):
                here = values[z, y]
                for x in range(nx):
                    wide[radius + x] = here[x]
                for x in range(radius):
                    wide[x] = here[0]
                    wide[radius + nx + x] = here[nx - 1]
                row = rows[y]
                for x in range(nx):
                    row[x] = half[0] * wide[radius + x]
                for t in range(1, radius + 1):
                    a, b = wide[radius - t : radius - t + nx], wide[radius + t : radius + t + nx]
                    w = half[t]
                    for x in range(nx):
                        row[x] += w * (a[x] + b[x])
            own = ring[z % n]
            for y in range(ny):
                line, here = own[y], rows[y]
                for x in range(nx):
                    line[x] = half[0] * here[x]
                for t in range(1, radius + 1):
                    a, b = rows[max(y - t, 0)], rows[min(y + t, ny - 1)]
                    w = half[t]
                    for x in range(nx):
                        line[x] += w * (a[x] + b[x])
        k = z - radius
        if k < 0:
            continue
        for y in range(ny):
            line, here = values[k, y], ring[k % n, y]
            for x in range(nx):
                line[x] = half[0] * here[x]
            for t in range(1, radius + 1):
                a, b = ring[max(k - t, 0) % n, y], ring[min(k + t, nz - 1) % n, y]
                w = half[t]
                for x in range(nx):
                    line[x] += w * (a[x] + b[x])


@kernel
def largest(force: Any, inside: Any, share: Any) -> Any:
    """Quantile of the lengths of the vectors inside, to 0.4 %.

    A histogram over the upper bits of the squared length: exact whatever the order.
    """
    _, nz, ny, nx = force.shape
    counts = np.zeros(1 << 16, np.int64)
    squared = np.empty(nx, np.float32)
    bits = squared.view(np.int32)
    total = 0
    for z in range(nz):
        for y in range(ny):
            a, b, c = force[0, z, y], force[1, z, y], force[2, z, y]
            for x in range(nx):
                squared[x] = a[x] * a[x] + b[x] * b[x] + c[x] * c[x]
            for x in range(nx):
                if inside[z, y, x]:
                    counts[bits[x] >> 15] += 1
                    total += 1
    wanted = share * total
    below, i = 0, 0
    while i < counts.size and below < wanted:
        below += counts[i]
        i += 1
    one = np.empty(1, np.int32)
    one[0] = i << 15
    return np.sqrt(one.view(np.float32)[0])


@kernel
def compose(u: Any, start: Any, d: Any, factor: Any, h: Any, out: Any) -> None:
    """Follow a map after a small step: v(x) = u(x + d) + d − u⁰(x), d scaled by a factor.

    Parameters
    ----------
    u, start : float32 arrays (3, z, y, x)
        The map so far and u⁰, mm.
    d : float32 array (3, z, y, x)
        The step before it is scaled.
    factor, h : float32
        mm of the force, and the spacing.
    out : float32 array (3, z, y, x)
        v, changed.
    """
    _, nz, ny, nx = u.shape
    zero, one = np.float32(0), np.float32(1)
    lz, ly, lx = np.float32(nz - 1), np.float32(ny - 1), np.float32(nx - 1)
    near = np.empty(nx, np.int64)
    fz, fy, fx = np.empty(nx, np.float32), np.empty(nx, np.float32), np.empty(nx, np.float32)
    up = ny * nx if nz > 1 else 0
    across = nx if ny > 1 else 0
    along = 1 if nx > 1 else 0
    per = factor / h
    az, ay, ax = u[0].reshape(-1), u[1].reshape(-1), u[2].reshape(-1)
    for z in range(nz):
        for y in range(ny):
            d0, d1, d2 = d[0, z, y], d[1, z, y], d[2, z, y]
            for x in range(nx):
                pz = min(max(np.float32(z) + per * d0[x], zero), lz)
                py = min(max(np.float32(y) + per * d1[x], zero), ly)
                px = min(max(np.float32(x) + per * d2[x], zero), lx)
                kz = min(np.int32(pz), np.int32(max(nz - 2, 0)))
                ky = min(np.int32(py), np.int32(max(ny - 2, 0)))
                kx = min(np.int32(px), np.int32(max(nx - 2, 0)))
                fz[x] = pz - np.float32(kz)
                fy[x] = py - np.float32(ky)
                fx[x] = px - np.float32(kx)
                near[x] = (np.int64(kz) * ny + ky) * nx + kx
            for axis in range(3):
                flat = az if axis == 0 else (ay if axis == 1 else ax)
                line, first, own = out[axis, z, y], start[axis, z, y], d[axis, z, y]
                for x in range(nx):
                    i = near[x]
                    gx = fx[x]
                    hx = one - gx
                    a = hx * flat[i] + gx * flat[i + along]
                    b = hx * flat[i + across] + gx * flat[i + across + along]
                    i += up
                    c = hx * flat[i] + gx * flat[i + along]
                    e = hx * flat[i + across] + gx * flat[i + across + along]
                    a += fy[x] * (b - a)
                    c += fy[x] * (e - c)
                    line[x] = a + fz[x] * (c - a) + factor * own[x] - first[x]


@kernel
def spread(values: Any, first: Any, step: Any, out: Any) -> None:
    """Interpolate between the points of one lattice at those of another, trilinearly.

    Parameters
    ----------
    values : float32 array (c, z, y, x)
    first : float32 array (3)
        Index in `values` of the first point of `out`.
    step : float32
        From one point of `out` to the next.
    out : float32 array (c, z, y, x)
        Changed.
    """
    channels, nz, ny, nx = out.shape
    _, dz, dy, dx = values.shape
    zero, one = np.float32(0), np.float32(1)
    near = np.empty(nx, np.int64)
    part = np.empty(nx, np.float32)
    for x in range(nx):
        p = min(max(first[2] + step * np.float32(x), zero), np.float32(dx - 1))
        near[x] = min(np.int64(p), max(dx - 2, 0))
        part[x] = p - np.float32(near[x])
    mixed = np.empty(dx + 1, np.float32)
    for z in range(nz):
        p = min(max(first[0] + step * np.float32(z), zero), np.float32(dz - 1))
        k = min(np.int64(p), max(dz - 2, 0))
        fz, up = p - np.float32(k), min(k + 1, dz - 1)
        for y in range(ny):
            p = min(max(first[1] + step * np.float32(y), zero), np.float32(dy - 1))
            j = min(np.int64(p), max(dy - 2, 0))
            fy, across = p - np.float32(j), min(j + 1, dy - 1)
            for c in range(channels):
                a, b = values[c, k, j], values[c, k, across]
                d, e = values[c, up, j], values[c, up, across]
                for x in range(dx):
                    low = (one - fy) * a[x] + fy * b[x]
                    high = (one - fy) * d[x] + fy * e[x]
                    mixed[x] = low + fz * (high - low)
                mixed[dx] = mixed[dx - 1]
                line = out[c, z, y]
                for x in range(nx):
                    i = near[x]
                    line[x] = mixed[i] + part[x] * (mixed[i + 1] - mixed[i])


@kernel
def look_up(packed: Any, shift: Any, mask: Any, first: Any, table: Any, out: Any) -> None:
    """Look up the HU, or the labels, that are coded in numbers, in a table.

    Parameters
    ----------
    packed : array (n)
    shift, mask, first : int
        A number n holds ``(n >> shift & mask) + first``; beyond the table its ends count.
    table : array (m)
    out : array (n)
        Changed.
    """
    last = table.size - 1
    for i in range(out.size):
        value = (np.int32(packed[i]) >> shift & mask) + first
        out[i] = table[min(max(value, 0), last)]


@kernel
def nearest(packed: Any, held: Any, coding: Any, where: Any, table: Any, out: Any) -> None:
    """Look up the labels of the voxels nearest to the mapped points of the lattice.

    Parameters
    ----------
    packed : array (z, y, x)
        Labels, coded as for `look_up`; its first `held` (3) voxels along each axis count.
    coding : (int, int)
        Shift and mask.
    where : PointMap
    table : uint16 array
    out : uint16 array (z, y, x)
        Changed; 0 beside the image.
    """
    at, step, scale, u = where
    nz, ny, nx = out.shape
    half = np.float32(0.5)
    for z in range(nz):
        z0 = at[0] + step * np.float32(z) + half
        for y in range(ny):
            y0 = at[1] + step * np.float32(y) + half
            uz, uy, ux = u[0, z, y], u[1, z, y], u[2, z, y]
            row = out[z, y]
            for x in range(nx):
                k = np.int32(np.floor(z0 + scale * uz[x]))
                j = np.int32(np.floor(y0 + scale * uy[x]))
                i = np.int32(np.floor(at[2] + step * np.float32(x) + half + scale * ux[x]))
                row[x] = 0
                if 0 <= k < held[0] and 0 <= j < held[1] and 0 <= i < held[2]:
                    label = np.int32(packed[k, j, i]) >> coding[0] & coding[1]
                    row[x] = table[min(label, table.size - 1)]


@kernel
def grow(mask: Any, radius: Any) -> None:
    """Mark all points of a cube around each one that is marked, in place."""
    nz, ny, nx = mask.shape
    far = radius + 1
    for z in range(nz):
        for y in range(ny):
            row = mask[z, y]
            last = far
            before = row.copy()
            for x in range(nx):
                last = 0 if before[x] else min(last + 1, far)
                row[x] = last <= radius
            last = far
            for x in range(nx - 1, -1, -1):
                last = 0 if before[x] else min(last + 1, far)
                row[x] |= last <= radius
    for axis in range(2):
        outer, inner = (nz, ny) if axis == 0 else (ny, nz)
        since = np.empty(nx, np.int64)
        marks = np.empty((inner, nx), np.bool_)
        for a in range(outer):
            for b in range(inner):
                row = mask[a, b] if axis == 0 else mask[b, a]
                marks[b] = row
            for way in range(2):
                since[:] = far
                for i in range(inner):
                    b = i if way == 0 else inner - 1 - i
                    row = mask[a, b] if axis == 0 else mask[b, a]
                    own = marks[b]
                    for x in range(nx):
                        since[x] = 0 if own[x] else min(since[x] + 1, far)
                        row[x] |= since[x] <= radius


@kernel
def coarsen(mask: Any, ratio: Any, out: Any) -> None:
    """Mark the points of a coarser lattice next to which any point of a finer one is marked.

    Parameters
    ----------
    mask : bool array (z, y, x)
    ratio : float
        Points of the finer lattice from one of the coarser one to the next; both begin together.
    out : bool array (z, y, x)
        False at first; changed.
    """
    nz, ny, nx = mask.shape
    mz, my, mx = out.shape
    for z in range(nz):
        k = min(int(z / ratio + 0.5), mz - 1)
        for y in range(ny):
            j = min(int(y / ratio + 0.5), my - 1)
            row, line = mask[z, y], out[k, j]
            for x in range(nx):
                if row[x]:
                    line[min(int(x / ratio + 0.5), mx - 1)] = True


@kernel
def mark_organs(labels: Any, marked: Any) -> None:
    """Set, at each point, the bit of the organ that an atlas labels there.

    Parameters
    ----------
    labels : uint16 array (n)
        Labels of one atlas: index of an organ + 1, or 0.
    marked : uint64 array (n, word)
        A bit for each organ; changed.
    """
    for i in range(labels.size):
        if labels[i]:
            organ = np.int64(labels[i]) - 1
            marked[i, organ // 64] |= np.uint64(1) << np.uint64(organ % 64)


@kernel
def sum_by_organ(values: Any, marked: Any, sums: Any, counts: Any) -> None:
    """Sum whole numbers over the points of each organ.

    Parameters
    ----------
    values : uint8 array (n)
    marked : uint64 array (n, word)
        From `mark_organs`.
    sums, counts : int64 arrays (organ)
        Changed.
    """
    for i in range(values.size):
        for word in range(marked.shape[1]):
            bits = marked[i, word]
            organ = 64 * word
            while bits:
                if bits & np.uint64(1):
                    sums[organ] += values[i]
                    counts[organ] += 1
                bits >>= np.uint64(1)
                organ += 1
