"""Mode `local` the plain way, written from the equations in the docstrings, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, map_coordinates

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
    u, weight = np.zeros(3), near
    for width in (25.0, *rounds * [agreement]):
        weight = near * np.exp(-(np.linalg.norm(t - u, axis=1) ** 2) / (2 * width**2))
        if weight.sum() < 1e-30:
            return np.zeros(4)
        u = weight @ t / (weight.sum() + 0.3)
    return np.array([*u, weight.sum()])


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


@dataclass(frozen=True)
class Map:
    """Of an atlas: y − x (mm) and √weight at the points of a lattice, and ρ^¼ of each organ."""

    values: Array
    step: float
    first: Any
    correlation: Any

    def at(self, x: Array) -> Array:
        """The same at voxels (3, n) of the scan."""
        where = (x - np.array(self.first)[:, None]) / self.step
        return np.array(
            [map_coordinates(one, where, order=1, mode="nearest") for one in self.values]
        )


def inside(
    scan: AnnotatedImage,
    atlases: Sequence[AnnotatedImage],
    boxes: Sequence[dict[int, Any]],
    matches: Sequence[tuple[Array, Array]],
    values: Sequence[int],
    spacing: float,
) -> Array:
    """Where each organ is looked for (organ, z, y, x): whole cells about 16 mm wide."""
    step = round(16 / spacing)
    out = np.zeros((len(values), *scan.image.shape), bool)
    for o, value in enumerate(values):
        moved = [
            domain(box[value], scan, atlas, spacing, *m)
            for atlas, box, m in zip(atlases, boxes, matches, strict=True)
            if value in box
        ]
        points = np.concatenate([*moved, np.zeros((0, 3))])
        if len(points):
            low = np.maximum(np.floor(points.min(0) - 15 / spacing), 0).astype(int) // step * step
            high = np.maximum(np.ceil(points.max(0) + 15 / spacing) + 1, 0).astype(int)
            high = -(-high // step) * step
            out[o][tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return out


def shares(
    scan: AnnotatedImage,
    atlases: Sequence[AnnotatedImage],
    maps: Sequence[Map],
    where: Array,
    values: Sequence[int],
    nus: Sequence[float],
    spacing: float,
) -> Array:
    """Share of each organ of the votes (organ, z, y, x)."""
    shape = scan.image.shape
    votes, totals = np.zeros(where.shape), np.zeros(where.shape)
    for atlas, one in zip(atlases, maps, strict=True):
        x = np.indices(shape).reshape(3, -1)
        *u, root = one.at(x.astype(float))
        mm = x * spacing + np.array(scan.origin)[:, None] + u
        y = (mm - np.array(atlas.origin)[:, None]) / spacing
        at = np.floor(y + 0.5).astype(int)
        held = ((at >= 0) & (at < np.array(atlas.image.shape)[:, None])).all(axis=0)
        nearest = tuple(np.clip(at, 0, np.array(atlas.image.shape)[:, None] - 1))
        hu = map_coordinates(atlas.image.astype(float), y, order=1, mode="nearest")
        difference = scan.image.ravel() - hu
        for o, value in enumerate(values):
            if (atlas.labels == value).any():
                weight = np.exp(-(difference**2) / (2 * nus[o] ** 2)) + 1e-6
                weight *= root**2 * one.correlation[o] ** 4 * held
                totals[o] += weight.reshape(shape)
                votes[o] += (weight * (atlas.labels[nearest] == value)).reshape(shape)
    out = np.zeros(where.shape)
    np.divide(votes, totals, out=out, where=(totals > 0) & where)
    return np.where(where, smoothed(out), 0)


def by_hu(shares: Array, hu: Array, weight: float) -> Array:
    """Logits shifted by what the HU of the whole scan say."""
    out = shares.astype(float)
    bins = np.clip(np.floor((hu + 1000) / 20).astype(int), 0, 199)
    for share in out:
        some = share > 0.02
        p, at = share[some], bins[some]
        own = np.bincount(at, p * (p > 0.5), 200)
        rest = np.bincount(at, 1 - p, 200)
        own, rest = (gaussian_filter1d(h, 1, mode="constant") + 0.2 for h in (own, rest))
        odds = p * ((own / own.sum()) / (rest / rest.sum()))[at] ** weight
        share[some] = odds / (odds + 1 - p)
    return out


def agreed(shares: Array, hu: Array, theta: float, strength: float, sweeps: int = 5) -> Array:
    """Mean field over organs and background, as a share against the background alone."""
    some = shares > 0
    background = np.maximum(1 - shares.sum(axis=0), 1e-3) * theta / (1 - theta)
    u = np.concatenate([np.where(some, np.maximum(shares, 1e-4), 0), background[None]])
    q = u / u.sum(axis=0)
    for _ in range(sweeps):
        total = np.zeros_like(q)
        for axis in range(3):
            for way in (-1, 1):
                other = np.roll(hu, way, axis).astype(float)
                weight = strength * np.exp(-((hu - other) ** 2) / (2 * 25**2))
                # What comes around from the other end is no neighbour.
                np.moveaxis(weight, axis, 0)[0 if way == 1 else -1] = 0
                total += weight * np.roll(q, way, axis + 1)
        q = u * np.exp(total)
        q /= q.sum(axis=0)
    return np.asarray(theta * q[:-1] / (theta * q[:-1] + (1 - theta) * q[-1]))


def smoothed(shares: Array) -> Array:
    """The mean over 125 neighbours, the farther of less weight; edges repeat."""
    padded = np.pad(shares, [(0, 0)] + 3 * [(2, 2)], mode="edge")
    out = np.zeros_like(shares)
    depth, height, width = shares.shape[1:]
    for k, j, i in product(range(5), repeat=3):
        weight = np.prod([(1, 4, 6, 4, 1)[d] / 16 for d in (k, j, i)])
        out += weight * padded[:, k : k + depth, j : j + height, i : i + width]
    return out


def decide(shares: Array, values: Sequence[int], smallest: float = 0.4) -> Array:
    labels = np.zeros(shares.shape[1:], np.uint16)
    for x in np.ndindex(*labels.shape):
        at = [float(share[x]) for share in shares]
        if max(at) >= smallest:
            labels[x] = values[at.index(max(at))]
    return labels
