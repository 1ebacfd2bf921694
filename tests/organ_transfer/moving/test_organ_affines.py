"""Affines of organs, against what made the matches, and against plain least squares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.matching.trend import Trend, fit_trend
from kpt_dask.organ_transfer.moving.organ_affines import LEAST, affine_of, fit_affines
from tests.naive import moving as naive

NO_TREND = Trend(np.zeros(3), np.zeros(3), np.zeros((3, 3)))


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_each_group_is_fitted_by_itself(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    source = rng.uniform(-150, 150, (n, 3))
    linear = np.eye(3) + rng.normal(0, 0.1, (3, 3))
    target = source @ linear + rng.normal(0, 5, (n, 3)) + rng.normal(0, 30, 3)
    wrong = rng.random(n) < 0.2
    target[wrong] = rng.uniform(-200, 200, (int(wrong.sum()), 3))
    body = fit_trend(target, target - source)
    ends = np.cumsum(sizes)
    affines, agreement = fit_affines(source, target, ends, [body] * len(sizes))
    for g, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        own = slice(end - size, end)
        expected = naive.affine(source[own], target[own], body)
        assert np.isnan(affines[g]).any() == (expected is None)
        if expected is not None:
            np.testing.assert_allclose(affines[g], expected[0], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(agreement[own], expected[1], rtol=1e-6, atol=1e-9)
        else:
            assert not agreement[own].any()


@given(st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_the_affine_of_a_trend_maps_back_what_it_displaced(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trend = Trend(rng.normal(0, 99, 3), rng.normal(0, 30, 3), rng.normal(0, 8, (3, 3)))
    in_scan = rng.uniform(-200, 200, (10, 3))
    in_atlas = in_scan - trend.at(in_scan)
    affine = affine_of(trend)
    np.testing.assert_allclose(in_atlas @ affine[:, :3].T + affine[:, 3], in_scan, atol=1e-3)


def test_three_matches_of_a_small_organ_keep_the_size_of_the_body() -> None:
    """Three points close together say where the organ lies, hardly how it is stretched."""
    rng = np.random.default_rng(0)
    body_points = rng.uniform(-200, 200, (300, 3))
    stretched = 1.15 * body_points + 10
    body = fit_trend(stretched, stretched - body_points)
    source = np.array([[50.0, 50, 50], [60, 50, 50], [50, 62, 50]])
    target = 1.15 * source + 10 + np.array([8.0, 0, 0]) + rng.normal(0, 3, (3, 3))
    [affine], agreement = fit_affines(source, target, np.array([LEAST]), [body])
    np.testing.assert_allclose(affine[:, :3], 1.15 * np.eye(3), atol=0.05)
    np.testing.assert_allclose(
        affine[:, :3] @ source.mean(0) + affine[:, 3], target.mean(0), atol=2
    )
    assert (agreement > 0.9).all()


def test_what_does_not_agree_has_no_say() -> None:
    rng = np.random.default_rng(1)
    source = rng.uniform(-80, 80, (9, 3))
    target = source + 20
    target[:2] += 90
    body = fit_trend(np.concatenate([target[2:]] * 5), np.full((35, 3), 20.0))
    [affine], agreement = fit_affines(source, target, np.array([9]), [body])
    np.testing.assert_allclose(affine[:, :3] @ source[2:].T + affine[:, 3:], target[2:].T, atol=0.5)
    assert agreement[:2].max() < 1e-3
    assert agreement[2:].min() > 0.99


@pytest.mark.parametrize("size", [0, 1, 2])
def test_fewer_than_three_matches_make_no_affine(size: int) -> None:
    points = np.arange(3.0 * size).reshape(size, 3)
    affines, agreement = fit_affines(points, points, np.array([size]), [NO_TREND])
    assert np.isnan(affines).all()
    assert not agreement.any()
