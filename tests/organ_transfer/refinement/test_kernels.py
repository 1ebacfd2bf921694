"""The kernels of the refinement against the equations."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kpt_dask.organ_transfer.refinement import kernels
from tests.naive import refinement as naive

Array = NDArray[Any]

SHAPES = [(7, 9, 11), (1, 6, 5), (5, 1, 4), (4, 3, 1), (2, 2, 2), (12, 5, 20)]


def values(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    image, u = values((6, 5, 8), 2), values((3, *shape), 3) * 3
    first, step, scale = rng.uniform(-2, 2, 3).astype(np.float32), np.float32(0.7), np.float32(0.5)
    out = np.empty(shape, np.float32)
    kernels.sample(image, kernels.PointMap(first, step, scale, u), np.float32(2), out)
    np.testing.assert_allclose(out, 2 * naive.sampled(image, first, step, u, scale), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_moments(shape: tuple[int, int, int]) -> None:
    f = values(shape, 1)
    mean, square = np.empty_like(f), np.empty_like(f)
    kernels.box_moments(f, mean, square)
    np.testing.assert_allclose(mean, naive.box_mean(f), atol=1e-6)
    np.testing.assert_allclose(square, naive.box_mean(f * f), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_force_and_correlation(shape: tuple[int, int, int]) -> None:
    f, m = values(shape, 1), values(shape, 2)
    m += f
    inside = np.random.default_rng(3).random(shape) < 0.7
    inside[:, : shape[1] // 2] &= np.arange(shape[0])[:, None, None] % 2 == 0
    h = np.float32(3)
    mean, square = np.empty_like(f), np.empty_like(f)
    kernels.box_moments(f, mean, square)
    found, cc = np.full((3, *shape), 7, np.float32), np.empty_like(f)
    kernels.force(f, mean, square, m, h, inside, found)
    kernels.correlation(f, mean, square, m, cc)
    two = tuple(n > 1 for n in shape)
    for axis in range(3):
        if two[axis]:
            continue
        assert not found[axis].any()
    if all(two):
        expected = naive.force(f, m, 3.0, inside)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    a, b, c = naive.correlation(f, m)
    np.testing.assert_allclose(cc, a / np.sqrt(b * c), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("sigma", "radius"), [(1.5, 5), (0.5, 2)])
def test_blur(shape: tuple[int, int, int], sigma: float, radius: int) -> None:
    f = values(shape, 4)
    expected = naive.blurred(f, sigma, radius)
    kernels.blur(f, kernels.taps(sigma, radius))
    np.testing.assert_allclose(f, expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_composition(shape: tuple[int, int, int]) -> None:
    u, start, d = (values((3, *shape), i) for i in range(3))
    out = np.empty_like(u)
    factor, h = np.float32(1.7), np.float32(4)
    kernels.compose(u, start, d, factor, h, out)
    expected = naive.composed(u, start, factor * d.astype(float), 4.0)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_largest_is_the_percentile(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    d = (size * rng.normal(0, 1, (3, 4, 7, 11))).astype(np.float32)
    inside = rng.random((4, 7, 11)) < 0.8
    length = np.sqrt((d.astype(float) ** 2).sum(axis=0))[inside]
    expected = np.quantile(length, 0.9, method="inverted_cdf")
    assert kernels.largest(d, inside, 0.9) == pytest.approx(expected, rel=0.005)


def test_largest_of_nothing_is_nothing() -> None:
    d = np.zeros((3, 4, 7, 11), np.float32)
    assert kernels.largest(d, np.ones((4, 7, 11), bool), 0.99) < 1e-18
    assert kernels.largest(d + 1, np.zeros((4, 7, 11), bool), 0.99) == 0
