from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import xarray as xr
from distributed import Client
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from atlas_store import AtlasKeypoints
from atlas_store.keypoints import first_frames
from kpt_dask.matching.first_pass import match, match_atlas
from tests.helpers import random_points
from tests.naive import stations
from tests.naive.stations import Points


def alike(rng: np.random.Generator, points: Points, n: int, swaps: int = 6) -> Points:
    """Other keypoints: some moved together and changed a little, some at random."""
    if not points.scale.size:
        return random_points(rng, n)
    picked = rng.integers(0, points.scale.size, n)
    descriptor = points.descriptor[picked].copy()
    for row in descriptor:
        for _ in range(int(rng.integers(0, swaps + 1))):
            a, b = rng.integers(0, 64, 2)
            row[[a, b]] = row[[b, a]]
    noise = np.rint(rng.normal(0, 4, (n, 3)) * 4) / 4
    moved = points.position[picked] + noise + (12, -7.5, 3.25)
    other = random_points(rng, n)
    strange = rng.random(n) < 0.2
    return Points(
        position=np.where(strange[:, None], other.position, moved).astype(np.float32),
        scale=points.scale[picked],
        sign=points.sign[picked],
        descriptor=np.where(strange[:, None], other.descriptor, descriptor),
        label=other.label,
    )


def arrays(points: Points) -> tuple[Any, ...]:
    return points.position, points.scale, points.sign, points.descriptor


def dataset(points: Points) -> xr.Dataset:
    return xr.Dataset(
        {
            "position": (("keypoint", "axis"), points.position),
            "scale": ("keypoint", points.scale),
            "sign": ("keypoint", points.sign),
            "descriptor": (("keypoint", "bin"), points.descriptor),
        }
    )


def stacked(atlases: Sequence[Points]) -> AtlasKeypoints:
    counts = [atlas.scale.size for atlas in atlases]
    fields = ("position", "scale", "sign", "descriptor", "label")
    n = sum(counts)
    return AtlasKeypoints(
        ids=tuple(f"a{i}" for i in range(len(atlases))),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        response=np.zeros(n, np.float32),
        octave=np.zeros(n, np.uint8),
        frame=np.zeros((n, 3, 3), np.float32),
        **{name: np.concatenate([getattr(atlas, name) for atlas in atlases]) for name in fields},
    )


def points(rows: Sequence[tuple[Any, ...]]) -> Points:
    """Keypoints from (position, scale, sign, descriptor)."""
    position, scale, sign, descriptor = zip(*rows, strict=True)
    return Points(
        np.array(position, np.float32).reshape(-1, 3),
        np.array(scale, np.float32),
        np.array(sign, np.int8),
        np.array(descriptor, np.uint8).reshape(-1, 64),
        np.ones(len(rows), np.uint16),
    )


def descriptor(distance: int = 0) -> Any:
    """A descriptor whose squared distance from ``descriptor()`` is 2 · distance."""
    ranks = np.arange(64)
    for k in range(distance):
        ranks[[2 * k, 2 * k + 1]] = ranks[[2 * k + 1, 2 * k]]
    return ranks


