"""From a subject to voxels: the kernels that paint shapes plane by plane, and the noise.

A voxel depends on nothing but the seed, the grid and its own index. All kernels are in this
file: numba's cache does not notice when a kernel called from another one changes.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from kpt_dask.demo.phantom.geometry import PERIOD, SQUARENESS, Floats, outline
from kpt_dask.demo.phantom.shapes import CAPSULE, CAVITY, ELLIPSOID, KEEP, OUTSIDE, WALL
from kpt_dask.demo.phantom.subject import Subject
from kpt_dask.kernels.jit import kernel

NOISE = 12.0
"""Standard deviation of the noise, HU."""
SKIN = 2.5
"""Thickness of the skin, mm."""
CELLS_PER_MM = 128 / PERIOD
"""Resolution of the texture; a body is two repeats of it tall."""


def render_planes(
    seed: int,
    subject: Subject,
    origin: Floats,
    spacing: float,
    first: int,
    label_of: NDArray[np.uint8],
    image: NDArray[np.int16],
    labels: NDArray[np.uint8],
) -> None:
    """Fill planes of the image and the labels, whose plane 0 is plane `first` of the volume.

    Parameters
    ----------
    seed : int
        Seed of the noise.
    subject : Subject
        Tall enough for the slab.
    origin : ndarray of float64, shape (3,)
        Centre of the volume's voxel (0, 0, 0), (z, y, x) in mm.
    spacing : float
        Edge length of a voxel, mm.
    first : int
        The slab's first plane.
    label_of : ndarray of uint8, shape (256,)
        Label of each region.
    image : ndarray of int16, shape (plane, y, x)
        HU; written.
    labels : ndarray of uint8, shape (plane, y, x)
        Written.
    """
    tables = _Tables(outline(), _texture(), label_of)
    _render(first, spacing, origin, subject, tables, seed, image, labels)


class _Tables(NamedTuple):
    """What all subjects share: the body's outline, the texture, and the label of each region."""

    outline: NDArray[np.float64]
    texture: NDArray[np.float32]
    label_of: NDArray[np.uint8]


class _Body(NamedTuple):
    """The body without its organs: outline (height, 3) and thickness of fat, mm; HU of layers."""

    outline: NDArray[np.float64]
    fat: float
    layers: NDArray[np.float64]


@lru_cache(maxsize=1)
def _texture() -> NDArray[np.float32]:
    """Make noise of unit variance that repeats every 64 cells, shape (64, 64, 64)."""
    white = np.random.default_rng(7).standard_normal((64, 64, 64))
    smooth = gaussian_filter(white, 0.8, mode="wrap")
    texture: NDArray[np.float32] = (smooth / smooth.std()).astype(np.float32)
    return texture


