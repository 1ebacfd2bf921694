"""Test whether the values of a scan can be HU: a histogram of the stream, judged at the end.

A CT shows air (below −500 HU), fat (around −100), soft tissue (around 0) and bone (above 200). What
lacks air or bone may be cut out or clipped; what lacks soft tissue, or both air and fat, such as MR
and PET, is not in HU.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

EDGES = (-1100.0, -500.0, -200.0, -1.0, 200.0, 850.0, 1250.0)
"""HU. What is below the first is padding, not air; then air, and so on; soft tissue lies between
the third and the fifth, and between the last two where 1024 was added."""

SAMPLES = 128
"""Least number of rows and columns of a plane that are sampled, if it has as many."""

NORMALISED = 20.0
"""Values that span no more were divided by something: fat and muscle alone are 100 HU apart."""

SOFT_TISSUE = 0.005
"""Share of all values that must be soft tissue's, at least; a body fills more of any scan."""

LIGHT = 0.001
"""Share of all values that must be air's or fat's, at least; 30 mm within a neck have a fifth."""

OFFSET = 0.1
"""Share of the values above air that lie where soft tissue would if 1024 were added; bone has less
than half as many there."""


class Intensities:
    """Counts of the values of a scan, from every few rows and columns of its planes."""

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf
        self._below = np.zeros(len(EDGES), np.int64)
        self._all = 0

    def add(self, planes: NDArray[Any]) -> None:
        """Count the values of a few planes (n, j, i), HU."""
        down, across = (max(1, n // SAMPLES) for n in planes.shape[1:])
        sample = np.ascontiguousarray(planes[:, ::down, ::across])
        self._low = min(self._low, float(sample.min()))
        self._high = max(self._high, float(sample.max()))
        self._below += [np.count_nonzero(sample < edge) for edge in EDGES]
        self._all += sample.size

    def fault(self) -> str | None:
        """Find why the values cannot be HU, as the end of a sentence; None if they can."""
        padding, air, fat, light, soft, tissue, raised = (int(n) for n in self._below)
        low, high, run = self._low, self._high, self._run
        if low == high:
            return f"holds nothing but the value {low:g}"
        if high - low <= NORMALISED:
            return f"{run}: normalised intensities, not HU"
        if low >= -1 and high <= 256:
            return f"{run}: a picture's grey values, not HU"
        above = self._all - air
        if raised - tissue > OFFSET * above and air - padding <= OFFSET * (raised - tissue):
            return f"{run} as if about 1024 had been added to HU, which its header does not say"
        if soft - fat < SOFT_TISSUE * self._all:
            return f"{run}, and hardly any between -200 and 200 HU, where soft tissue is"
        if light - padding < LIGHT * self._all:
            return (
                f"{run}, and hardly any below 0 HU, where air and fat are: MR, PET, or clipped at 0"
            )
        return None

    def doubt(self) -> str | None:
        """Find why values that can be HU may not be, as `fault` does."""
        padding, air, *_, soft, _, _ = (int(n) for n in self._below)
        if air == padding:
            return f"{self._run}, no air (nothing below -500 HU): it may be clipped, or not in HU"
        if self._all == soft:
            return f"{self._run}, no bone (nothing above 200 HU): it may be clipped, or not in HU"
        return None

    @property
    def _run(self) -> str:
        return f"holds values from {self._low:g} to {self._high:g}"
