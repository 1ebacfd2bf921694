"""Modes `affine` and `across` the plain way, written from the equations, in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.matching.trend import Trend, fit_trend
from tests.naive.stations import AnnotatedImage

Array = NDArray[Any]


@dataclass(frozen=True)
class Match:
    """A match: where its test keypoint lies, how its atlas moves, and what voting made of it."""

    atlas: int
    label: int
    voted: int
    position: Array
    translation: Array
    p_label: float
    p_match: float


def distance(atlas: AnnotatedImage, value: int, point: Array, spacing: float) -> float:
    """mm to the nearest voxel centre of an organ, 0 in one of its voxels."""
    nearest = np.inf
    for voxel in np.argwhere(atlas.labels == value):
        apart = point - (np.array(atlas.origin) + spacing * voxel)
        if (-spacing / 2 <= apart).all() and (apart < spacing / 2).all():
            return 0.0
        nearest = min(nearest, float(np.linalg.norm(apart)))
    return nearest


def weights(
    matches: Sequence[Match],
    atlases: Sequence[AnnotatedImage],
    values: Sequence[int],
    spacing: float,
    across: Mapping[int, Sequence[int]],
    rho: float | None = None,
) -> Array:
    """w_lm (organ, match)."""
    found = np.zeros((len(values), len(matches)))
    for o, value in enumerate(values):
        for i, m in enumerate(matches):
            if not (atlases[m.atlas].labels == value).any():
                continue
            if rho is not None and value not in across:
                d = distance(atlases[m.atlas], value, m.position - m.translation, spacing)
                found[o, i] = m.p_match * exp(-(d**2) / (2 * rho**2)) if d < 4 * rho else 0
            elif m.label == m.voted and m.label in across.get(value, [value]):
                found[o, i] = m.p_label * m.p_match
    return found


def shift_of(m: Match, scan: AnnotatedImage, atlas: AnnotatedImage, spacing: float) -> Array:
    """Where an atlas's voxel 0 comes to lie, in voxels of the scan."""
    return np.rint((np.array(atlas.origin) + m.translation - scan.origin) / spacing).astype(int)


def without_lightest(weight: Array, moves: Sequence[Any], share: float) -> Array:
    """0 for the moves of one organ that together hold at most a share of its weight."""
    out, heavy = weight.copy(), {}
    for i, move in enumerate(moves):
        heavy[move] = heavy.get(move, 0.0) + weight[i]
    dropped = 0.0
    for move in sorted(sorted(heavy), key=lambda move: heavy[move]):
        dropped += heavy[move]
        if dropped > share * weight.sum():
            break
        out[[i for i, other in enumerate(moves) if other == move]] = 0
    return out


def affine(source: Array, target: Array, body: Trend) -> tuple[Array, Array] | None:
    """Affine of an organ, and how far each pair agrees with it; None if there is no telling.

    Rows of the least squares that hold it to the body's affine stand beside those of the pairs.
    """
    if len(source) < 3:
        return None
    # A point y of the scan has come by offset + (y − centre) @ slope / 100 from one of the atlas.
    back = np.eye(3) - body.slope / 100
    linear = np.linalg.inv(back)
    offset = (body.offset - body.centre @ body.slope / 100) @ linear
    if not plausible(linear):
        linear, offset = np.eye(3), body.offset
    centre = source.mean(axis=0)
    rows = np.column_stack([np.ones(len(source)), (source - centre) / 100])
    beyond = target - (source @ linear + offset)
    held = np.sqrt(np.diag([0.16, 0.64, 0.64, 0.64]))
    found = np.zeros((4, 3))
    for sigma in (40.0, 25.0, 15.0, 15.0, 15.0, 15.0):
        off = np.linalg.norm(beyond - rows @ found, axis=1)
        weight = np.exp(-(off**2) / (2 * sigma**2))
        agreeing = found
        root = np.sqrt(weight)[:, None]
        all_rows = np.concatenate([root * rows, held])
        found = np.linalg.lstsq(all_rows, np.concatenate([root * beyond, np.zeros((4, 3))]))[0]
    slope = agreeing[1:] / 100
    linear = linear + slope
    if not plausible(linear) or weight.sum() <= 1:
        return None
    return np.column_stack([linear.T, offset + agreeing[0] - centre @ slope]), weight


def plausible(linear: Array) -> bool:
    stretch = np.sqrt(np.abs(np.linalg.eigvalsh(linear.T @ linear)))
    return bool(stretch.min() > 0.6 and stretch.max() < 1.6 and np.linalg.det(linear) > 0)


def shares(
    scan: AnnotatedImage,
    atlases: Sequence[AnnotatedImage],
    matches: Sequence[Match],
    weight: Array,
    values: Sequence[int],
    nus: Sequence[float],
    spacing: float,
    *,
    affines: bool = False,
) -> tuple[Array, Array]:
    """Share of each organ at each voxel, and which voxels hang on no rounding."""
    out = np.zeros((len(values), *scan.image.shape))
    clear = np.ones(scan.image.shape, bool)
    weight = weight.copy()
    fitted = {}
    for o, a in np.ndindex(len(values), len(atlases)) if affines else ():
        own = [i for i, m in enumerate(matches) if m.atlas == a and weight[o, i] > 0]
        target = np.array([matches[i].position for i in own]).reshape(-1, 3)
        moved = np.array([matches[i].translation for i in own]).reshape(-1, 3)
        all_own = [m for m in matches if m.atlas == a]
        body = fit_trend(
            np.array([m.position for m in all_own], np.float32).reshape(-1, 3),
            np.array([m.translation for m in all_own], np.float32).reshape(-1, 3),
        )
        found = affine(target - moved, target, body)
        if found is not None:
            fitted[o, a] = found[0], (weight[o, own] * found[1]).sum()
            weight[o, own] = 0
    totals = weight.sum(axis=1)
    for (o, _), (_, w) in fitted.items():
        totals[o] += w

    def add(o: int, atlas: AnnotatedImage, voxel: Any, x: Any, w: float) -> None:
        if atlas.labels[voxel] == values[o]:
            difference = float(scan.image[x]) - float(atlas.image[voxel])
            out[(o, *x)] += w / totals[o] * exp(-(difference**2) / (2 * nus[o] ** 2))

    for i, m in enumerate(matches):
        shift = shift_of(m, scan, atlases[m.atlas], spacing)
        for o in np.flatnonzero(weight[:, i]):
            for voxel in np.argwhere(atlases[m.atlas].labels == values[o]):
                x = tuple((voxel + shift).tolist())
                if all(0 <= k < n for k, n in zip(x, scan.image.shape, strict=True)):
                    add(int(o), atlases[m.atlas], tuple(voxel.tolist()), x, weight[o, i])
    for (o, a), (m, w) in fitted.items():
        for x in np.ndindex(*scan.image.shape):
            mm = np.array(x) * spacing + scan.origin
            at = (np.linalg.solve(m[:, :3], mm - m[:, 3]) - atlases[a].origin) / spacing
            clear[x] &= not (np.abs(at - np.floor(at) - 0.5) < 1e-6).any()
            voxel = tuple(np.floor(at + 0.5).astype(int).tolist())
            if all(0 <= k < n for k, n in zip(voxel, atlases[a].image.shape, strict=True)):
                add(o, atlases[a], voxel, x, w)
    return out, clear
