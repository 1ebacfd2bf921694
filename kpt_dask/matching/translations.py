"""Translations that matches propose: their density, and how far apart the closest pairs are."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.exponential import LOG2_E, exp2
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.simd import LANES

BANDWIDTH = 10.0
"""σ of the density of translations, mm."""

_NEGLIGIBLE = 29.0
"""−log₂ of the smallest weight that counts in a density."""
_SAMPLE = 64
"""Size of the sample of test keypoints that predicts how far apart the closest pairs are."""
_MARGIN = 1.5
"""Pairs within the predicted distance, typical, as a multiple of the pairs to keep."""
_FARTHEST = 100_000
"""Last bin of the histogram of distances, mm; it holds all farther pairs too."""


@kernel
def density(
    points: NDArray[np.float32], samples: NDArray[np.float32], bandwidth: float
) -> NDArray[np.float32]:
    """Mean of Gaussians of `bandwidth` centred at `samples` (m, 3), at `points` (n, 3).

    Unnormalized, so it is a share between 0 and 1: how much of all samples agrees. The same
    density serves the Hough transform (its mode) and p(m).
    """
    out = np.zeros(points.shape[0], np.float32)
    m = samples.shape[0]
    scale = np.float32(0.5 * LOG2_E / (bandwidth * bandwidth))
    farthest, nothing = np.float32(_NEGLIGIBLE), np.float32(0)
    blocks = (m + LANES - 1) // LANES
    # Padded to whole vectors by samples that are infinitely far.
    along = np.full((3, blocks * LANES), np.inf, np.float32)
    for j in range(m):
        for axis in range(3):
            along[axis, j] = samples[j, axis]
    zs, ys, xs = along[0], along[1], along[2]
    sums = np.empty(LANES, np.float32)
    for i in range(points.shape[0]):
        z, y, x = points[i, 0], points[i, 1], points[i, 2]
        sums[:] = nothing
        for b in range(blocks):
            begin = np.uint64(b * LANES)
            for lane in range(np.uint64(LANES)):
                dz, dy, dx = zs[begin + lane] - z, ys[begin + lane] - y, xs[begin + lane] - x
                v = (dz * dz + dy * dy + dx * dx) * scale
                w = exp2(-min(v, farthest))
                sums[lane] += w if v < farthest else nothing
        total = 0.0
        for lane in range(LANES):
            total += sums[lane]
        out[i] = total / m
    return out


def closest_pairs_radius(
    test: NDArray[np.float32], atlas: NDArray[np.float32], share: float
) -> float:
    """ε_x: the distance below which the closest `share` of all pairs lie, mm.

    Exact, in bounded memory: a histogram finds the millimetre, and only the pairs of that
    millimetre are sorted. A sample predicts the distance, and pairs farther apart along z are
    skipped; should the prediction turn out too small, all pairs are counted.
    """
    rank = max(math.ceil(round(share * test.shape[0] * atlas.shape[0], 6)), 1)
    other = np.ascontiguousarray(atlas[np.argsort(atlas[:, 0], kind="stable")].T)
    sampled = np.ascontiguousarray(test[:: max(test.shape[0] // _SAMPLE, 1)])
    below = np.cumsum(_count_millimetres(sampled, other, _FARTHEST))
    farthest = int(np.searchsorted(below, min(_MARGIN * share, 1.0) * below[-1])) + 1
    below = np.cumsum(_count_millimetres(test, other, min(farthest, _FARTHEST)))
    if below[-2] < rank:
        below = np.cumsum(_count_millimetres(test, other, _FARTHEST))
    millimetre = int(np.searchsorted(below, rank))
    before = int(below[millimetre - 1]) if millimetre else 0
    inside = _pairs_of_millimetre(test, other, millimetre, int(below[millimetre]) - before)
    inside.sort()
    # The next float up, because pairs are kept that are strictly closer; and far enough
    # from 0 that its square is not 0.
    return max(float(np.nextafter(inside[rank - before - 1], np.float32(np.inf))), 1e-6)


@kernel
def _near(point: Any, others: Any, farthest: int, distances: Any) -> Any:
    """Find a range of points that holds all within a distance, and compute their distances.

    Parameters
    ----------
    point : float32 array (3)
    others : float32 array (3, m)
        Sorted by z, mm.
    farthest : int
        Distance, mm; all points are in the range if it is `_FARTHEST`.
    distances : float32 array (m)
        Receives the distances of the range, mm.
    """
    zs, ys, xs = others[0], others[1], others[2]
    first, stop = 0, zs.size
    if farthest < _FARTHEST:
        # A millimetre of tolerance for rounding.
        first = np.searchsorted(zs, point[0] - (farthest + 1))
        stop = np.searchsorted(zs, point[0] + (farthest + 1))
    z, y, x = point[0], point[1], point[2]
    for j in range(np.uint64(first), np.uint64(stop)):
        dz, dy, dx = z - zs[j], y - ys[j], x - xs[j]
        distances[j] = np.sqrt(dz * dz + dy * dy + dx * dx)
    return first, stop


@kernel
def _count_millimetres(test: Any, others: Any, farthest: int) -> Any:
    """Count pairs by millimetre, int64 (farthest + 1); the last is complete if `_FARTHEST`."""
    counts = np.zeros(farthest + 1, np.int64)
    distances = np.empty(others.shape[1], np.float32)
    for i in range(test.shape[0]):
        first, stop = _near(test[i], others, farthest, distances)
        for j in range(first, stop):
            counts[int(min(distances[j], np.float32(farthest)))] += 1
    return counts


@kernel
def _pairs_of_millimetre(test: Any, others: Any, millimetre: int, n: int) -> Any:
    """Find the distances of all `n` pairs of a millimetre."""
    # Branch-free compaction: a distance of another millimetre is overwritten by the next.
    out = np.empty(n + 1, np.float32)
    distances = np.empty(others.shape[1], np.float32)
    k = 0
    for i in range(test.shape[0]):
        first, stop = _near(test[i], others, min(millimetre + 1, _FARTHEST), distances)
        for j in range(first, stop):
            out[k] = distances[j]
            k += int(min(distances[j], np.float32(_FARTHEST))) == millimetre
    return out[:n]
