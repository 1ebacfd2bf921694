"""Patches and ranks against the plain reference, on patches of any content."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.keypoints.descriptors import BINS, PATCH, PATCH_REACH, STEP, describe, sample_patch
from kpt_dask.volumes.scale_space import LEVELS, level_sigma
from tests.naive import keypoints

SIZE = PATCH + 2

OFFSET = st.floats(-0.5, 0.5, allow_subnormal=False)
STEPS = st.floats(STEP * level_sigma(0.5), STEP * level_sigma(LEVELS + 0.5))


def gaussian(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Something as smooth as the Gaussians that patches are taken from."""
    noise = np.random.default_rng(seed).normal(0, 3000, shape)
    return keypoints.blur(noise, 1.6, 0.5).astype(np.float32)


def sampled(
    volume: np.ndarray, index: tuple[int, ...], offset: tuple[float, ...], step: float
) -> np.ndarray:
    patch = np.empty((SIZE, SIZE, SIZE), np.float32)
    sample_patch(volume, volume.shape[0], np.array(index), np.array(offset), step, patch)
    return patch


def described(patch: np.ndarray) -> np.ndarray | None:
    ranks = np.full(BINS, 255, np.uint8)
    accepted = describe(np.ascontiguousarray(patch, np.float32), ranks)
    assert accepted or (ranks == 255).all()
    return ranks if accepted else None


@given(st.tuples(*3 * [st.integers(1, 24)]), st.data(), st.tuples(OFFSET, OFFSET, OFFSET), STEPS)
@settings(max_examples=40, deadline=None)
def test_samples_are_trilinear_and_edges_repeat(
    shape: tuple[int, int, int], data: st.DataObject, offset: tuple[float, ...], step: float
) -> None:
    index = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    volume = gaussian(shape, 1)
    expected = keypoints.sample(volume.astype(np.float64), np.add(index, offset), step, SIZE)
    patch = sampled(volume, index, offset, step)
    np.testing.assert_allclose(patch, expected, atol=1e-5 * np.abs(volume).max())


@given(st.tuples(OFFSET, OFFSET, OFFSET), STEPS, st.sampled_from([0, 1, 2]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_beyond_an_edge_samples_are_equal_not_nearly_so(
    offset: tuple[float, ...], step: float, axis: int, far: bool
) -> None:
    """Else rounding noise decides the octant of every gradient out there."""
    volume = gaussian((40, 40, 40), 2)
    index = [20, 20, 20]
    index[axis] = 39 if far else 0
    patch = np.moveaxis(sampled(volume, tuple(index), offset, step), axis, 0)
    at = offset[axis] + (np.arange(SIZE) - SIZE // 2) * step
    outside = patch[at > 0] if far else patch[at < 0]
    assert (outside == outside[0]).all()


@given(st.integers(-500, 500), st.tuples(OFFSET, OFFSET, OFFSET), STEPS)
@settings(max_examples=20, deadline=None)
def test_bytes_do_not_depend_on_where_the_array_begins(
    before: int, offset: tuple[float, ...], step: float
) -> None:
    """Along z as a place in a ring, along x as a place in a row."""
    volume = gaussian((40, 40, 47), 3)
    there = sampled(volume, (20, 20, 23), offset, step)
    start = abs(before) % 3
    moved = np.ascontiguousarray(volume[:, start:, start:])
    assert sampled(moved, (20, 20 - start, 23 - start), offset, step).tobytes() == there.tobytes()
    # Half a ring: planes 20 ± 18 are what it must hold.
    size, n = 2 * PATCH_REACH + 1, 40
    ring = np.full((size, 40, 47), np.nan, np.float32)
    for z in range(20 - PATCH_REACH, 20 + PATCH_REACH + 1):
        ring[z % size] = volume[z]
    patch = np.empty((SIZE, SIZE, SIZE), np.float32)
    sample_patch(ring, n, np.array((20, 20, 23)), np.array(offset), step, patch)
    assert patch.tobytes() == there.tobytes()


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_ranks_are_those_of_the_reference(seed: int) -> None:
    """Where two sums are as good as equal, either order will do."""
    patch = gaussian((SIZE, SIZE, SIZE), seed)
    ranks = described(patch)
    sums, edge = keypoints.gradient_sums(patch.astype(np.float64))
    assert ranks is not None
    assert edge < 1
    assert sorted(ranks) == list(range(BINS))
    assert np.diff(sums[np.argsort(ranks)]).min() > -1e-5 * sums.max()
    assert np.count_nonzero(ranks != keypoints.ranks(sums)) <= 4


def test_equal_sums_rank_by_position() -> None:
    """A ramp with a kink has gradients in few octants; all other sums are 0."""
    z, y, x = np.indices((SIZE, SIZE, SIZE)).astype(np.float64)
    patch = 3 * z + 5 * np.abs(y - 6.2) + 7 * np.abs(x - 5.8) + np.abs(z - 6.1)
    sums, _ = keypoints.gradient_sums(patch)
    assert np.count_nonzero(sums == 0) >= 32
    empty = np.flatnonzero(sums == 0)
    np.testing.assert_array_equal(described(patch)[empty], np.arange(empty.size))


@pytest.mark.parametrize("axes", [(), (0,), (0, 1)])
def test_flat_and_line_like_patches_are_refused(axes: tuple[int, ...]) -> None:
    """Nothing changes along at least one axis: the tensor's determinant is 0."""
    patch = np.zeros((SIZE, SIZE, SIZE))
    for axis in axes:
        patch += 50 * np.sin(np.indices(patch.shape)[axis] / 2.0)
    assert described(patch) is None


@given(st.integers(0, 10_000), st.floats(-8, 8).map(lambda e: 2.0 ** round(e)))
@settings(max_examples=20, deadline=None)
def test_a_power_of_two_changes_no_rank(seed: int, factor: float) -> None:
    patch = gaussian((SIZE, SIZE, SIZE), seed)
    np.testing.assert_array_equal(described(factor * patch), described(patch))


@given(st.integers(0, 10_000), st.sampled_from([0, 1, 2]))
@settings(max_examples=30, deadline=None)
def test_flipped_patch_has_permuted_ranks(seed: int, axis: int) -> None:
    patch = gaussian((SIZE, SIZE, SIZE), seed)
    ranks = described(patch)
    flipped = described(np.flip(patch, axis))
    assert ranks is not None
    assert flipped is not None
    # (z bin, y bin, x bin, z sign, y sign, x sign): both change along the axis.
    expected = np.flip(ranks.reshape(6 * (2,)), (axis, axis + 3)).ravel()
    assert np.count_nonzero(flipped != expected) <= 4
