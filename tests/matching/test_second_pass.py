from typing import Any

import numpy as np
import xarray as xr
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atlas_store import AtlasKeypoints
from kpt_dask.matching.second_pass import rematch, rematch_atlas
from tests.naive import warping
from tests.naive.stations import squared_distance

Array = NDArray[Any]
Side = tuple[Array, Array, Array, Array]


def keypoints(rng: np.random.Generator, n: int) -> Side:
    return (
        rng.uniform(0, 90, (n, 3)).astype(np.float32),
        rng.choice([2.0, 3.5, 6.0], n).astype(np.float32),
        rng.choice([-1, 1], n).astype(np.int8),
        rng.integers(0, 64, (n, 64)).astype(np.uint8),
    )


def first_matches(rng: np.random.Generator, n: int, m: int) -> tuple[Array, Array]:
    keypoint = np.sort(rng.choice(n, min(m, n), replace=False)).astype(np.int32)
    return keypoint, rng.normal(5, 4, (keypoint.size, 3)).astype(np.float32)


def expected(test: Side, atlas: Side, keypoint: Array, translation: Array) -> list[Any]:
    """Pairs that choose each other, by eq. 2 near where the field expects them, twice."""
    position = test[0][keypoint]
    for radius in (35, 25):
        pairs = chosen(test, atlas, position, translation, radius)
        position = np.array([test[0][i] for i, _ in pairs]).reshape(-1, 3)
        translation = position - np.array([atlas[0][j] for _, j in pairs]).reshape(-1, 3)
    return pairs


def chosen(test: Side, atlas: Side, position: Array, translation: Array, radius: float) -> Any:
    """Pairs that choose each other within a radius."""
    cost = np.full((len(test[1]), len(atlas[1])), np.inf)
    for i in range(len(test[1])):
        *u, support = warping.displacement(test[0][i], position, translation)
        for j in range(len(atlas[1])):
            near = np.linalg.norm(test[0][i] - u - atlas[0][j]) < radius
            ratio = float(test[1][i]) / float(atlas[1][j])
            if support > 0 and near and 0.5 <= ratio <= 2 and test[2][i] == atlas[2][j]:
                cost[i, j] = squared_distance(test[3][i], atlas[3][j])
    return [
        (i, int(row.argmin()))
        for i, row in enumerate(cost)
        if row.min(initial=np.inf) < np.inf and cost[:, row.argmin()].argmin() == i
    ]


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 30), st.integers(0, 12))
@settings(max_examples=20, deadline=None)
def test_pairs_are_those_that_choose_each_other(seed: int, n: int, m: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    test, atlas = keypoints(rng, n), keypoints(rng, m)
    first = first_matches(rng, n, k)
    i, j = rematch_atlas(test, atlas, *first)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected(test, atlas, *first)


def test_every_atlas_is_matched_with_its_own_first_matches(one_process: Client) -> None:
    rng = np.random.default_rng(4)
    test, sides = keypoints(rng, 25), [keypoints(rng, n) for n in (20, 0, 30)]
    firsts = [first_matches(rng, 25, k) for k in (8, 0, 10)]
    counts = [len(scale) for _, scale, _, _ in sides]
    position, scale, sign, descriptor = (np.concatenate(a) for a in zip(*sides, strict=True))
    atlases: Any = AtlasKeypoints(
        ids=("a", "b", "c"),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        position=position,
        scale=scale,
        sign=sign,
        response=scale,
        descriptor=descriptor,
        octave=np.zeros(len(scale), np.uint8),
        frame=np.zeros((len(scale), 3, 3), np.float32),
        label=np.zeros(len(scale), np.uint16),
    )
    scan = xr.Dataset(
        {
            "position": (("keypoint", "axis"), test[0]),
            "scale": ("keypoint", test[1]),
            "sign": ("keypoint", test[2]),
            "descriptor": (("keypoint", "bin"), test[3]),
        }
    )
    matches = xr.Dataset(
        {
            "keypoint": ("match", np.concatenate([k for k, _ in firsts])),
            "atlas": ("match", np.repeat(np.int32([0, 1, 2]), [k.size for k, _ in firsts])),
            "translation": (("match", "axis"), np.concatenate([t for _, t in firsts])),
        }
    )
    found = rematch(scan, atlases, matches, client=one_process)
    pairs = [
        (a, i, j)
        for a, (side, first) in enumerate(zip(sides, firsts, strict=True))
        for i, j in expected(test, side, *first)
    ]
    assert len(pairs) > 5
    columns = (found[name].values for name in ("atlas", "keypoint", "atlas_keypoint"))
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == pairs
    for translation, (a, i, j) in zip(found.translation.values, pairs, strict=True):
        np.testing.assert_allclose(translation, test[0][i] - sides[a][0][j], atol=1e-5)
