from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kpt_dask.matching.displacement import regress
from tests.naive import warping as naive

Array = NDArray[Any]


def matches(seed: int, n: int, wrong: float = 0.3) -> tuple[Array, Array]:
    """Positions in a box of 200 mm, and translations of which some are far off."""
    rng = np.random.default_rng(seed)
    position = rng.uniform(-100, 100, (n, 3))
    translation = np.array([20, -10, 5]) + 0.05 * position + rng.normal(0, 3, (n, 3))
    outlier = rng.random(n) < wrong
    translation[outlier] += rng.normal(0, 60, (int(outlier.sum()), 3))
    return position.astype(np.float32), translation.astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
@settings(max_examples=25, deadline=None)
def test_it_is_what_the_equations_say(seed: int, n: int) -> None:
    position, translation = matches(seed, n)
    points = np.random.default_rng(seed + 1).uniform(-150, 150, (12, 3))
    found = regress(points, position, translation)
    assert found.dtype == np.float32
    for point, row in zip(points, found, strict=True):
        expected = naive.regression(point, position, translation)
        # Between groups of matches that disagree, float32 decides where the mean goes; what
        # votes there counts as much as the support.
        counts = min(expected[3], 1)
        np.testing.assert_allclose(row[:3] * counts, expected[:3] * counts, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(row[3], expected[3], rtol=1e-4, atol=5e-4)


def test_one_translation_is_found_everywhere_near() -> None:
    position, _ = matches(3, 40)
    translation = np.tile(np.float32([7, -3, 11]), (40, 1))
    found = regress(position, position, translation)
    np.testing.assert_allclose(found[:, :3], translation, rtol=0.25)
    assert (found[:, 3] >= 0.9).all()


def test_a_lone_match_far_from_the_trend_moves_hardly_anything() -> None:
    """Forty that agree on the same displacement do."""
    there = np.zeros((1, 3), np.float32)
    for far, alone in ((10.0, 0.9), (40.0, 0.3), (70.0, 0.1)):
        translation = np.full((1, 3), far / np.sqrt(3), np.float32)
        found = regress(there, there, translation)
        assert np.linalg.norm(found[0, :3]) < alone * far
    forty = np.tile(np.full((1, 3), 40 / np.sqrt(3), np.float32), (40, 1))
    found = regress(there, np.zeros((40, 3), np.float32), forty)
    assert np.linalg.norm(found[0, :3]) > 0.97 * 40


def test_the_order_of_matches_does_not_count() -> None:
    position, translation = matches(5, 80)
    order = np.random.default_rng(0).permutation(80)
    points = position[:10] + 1
    np.testing.assert_allclose(
        regress(points, position, translation),
        regress(points, position[order], translation[order]),
        atol=1e-4,
    )


def test_wrong_matches_have_hardly_any_say() -> None:
    rng = np.random.default_rng(1)
    position = rng.uniform(-40, 40, (100, 3)).astype(np.float32)
    translation = np.tile(np.float32([20, 0, -10]), (100, 1))
    translation[:35] += rng.normal(0, 80, (35, 3)).astype(np.float32)
    found = regress(np.zeros((1, 3)), position, translation)
    assert np.linalg.norm(found[0, :3] - [20, 0, -10]) < 1


@pytest.mark.parametrize("n", [0, 30])
def test_far_from_all_matches_nothing_is_supported(n: int) -> None:
    position, translation = matches(2, n)
    assert not regress(np.full((4, 3), 1000.0), position, translation).any()
    assert regress(np.zeros((0, 3)), position, translation).shape == (0, 4)