def clear(test: Points, atlas: Points) -> bool:
    """Whether the mode of the translations is one that no rounding can turn into another."""
    first = stations.nearest(test, atlas)
    proposed = stations.translations(test, atlas, first)
    if not proposed:
        return True
    at = stations.mode(proposed)
    heights = [stations.density(t, proposed) for t in proposed if t != at]
    return max(heights, default=0.0) < stations.density(at, proposed) * (1 - 1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_matches_are_those_of_the_equations(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    test = random_points(rng, n)
    atlas = alike(rng, test, m)
    assume(clear(test, atlas))
    expected, probability = stations.match_atlas(test, atlas)
    found = match_atlas(arrays(test), arrays(atlas))
    assert found.keypoint.tolist() == [e.test for e in expected]
    assert found.atlas_keypoint.tolist() == [e.atlas for e in expected]
    assert found.squared_distance.tolist() == [e.squared for e in expected]
    np.testing.assert_allclose(found.probability, probability, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(
        found.translation, np.reshape(stations.translations(test, atlas, expected), (-1, 3))
    )


def in_frames(rng: np.random.Generator, own: Points) -> tuple[Points, tuple[Any, ...]]:
    """Give keypoints up to three frames: as the equations see them, and as arrays of frames."""
    counts = rng.integers(1, 4, own.scale.size)
    rows = np.repeat(np.arange(own.scale.size), counts)
    flat = rng.permuted(own.descriptor[rows], axis=1)
    # The frame that fits need not come first.
    flat[np.cumsum(counts) - 1 - rng.integers(0, counts)] = own.descriptor
    frames = np.empty(own.scale.size, object)
    frames[:] = np.split(flat, np.cumsum(counts)[:-1])
    points = Points(own.position, own.scale, own.sign, frames, own.label)
    return points, (own.position[rows], own.scale[rows], own.sign[rows], flat)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_frames_of_one_keypoint_are_no_rivals(seed: int, n: int, m: int) -> None:
    """One match for a keypoint, by its closest frame; the second nearest is another keypoint."""
    rng = np.random.default_rng(seed)
    own = random_points(rng, n)
    test, test_arrays = in_frames(rng, own)
    atlas, atlas_arrays = in_frames(rng, alike(rng, own, m))
    assume(clear(test, atlas))
    expected, probability = stations.match_atlas(test, atlas)
    found = match_atlas(test_arrays, atlas_arrays)
    first, other = (first_frames(a[0], a[1]) for a in (test_arrays, atlas_arrays))
    assert (first.size, other.size) == (n, m)
    assert found.keypoint.tolist() == [first[e.test] for e in expected]
    assert found.atlas_keypoint.tolist() == [other[e.atlas] for e in expected]
    assert found.squared_distance.tolist() == [e.squared for e in expected]
    np.testing.assert_allclose(found.probability, probability, rtol=1e-6, atol=1e-8)


def test_all_atlases_at_once(one_process: Client) -> None:
    rng = np.random.default_rng(3)
    test = random_points(rng, 40)
    # The third has none, the fourth one.
    atlases = [alike(rng, test, n) for n in (35, 28, 0, 1, 50)]
    found = match(dataset(test), stacked(atlases), client=one_process)
    assert {name: str(found[name].dtype) for name in found} == {
        "keypoint": "int32",
        "atlas": "int32",
        "atlas_keypoint": "int32",
        "label": "uint16",
        "squared_distance": "float32",
        "translation": "float32",
        "probability": "float32",
    }
    k = 0
    for i, atlas in enumerate(atlases):
        expected, probability = stations.match_atlas(test, atlas)
        own = found.isel(match=slice(k, k + len(expected)))
        assert (own.atlas == i).all()
        assert own.keypoint.values.tolist() == [e.test for e in expected]
        assert own.atlas_keypoint.values.tolist() == [e.atlas for e in expected]
        assert own.label.values.tolist() == [atlas.label[e.atlas] for e in expected]
        np.testing.assert_allclose(own.probability, probability, rtol=1e-6)
        k += len(expected)
    assert k == found.sizes["match"] > 20
    assert found.attrs["largest_squared_distance"] == found.squared_distance.values.max()


def test_processes_match_as_threads_do(one_process: Client, two_processes: Client) -> None:
    rng = np.random.default_rng(5)
    test = random_points(rng, 60)
    atlases = stacked([alike(rng, test, 50) for _ in range(5)])
    expected = match(dataset(test), atlases, client=one_process)
    xr.testing.assert_identical(match(dataset(test), atlases, client=two_processes), expected)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0)])
