"""Smooth displacement fields from matches that are partly wrong.

A robust kernel regression of what the matches' translations have beyond their affine trend,
evaluated at the nodes of a lattice and linear in between. Knows points and translations in mm;
no atlases, no organs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.exponential import LOG2_E, exp2
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.simd import LANES
from kpt_dask.matching.trend import Trend, fit_trend
from kpt_dask.options import SIGMA_T, SIGMA_X

Widths = tuple[float, float]
"""σ_x and σ_t: standard deviations of the kernels in space and in translation, mm."""

ROUNDS = 3
"""Number of rounds of reweighting by agreement."""
REACH = 3.0
"""Standard deviations beyond which a match has no say."""
BEYOND = 25.0
"""How far organs lie beside where the affine trend puts them, standard deviation, mm."""
PRIOR = 0.3
"""Weight of the trend among the matches near a point, in matches."""
UNSUPPORTED = 1e-30
"""Matches that disagree so much support nothing."""
_FARTHEST = 120.0
"""−log₂ of the smallest weight: float32 holds no smaller ones."""
AFFINE_SUPPORT = 1e-3
"""Support of the affine trend, which carries the field where no match is near."""


@dataclass(frozen=True)
class Field:
    """The displacement from an atlas to the scan, u(x) = A(x) + r(x), from the atlas's matches.

    A is the affine trend of all matches, r the regression of t_m − A(x_m); see `regress`.

    Attributes
    ----------
    position : float32 array (m, 3)
        x_m, mm.
    rest : float32 array (m, 3)
        t_m − A(x_m), mm.
    trend : Trend
    """

    position: NDArray[np.float32]
    rest: NDArray[np.float32]
    trend: Trend

    @classmethod
    def of(cls, position: NDArray[np.float32], translation: NDArray[np.float32]) -> "Field":
        """Fit the trend of matches at x_m (m, 3) with translations t_m (m, 3), mm."""
        trend = fit_trend(position, translation)
        return cls(position, translation - trend.at(position), trend)

    def reversed(self) -> "Field":
        """Field with the roles exchanged: its points are those of the atlas."""
        translation = self.rest + self.trend.at(self.position)
        return Field.of(self.position - translation, translation)

    def at(self, points: NDArray[Any], widths: Widths = (SIGMA_X, SIGMA_T)) -> NDArray[np.float32]:
        """Estimate the displacement at points (n, 3), mm, and its support (n, 4).

        The support is that of the regression and `AFFINE_SUPPORT`. All is 0 if the trend is
        unknown, as it is without matches.
        """
        found = regress(points, self.position, self.rest, widths)
        if self.trend.known:
            found[:, :3] += self.trend.at(points)
            found[:, 3] += np.float32(AFFINE_SUPPORT)
        return found


def regress(
    points: NDArray[Any],
    position: NDArray[np.float32],
    translation: NDArray[np.float32],
    widths: Widths = (SIGMA_X, SIGMA_T),
) -> NDArray[np.float32]:
    """Estimate the displacement at points beyond a trend, and how many matches support it.

    With w_m = exp(−‖x − x_m‖² / 2σ_x²) for the matches nearer than `REACH` · σ_x, the
    displacement u is first Σ v_m t_m / (Σ v_m + `PRIOR`), v_m = w_m · exp(−‖t_m‖² / 2 `BEYOND`²);
    then, `ROUNDS` times, the same with v_m = w_m · exp(−‖t_m − u‖² / 2σ_t²). So matches that
    agree outweigh the trend, and one that is far from it alone does not. The support is the sum of
    the last weights: the effective number of matches at x that agree.

    Parameters
    ----------
    points : ndarray (n, 3)
        x, mm.
    position, translation : float32 arrays (m, 3)
        x_m, and t_m beyond the trend, mm.
    widths : (float, float)
        σ_x and σ_t, mm.

    Returns
    -------
    ndarray (n, 4), float32
        Displacement beyond the trend (z, y, x) in mm, and the support; all 0 where no match is
        near, or where the support is below `UNSUPPORTED`. Points that share z and y are fastest
        side by side.
    """
    order = np.argsort(position[:, 2], kind="stable")
    out = np.zeros((len(points), 4), np.float32)
    _regress(
        np.ascontiguousarray(points, np.float32),
        np.ascontiguousarray(position[order].T, np.float32),
        np.ascontiguousarray(translation[order].T, np.float32),
        np.float32(widths[0]),
        np.float32(widths[1]),
        out,
    )
    return out


@kernel
def _total(sums: Any, begin: int) -> Any:
    """Sum of `LANES` numbers, four at a time."""
    total = np.float32(0)
    for lane in range(begin, begin + LANES, 4):
        total += (sums[lane] + sums[lane + 1]) + (sums[lane + 2] + sums[lane + 3])
    return total


@kernel
def _regress(
    points: NDArray[np.float32],
    position: NDArray[np.float32],
    translation: NDArray[np.float32],
    sigma_x: np.float32,
    sigma_t: np.float32,
    out: NDArray[np.float32],
) -> None:
    """Fill `out` as `regress` says; `position` (3, m) is sorted along x.

    All in float32 and without branches, `LANES` matches at a time, each lane with sums of its
    own: their number is rounded up by matches that weigh nothing. Few arrays in each loop, and
    all sums in one, or the loops would not become vectors.
    """
    reach = np.float32(REACH) * sigma_x
    limit = reach * reach
    in_space = np.float32(0.5 * LOG2_E) / (sigma_x * sigma_x)
    in_translation = np.float32(0.5 * LOG2_E) / (sigma_t * sigma_t)
    farthest = np.float32(_FARTHEST)
    nothing = np.float32(0)
    m = position.shape[1]
    layer, chosen = np.empty(m + 1, np.int64), np.empty(m + 1, np.int64)
    near = np.empty((6, m + LANES), np.float32)
    aside, along, tz, ty, tx, weight = near[0], near[1], near[2], near[3], near[4], near[5]
    sums = np.empty(4 * LANES, np.float32)
    n = in_layer = first = last = 0
    layer_z = np.float32(np.nan)
    for i in range(points.shape[0]):
        z, y, x = points[i, 0], points[i, 1], points[i, 2]
        if i == 0 or z != points[i - 1, 0] or y != points[i - 1, 1]:
            n = 0
            start, stop = 0, m
            follows = i + 1 < points.shape[0] and z == points[i + 1, 0] and y == points[i + 1, 1]
            if not follows:
                # A row of its own: only matches that may be near in x are looked at.
                start = np.searchsorted(position[2], x - reach)
                stop = np.searchsorted(position[2], x + reach)
            elif z != layer_z:
                layer_z = z
                in_layer = 0
                for j in range(m):
                    layer[in_layer] = j
                    in_layer += abs(position[0, j] - z) < reach
            # Without branches: which matches are near is as good as random.
            for at in range(start, in_layer if follows else stop):
                j = layer[at] if follows else at
                dz = position[0, j] - z
                dy = position[1, j] - y
                squared = dz * dz + dy * dy
                aside[n] = squared
                chosen[n] = j
                n += 1 if squared < limit else 0
            for k in range(n):
                j = chosen[k]
                along[k] = position[2, j]
                tz[k] = translation[0, j]
                ty[k] = translation[1, j]
                tx[k] = translation[2, j]
            near[:, n : n + LANES] = nothing
            aside[n : n + LANES] = limit
            first = last = 0
        elif x < points[i - 1, 2]:
            first = last = 0
        while first < n and along[first] < x - reach:
            first += 1
        while last < n and along[last] < x + reach:
            last += 1
        blocks = (last - first + LANES - 1) // LANES
        for b in range(blocks):
            begin = np.uint64(first + b * LANES)
            for lane in range(np.uint64(LANES)):
                dx = along[begin + lane] - x
                squared = aside[begin + lane] + dx * dx
                w = exp2(-min(squared * in_space, farthest))
                weight[begin + lane] = w if squared < limit else nothing
        uz = uy = ux = support = nothing
        # From the trend on: a lone match far from it is more likely wrong than right.
        disagreement = np.float32(0.5 * LOG2_E / BEYOND**2)
        for _ in range(ROUNDS + 1):
            sums[:] = nothing
            for b in range(blocks):
                begin = np.uint64(first + b * LANES)
                for lane in range(np.uint64(LANES)):
                    az, ay, ax = tz[begin + lane], ty[begin + lane], tx[begin + lane]
                    dz, dy, dx = az - uz, ay - uy, ax - ux
                    v = (dz * dz + dy * dy + dx * dx) * disagreement
                    w = exp2(-min(v, farthest))
                    w = weight[begin + lane] * (w if v < farthest else nothing)
                    sums[lane] += w
                    sums[LANES + lane] += w * az
                    sums[2 * LANES + lane] += w * ay
                    sums[3 * LANES + lane] += w * ax
            support = _total(sums, 0)
            if support < UNSUPPORTED:
                break
            uz = _total(sums, LANES) / (support + np.float32(PRIOR))
            uy = _total(sums, 2 * LANES) / (support + np.float32(PRIOR))
            ux = _total(sums, 3 * LANES) / (support + np.float32(PRIOR))
            disagreement = in_translation
        if support < UNSUPPORTED:
            continue
        out[i, 0] = uz
        out[i, 1] = uy
        out[i, 2] = ux
        out[i, 3] = support
