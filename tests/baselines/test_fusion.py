"""Label fusion against its definition, voxel by voxel."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kpt_dask.baselines.fusion import (
    LEAST,
    NU,
    PATCH,
    WarpedAtlas,
    locally_weighted,
    majority,
)

SHAPE = 3, 4, 5
ANNOTATED = frozenset({1, 2, 5}), frozenset({1, 5}), frozenset({1, 2})


def atlases_of(seed: int) -> tuple[NDArray[np.float32], list[WarpedAtlas]]:
    """A scan and three atlases at random, not all of which annotate every organ."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 60, (4, *SHAPE)).astype(np.float32)
    made = []
    for image, annotated in zip(images[1:], ANNOTATED, strict=True):
        labels = rng.choice([0, *sorted(annotated)], SHAPE).astype(np.uint16)
        made.append(WarpedAtlas(image, labels, annotated))
    return images[0], made


def decided(votes: list[tuple[int, frozenset[int], float]]) -> int:
    """Decide one voxel: its label in each atlas, what that annotates, and its weight."""
    shares = {}
    for value in sorted({value for _, annotated, _ in votes for value in annotated}):
        own = [(label, weight) for label, annotated, weight in votes if value in annotated]
        shares[value] = sum(w for label, w in own if label == value) / sum(w for _, w in own)
    best = max(shares, key=lambda value: (shares[value], -value))
    return best if shares[best] > 1 - sum(shares.values()) else 0


def weight_at(scan: NDArray[Any], other: NDArray[Any], where: tuple[int, ...]) -> float:
    reach = PATCH // 2
    sides = [
        [min(max(i + d, 0), n - 1) for d in range(-reach, reach + 1)]
        for i, n in zip(where, scan.shape, strict=True)
    ]
    off = scan[np.ix_(*sides)].astype(float) - other[np.ix_(*sides)]
    return float(np.exp(-np.mean(off**2) / (2 * NU**2)) + LEAST)


@given(st.integers(0, 1000))
def test_the_majority_decides(seed: int) -> None:
    _, atlases = atlases_of(seed)
    found = majority(atlases)
    for where in np.ndindex(SHAPE):
        votes = [(int(a.labels[where]), a.annotated, 1.0) for a in atlases]
        assert found[where] == decided(votes)


@given(st.integers(0, 1000))
def test_atlases_that_look_like_the_scan_count_more(seed: int) -> None:
    scan, atlases = atlases_of(seed)
    found = locally_weighted(scan, atlases)
    for where in np.ndindex(SHAPE):
        votes = [
            (int(a.labels[where]), a.annotated, weight_at(scan, a.image, where)) for a in atlases
        ]
        assert found[where] == decided(votes)


def test_without_annotations_there_is_nothing_to_fuse() -> None:
    image = np.zeros(SHAPE, np.float32)
    with pytest.raises(ValueError, match="annotates"):
        majority([WarpedAtlas(image, np.zeros(SHAPE, np.uint16), frozenset())])
