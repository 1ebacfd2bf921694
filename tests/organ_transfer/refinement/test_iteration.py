"""What an iteration of the refinement does in runs of points, against the equations."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kpt_dask.organ_transfer.refinement import iteration
from kpt_dask.organ_transfer.refinement.iteration import PAD, UNITS, PointMap
from kpt_dask.organ_transfer.refinement.levels import Region, grown, sum_boxes
from tests.naive import refinement as naive

Array = NDArray[Any]

SHAPES = [(7, 9, 11), (1, 6, 5), (5, 1, 4), (4, 3, 1), (1, 1, 1), (12, 5, 40)]
CORE = (..., *(3 * (slice(PAD, -PAD),)))


def padded(shape: tuple[int, ...]) -> tuple[int, int, int]:
    z, y, x = (n + 2 * PAD for n in shape)
    return z, y, x


def values(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def strides(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    return shape[1] * shape[2], shape[2], 1


def some_points(shape: tuple[int, ...], part: float = 0.4) -> Array:
    """Points of a lattice, in its padded arrays."""
    return np.pad(np.random.default_rng(9).random(shape) < part, PAD)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_runs_are_the_points_marked(seed: int, part: float) -> None:
    mask = np.pad(np.random.default_rng(seed).random((3, 4, 7)) < part, ((0, 0), (0, 0), (1, 1)))
    runs = iteration.runs_of(mask)
    found = [i for begin, end in runs for i in range(begin, end)]
    assert found == np.flatnonzero(mask).tolist()
    assert all(begin // 9 == (end - 1) // 9 for begin, end in runs)
    assert (runs[1:, 0] >= runs[:-1, 1]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_growing(shape: tuple[int, ...]) -> None:
    mask = some_points(shape, 0.1)
    np.testing.assert_array_equal(grown(mask, (2, 2, 2)), naive.grown(mask, 2))
    assert grown(mask, (0, 0, 0)).tolist() == mask.tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("image_shape", [(6, 5, 8), (1, 5, 8), (6, 1, 8), (6, 5, 1)])
def test_sampling(shape: tuple[int, ...], image_shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(-9000, 9000, image_shape).astype(np.int16)
    wide, mask = padded(shape), some_points(shape)
    start, v = values((3, *wide), 3) * 3, values((3, *wide), 4)
    first, step, scale = rng.uniform(-8, 2, 3).astype(np.float32), np.float32(0.7), np.float32(0.5)
    where = PointMap(first, step, scale, start.reshape(3, -1), v.reshape(3, -1), wide)
    out = np.full(wide, 7, np.float32)
    iteration.sample(image, where, iteration.runs_of(mask), out.reshape(-1))
    expected = naive.sampled(image / UNITS, first, step, start.astype(float) + v, scale)
    np.testing.assert_allclose(out, np.where(mask, expected, 7), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_force_and_correlation(shape: tuple[int, ...]) -> None:
    wide, inside = padded(shape), some_points(shape)
    region = Region.around(inside)
    f, m = values(wide, 1), values(wide, 2)
    m += f
    everywhere = Region.around(np.pad(np.ones(shape, bool), PAD))
    fixed = np.zeros((3, f.size), np.float32)
    fixed[0] = f.reshape(-1)
    scratch = np.full_like(fixed, np.nan), np.full_like(fixed, np.nan)
    sums = sum_boxes(fixed[0], fixed[0], everywhere, wide, scratch)
    iteration.moments(sums, everywhere.points, fixed)
    # Beyond the points that move, nothing is known of the atlas.
    moving = np.where(naive.grown(inside, 2), m, np.nan).astype(np.float32).reshape(-1)
    sums = sum_boxes(fixed[0], moving, region, wide, scratch)
    found, cc = np.full((3, f.size), 7, np.float32), np.full(f.size, 7, np.float32)
    points = region.points
    iteration.force(fixed, moving, sums, np.float32(3), strides(wide), points, found)
    iteration.correlation(fixed, sums, points, cc)
    expected = np.where(inside, naive.force(f, m, 3.0, inside), 7)
    np.testing.assert_allclose(found.reshape(3, *wide), expected, rtol=1e-3, atol=1e-4)
    a, b, c = naive.correlation(f, m)
    expected = np.where(inside, a / np.sqrt(b * c), 7)
    np.testing.assert_allclose(cc.reshape(wide), expected, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_smoothing(shape: tuple[int, ...]) -> None:
    wide, inside = padded(shape), some_points(shape)
    region, moved = Region.around(inside), naive.grown(inside, 2)
    d = (values((3, *wide), 4) * inside).reshape(3, -1)
    one, two = np.zeros_like(d), np.zeros_like(d)
    taps = iteration.taps(iteration.SMOOTHNESS, iteration.RADIUS)
    for stride, (before, after) in zip(
        reversed(strides(wide)), ((d, one), (one, two), (two, one)), strict=True
    ):
        iteration.smooth(before, stride, taps, region.moved, after)
    expected = [naive.smoothed(axis.reshape(wide), moved) for axis in d]
    np.testing.assert_allclose(one.reshape(3, *wide), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step(shape: tuple[int, ...]) -> None:
    wide = padded(shape)
    region = Region.around(some_points(shape))
    moved = naive.grown(region.mask, 2)
    v, d = values((3, *wide), 1), values((3, *wide), 2) * moved
    out = np.full((3, v[0].size), 7, np.float32)
    iteration.copy(v.reshape(3, -1), region.fringe, out)
    flat = v.reshape(3, -1), d.reshape(3, -1)
    iteration.add_step(*flat, np.float32(1.7), strides(wide), region.moved, out)
    expected = naive.stepped(v, np.float32(1.7) * d.astype(float), moved)
    expected = np.where(naive.grown(moved, 1), expected, 7)
    np.testing.assert_allclose(out.reshape(3, *wide), expected, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_largest_is_the_percentile(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    d = (size * rng.normal(0, 1, (3, 4 * 7 * 11))).astype(np.float32)
    inside = np.pad(rng.random((4, 7, 9)) < 0.8, ((0, 0), (0, 0), (1, 1)))
    length = np.sqrt((d.astype(float) ** 2).sum(axis=0))[inside.reshape(-1)]
    expected = np.quantile(length, 0.9, method="inverted_cdf")
    found = iteration.largest(d, iteration.runs_of(inside), 0.9)
    assert found == pytest.approx(expected, rel=0.005)


def test_largest_of_nothing_is_nothing() -> None:
    d = np.zeros((3, 4 * 7 * 11), np.float32)
    whole, none = np.array([[0, 4 * 7 * 11]]), np.empty((0, 2), np.int64)
    assert iteration.largest(d, whole, 0.99) < 1e-18
    assert iteration.largest(d + 1, none, 0.99) == 0
