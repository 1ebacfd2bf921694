"""Affines of organs: least squares over an organ's matches, held to how the whole body lies.

Knows points in mm; no atlases, no organs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.matching.trend import UNIT, Trend

LEAST = 3
"""Least number of matches of an organ to which an affine is fitted."""
WIDTHS = 40.0, 25.0, 15.0, 15.0, 15.0
"""σ of each round of reweighting, mm."""
PRIOR = 0.16, 0.64, 0.64, 0.64
"""Precision of the prior on an organ's offset and slopes, in matches.

A match is off by some 8 mm; an organ lies 20 mm beside where the body's affine puts it, and
differs from it by 10 mm in 100 mm (standard deviations): (8/20)² and (8/10)².
"""
SCALES = 0.6, 1.6
"""Least and largest singular value of a plausible affine."""


def fit_affines(
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    ends: NDArray[np.int64],
    bodies: Sequence[Trend],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit an affine to each group of matches: that of the body, and what the matches say beyond.

    Parameters
    ----------
    source, target : float64 arrays (n, 3)
        Points in the atlas and in the scan, mm; those of a group follow each other.
    ends : int64 array (g)
        End of each group.
    bodies : sequence of Trend
        Of each group: the trend of all matches of its atlas.

    Returns
    -------
    affines : float64 array (g, 3, 4)
        x becomes ``affine[:, :3] @ x + affine[:, 3]``. NaN where a group has fewer than `LEAST`
        matches, where none agrees with the body, or where the affine is implausible: mirrored, or
        with a singular value outside of `SCALES`.
    agreement : float64 array (n)
        exp(−d²/2σ²) of each match, d mm from where its group's affine maps it; 0 without one.

    Notes
    -----
    With r_m = y_m − B(x_m), B the body's affine, δ and D minimize
    Σ w_m ‖r_m − δ − D (x_m − c)‖² + ‖δ‖² π₀ + ‖D‖² π₁, π from `PRIOR`, c the mean of the x_m, and
    w_m = exp(−‖r_m − δ − D (x_m − c)‖²/2σ²) of the round before: a maximum a posteriori.
    """
    affines, agreement = np.full((len(ends), 3, 4), np.nan), np.zeros(len(source))
    counts = np.diff(ends, prepend=0)
    fitted = np.flatnonzero(counts >= LEAST)
    if not fitted.size:
        return affines, agreement
    rows = np.concatenate([np.arange(end - n, end) for n, end in zip(counts, ends, strict=True)])
    rows = rows[np.isin(np.repeat(np.arange(len(ends)), counts), fitted)]
    group = np.repeat(np.arange(fitted.size), counts[fitted])
    begins = np.cumsum(counts[fitted]) - counts[fitted]
    body = np.array([affine_of(bodies[g]) for g in fitted.tolist()])
    x, y = source[rows], target[rows]
    centre = np.add.reduceat(x, begins) / counts[fitted][:, None]
    design = np.column_stack([np.ones(len(x)), (x - centre[group]) / UNIT])
    beyond = y - _mapped(body[group], x)
    found = np.zeros((fitted.size, 4, 3))
    weight = np.zeros(len(x))
    for sigma in WIDTHS:
        weight = _agreement(beyond, design, found[group], sigma)
        outer = weight[:, None, None] * design[:, :, None] * design[:, None, :]
        left = np.add.reduceat(outer, begins) + np.diag(PRIOR)
        right = np.add.reduceat(
            weight[:, None, None] * design[:, :, None] * beyond[:, None, :], begins
        )
        found = np.linalg.solve(left, right)
    weight = _agreement(beyond, design, found[group], WIDTHS[-1])
    linear = body[:, :, :3] + found[:, 1:].transpose(0, 2, 1) / UNIT
    slope_at_centre = np.einsum("gja,gj->ga", found[:, 1:] / UNIT, centre)
    offset = body[:, :, 3] + found[:, 0] - slope_at_centre
    usable = _is_plausible(linear) & (np.add.reduceat(weight, begins) > 1)
    affines[fitted[usable]] = np.concatenate([linear, offset[..., None]], axis=2)[usable]
    agreement[rows] = weight * usable[group]
    return affines, agreement


def affine_of(trend: Trend) -> NDArray[np.float64]:
    """Affine (3, 4) from the atlas to the scan; the offset alone where its slope is implausible.

    The trend says how far a point of the scan has come; here it is told by points of the atlas.
    """
    slope = trend.slope.T / UNIT
    back = np.eye(3) - slope
    if abs(np.linalg.det(back)) > 1e-3:
        linear = np.linalg.inv(back)
        if _is_plausible(linear[None])[0]:
            offset = linear @ (trend.offset - slope @ trend.centre)
            return np.column_stack([linear, offset])
    return np.column_stack([np.eye(3), trend.offset])


def _mapped(affine: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.einsum("naj,nj->na", affine[:, :, :3], x) + affine[:, :, 3]
    return found


def _agreement(
    beyond: NDArray[np.float64],
    design: NDArray[np.float64],
    found: NDArray[np.float64],
    sigma: float,
) -> NDArray[np.float64]:
    off = beyond - np.einsum("ni,nia->na", design, found)
    weight: NDArray[np.float64] = np.exp(-(off**2).sum(axis=1) / (2 * sigma * sigma))
    return weight


def _is_plausible(linear: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of (n, 3, 3) is not mirrored and has singular values within `SCALES`."""
    values = np.linalg.svd(linear, compute_uv=False)
    inside = (values[:, -1] > SCALES[0]) & (values[:, 0] < SCALES[1])
    found: NDArray[np.bool_] = inside & (np.linalg.det(linear) > 0)
    return found
