"""Keypoints of moved, turned, mirrored and rescaled volumes.

Comparisons that may meet float32 ties print how many they met; ``pytest -rP`` shows it.
"""

import numpy as np
import pytest

from kpt_dask.keypoints.descriptors import BINS, STEP
from kpt_dask.keypoints.sweep import OctaveKeypoints
from kpt_dask.volumes.scale_space import level_sigma
from tests.keypoints.common import AIR, Shape, found_in, texture
from tests.naive import keypoints


def permutation(axes: tuple[int, int, int], flipped: tuple[int, ...]) -> np.ndarray:
    """Where the ranks of a volume's descriptors come from, once transposed and then flipped."""
    bins = np.arange(BINS).reshape(6 * (2,)).transpose(*axes, *(a + 3 for a in axes))
    return np.flip(bins, [a + d for a in flipped for d in (0, 3)]).ravel()


def inside(found: OctaveKeypoints, shape: Shape) -> np.ndarray:
    """Whether the patch lies in the volume, where no edge has to repeat."""
    sigma = level_sigma(0) * 2 ** ((found.level + found.offset[:, 3]) / 3)
    reach = 6 * STEP * sigma[:, None] + 1
    centre = found.voxel + found.offset[:, :3]
    return ((centre > reach) & (centre < np.array(shape) - 1 - reach)).all(axis=1)


@pytest.mark.parametrize("octave", [0, 1])
@pytest.mark.parametrize("shift", [(1, 0, 0), (3, -2, 5)])
def test_integer_translation_is_exact(octave: int, shift: Shape) -> None:
    """Structures far from the border, so that nothing but air repeats there."""
    values = np.full((120, 120, 120), AIR, np.float32)
    values[40:80, 40:80, 41:80] = texture((40, 40, 39), 8)
    here, there = found_in(values, octave), found_in(np.roll(values, shift, (0, 1, 2)), octave)
    assert here.level.size > 4
    np.testing.assert_array_equal(there.voxel, here.voxel + shift)
    for a, b in zip(here[1:], there[1:], strict=True):
        assert a.tobytes() == b.tobytes()


MOVES = [((0, 1, 2), (a,)) for a in range(3)] + [
    ((0, 2, 1), (1,)),
    ((2, 1, 0), (0,)),
    ((1, 0, 2), (1,)),
    ((1, 2, 0), ()),
]
"""Axes that a volume is transposed to, and which are flipped then: flips and rotations."""


@pytest.fixture(scope="module", params=["real", "texture"])
def upright(
    request: pytest.FixtureRequest, crop: np.ndarray
) -> tuple[np.ndarray, OctaveKeypoints, dict[tuple[int, ...], np.ndarray]]:
    """Voxels, keypoints, and the reference's gradient sums by level and voxel."""
    values = crop if request.param == "real" else texture((60, 70, 80), 3)
    naive = keypoints.find(values, True)
    sums = dict(zip(map(tuple, naive.voxel.tolist()), naive.sums, strict=True))
    return values, found_in(values), sums


@pytest.mark.parametrize(("axes", "flipped"), MOVES)
def test_flips_and_right_angles(
    upright: tuple[np.ndarray, OctaveKeypoints, dict[tuple[int, ...], np.ndarray]],
    axes: tuple[int, int, int],
    flipped: tuple[int, ...],
) -> None:
    """Flips are exact; transposing changes the order of the blur's axes, so its rounding."""
    values, here, sums_of = upright
    moved = np.ascontiguousarray(np.flip(values.transpose(axes), flipped))
    there = found_in(moved)
    index, offset = here.voxel[:, axes], here.offset[:, [*axes, 3]]
    for axis in flipped:
        index[:, axis] = moved.shape[axis] - 1 - index[:, axis]
        offset[:, axis] *= -1
    from_bin = permutation(axes, flipped)
    order = np.lexsort((*index.T[::-1], here.level))
    expected = OctaveKeypoints(*(a[order] for a in (index, offset, *here[2:])))
    np.testing.assert_array_equal(there.voxel, expected.voxel)
    np.testing.assert_array_equal(there.level, expected.level)
    np.testing.assert_array_equal(np.sign(there.response), np.sign(expected.response))
    exact = axes == (0, 1, 2)
    np.testing.assert_allclose(there.response, expected.response, rtol=0, atol=0 if exact else 4e-3)
    apart = np.abs(there.offset - expected.offset)
    # Where neighbours hardly differ, rounding moves the vertex a little further.
    assert np.percentile(apart, 99) <= (0 if exact else 2e-3)
    assert apart.max() <= (1e-9 if exact else 0.02)
    whole = np.flatnonzero(inside(there, moved.shape))
    assert whole.size > 10
    differ = beyond = 0
    for n in whole:
        i = order[n]
        sums = sums_of[int(here.level[i]), *here.voxel[i].tolist()][from_bin]
        if (there.descriptor[n] != here.descriptor[i][from_bin]).any():
            differ += 1
            inverted = -np.diff(sums[np.argsort(there.descriptor[n])]).min()
            beyond += bool(inverted > 1e-3 * sums.max())
    print(f"{whole.size} descriptors; the ranks of {differ} differ, of {beyond} by more than ties")
    # A gradient next to the border of two octants takes its whole magnitude along.
    assert beyond <= (0 if exact else 0.1 * whole.size)


