"""Mode `local` the plain way, written from the equations in the docstrings, in float64."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator
from scipy.ndimage import minimum_filter

from tests.naive.stations import AnnotatedImage

Array = NDArray[Any]


def trend(position: Array, translation: Array) -> tuple[Array, Array]:
    """Affine trend of the translations: a matrix (4, 3) for (1, x − c), and c."""
    x, t = position.astype(float), translation.astype(float)
    c = x.mean(axis=0)
    squared = ((t[:, None] - t) ** 2).sum(axis=2)
    found = np.zeros((4, 3))
    found[0] = t[np.exp(-squared / (2 * 15**2)).sum(axis=1).argmax()]
    rows = np.array([[1, *(one - c)] for one in x])
    for sigma in (60, 40, 25, 15, 15, 15):
        weight = np.exp(-((t - rows @ found) ** 2).sum(axis=1) / (2 * sigma**2))
        # The ridge as rows that want a slope of 0, which is counted over 100 mm.
        ridge = 100 * np.sqrt(1e-3 * weight.sum()) * np.eye(4)[1:]
        root = np.sqrt(weight)[:, None]
        wanted = np.concatenate([root * t, np.zeros((3, 3))])
        found = np.linalg.lstsq(np.concatenate([root * rows, ridge]), wanted, rcond=None)[0]
    return found, c


def displacement(x: Any, position: Array, translation: Array) -> Array:
    """u (z, y, x) and the support at one point: the trend and what matches have beyond it."""
    if len(position) == 0:
        return np.zeros(4)
    found, c = trend(position, translation)
    rest = translation - (found[0] + (position - c) @ found[1:])
    here = np.array([*(found[0] + (np.asarray(x) - c) @ found[1:]), 1e-3])
    return here + regression(x, position, rest)


def regression(
    x: Any,
    position: Array,
    translation: Array,
    space: float = 25.0,
    agreement: float = 10.0,
    rounds: int = 3,
) -> Array:
    """u (z, y, x) and the support at one point."""
    if len(position) == 0:
        return np.zeros(4)
    t = translation.astype(float)
    distance = np.linalg.norm(position.astype(float) - x, axis=1)
    near = np.where(distance < 3 * space, np.exp(-(distance**2) / (2 * space**2)), 0)
    if not near.any():
        return np.zeros(4)
    u = near @ t / near.sum()
    weight = near
    for _ in range(rounds):
        weight = near * np.exp(-(np.linalg.norm(t - u, axis=1) ** 2) / (2 * agreement**2))
        if weight.sum() < 1e-30:
            return np.zeros(4)
        u = weight @ t / weight.sum()
    return np.array([*u, weight.sum()])


def field(scan: AnnotatedImage, spacing: float, position: Array, translation: Array) -> Array:
    """u and the support at every voxel, linear between nodes about 16 mm apart."""
    shape = scan.image.shape
    node = round(16 / spacing) * spacing
    axes = [node * np.arange(int(n * spacing / node) + 2) for n in shape]
    nodes = np.zeros([*map(len, axes), 4])
    for k, j, i in np.ndindex(*nodes.shape[:3]):
        mm = np.array([axes[0][k], axes[1][j], axes[2][i]])
        nodes[k, j, i] = displacement(mm + scan.origin, position, translation)
    voxels = np.stack(np.meshgrid(*[spacing * np.arange(n) for n in shape], indexing="ij"), -1)
    found: Array = RegularGridInterpolator(axes, nodes)(voxels)
    return found


def domain(
    box: Any, scan: AnnotatedImage, atlas: AnnotatedImage, spacing: float, p: Array, t: Array
) -> Array:
    """Corners and middles of an organ's box (first and last voxels), moved (n, 3), in voxels."""
    moved = []
    for index in product(*[(a, (a + b - 1) / 2, b - 1) for a, b in box]):
        at = np.array(index) * spacing + atlas.origin
        *u, support = displacement(at, p - t, t)
        if support > 0:
            moved.append((at + u - scan.origin) / spacing)
    return np.array(moved).reshape(-1, 3)


def shares(
    scan: AnnotatedImage,
    atlases: Sequence[AnnotatedImage],
    boxes: Sequence[dict[int, Any]],
    matches: Sequence[tuple[Array, Array]],
    values: Sequence[int],
    nus: Sequence[float],
    spacing: float,
) -> tuple[Array, Array]:
    """Share of each organ at each voxel (organ, z, y, x), and whether a voxel is clear.

    A voxel that falls between two voxels of an atlas, within rounding, is not, nor its neighbours.
    """
    shape = scan.image.shape
    step = round(16 / spacing)
    clear = np.ones(shape, bool)
    out = np.zeros((len(values), *shape))
    inside = np.zeros((len(values), *shape), bool)
    for o, value in enumerate(values):
        moved = [
            domain(box[value], scan, atlas, spacing, *m)
            for atlas, box, m in zip(atlases, boxes, matches, strict=True)
            if value in box
        ]
        points = np.concatenate([*moved, np.zeros((0, 3))])
        if len(points):
            # Whole cells between nodes.
            low = np.maximum(np.floor(points.min(0) - 15 / spacing), 0).astype(int) // step * step
            high = np.maximum(np.ceil(points.max(0) + 15 / spacing) + 1, 0).astype(int)
            high = -(-high // step) * step
            inside[o][tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    fields = [field(scan, spacing, *m) for m in matches]
    votes, totals = np.zeros_like(out), np.zeros_like(out)
    for atlas, box, u in zip(atlases, boxes, fields, strict=True):
        for x in np.ndindex(*shape):
            mm = np.array(x) * spacing + scan.origin - u[x][:3]
            y = (mm - atlas.origin) / spacing
            if (np.abs(y - np.floor(y) - 0.5) < 1e-4).any():
                clear[x] = False
            at = tuple(np.floor(y + 0.5).astype(int).tolist())
            if not all(0 <= a < n for a, n in zip(at, atlas.image.shape, strict=True)):
                continue
            difference = scan.image[x] - atlas.image[at]
            for o, value in enumerate(values):
                if value in box:
                    weight = u[x][3] * np.exp(-(difference**2) / (2 * nus[o] ** 2))
                    totals[(o, *x)] += weight
                    votes[(o, *x)] += weight * (atlas.labels[at] == value)
    np.divide(votes, totals, out=out, where=(totals > 0) & inside)
    return np.where(inside, smoothed(out), 0), minimum_filter(clear, 3, mode="nearest")


def smoothed(shares: Array) -> Array:
    """The mean over 27 neighbours, those on the diagonals of less weight; edges repeat."""
    padded = np.pad(shares, [(0, 0)] + 3 * [(1, 1)], mode="edge")
    out = np.zeros_like(shares)
    depth, height, width = shares.shape[1:]
    for k, j, i in product(range(3), repeat=3):
        weight = np.prod([(1, 2, 1)[d] / 4 for d in (k, j, i)])
        out += weight * padded[:, k : k + depth, j : j + height, i : i + width]
    return out


def decide(shares: Array, values: Sequence[int], smallest: float = 0.36) -> Array:
    labels = np.zeros(shares.shape[1:], np.uint16)
    for x in np.ndindex(*labels.shape):
        at = [float(share[x]) for share in shares]
        if max(at) >= smallest:
            labels[x] = values[at.index(max(at))]
    return labels