@kernel
def _mix(key: np.uint64) -> np.uint64:
    """Scramble 64 bits (splitmix64's finalizer)."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


@kernel
def _noise_plane(seed: int, z: int, row: Any, plane: Any) -> None:
    """Fill a plane with noise of unit variance, a function of seed and index alone.

    White noise (the sum of four uniform numbers out of 64 hashed bits) is smoothed with
    weights (s, 1, s) along both axes, as a reconstruction kernel would.
    """
    ny, nx = plane.shape
    s = 0.45
    scale = 1 / (37837.227 * (1 + 2 * s * s))
    plane[:] = 0.0
    key = _mix(np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(z + 1))
    low = np.uint64(0xFFFF)
    for y in range(-1, ny + 1):
        start = _mix(key + np.uint64(y + 1) * np.uint64(0xD1B54A32D192ED03))
        for x in range(nx + 2):
            h = _mix(start + np.uint64(x) * np.uint64(0x9E3779B97F4A7C15))
            total = (h & low) + ((h >> np.uint64(16)) & low)
            total += ((h >> np.uint64(32)) & low) + (h >> np.uint64(48))
            row[x] = np.float64(np.int64(total)) - 131070.0
        for target in range(max(y - 1, 0), min(y + 2, ny)):
            weight = scale if target == y else scale * s
            for x in range(nx):
                plane[target, x] += weight * (row[x + 1] + s * (row[x] + row[x + 2]))


@kernel
def _lookup(table: Any, z: float, y: float, x: float) -> float:
    """Interpolate the repeating texture at a point, cells."""
    fz, fy, fx = np.floor(z), np.floor(y), np.floor(x)
    z, y, x = z - fz, y - fy, x - fx
    z0, y0, x0 = np.int64(fz) & 63, np.int64(fy) & 63, np.int64(fx) & 63
    z1, y1, x1 = (z0 + 1) & 63, (y0 + 1) & 63, (x0 + 1) & 63
    a = table[z0, y0, x0] * (1 - x) + table[z0, y0, x1] * x
    b = table[z0, y1, x0] * (1 - x) + table[z0, y1, x1] * x
    c = table[z1, y0, x0] * (1 - x) + table[z1, y0, x1] * x
    d = table[z1, y1, x0] * (1 - x) + table[z1, y1, x1] * x
    low: float = a * (1 - y) + b * y
    high: float = c * (1 - y) + d * y
    return low * (1 - z) + high * z


@kernel
def _distance(kind: int, p: Any, z: float, y: float, x: float) -> float:
    """About the distance from a shape's surface in mm, negative inside."""
    z, y, x = z - p[0], y - p[1], x - p[2]
    if kind == CAPSULE:
        az, ay, ax = p[3] - p[0], p[4] - p[1], p[5] - p[2]
        along = (z * az + y * ay + x * ax) / (az * az + ay * ay + ax * ax)
        along = min(max(along, 0.0), 1.0)
        z, y, x = z - along * az, y - along * ay, x - along * ax
        radius: float = p[6] + along * (p[7] - p[6])
        return float(np.sqrt(z * z + y * y + x * x)) - radius
    u = p[3] * z + p[4] * y + p[5] * x
    v = p[6] * z + p[7] * y + p[8] * x
    w = p[9] * z + p[10] * y + p[11] * x
    if kind == ELLIPSOID:
        level = np.sqrt(u * u + v * v + w * w)
        slope = level
    else:
        across = v * v + w * w
        u3, across3 = u * u * u, across * across * across
        power = u3 * u3 * u * u + across3 * across
        level = np.sqrt(np.sqrt(np.sqrt(power)))
        slope = power / level
        u, v, w = u3 * u3 * u, across3 * v, across3 * w
    gz = p[3] * u + p[6] * v + p[9] * w
    gy = p[4] * u + p[7] * v + p[10] * w
    gx = p[5] * u + p[8] * v + p[11] * w
    steepness = np.sqrt(gz * gz + gy * gy + gx * gx)
    if steepness < 1e-12:
        return -1e3
    distance: float = (level - 1) * slope / steepness
    return distance


@kernel
def _cover(distance: float, edge: float) -> float:
    """Share of a voxel that lies inside."""
    return min(max(0.5 - distance / edge, 0.0), 1.0)


@kernel
def _paint_body(
    point: tuple[float, float, float], grain: float, air: float, body: _Body, edge: float
) -> tuple[float, int]:
    """HU and region of the body without its organs: cavity, muscles, fat, skin."""
    z, y, x = point
    outline, fat, layers = body
    period = outline.shape[0] - 1
    height = z - np.floor(z / period) * period
    i = min(int(height), period - 1)
    t = height - i
    a = outline[i, 0] * (1 - t) + outline[i + 1, 0] * t
    b = outline[i, 1] * (1 - t) + outline[i + 1, 1] * t
    wall = outline[i, 2] * (1 - t) + outline[i + 1, 2] * t
    X, Y = x / a, y / b
    X2, Y2 = X * X, Y * Y
    level = np.sqrt(np.sqrt(X2 * X2 + Y2 * Y2 + 2 * SQUARENESS * X2 * Y2))
    if level < 0.3:
        return layers[4] + 16 * grain, CAVITY
    gx, gy = X * (X2 + SQUARENESS * Y2) / a, Y * (Y2 + SQUARENESS * X2) / b
    d = (level - 1) * level * level * level / np.sqrt(gx * gx + gy * gy)
    thick = fat * (1 - 0.35 * Y / level) + 0.4 * grain
    region = OUTSIDE if d > thick + SKIN else CAVITY if d < -wall else WALL
    if d - thick - SKIN > edge:
        return air, region
    v = layers[4] + 16 * grain
    if d < -wall - edge:
        return v, region
    plane = (d + 0.45 * wall + 1.2 * grain) / 1.2
    muscle = layers[3] + 9 * grain
    if abs(plane) < 4:
        muscle -= 95 * np.exp(-plane * plane)
    v += _cover(-(d + wall), edge) * (muscle - v)
    v += _cover(-d, edge) * (layers[2] + 9 * grain - v)
    v += _cover(-(d - thick), edge) * (layers[1] - v)
    v += _cover(-(d - thick - SKIN), edge) * (air - v)
    return v, region


