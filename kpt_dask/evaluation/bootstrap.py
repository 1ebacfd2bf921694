"""Intervals of means, by drawing scans again with replacement."""

from collections.abc import Sequence

import numpy as np

REPLICATES = 10_000
"""Bootstrap samples; the ends of an interval are then known to about 2 % of its length."""
SEED = 20_200_201
LEVEL = 95.0
"""Per cent of the samples that lie within an interval."""


def mean_interval(scans: Sequence[Sequence[float]]) -> list[float] | None:
    """Percentile bootstrap interval of the mean over all values of all scans.

    Scans are drawn, with all their values: organs of one scan are not independent.

    Parameters
    ----------
    scans : sequence of sequence of float
        Values of each scan; one without any does not count.

    Returns
    -------
    list of two float, or None
        The 2.5th and 97.5th percentiles of the mean; None for fewer than two scans. The same
        values give the same interval.
    """
    known = [values for values in scans if len(values)]
    if len(known) < 2:
        return None
    sums, sizes = np.array([sum(values) for values in known]), np.array([len(v) for v in known])
    drawn = np.random.default_rng(SEED).multinomial(
        len(known), np.full(len(known), 1 / len(known)), REPLICATES
    )
    means = (drawn @ sums) / (drawn @ sizes)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail]).tolist()
    return [low, high]