@pytest.mark.parametrize(("axes", "flipped"), MOVES)
def test_local_frames_turn_with_the_volume(
    crop: np.ndarray, axes: tuple[int, int, int], flipped: tuple[int, ...]
) -> None:
    """Descriptors stay; only a mirrored volume mirrors them, along the third axis of a frame."""
    moved = np.ascontiguousarray(np.flip(crop.transpose(axes), flipped))
    here, there = found_in(crop, invariant=True), found_in(moved, invariant=True)
    turn = np.eye(3)[list(axes)]
    turn[list(flipped)] *= -1
    mirrored = np.linalg.det(turn) < 0
    index = here.voxel[:, axes]
    for axis in flipped:
        index[:, axis] = moved.shape[axis] - 1 - index[:, axis]
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for n, key in enumerate(np.column_stack([there.level, there.voxel]).tolist()):
        rows_of.setdefault(tuple(key), []).append(n)
    whole = np.flatnonzero(inside(here, crop.shape))
    missing, apart_ranks = 0, []
    for n in whole:
        expected = here.frame[n] @ turn.T
        ranks = here.descriptor[n]
        if mirrored:
            expected[2] *= -1
            ranks = np.flip(ranks.reshape(6 * (2,)), (2, 5)).ravel()
        rows = rows_of[int(here.level[n]), *index[n].tolist()]
        apart = np.abs(there.frame[rows] - expected).max(axis=(1, 2))
        if apart.min() > 1e-2:
            missing += 1
        else:
            other = there.descriptor[rows[int(apart.argmin())]]
            apart_ranks.append(int(((other.astype(int) - ranks) ** 2).sum()))
    swaps, worst = np.count_nonzero(apart_ranks), max(apart_ranks)
    print(f"{whole.size} frames; rounding changes {missing}, the ranks of {swaps}, by ≤ {worst}")
    assert whole.size > 20
    exact = axes == (0, 1, 2)
    assert missing <= (0 if exact else 0.05 * whole.size)
    # Mirroring turns the order of empty bins around, which are ties; of two descriptors that
    # have nothing in common it is 43 680.
    assert swaps <= (whole.size if mirrored else 0.05 * whole.size)
    assert worst <= 1000


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("factor", [0.25, 2.0, 1024.0])
def test_power_of_two_is_exact(crop: np.ndarray, factor: float, invariant: bool) -> None:
    here = found_in(crop, invariant=invariant)
    there = found_in(factor * crop, invariant=invariant)
    for name in ("voxel", "offset", "level", "descriptor", "frame"):
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
    np.testing.assert_array_equal(there.response, factor * here.response)


@pytest.mark.parametrize(("factor", "plus"), [(2.0, 700.0), (0.7, -300.0)])
def test_linear_intensity_changes_only_ties(crop: np.ndarray, factor: float, plus: float) -> None:
    here, there = found_in(crop), found_in((factor * crop + plus).astype(np.float32))
    keys = [
        {(int(k), *v): i for i, (k, v) in enumerate(zip(f.level, f.voxel.tolist(), strict=True))}
        for f in (here, there)
    ]
    both = sorted(keys[0].keys() & keys[1].keys())
    lost = len(keys[0].keys() ^ keys[1].keys())
    a, b = (
        f.descriptor[[k[key] for key in both]] for f, k in zip((here, there), keys, strict=True)
    )
    differ = (a != b).any(axis=1)
    print(f"{len(both)} keypoints; {lost} others differ by ties, and the ranks of {differ.sum()}")
    assert lost <= 0.01 * len(both)
    assert differ.mean() < 0.1
