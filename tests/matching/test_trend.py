"""The affine trend of matches against the plain way, and what it is for."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.matching.displacement import Field
from kpt_dask.matching.trend import fit_trend
from tests.naive import warping


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_the_trend_is_what_the_equations_say(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    position = rng.uniform(-200, 300, (m, 3)).astype(np.float32)
    translation = (0.1 * position[:, [1, 2, 0]] + rng.normal(0, 8, (m, 3))).astype(np.float32)
    found, centre = warping.trend(position, translation)
    points = rng.uniform(-300, 400, (20, 3))
    expected = found[0] + (points - centre) @ found[1:]
    np.testing.assert_allclose(fit_trend(position, translation).at(points), expected, atol=0.02)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_body_of_another_size_is_found_among_wrong_matches(seed: int) -> None:
    """A third of the matches is wrong, and bodies differ by 12 % along each axis."""
    rng = np.random.default_rng(seed)
    there = rng.uniform(-200, 200, (300, 3))
    size = rng.normal(1, 0.12, 3).clip(0.7, 1.3)
    here = there * size + rng.uniform(-100, 100, 3)
    translation = here - there + rng.normal(0, 2, here.shape)
    translation[:100] += rng.uniform(-150, 150, (100, 3))
    field = Field.of(here.astype(np.float32), translation.astype(np.float32))
    off = np.linalg.norm(field.trend.at(here) - (here - there), axis=1)
    assert np.percentile(off, 95) < 5
    back = np.linalg.norm(field.reversed().trend.at(there) - (here - there), axis=1)
    assert np.percentile(back, 95) < 5


def test_without_matches_nothing_is_known() -> None:
    none = np.zeros((0, 3), np.float32)
    field = Field.of(none, none)
    assert not field.trend.known
    assert not field.at(np.zeros((4, 3))).any()
    assert not field.reversed().at(np.zeros((4, 3))).any()
