"""What an iteration of the refinement does plane after plane, against the equations."""

from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kpt_dask.organ_transfer.refinement import iteration, kernels, sweep
from kpt_dask.organ_transfer.refinement.iteration import PAD, UNITS, PointMap
from kpt_dask.organ_transfer.refinement.levels import Region, grown
from kpt_dask.organ_transfer.refinement.sweep import Runs
from tests.naive import refinement as naive

Array = NDArray[Any]

SHAPES = [(7, 9, 11), (1, 6, 5), (5, 1, 4), (4, 3, 1), (1, 1, 1), (12, 5, 40)]
CORE = (..., *(3 * (slice(PAD, -PAD),)))


def padded(shape: tuple[int, ...]) -> tuple[int, int, int]:
    z, y, x = (n + 2 * PAD for n in shape)
    return z, y, x


def values(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def by_plane(values: Array) -> Array:
    """Points of each plane in one row."""
    return values.reshape(*values.shape[:-2], -1)


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


def test_runs_are_split_by_plane() -> None:
    shape = 4, 5, 9
    mask = np.pad(np.random.default_rng(1).random((2, 5, 7)) < 0.4, ((1, 1), (0, 0), (1, 1)))
    runs = Runs.split(iteration.runs_of(mask), shape)
    for z in range(4):
        own = runs.of[runs.first[z] : runs.first[z + 1]]
        found = [i for begin, end in own for i in range(begin, end)]
        assert found == np.flatnonzero(mask[z]).tolist()


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_narrow_gaps_of_rows_are_filled(seed: int, part: float, widest: int) -> None:
    mask = np.pad(np.random.default_rng(seed).random((3, 4, 9)) < part, ((0, 0), (0, 0), (1, 1)))
    found = mask.copy()
    kernels.fill_gaps(iteration.runs_of(mask), 11, widest, found.reshape(-1))
    for row, own in zip(mask.reshape(-1, 11), found.reshape(-1, 11), strict=True):
        expected = row.copy()
        marked = np.flatnonzero(row)
        for before, after in pairwise(marked):
            expected[before:after] |= after - before - 1 <= widest
        assert own.tolist() == expected.tolist()


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
    where = PointMap(first, step, scale, by_plane(start), by_plane(v), wide)
    out = np.full(wide, 7, np.float32)
    runs = Runs.split(iteration.runs_of(mask), wide)
    for z, plane in enumerate(by_plane(out)):
        iteration.sample(image, where, z, runs.of[runs.first[z] : runs.first[z + 1]], plane)
    expected = naive.sampled(image / UNITS, first, step, start.astype(float) + v, scale)
    np.testing.assert_allclose(out, np.where(mask, expected, 7), atol=1e-5)


class Case(NamedTuple):
    """A scan, an image that a map moves, and points with a force."""

    f: Array
    image: Array
    where: PointMap
    inside: Array
    fixed: Array

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Self:
        wide, inside = padded(shape), some_points(shape)
        f = values(wide, 1)
        image = np.random.default_rng(2).integers(-9000, 9000, wide).astype(np.int16)
        unit = np.float32(1)
        start, v = values((3, *wide), 3), values((3, *wide), 4)
        where = PointMap(np.zeros(3, np.float32), unit, unit, by_plane(start), by_plane(v), wide)
        fixed = np.zeros((3, wide[0], wide[1] * wide[2]), np.float32)
        fixed[0] = by_plane(f)
        everywhere = Region.around(np.pad(np.ones(shape, bool), PAD))
        sweep.take_moments(wide[2], everywhere.planes, fixed)
        return cls(f, image, where, inside, fixed)

    def moved(self, v: Array) -> Array:
        """The image where the map with a correction takes the points."""
        u = self.where.start.astype(float) + v
        u = u.reshape(3, *self.f.shape)
        return naive.sampled(self.image / UNITS, np.zeros(3), 1.0, u, 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_correlation(shape: tuple[int, ...]) -> None:
    case = Case.of(shape)
    out = np.full(case.fixed.shape[1:], 7, np.float32)
    region = Region.around(case.inside)
    sweep.take_correlation(case.image, case.where, region.planes, case.fixed, out)
    a, b, c = naive.correlation(case.f, case.moved(case.where.v))
    expected = np.where(case.inside, a / np.sqrt(b * c), 7)
    np.testing.assert_allclose(out.reshape(case.f.shape), expected, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_iterations(shape: tuple[int, ...]) -> None:
    """A force; then a step by it and the next force; then a step by that."""
    case = Case.of(shape)
    wide = case.f.shape
    region, moves = Region.around(case.inside), naive.grown(case.inside, 2)
    taps = iteration.taps(iteration.SMOOTHNESS, iteration.RADIUS)
    d, v = np.zeros_like(case.where.v), case.where.v
    start = v.copy().reshape(3, *wide)
    h, factors = np.float32(3), (0.0, 1.7, 0.8)
    expected, step = start.astype(float), np.zeros_like(start)
    for factor in factors[:2]:
        if factor:
            expected = naive.stepped(expected, np.float32(factor) * step.astype(float), moves)
        counts = sweep.step_and_take_forces(
            case.image, case.where, region.planes, case.fixed, h, taps, np.float32(factor), d
        )
        assert counts.sum() == case.inside.sum()
        np.testing.assert_allclose(v.reshape(3, *wide), expected, atol=1e-3)
        force = naive.force(case.f, case.moved(expected.reshape(v.shape)), 3.0, case.inside)
        step = np.array([naive.smoothed(one, moves) for one in force])
        np.testing.assert_allclose(d.reshape(3, *wide), step, atol=1e-3)
    sweep.step(d, np.float32(factors[2]), wide[2], region.planes, v)
    expected = naive.stepped(expected, np.float32(factors[2]) * step, moves)
    np.testing.assert_allclose(v.reshape(3, *wide), expected, atol=1e-3)
    assert (v.reshape(3, *wide) == start)[:, ~moves].all()


def test_the_first_force_comes_before_any_step() -> None:
    case = Case.of((4, 5, 6))
    before = case.where.v.copy()
    planes = Region.around(case.inside).planes
    taps = iteration.taps(iteration.SMOOTHNESS, iteration.RADIUS)
    sweep.step_and_take_forces(
        case.image,
        case.where,
        planes,
        case.fixed,
        np.float32(3),
        taps,
        np.float32(0),
        np.zeros_like(before),
    )
    assert (case.where.v == before).all()


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_quantile_of_lengths(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    d = (size * rng.normal(0, 1, (3, 4, 7 * 11))).astype(np.float32)
    inside = np.pad(rng.random((4, 7, 9)) < 0.8, ((0, 0), (0, 0), (1, 1)))
    length = np.sqrt((d.astype(float) ** 2).sum(axis=0))[by_plane(inside)]
    expected = np.quantile(length, 0.9, method="inverted_cdf")
    runs = Runs.split(iteration.runs_of(inside), (4, 7, 11))
    counts = np.zeros(iteration.BINS, np.int32)
    for z in range(4):
        own = runs.of[runs.first[z] : runs.first[z + 1]]
        iteration.count_lengths(d, z, own, np.empty(11, np.float32), counts)
    assert iteration.quantile(counts, 0.9) == pytest.approx(expected, rel=0.005)


def test_quantile_of_nothing_is_nothing() -> None:
    counts = np.zeros(iteration.BINS, np.int32)
    assert iteration.quantile(counts, 0.99) == 0
    counts[0] = 5
    assert iteration.quantile(counts, 0.99) < 1e-18
