"""What is usual is not moved by what is wrong."""

import numpy as np
import pytest
from scipy import stats

from kpt_dask.annotation_check.spread import LEAST, LIMIT, Spread


def test_of_a_normal_sample_it_is_mean_and_standard_deviation() -> None:
    values = np.random.default_rng(0).normal(7.0, 2.0, 4000)
    spread = Spread.of(values, 0.0)
    assert spread.centre.item() == pytest.approx(7.0, abs=0.1)
    assert spread.scale.item() == pytest.approx(2.0, rel=0.06)
    assert spread.deviation(17.0).item() == pytest.approx(5.0, rel=0.06)


def test_a_tenth_of_wrong_values_are_found_and_hide_nothing() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.0, 1.0, 200)
    values[:19] = 30.0
    deviation = Spread.of(values, 0.0).deviation(values)
    assert (deviation[:19] > LIMIT).all()
    assert (np.abs(deviation[19:]) < LIMIT).all()


def test_differences_below_the_floor_do_not_matter() -> None:
    spread = Spread.of(np.full(1000, 3.0), 0.5)
    assert abs(spread.deviation(3.0 + 4.4 * 0.5).item()) < LIMIT
    assert spread.deviation(3.0 + 4.6 * 0.5).item() > LIMIT


def test_few_values_have_no_spread() -> None:
    values = np.arange(2.0 * LEAST).reshape(LEAST, 2)
    values[0, 1] = np.nan
    spread = Spread.of(values, 1.0)
    assert np.isfinite(spread.centre).tolist() == [True, False]
    assert np.isnan(spread.deviation(values)[:, 1]).all()


@pytest.mark.parametrize("n", [10, 20, 100])
def test_few_values_widen_it_as_students_t_does(n: int) -> None:
    """A value at the limit is as unlikely under t as `LIMIT` is under the normal distribution."""
    spread = Spread.of(np.repeat([-1.0, 1.0], n // 2), 0.0)
    value = LIMIT * spread.scale.item() / 1.4826 / np.sqrt(1 + 1 / n)
    assert stats.t.sf(value, n - 1) == pytest.approx(stats.norm.sf(LIMIT), rel=1e-6)
