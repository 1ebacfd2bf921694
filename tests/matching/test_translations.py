"""Translations of matches: their density, and the radius of the closest pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.matching import translations
from kpt_dask.matching.translations import closest_pairs_radius, density
from tests.helpers import random_points
from tests.naive import stations


@pytest.mark.parametrize("sampled", [1, 3, 64])
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_the_radius_keeps_the_closest_tenth_of_all_pairs(
    sampled: int, seed: int, n: int, m: int, spread: int
) -> None:
    """Also where the few pairs that are looked at first say too little of all."""
    rng = np.random.default_rng(seed)
    a, b = random_points(rng, n, 15), random_points(rng, m, spread)
    distances = [stations.distance(p, q) for p in a.position for q in b.position]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translations, "_SAMPLE", sampled)
        radius = closest_pairs_radius(a.position, b.position, 0.1)
    largest = stations.largest_distance_kept(a, b, (0, 0, 0))
    assert [d < radius for d in distances] == [d <= largest for d in distances]


def test_the_radius_of_pairs_that_are_very_far_apart() -> None:
    a = np.zeros((1, 3), np.float32)
    b = np.float32([[200_000 + 1000 * k, 0, 0] for k in range(20)])
    assert closest_pairs_radius(a, b, 0.1) == np.nextafter(np.float32(201_000), np.float32(np.inf))


def test_density_is_the_share_that_agrees() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(0, 12, (40, 3)).astype(np.float32)
    at = np.concatenate([samples, rng.normal(0, 30, (20, 3)).astype(np.float32)])
    expected = [stations.density(tuple(p), [tuple(s) for s in samples]) for p in at]
    np.testing.assert_allclose(density(at, samples, 10.0), expected, rtol=1e-6, atol=1e-8)
    same = np.repeat(samples[:1], 9, axis=0)
    assert density(same, same, 10.0).tolist() == [1] * 9


def test_two_motions_each_keep_their_density() -> None:
    far = np.float32([[0, 0, 0]] * 6 + [[80, 0, 0]] * 2)
    np.testing.assert_allclose(density(far, far, 10.0), [0.75] * 6 + [0.25] * 2, atol=1e-6)
