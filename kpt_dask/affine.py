"""Affines from matches that are partly wrong: RANSAC. Knows points in mm; no atlases, no organs."""

from functools import lru_cache
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
    found, agree = np.empty((4, 3)), np.empty(n, np.bool_)
    if not _fit(source, target, _samples(n), found, agree):
        return None
    return np.ascontiguousarray(found.T), agree


@lru_cache(256)
def _samples(n: int) -> NDArray[np.int64]:
    """Choose 4 of n: all ways (in order), or `TRIALS` of them."""
    if comb(n, 4) <= TRIALS:
        return np.array(list(combinations(range(n), 4)))
    chosen = np.empty((TRIALS, 4), np.int64)
    _choose(n, _DRAWN, chosen)
    return chosen


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
def _fit(
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    samples: NDArray[np.int64],
    out: NDArray[np.float64],
    agree: NDArray[np.bool_],
) -> bool:
    """Find the affine that `fit_affine` gives, if there is one.

    Parameters
    ----------
    samples : int64 array (m, 4)
        Which pairs are tried.
    out : float64 array (4, 3)
        Receives it: x becomes ``(x, 1) @ out``.
    agree : bool array (n)
        Receives who agrees with it.

    Returns
    -------
    bool
        Whether it is plausible, and enough agree.
    """
    if _best(source, target, samples, out) < LEAST:
        return False
    _agree(source, target, out, agree)
    _least_squares(source, target, agree, out)
    return _agree(source, target, out, agree) >= LEAST and _is_plausible(out)


@kernel
def _best(
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    samples: NDArray[np.int64],
    out: NDArray[np.float64],
) -> int:
    """Find the plausible affine through 4 pairs that most agree with, the first in a tie.

    Returns
    -------
    int
        How many agree; 0 if none is plausible.
    """
    edges, moved, inverse = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
    found, agree = np.empty((4, 3)), np.empty(source.shape[0], np.bool_)
    most_agree = 0
    for s in range(samples.shape[0]):
        first = samples[s, 0]
        for k in range(3):
            for a in range(3):
                edges[k, a] = source[samples[s, k + 1], a] - source[first, a]
                moved[k, a] = target[samples[s, k + 1], a] - target[first, a]
        if not abs(_invert(edges, inverse)) > _FLAT:
            continue
        _through(inverse, moved, source[first], target[first], found)
        if not _is_plausible(found):
            continue
        count = _agree(source, target, found, agree)
        if count > most_agree:
            most_agree = count
            out[...] = found
    return most_agree


@kernel
def _least_squares(
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    agree: NDArray[np.bool_],
    out: NDArray[np.float64],
) -> None:
    """Fit an affine to pairs of which four do not lie in a plane."""
    before, after = np.zeros(3), np.zeros(3)
    squares, products, inverse = np.zeros((3, 3)), np.zeros((3, 3)), np.empty((3, 3))
    n = 0
    for m in range(agree.size):
        if agree[m]:
            before += source[m]
            after += target[m]
            n += 1
    before /= n
    after /= n
    for m in range(agree.size):
        if agree[m]:
            for i in range(3):
                for j in range(3):
                    d = source[m, i] - before[i]
                    squares[i, j] += d * (source[m, j] - before[j])
                    products[i, j] += d * (target[m, j] - after[j])
    _invert(squares, inverse)
    _through(inverse, products, before, after, out)


@kernel
def _through(inverse: Any, moved: Any, before: Any, after: Any, out: Any) -> None:
    """Make the affine with the linear part ``inverse @ moved`` that maps one point to another."""
    for j in range(3):
        for i in range(3):
            out[i, j] = 0.0
            for k in range(3):
                out[i, j] += inverse[i, k] * moved[k, j]
        out[3, j] = after[j]
        for k in range(3):
            out[3, j] -= before[k] * out[k, j]


@kernel
def _agree(source: Any, target: Any, affine: Any, agree: Any) -> int:
    """Which points an affine maps less than `TOLERANCE` from their targets; counts them."""
    count = 0
    for m in range(source.shape[0]):
        apart = 0.0
        for a in range(3):
            d = affine[3, a] - target[m, a]
            for k in range(3):
                d += source[m, k] * affine[k, a]
            apart += d * d
        agree[m] = apart < TOLERANCE * TOLERANCE
        count += 1 if agree[m] else 0
    return count


@kernel
def _is_plausible(affine: Any) -> bool:
    """Whether an affine is not mirrored, and stretches nothing beyond `SCALES`."""
    linear = affine[:3]
    if not _determinant(linear) > 0:
        return False
    # All squared stretches, the eigenvalues of L Lᵀ, lie between two bounds.
    least, most = SCALES[0] ** 2, SCALES[1] ** 2
    low, high = np.empty((3, 3)), np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            squared = 0.0
            for k in range(3):
                squared += linear[i, k] * linear[j, k]
            low[i, j] = squared - (least if i == j else 0.0)
            high[i, j] = (most if i == j else 0.0) - squared
    return _is_positive(low) and _is_positive(high)


@kernel
def _invert(m: Any, out: Any) -> float:
    """Invert a matrix; gives its determinant."""
    determinant: float = _determinant(m)
    for i in range(3):
        for j in range(3):
            p, q, r, t = (j + 1) % 3, (j + 2) % 3, (i + 1) % 3, (i + 2) % 3
            out[i, j] = (m[p, r] * m[q, t] - m[p, t] * m[q, r]) / determinant
    return determinant


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
