"""Affines from matches that are partly wrong: RANSAC. Knows points in mm; no atlases, no organs."""

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    samples = _samples(n)
    corners = homogeneous[samples]
    spread = np.abs(np.linalg.det(corners)) > _FLAT
    affines = np.linalg.solve(corners[spread], target[samples[spread]])
    affines = affines[_plausible(affines[:, :3])]
    if not len(affines):
        return None
    counts = _agree(homogeneous @ affines, target).sum(axis=1)
    best = _agree(homogeneous @ affines[np.argmax(counts)], target)
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
        return np.array(list(combinations(range(n), 4)))
    drawn = np.random.default_rng(SEED).random((TRIALS, n))
    least = np.argpartition(drawn, 3, axis=1)[:, :4]
    order = np.take_along_axis(drawn, least, axis=1).argsort(axis=1, kind="stable")
    return np.take_along_axis(least, order, axis=1)


def _plausible(linear: NDArray[Any]) -> NDArray[np.bool_]:
    # Most fail already by what the stretches multiply to, or by the sum of their squares.
    least, most = SCALES
    volume, squares = np.linalg.det(linear), (linear**2).sum(axis=(-2, -1))
    found = (volume >= 0.999 * least**3) & (volume <= 1.001 * most**3)
    found = np.asarray(found & (squares <= 3.003 * most**2))
    stretches = np.linalg.svd(linear[found], compute_uv=False)
    found[found] = (stretches >= least).all(-1) & (stretches <= most).all(-1)
    return found


def _agree(mapped: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray(np.linalg.norm(mapped - target, axis=-1) < TOLERANCE)
