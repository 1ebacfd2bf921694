"""Affines from matches that are partly wrong: RANSAC. Knows points in mm; no atlases, no organs."""

from functools import cache
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.jit import kernel

LEAST = 8
"""Matches that must agree, at least: twice the 4 that any affine fits exactly."""
TOLERANCE = 5.0
"""How far from where the affine maps it a point may lie to agree, mm."""
SCALES = (0.7, 1.4)
"""Smallest and largest stretch of a plausible affine, in any direction."""
TRIALS = 500
"""Affines that are tried, each through 4 matches."""
SEED = 0
"""Of the choice of matches, where there are more than `TRIALS` ways to choose."""

_DRAWN = np.random.default_rng(SEED).random((TRIALS, 4))
_FLAT = 1.0
"""mm³; four points that span less lie in a plane."""


def fit_affine(
    source: NDArray[np.float64], target: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """Find the plausible affine that most points agree with.

    Parameters
    ----------
    source, target : float64 arrays (n, 3)
        Points before and after, mm.

    Returns
    -------
    affine : float64 array (3, 4)
        Least squares over those that agree with the best of the affines through 4 pairs, the
        first in a tie: x becomes ``affine[:, :3] @ x + affine[:, 3]``.
    agree : bool array (n)
        Which points it maps less than `TOLERANCE` from their targets.

    None if fewer than `LEAST` agree, or if it is implausible: mirrored, or with a singular
    value outside of `SCALES`.
    """
    n = len(source)
    if n < LEAST:
        return None
    homogeneous = np.column_stack([source, np.ones(n)])
    found = np.empty((4, 3))
    if not _best(source, target, _samples(n), found):
        return None
    best = _agree(homogeneous @ found, target)
    if best.sum() < LEAST:
        return None
    refined = np.linalg.lstsq(homogeneous[best], target[best], rcond=None)[0]
    agree = _agree(homogeneous @ refined, target)
    if agree.sum() < LEAST or not _plausible(refined[:3]):
        return None
    return np.ascontiguousarray(refined.T), agree


def _samples(n: int) -> NDArray[np.int64]:
    """Choose 4 of n: all ways (in order), or `TRIALS` of them."""
    if comb(n, 4) <= TRIALS:
        return _all_fours(n)
    chosen = np.empty((TRIALS, 4), np.int64)
    _choose(n, _DRAWN, chosen)
    return chosen


@cache
def _all_fours(n: int) -> NDArray[np.int64]:
    return np.array(list(combinations(range(n), 4)))


@kernel
def _choose(n: int, drawn: NDArray[np.float64], chosen: NDArray[np.int64]) -> None:
    """Choose 4 of n by numbers from 0 to 1."""
    before = np.empty(4, np.int64)
    for s in range(len(drawn)):
        for k in range(4):
            # The i-th of those that are left, so that none is chosen twice.
            i = int(drawn[s, k] * (n - k))
            at = 0
            while at < k and i >= before[at]:
                i += 1
                at += 1
            before[at + 1 : k + 1] = before[at:k].copy()
            before[at] = i
            chosen[s, k] = i


@kernel
def _best(
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    samples: NDArray[np.int64],
    out: NDArray[np.float64],
) -> bool:
    """Find the plausible affine through 4 pairs that most agree with, the first in a tie.

    Parameters
    ----------
    samples : int64 array (m, 4)
        Which pairs.
    out : float64 array (4, 3)
        Receives it: x becomes ``(x, 1) @ out``.

    Returns
    -------
    bool
        Whether any is plausible.
    """
    least, most = SCALES[0] ** 2, SCALES[1] ** 2
    edges, moved, linear = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
    inverse, low, high = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
    most_agree = 0
    for s in range(samples.shape[0]):
        first = samples[s, 0]
        for k in range(3):
            for a in range(3):
                edges[k, a] = source[samples[s, k + 1], a] - source[first, a]
                moved[k, a] = target[samples[s, k + 1], a] - target[first, a]
        volume = _determinant(edges)
        if not abs(volume) > _FLAT:
            continue
        for i in range(3):
            for j in range(3):
                p, q, r, t = (j + 1) % 3, (j + 2) % 3, (i + 1) % 3, (i + 2) % 3
                inverse[i, j] = (edges[p, r] * edges[q, t] - edges[p, t] * edges[q, r]) / volume
        for i in range(3):
            for j in range(3):
                linear[i, j] = 0.0
                for k in range(3):
                    linear[i, j] += inverse[i, k] * moved[k, j]
        if not _determinant(linear) > 0:
            continue
        # All squared stretches, the eigenvalues of L Lᵀ, lie between two bounds.
        for i in range(3):
            for j in range(3):
                squared = 0.0
                for k in range(3):
                    squared += linear[i, k] * linear[j, k]
                low[i, j] = squared - (least if i == j else 0.0)
                high[i, j] = (most if i == j else 0.0) - squared
        if not (_is_positive(low) and _is_positive(high)):
            continue
        agree = 0
        for m in range(source.shape[0]):
            apart = 0.0
            for a in range(3):
                d = target[first, a] - target[m, a]
                for k in range(3):
                    d += (source[m, k] - source[first, k]) * linear[k, a]
                apart += d * d
            agree += 1 if apart < TOLERANCE * TOLERANCE else 0
        if agree > most_agree:
            most_agree = agree
            out[:3] = linear
            for a in range(3):
                out[3, a] = target[first, a]
                for k in range(3):
                    out[3, a] -= source[first, k] * linear[k, a]
    return most_agree > 0


@kernel
def _determinant(m: NDArray[np.float64]) -> float:
    value: float = (
        m[0, 0] * (m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1])
        - m[0, 1] * (m[1, 0] * m[2, 2] - m[1, 2] * m[2, 0])
        + m[0, 2] * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
    )
    return value


@kernel
def _is_positive(m: NDArray[np.float64]) -> bool:
    """Whether all eigenvalues of a symmetric matrix are over 0: Sylvester's criterion."""
    corner = m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]
    return bool(m[0, 0] > 0 and corner > 0 and _determinant(m) > 0)


def _plausible(linear: NDArray[Any]) -> bool:
    stretches = np.linalg.svd(linear, compute_uv=False)
    inside = stretches[-1] >= SCALES[0] and stretches[0] <= SCALES[1]
    return bool(inside and np.linalg.det(linear) > 0)


def _agree(mapped: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray(np.linalg.norm(mapped - target, axis=-1) < TOLERANCE)
