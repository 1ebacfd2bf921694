"""Robust spread: what is usual among atlases of which some may be wrong.

The centre is the median. The scale, in standard deviations of a normal distribution, is the larger
of 1.4826 times the median and 1/1.645 times the 90th percentile of the absolute deviations, so that
a quantity with heavy tails does not make outliers of one atlas in ten. Up to a tenth of the atlases
may be wrong without widening it.

Of few atlases, centre and scale are uncertain: the scale is widened as Student's t, with one degree
of freedom less than there are atlases, is wider at `LIMIT` standard deviations than the normal
distribution. At last it is at least a floor, below which differences do not matter.
"""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

LIMIT = 4.5
"""Standard deviations from which an atlas is unusual. Of 3.5 to 7, the least that doubted at most
5 % of the sound patients of even position of OpenKBP; see the README of `kpt_dask`."""

LEAST = 10
"""Fewer atlases have no spread."""

_MEDIAN, _PERCENTILE, _AT = 1.4826, 90.0, 1.6449


class Spread(NamedTuple):
    """What is usual of some quantities; arrays of one shape.

    Attributes
    ----------
    centre, scale : ndarray, float64
        NaN where fewer than `LEAST` atlases have the quantity.
    """

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def of(cls, values: ArrayLike, floor: float) -> Self:
        """Measure the spread over the first axis; NaN is no value.

        Parameters
        ----------
        values : array-like (atlas, …)
        floor : float
            Least scale, in the unit of the values.

        Examples
        --------
        >>> import numpy as np
        >>> Spread.of(np.arange(101.0), 1.0).centre.item()
        50.0
        """
        array = np.atleast_1d(np.asarray(values, np.float64))
        number = np.count_nonzero(~np.isnan(array), axis=0)
        known = np.where(number >= LEAST, array, np.nan)
        # Columns without values stay NaN, without a warning of NumPy's.
        filled = np.where(number >= LEAST, known, 0.0)
        centre = np.nanmedian(filled, axis=0)
        away = np.abs(filled - centre)
        usual = _MEDIAN * np.nanmedian(away, axis=0)
        tails: NDArray[np.float64] = np.nanpercentile(away, _PERCENTILE, axis=0) / _AT
        wide = np.maximum(np.maximum(usual, tails) * _widening(number), floor)
        unknown = number < LEAST
        return cls(np.where(unknown, np.nan, centre), np.where(unknown, np.nan, wide))

    def deviation(self, values: ArrayLike) -> NDArray[np.float64]:
        """Signed standard deviations from the centre."""
        found: NDArray[np.float64] = (np.asarray(values, np.float64) - self.centre) / self.scale
        return found


def _widening(number: NDArray[np.int_]) -> NDArray[np.float64]:
    """Limit of Student's t over that of the normal distribution, for a new value."""
    n = np.maximum(number, 2)
    limit = -special.stdtrit(n - 1.0, special.ndtr(-LIMIT)) * np.sqrt(1 + 1 / n)
    return np.asarray(limit / LIMIT, np.float64)
