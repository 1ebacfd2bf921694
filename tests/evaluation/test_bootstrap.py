"""Bootstrap intervals, against all resamples, against SciPy and against drawing in a loop."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from kpt_dask.evaluation.bootstrap import mean_interval


def test_few_scans_give_the_percentiles_of_all_resamples() -> None:
    """Of four scans with different numbers of organs there are 256 resamples."""
    scans = [[0.1, 0.3], [0.9], [0.5, 0.6, 0.7], [0.2, 0.8]]
    means = [np.mean([v for scan in drawn for v in scan]) for drawn in product(scans, repeat=4)]
    found = mean_interval(scans)
    assert found is not None
    # Resamples are few, so a percentile is one of them or between two neighbours.
    low, high = (np.percentile(means, [q - 0.6, q + 0.6], method="nearest") for q in (2.5, 97.5))
    assert low[0] <= found[0] <= low[1]
    assert high[0] <= found[1] <= high[1]


def test_scipy_finds_the_same() -> None:
    values = np.random.default_rng(1).beta(8, 3, 30)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    found = mean_interval([[value] for value in values])
    assert found is not None
    width = expected.high - expected.low
    assert found == pytest.approx([expected.low, expected.high], abs=0.04 * width)


def test_a_loop_over_scans_finds_the_same() -> None:
    """Organs of one scan, which go up and down together, are drawn together."""
    rng = np.random.default_rng(3)
    scans = [list(level + rng.normal(0, 0.01, rng.integers(1, 6))) for level in rng.random(12)]
    means = []
    for _ in range(6000):
        drawn = [scans[i] for i in rng.integers(0, 12, 12)]
        means.append(np.mean([value for scan in drawn for value in scan]))
    low, high = np.percentile(means, [2.5, 97.5])
    found = mean_interval(scans)
    assert found == pytest.approx([low, high], abs=0.05 * (high - low))
    # Independent values would give an interval that is far too short.
    alone = mean_interval([[value] for scan in scans for value in scan])
    assert alone is not None
    assert alone[1] - alone[0] < 0.8 * (high - low)


def test_the_same_values_give_the_same_interval_and_one_scan_gives_none() -> None:
    scans = [[0.5], [0.75, 0.25], []]
    assert mean_interval(scans) == mean_interval(scans[:2])
    assert mean_interval([[0.5, 0.7], []]) is None
    assert mean_interval([[0.5], [0.5]]) == [0.5, 0.5]
