"""RANSAC of affines: fits to matches of which some are wrong.

Knows points in mm; no atlases, no organs. Deterministic: the samples are drawn once, from a seed.
"""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import kernel
from kpt_dask.runtime.team import map_in_threads

Points = Annotated[NDArray[np.float64], "axis point"]
"""Coordinates of points axis by axis, so that loops over points are vectorised, mm."""

LEAST = 8
"""Least number of matches that must agree: twice the 4 that any affine fits exactly."""
TOLERANCE_MM = 5.0
"""A match agrees with an affine that maps its source less than this from its target."""
SCALES = (0.7, 1.4)
"""Least and largest singular value of a plausible affine."""
TRIALS = 500
"""Samples of 4 matches, at most, through each of which an affine is tried."""
SEED = 0
"""Seed of the samples, where there are more than `TRIALS` ways to choose 4 matches."""

_DRAWN = np.random.default_rng(SEED).random((TRIALS, 4))
_PARTS = 4
"""Number of parts that the groups are dealt into, each fitted by one thread."""
_SQUARED_TOLERANCE = TOLERANCE_MM * TOLERANCE_MM
_LEAST_VOLUME = 1.0
"""mm³; determinant of the edges below which 4 points count as lying in a plane."""


def fit_affines(
    source: NDArray[np.float64], target: NDArray[np.float64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Find the plausible affine of each group of points that most of them agree with.

    Parameters
    ----------
    source, target : float64 arrays (n, 3)
        Points before and after, mm; those of a group follow each other.
    ends : int64 array (g)
        End of each group.

    Returns
    -------
    affines : float64 array (g, 3, 4)
        x becomes ``affine[:, :3] @ x + affine[:, 3]``. Least squares over the pairs that agree
        with the best affine through 4 pairs, the first in a tie. NaN if fewer than `LEAST` agree,
        or if it is implausible: mirrored, or with a singular value outside of `SCALES`.
    agree : bool array (n)
        Whether a pair agrees with its group's affine.
    """
    affines, agree = np.empty((len(ends), 4, 3)), np.zeros(len(source), np.bool_)
    # Interleaved: large groups follow each other, so each part gets as many.
    points = source, target, _DRAWN, ends
    map_in_threads(_fit_groups, ((*points, i, _PARTS, affines, agree) for i in range(_PARTS)))
    return affines.transpose(0, 2, 1), agree


@kernel
def _fit_groups(
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    drawn: NDArray[np.float64],
    ends: NDArray[np.int64],
    first: int,
    step: int,
    out: NDArray[np.float64],
    agree: NDArray[np.bool_],
) -> None:
    """Fit every `step`-th group from `first` on, one thread's part; x becomes (x, 1) @ out[g]."""
    chosen = np.empty((TRIALS, 4), np.int64)
    for g in range(first, ends.size, step):
        begin = ends[g - 1] if g > 0 else 0
        n = ends[g] - begin
        before, after, apart = np.empty((3, n)), np.empty((3, n)), np.empty(n)
        for m in range(n):
            for axis in range(3):
                before[axis, m] = source[begin + m, axis]
                after[axis, m] = target[begin + m, axis]
        samples = chosen[: _choose(n, drawn, chosen)]
        if _fit(before, after, samples, out[g], apart):
            for m in range(n):
                agree[begin + m] = apart[m] < _SQUARED_TOLERANCE
        else:
            out[g] = np.nan


@kernel
def _choose(n: int, drawn: NDArray[np.float64], chosen: NDArray[np.int64]) -> int:
    """Choose samples of 4 out of n: all of them in order, or as many as `drawn` has rows.

    Returns
    -------
    int
        Number of samples; they are written to `chosen` (m, 4).
    """
    count = 0
    if n * (n - 1.0) * (n - 2.0) * (n - 3.0) <= 24 * drawn.shape[0]:
        for a in range(n):
            for b in range(a + 1, n):
                for c in range(b + 1, n):
                    for d in range(c + 1, n):
                        chosen[count, 0], chosen[count, 1] = a, b
                        chosen[count, 2], chosen[count, 3] = c, d
                        count += 1
        return count
    before = np.empty(4, np.int64)
    for s in range(drawn.shape[0]):
        for k in range(4):
            # The i-th of those not chosen yet, so that none is chosen twice.
            i = int(drawn[s, k] * (n - k))
            at = 0
            while at < k and i >= before[at]:
                i += 1
                at += 1
            for later in range(k, at, -1):
                before[later] = before[later - 1]
            before[at] = i
            chosen[s, k] = i
    return len(drawn)


@kernel
def _fit(
    source: Points,
    target: Points,
    samples: NDArray[np.int64],
    out: NDArray[np.float64],
    apart: NDArray[np.float64],
) -> bool:
    """Fit the affine of a group.

    Parameters
    ----------
    source, target : float64 arrays (3, n)
        Pairs of points.
    samples : int64 array (m, 4)
        Indices of the pairs through which affines are tried.
    out : float64 array (4, 3)
        Receives the affine.
    apart : float64 array (n)
        Receives each point's squared distance from its target, mm².

    Returns
    -------
    bool
        Whether the affine is plausible, and enough pairs agree with it.
    """
    if source.shape[1] < LEAST or _best(source, target, samples, out) < LEAST:
        return False
    _agree(source, target, out, apart)
    _least_squares(source, target, apart, out)
    return _agree(source, target, out, apart) >= LEAST and _is_plausible(out)


@kernel
def _best(
    source: Points, target: Points, samples: NDArray[np.int64], out: NDArray[np.float64]
) -> int:
    """Find the plausible affine through 4 pairs that most agree with, the first in a tie.

    Returns
    -------
    int
        Number of pairs that agree; 0 if no affine is plausible.
    """
    edges, moved, inverse = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
    affine, apart = np.empty((4, 3)), np.empty(source.shape[1])
    most_agree = 0
    for s in range(samples.shape[0]):
        first = samples[s, 0]
        for k in range(3):
            for a in range(3):
                edges[k, a] = source[a, samples[s, k + 1]] - source[a, first]
                moved[k, a] = target[a, samples[s, k + 1]] - target[a, first]
        if not abs(_invert(edges, inverse)) > _LEAST_VOLUME:
            continue
        _through(inverse, moved, source[:, first], target[:, first], affine)
        if not _is_plausible(affine):
            continue
        count = _agree(source, target, affine, apart)
        if count > most_agree:
            most_agree = count
            out[...] = affine
            if count == source.shape[1]:
                break
    return most_agree


@kernel
def _least_squares(
    source: Points, target: Points, apart: NDArray[np.float64], out: NDArray[np.float64]
) -> None:
    """Fit an affine to the pairs that agree by least squares; four of them span a volume."""
    before, after = np.zeros(3), np.zeros(3)
    squares, products, inverse = np.zeros((3, 3)), np.zeros((3, 3)), np.empty((3, 3))
    n = 0
    for m in range(apart.size):
        if apart[m] < _SQUARED_TOLERANCE:
            before += source[:, m]
            after += target[:, m]
            n += 1
    before /= n
    after /= n
    for m in range(apart.size):
        if apart[m] < _SQUARED_TOLERANCE:
            for i in range(3):
                for j in range(3):
                    d = source[i, m] - before[i]
                    squares[i, j] += d * (source[j, m] - before[j])
                    products[i, j] += d * (target[j, m] - after[j])
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
def _agree(source: Points, target: Points, affine: Any, apart: NDArray[np.float64]) -> int:
    """Count the pairs that agree with an affine; `apart` (n) receives squared distances, mm²."""
    for a in range(3):
        z, y, x, end = affine[0, a], affine[1, a], affine[2, a], affine[3, a]
        for m in range(apart.size):
            d = end - target[a, m]
            d += source[0, m] * z
            d += source[1, m] * y
            d += source[2, m] * x
            apart[m] = d * d + (apart[m] if a > 0 else 0.0)
    count = 0
    for m in range(apart.size):
        count += apart[m] < _SQUARED_TOLERANCE
    return count


@kernel
def _is_plausible(affine: Any) -> bool:
    """Whether an affine is not mirrored and has singular values within `SCALES`."""
    linear = affine[:3]
    if not _determinant(linear) > 0:
        return False
    # Squared singular values are the eigenvalues of L Lᵀ.
    least, most = SCALES[0] ** 2, SCALES[1] ** 2
    a, d, f = _dot(linear, 0, 0), _dot(linear, 1, 1), _dot(linear, 2, 2)
    b, c, e = _dot(linear, 0, 1), _dot(linear, 0, 2), _dot(linear, 1, 2)
    return _is_positive(a - least, b, c, d - least, e, f - least) and _is_positive(
        most - a, -b, -c, most - d, -e, most - f
    )


@kernel
def _dot(m: Any, i: int, j: int) -> Any:
    return m[i, 0] * m[j, 0] + m[i, 1] * m[j, 1] + m[i, 2] * m[j, 2]


@kernel
def _invert(m: Any, out: Any) -> float:
    """Invert a matrix into `out`; return its determinant."""
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
def _is_positive(a: float, b: float, c: float, d: float, e: float, f: float) -> bool:
    """Whether the matrix (a b c, b d e, c e f) is positive definite: Sylvester's criterion."""
    corner = a * d - b * b
    return (
        a > 0 and corner > 0 and a * (d * f - e * e) - b * (b * f - e * c) + c * (b * e - d * c) > 0
    )
