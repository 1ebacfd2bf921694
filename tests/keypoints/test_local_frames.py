"""Local frames against the plain reference, and what flips and right angles do to them."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.keypoints.descriptors import BINS, PATCH
from kpt_dask.keypoints.local_frames import MAX_FRAMES, describe_in_frames
from tests.naive import keypoints

SHAPE = (PATCH + 2, PATCH + 2, PATCH + 2)
SYMMETRIES = [
    (axes, flips) for axes in permutations(range(3)) for flips in product((1, -1), repeat=3)
]


def patch_of(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 3000, SHAPE)
    return keypoints.blur(noise, 1.6, 0.5).astype(np.float32)


def described(patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    frames = np.full((MAX_FRAMES, 3, 3), np.nan, np.float32)
    ranks = np.full((MAX_FRAMES, BINS), 255, np.uint8)
    n = describe_in_frames(np.ascontiguousarray(patch, np.float32), frames, ranks)
    return frames[:n], ranks[:n]


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_frames_and_ranks_are_those_of_the_reference(seed: int) -> None:
    patch = patch_of(seed)
    frames, ranks = described(patch)
    expected = keypoints.frames_of(patch.astype(np.float64))
    np.testing.assert_allclose(frames, [frame.axes for frame in expected], atol=1e-5)
    for frame, own in zip(expected, ranks, strict=True):
        assert sorted(own) == list(range(BINS))
        assert np.diff(frame.sums[np.argsort(own)]).min() > -1e-5 * frame.sums.max()


@given(st.integers(0, 10_000), st.sampled_from(SYMMETRIES))
@settings(max_examples=60, deadline=None)
def test_flips_and_right_angles_turn_frames_and_keep_ranks(
    seed: int, symmetry: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    axes, flips = symmetry
    patch = patch_of(seed)
    moved = patch.transpose(axes)[tuple(slice(None, None, f) for f in flips)]
    turn = np.eye(3)[list(axes)] * np.array(flips)[:, None]
    frames, ranks = described(patch)
    expected = frames @ turn.T
    if np.linalg.det(turn) < 0:
        # No rotation mirrors: the third axis points the other way.
        expected[:, 2] *= -1
        ranks = np.flip(ranks.reshape(-1, *6 * (2,)), (3, 6)).reshape(-1, BINS)
    found, found_ranks = described(moved)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.count_nonzero(found_ranks != ranks) <= 4 * len(ranks)


@pytest.mark.parametrize("values", ["blob", "ramp", "nothing"])
def test_there_is_always_a_frame(values: str) -> None:
    """Also where all directions are alike, or there is only one."""
    at = np.indices(SHAPE) - PATCH // 2 - 1.0
    patch = {"blob": (at**2).sum(axis=0), "ramp": at[1], "nothing": np.zeros(SHAPE)}[values]
    frames, ranks = described(patch)
    assert len(frames) >= 1
    np.testing.assert_allclose(
        frames @ frames.transpose(0, 2, 1), [np.eye(3)] * len(frames), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.det(frames), 1, atol=1e-6)
    assert (np.sort(ranks, axis=1) == np.arange(BINS)).all()
    if values != "blob":
        np.testing.assert_array_equal(frames, [np.eye(3)])


@given(st.integers(0, 10_000), st.integers(-8, 8))
@settings(max_examples=20, deadline=None)
def test_a_power_of_two_changes_nothing(seed: int, exponent: int) -> None:
    patch = patch_of(seed)
    for a, b in zip(described(patch), described(patch * np.float32(2.0**exponent)), strict=True):
        np.testing.assert_array_equal(a, b)
