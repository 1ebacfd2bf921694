"""Smooth displacement fields from matches that are partly wrong.

A robust kernel regression of the matches' translations, evaluated at the nodes of a lattice
and linear in between. Knows points and translations in mm; no atlases, no organs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.jit import kernel
from kpt_dask.options import SIGMA_T, SIGMA_X

Widths = tuple[float, float]
"""σ_x and σ_t: standard deviations of the kernels in space and in translation, mm."""

ROUNDS = 3
"""Of reweighting by agreement."""
REACH = 3.0
"""Standard deviations beyond which a match has no say."""


def regress(
    points: NDArray[Any],
    position: NDArray[np.float32],
    translation: NDArray[np.float32],
    widths: Widths = (SIGMA_X, SIGMA_T),
) -> NDArray[np.float32]:
    """Estimate the displacement at points, and how many matches support it.

    With w_m = exp(−‖x − x_m‖² / 2σ_x²) for the matches nearer than `REACH` · σ_x, the
    displacement u is first Σ w_m t_m / Σ w_m; then, `ROUNDS` times, the same mean with the
    weights w_m · exp(−‖t_m − u‖² / 2σ_t²). The support is the sum of the last weights: the
    effective number of matches at x that agree.

    Parameters
    ----------
    points : ndarray (n, 3)
        x, mm.
    position, translation : float32 arrays (m, 3)
        x_m and t_m of the matches, mm.
    widths : (float, float)
        σ_x and σ_t, mm.

    Returns
    -------
    ndarray (n, 4), float32
        Displacement (z, y, x) in mm, and the support; all 0 where no match is near.
    """
    order = np.argsort(position[:, 0], kind="stable")
    out = np.zeros((len(points), 4), np.float32)
    _regress(
        np.ascontiguousarray(points, np.float64),
        np.ascontiguousarray(position[order], np.float64),
        np.ascontiguousarray(translation[order], np.float64),
        (float(widths[0]), float(widths[1])),
        out,
    )
    return out


@kernel
def _regress(
    points: NDArray[np.float64],
    position: NDArray[np.float64],
    translation: NDArray[np.float64],
    widths: Widths,
    out: NDArray[np.float32],
) -> None:
    """Fill `out` as `regress` says; `position` is sorted along its first axis."""
    sigma_x, sigma_t = widths
    reach = REACH * sigma_x
    in_space = -0.5 / (sigma_x * sigma_x)
    in_translation = -0.5 / (sigma_t * sigma_t)
    near = np.empty(position.shape[0], np.int64)
    weight = np.empty(position.shape[0], np.float64)
    for i in range(points.shape[0]):
        z, y, x = points[i, 0], points[i, 1], points[i, 2]
        n = 0
        first = np.searchsorted(position[:, 0], z - reach)
        for j in range(first, position.shape[0]):
            dz = position[j, 0] - z
            if dz >= reach:
                break
            dy = position[j, 1] - y
            dx = position[j, 2] - x
            squared = dz * dz + dy * dy + dx * dx
            if squared < reach * reach:
                near[n] = j
                weight[n] = np.exp(in_space * squared)
                n += 1
        if n == 0:
            continue
        uz = uy = ux = support = 0.0
        for k in range(ROUNDS + 1):
            sz = sy = sx = support = 0.0
            for p in range(n):
                j = near[p]
                w = weight[p]
                if k > 0:
                    dz = translation[j, 0] - uz
                    dy = translation[j, 1] - uy
                    dx = translation[j, 2] - ux
                    w *= np.exp(in_translation * (dz * dz + dy * dy + dx * dx))
                sz += w * translation[j, 0]
                sy += w * translation[j, 1]
                sx += w * translation[j, 2]
                support += w
            if support == 0.0:
                break
            uz = sz / support
            uy = sy / support
            ux = sx / support
        out[i, 0] = uz
        out[i, 1] = uy
        out[i, 2] = ux
        out[i, 3] = support
