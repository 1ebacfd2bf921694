"""Matching, voting and transfer the plain way, written from the equations.

Wachinger et al. 2015, sections 2.2–2.4, in float64 loops over whole arrays; to be read
beside neither the kernels nor the blocks. Where the equations leave something open, the
readings are those that the public docstrings give.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Vector = tuple[float, ...]


@dataclass(frozen=True)
class Points:
    """Keypoints: F^x (n, 3) mm, F^σ (n) mm, sign (n), F^D (n, 64), organ label (n)."""

    position: Array
    scale: Array
    sign: Array
    descriptor: Array
    label: Array


@dataclass(frozen=True)
class Match:
    """One match m: test keypoint, atlas keypoint, ‖F^D − 𝓕^D‖²."""

    test: int
    atlas: int
    squared: int


def distance(a: Any, b: Any) -> float:
    """Euclidean."""
    return sqrt(sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)))


def squared_distance(a: Any, b: Any) -> int:
    """Of the closest frames, where keypoints have several."""
    return min(
        sum((p - q) ** 2 for p, q in zip(one, other, strict=True))
        for one in np.atleast_2d(a).tolist()
        for other in np.atleast_2d(b).tolist()
    )


def nearest(
    test: Points, atlas: Points, shift: Any = (0, 0, 0), radius: float = inf
) -> list[Match]:
    """Constrained argmin (eq. 2) and the ratio test on Euclidean distances.

    With a radius, only atlas keypoints with ‖F^x − (𝓕^x + t)‖ < ε_x are candidates.
    """
    matches = []
    for i in range(len(test.scale)):
        candidates = []
        for j in range(len(atlas.scale)):
            ratio = float(test.scale[i]) / float(atlas.scale[j])
            if not 1 / 2 <= ratio <= 2 or test.sign[i] != atlas.sign[j]:
                continue
            if radius < inf and not distance(test.position[i], atlas.position[j] + shift) < radius:
                continue
            candidates.append((squared_distance(test.descriptor[i], atlas.descriptor[j]), j))
        candidates.sort()
        if not candidates:
            continue
        second = candidates[1][0] if len(candidates) > 1 else inf
        # d1 / d2 > 0.9 in whole numbers: a float's rounding must not decide.
        if second < inf and 100 * candidates[0][0] > 81 * second:
            continue
        matches.append(Match(i, candidates[0][1], candidates[0][0]))
    return matches


def translations(test: Points, atlas: Points, matches: Sequence[Match]) -> list[Vector]:
    return [
        tuple((test.position[m.test].astype(float) - atlas.position[m.atlas]).tolist())
        for m in matches
    ]


def density(at: Vector, samples: Sequence[Vector], bandwidth: float = 10.0) -> float:
    """Mean of Gaussians of the bandwidth around the samples, 1 at its highest."""
    total = sum(exp(-(distance(at, sample) ** 2) / (2 * bandwidth**2)) for sample in samples)
    return total / len(samples)


def mode(proposed: Sequence[Vector]) -> Vector:
    """Translation that most agree on, among those proposed; the first in a tie."""
    heights = [density(t, proposed) for t in proposed]
    return proposed[heights.index(max(heights))]


def largest_distance_kept(test: Points, atlas: Points, shift: Vector, share: float = 0.1) -> float:
    """Largest ‖F^x − (𝓕^x + t)‖ among the closest tenth of all pairs."""
    distances = sorted(distance(p, q + shift) for p in test.position for q in atlas.position)
    return distances[max(-(-len(distances) * round(100 * share) // 100), 1) - 1]


def match_atlas(test: Points, atlas: Points) -> tuple[list[Match], list[float]]:
    """Both matchings with one atlas, and p(m) of the matches of the second."""
    first = nearest(test, atlas)
    if not first:
        return [], []
    shift = mode(translations(test, atlas, first))
    # Just beyond: the farthest pair of the closest tenth stays.
    radius = largest_distance_kept(test, atlas, shift) * (1 + 1e-7) + 1e-9
    matches = nearest(test, atlas, np.array(shift), radius)
    moved = translations(test, atlas, matches)
    return matches, [density(t, moved) for t in moved]


def likelihood(squared: float, tau_squared: float) -> float:
    """p(F | 𝓕, m) (eq. 4)."""
    return (2 * pi * tau_squared) ** -0.5 * exp(-squared / (2 * tau_squared))


def votes(
    n_keypoints: int,
    values: Sequence[int],
    keypoint: Sequence[int],
    label: Sequence[int],
    squared: Sequence[float],
    probability: Sequence[float],
) -> tuple[list[list[float]], list[int]]:
    """p(L) of every test keypoint over the organs, and L̂ or 0 (eqs. 3–7)."""
    posteriors, winners = [], []
    for k in range(n_keypoints):
        sums = [0.0] * len(values)
        for m in range(len(keypoint)):
            for o, value in enumerate(values):
                if keypoint[m] == k and label[m] == value:
                    sums[o] += likelihood(squared[m], max(squared)) * probability[m]
        total = sum(sums)
        posteriors.append([s / total if total else 0.0 for s in sums])
        winners.append(values[sums.index(max(sums))] if total else 0)
    return posteriors, winners


@dataclass(frozen=True)
class AnnotatedImage:
    """I_m and S_m: HU and labels (z, y, x), and the centre of voxel 0, mm."""

    image: Array
    labels: Array
    origin: Vector


@dataclass(frozen=True)
class Proposal:
    """A match as the transfer sees it."""

    atlas: int
    label: int
    keypoint_label: int
    translation: Vector
    p_label: float
    p_match: float


def transfer(
    scan: AnnotatedImage,
    atlases: Sequence[AnnotatedImage],
    proposals: Sequence[Proposal],
    values: Sequence[int],
    nus: Sequence[float],
    spacing: float,
) -> Array:
    """Share of each organ at each voxel (organ, z, y, x) (eqs. 8–11), voxel by voxel of I_m."""
    shares = np.zeros((len(values), *scan.image.shape))
    totals = np.zeros(len(values))
    for m in proposals:
        if m.label == 0 or m.label != m.keypoint_label:
            continue
        o = list(values).index(m.label)
        weight = m.p_label * m.p_match
        totals[o] += weight
        atlas = atlases[m.atlas]
        # Where a voxel of the atlas's grid comes to lie, in voxels of the scan.
        shift = [
            round((a + t - s) / spacing)
            for a, t, s in zip(atlas.origin, m.translation, scan.origin, strict=True)
        ]
        for voxel in np.argwhere(atlas.labels == m.label):
            x = tuple(int(v) for v in voxel + shift)
            if all(0 <= i < n for i, n in zip(x, scan.image.shape, strict=True)):
                difference = float(scan.image[x]) - float(atlas.image[tuple(voxel)])
                shares[(o, *x)] += weight * exp(-(difference**2) / (2 * nus[o] ** 2))
    return shares / np.where(totals > 0, totals, 1)[:, None, None, None]


def decide(shares: Array, values: Sequence[int]) -> Array:
    """Ŝ: the organ of the largest share, background where that is under 15 %."""
    labels = np.zeros(shares.shape[1:], np.uint16)
    for x in np.ndindex(labels.shape):
        at = [float(share[x]) for share in shares]
        if max(at) >= 0.15:
            labels[x] = values[at.index(max(at))]
    return labels