def test_without_keypoints_there_is_no_match(one_process: Client, n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    found = match(
        dataset(random_points(rng, n)), stacked([random_points(rng, m)] * 2), client=one_process
    )
    assert found.sizes["match"] == 0
    assert found.translation.shape == (0, 3)
    assert found.attrs["largest_squared_distance"] == 0


def test_one_keypoint_each_is_a_match_that_all_agree_on() -> None:
    rng = np.random.default_rng(0)
    one, other = random_points(rng, 1), random_points(rng, 1)
    other = Points(other.position, one.scale, one.sign, other.descriptor, other.label)
    found = match_atlas(arrays(one), arrays(other))
    assert found.atlas_keypoint.tolist() == [0]
    np.testing.assert_array_equal(found.translation, one.position - other.position)
    assert found.probability.tolist() == [1]


def test_few_keypoints_match_themselves() -> None:
    # As many pairs at distance 0 as ε_x keeps.
    few = random_points(np.random.default_rng(2), 8)
    found = match_atlas(arrays(few), arrays(few))
    assert found.atlas_keypoint.tolist() == list(range(8))
    assert not found.translation.any()


def test_the_same_scan_can_be_matched_again_and_again(one_process: Client) -> None:
    rng = np.random.default_rng(4)
    test = random_points(rng, 40)
    atlases = stacked([alike(rng, test, 30)] * 2)
    expected = match(dataset(test), atlases, client=one_process)
    for _ in range(15):
        xr.testing.assert_identical(match(dataset(test), atlases, client=one_process), expected)


@pytest.mark.parametrize(
    ("scale", "sign", "expected"),
    [(8.0, 1, 0), (2.0, 1, 0), (8.01, 1, 1), (1.99, 1, 1), (4.0, -1, 1)],
)
def test_the_constraints_are_inside_the_argmin(scale: float, sign: int, expected: int) -> None:
    test = points([((0, 0, 0), 4, 1, descriptor())])
    atlas = points([((0, 0, 0), scale, sign, descriptor(1)), ((0, 0, 0), 5, 1, descriptor(8))])
    found = match_atlas(arrays(test), arrays(atlas))
    assert found.atlas_keypoint.tolist() == [expected]


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [(0, 10, True), (8, 10, True), (25, 31, True), (9, 10, False), (10, 10, False)],
)
def test_the_ratio_is_of_distances_not_of_their_squares(
    first: int, second: int, kept: bool
) -> None:
    test = points([((0, 0, 0), 4, 1, descriptor())])
    atlas = points([((0, 0, 0), s, 1, descriptor(d)) for s, d in ((4, second), (5, first))])
    found = match_atlas(arrays(test), arrays(atlas))
    assert found.keypoint.size == kept


def test_a_ratio_of_exactly_nine_tenths_is_kept() -> None:
    # Exchanging ranks a and b costs 2 (a − b)²: 2 · 81 = 162 and 2 · 100 = 200.
    near, far = np.arange(64), np.arange(64)
    near[[0, 9]], far[[0, 10]] = near[[9, 0]], far[[10, 0]]
    test = points([((0, 0, 0), 4, 1, descriptor())])
    atlas = points([((0, 0, 0), 4, 1, near), ((0, 0, 0), 5, 1, far)])
    found = match_atlas(arrays(test), arrays(atlas))
    assert found.squared_distance.tolist() == [162]


def test_ties_go_to_the_lower_index() -> None:
    """The first of two that are the same, whichever has the smaller scale or lies lower."""
    test = points([((0, 0, 0), 4, 1, descriptor())])
    for height, scale in ((0, 5), (0, 3), (1, 4), (-1, 4)):
        alike = [((0, 0, 0), 4, 1, descriptor()), ((height, 0, 0), scale, 1, descriptor())]
        atlas = points([((0, 0, 0), 6, 1, descriptor(5)), *alike])
        found = match_atlas(arrays(test), arrays(atlas))
        assert found.atlas_keypoint.tolist() == [1]
        assert found.squared_distance.tolist() == [0]


def together(n: int, shift: Any, jitter: float = 0.0) -> tuple[Points, Points]:
    """Keypoints that have one clear partner each, `shift` apart."""
    rng = np.random.default_rng(n)
    atlas = random_points(rng, n, spread=60)
    noise = np.rint(rng.uniform(-jitter, jitter, (n, 3)) * 4) / 4
    position = (atlas.position + np.asarray(shift) + noise).astype(np.float32)
    return Points(position, atlas.scale, atlas.sign, atlas.descriptor, atlas.label), atlas


def test_matches_far_from_the_rough_alignment_are_dropped() -> None:
    test, atlas = together(30, (20, -30, 10), jitter=3)
    position = test.position.copy()
    position[:5] += np.float32((400, 0, 0))
    test = Points(position, test.scale, test.sign, test.descriptor, test.label)
    found = match_atlas(arrays(test), arrays(atlas))
    assert found.keypoint.tolist() == list(range(5, 30))
    assert np.abs(found.translation - (20, -30, 10)).max() <= 3


def test_a_keypoint_with_a_double_elsewhere_is_matched_near_the_alignment() -> None:
    test, atlas = together(30, (5, 5, 5))
    # The double comes first, so that a tie alone would choose it.
    double = Points(*(np.concatenate([a[3:4], a]) for a in vars(atlas).values()))
    changed = double.descriptor.copy()
    for row in (0, 4):
        changed[row][:2] = changed[row][1::-1]
    far = double.position.copy()
    far[0] += 300
    double = Points(far, double.scale, double.sign, changed, double.label)
    assert 3 not in [m.test for m in stations.nearest(test, double)]
    found = match_atlas(arrays(test), arrays(double))
    assert found.atlas_keypoint[found.keypoint == 3].tolist() == [4]
