"""The affine trend of an atlas's matches: how the whole body lies, leans and differs in size.

Bodies differ in size by a tenth and more, so far from where matches agree a translation is off by
centimetres. A displacement field is this trend, and what matches say beyond it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.matching.translations import density

WIDTHS = 60.0, 40.0, 25.0, 15.0, 15.0, 15.0
"""σ of each round of reweighting, mm: coarse first, as the start is a translation alone."""
BANDWIDTH = 15.0
"""Bandwidth of the density of translations whose mode is the start, mm."""
RIDGE = 1e-3
"""How strongly the slope is held to 0, as a share of the matches' weight."""
UNIT = 100.0
"""mm over which the slope is counted."""


@dataclass(frozen=True)
class Trend:
    """A(x) = offset + slope · (x − centre) / `UNIT`: the displacement from atlas to scan at x, mm.

    Attributes
    ----------
    centre, offset : float64 arrays (3)
        mm.
    slope : float64 array (3, 3)
        Row j is what one `UNIT` along axis j adds to the displacement, mm.
    known : bool
        Whether there were matches to fit it to; else it is 0 everywhere.
    """

    centre: NDArray[np.float64]
    offset: NDArray[np.float64]
    slope: NDArray[np.float64]
    known: bool = True

    def at(self, points: NDArray[Any]) -> NDArray[np.float32]:
        """Displacement at points (n, 3), mm."""
        along = (np.asarray(points, np.float64) - self.centre) / UNIT
        # A product of matrices might sum in another order on other threads.
        moved = self.offset + np.einsum("nj,ja->na", along, self.slope)
        return np.asarray(moved, np.float32)


def fit_trend(position: NDArray[Any], translation: NDArray[Any]) -> Trend:
    """Fit the trend by least squares, reweighted by agreement.

    The start is the translation of highest density. Then, for σ in `WIDTHS`, match m weighs
    exp(−‖t_m − A(x_m)‖² / 2σ²).

    Parameters
    ----------
    position, translation : ndarray (m, 3)
        x_m in the scan and t_m from the atlas to the scan, mm.

    Returns
    -------
    Trend
        Unknown if there are no matches.
    """
    x, t = np.asarray(position, np.float64), np.asarray(translation, np.float64)
    if not len(x):
        return Trend(np.zeros(3), np.zeros(3), np.zeros((3, 3)), known=False)
    samples = np.ascontiguousarray(translation, np.float32)
    centre = x.mean(axis=0)
    design = np.column_stack([np.ones(len(x)), (x - centre) / UNIT])
    found = np.zeros((4, 3))
    found[0] = t[density(samples, samples, BANDWIDTH).argmax()]
    for sigma in WIDTHS:
        off = t - np.einsum("mi,ia->ma", design, found)
        weight = np.exp(-(off**2).sum(axis=1) / (2 * sigma * sigma))
        if (total := weight.sum()) < 1e-6:
            break
        left = np.einsum("m,mi,mj->ij", weight, design, design)
        left[[1, 2, 3], [1, 2, 3]] += RIDGE * total
        found = np.linalg.solve(left, np.einsum("m,mi,ma->ia", weight, design, t))
    return Trend(centre, found[0], found[1:])