@kernel
def _couch(y: float, x: float, air: float, edge: float) -> float:
    """HU of the couch behind the body: a thin shell around foam."""
    depth = y - 127 + 10 * (x / 160) * (x / 160)
    shell = _cover(abs(depth - 1.5) - 1.5, edge)
    return air + 60 * _cover(abs(depth - 15) - 15, edge) + shell * 600


@kernel
def _to_template(z: float, spacing: float, origin: Any, motion: Any, ripples: Any, at: Any) -> None:
    """Fill `at` (3, y, x) with the template's points for a plane of the volume, mm.

    A wave's cosine is split into one along x, tabulated in `ripples` (2, wave, x), and one
    along z and y, so that there is no cosine per voxel.
    """
    linear, offset, wave, phase, amplitude = motion
    _, ny, nx = at.shape
    for j in range(ny):
        y = origin[1] + spacing * j
        for a in range(3):
            for i in range(nx):
                x = origin[2] + spacing * i
                at[a, j, i] = linear[a, 0] * z + linear[a, 1] * y + linear[a, 2] * x + offset[a]
        for m in range(len(phase)):
            angle = wave[m, 0] * z + wave[m, 1] * y + phase[m]
            c, s = np.cos(angle), np.sin(angle)
            for i in range(nx):
                ripple = c * ripples[0, m, i] - s * ripples[1, m, i]
                for a in range(3):
                    at[a, j, i] += amplitude[m, a] * ripple


@kernel
def _span(low: float, high: float, origin: float, spacing: float, n: int) -> tuple[int, int]:
    """Voxels of an axis between two points, mm."""
    first = max(int(np.ceil((low - origin) / spacing)), 0)
    last = min(int(np.floor((high - origin) / spacing)) + 1, n)
    return first, last


@kernel
def _render(
    first: int,
    spacing: float,
    origin: Any,
    subject: Any,
    tables: _Tables,
    seed: int,
    image: Any,
    labels: Any,
) -> None:
    nz, ny, nx = image.shape
    motion, fat, layers, hu, grain, kinds, params, regions, insides, low, high = subject
    outline, texture, label_of = tables
    body = _Body(outline, fat, layers)
    edge = max(spacing, 1.0)
    cell = CELLS_PER_MM
    waves = len(motion.phase)
    ripples = np.empty((2, waves, nx))
    for m in range(waves):
        for i in range(nx):
            angle = motion.wave[m, 2] * (origin[2] + spacing * i)
            ripples[0, m, i], ripples[1, m, i] = np.cos(angle), np.sin(angle)
    at = np.empty((3, ny, nx))
    speckle, rest, plane = np.empty((ny, nx)), np.empty((ny, nx)), np.empty((ny, nx))
    region = np.empty((ny, nx), np.uint8)
    row = np.empty(nx + 2)
    for k in range(nz):
        z = origin[0] + spacing * (first + k)
        _to_template(z, spacing, origin, motion, ripples, at)
        for j in range(ny):
            y = origin[1] + spacing * j
            for i in range(nx):
                tz, ty, tx = at[0, j, i], at[1, j, i], at[2, j, i]
                air = _couch(y, origin[2] + spacing * i, layers[0], edge)
                speckle[j, i] = _lookup(texture, tz * cell, ty * cell, tx * cell)
                plane[j, i], region[j, i] = _paint_body(
                    (tz, ty, tx), speckle[j, i], air, body, edge
                )
        for n in range(len(kinds)):
            # Off the tips of oblong shapes the distance is too small: they reach further than half.
            if z < low[n, 0] - edge or z > high[n, 0] + edge:
                continue
            j0, j1 = _span(low[n, 1] - edge, high[n, 1] + edge, origin[1], spacing, ny)
            i0, i1 = _span(low[n, 2] - edge, high[n, 2] + edge, origin[2], spacing, nx)
            for j in range(j0, j1):
                for i in range(i0, i1):
                    if not (insides[n] >> np.uint32(region[j, i])) & np.uint32(1):
                        continue
                    d = _distance(kinds[n], params[n], at[0, j, i], at[1, j, i], at[2, j, i])
                    share = _cover(d, edge)
                    if share > 0:
                        painted = hu[n] + grain[n] * speckle[j, i]
                        plane[j, i] += share * (painted - plane[j, i])
                        if d < 0 and regions[n] != KEEP:
                            region[j, i] = regions[n]
        _noise_plane(seed, first + k, row, rest)
        for j in range(ny):
            for i in range(nx):
                value = np.rint(plane[j, i] + NOISE * rest[j, i])
                image[k, j, i] = np.int16(min(max(value, -1024.0), 3071.0))
                labels[k, j, i] = label_of[region[j, i]]
