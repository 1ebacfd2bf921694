"""Agreement of warped atlases with each other, against plain loops over pairs and atlases."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kpt_dask.organ_transfer.refinement.agreement import (
    FEWEST,
    LEAST,
    best_shares,
    conformity,
    count_others,
    overlap,
)
from kpt_dask.organ_transfer.refinement.atlas import Refined

Array = NDArray[Any]


def refined(labels: Array) -> list[Refined]:
    nothing = np.zeros(labels.shape[1:], np.uint8)
    return [Refined((0.0, 0.0, 0.0), one.astype(np.uint16), nothing) for one in labels]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_overlap_is_the_mean_over_pairs(seed: int, atlases: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (atlases, 3, 4, 5))
    labels[1:, labels[0] == 3] = 3
    labels[:, 0, 0] = 0
    found = overlap(count_others(refined(labels), 4))
    for o, value in enumerate(found):
        masks = [one == o + 1 for one in labels if (one == o + 1).any()]
        if len(masks) < 2:
            assert value == 0
            continue
        both = sum((a & b).sum() for i, a in enumerate(masks) for b in masks[:i])
        size = sum(mask.sum() for mask in masks) / len(masks)
        assert value == pytest.approx(both / size / (len(masks) * (len(masks) - 1) / 2))
    assert not overlap(count_others([], 4)).any()


def dice_by_others(masks: list[Array]) -> list[float]:
    """Mean Dice of an atlas with the points that 1, 2, … of the others label."""
    found = []
    for k in range(1, len(masks)):
        scores = []
        for i, own in enumerate(masks):
            others = [m for j, m in enumerate(masks) if j != i]
            agreed = np.sum(others, axis=0) >= k
            scores.append(2 * (own & agreed).sum() / (own.sum() + agreed.sum()))
        found.append(float(np.mean(scores)))
    return found


@given(st.integers(0, 2**32 - 1), st.integers(FEWEST, 12), st.floats(0.3, 2.5))
@settings(max_examples=30, deadline=None)
def test_the_best_share_is_where_an_atlas_is_found_best_by_the_others(
    seed: int, atlases: int, scatter: float
) -> None:
    """Balls whose centres scatter, of atlases of which the last does not show the organ."""
    rng = np.random.default_rng(seed)
    points = np.indices((9, 10, 11))
    centres = np.array([4, 5, 5])[:, None] + rng.normal(0, scatter, (3, atlases))
    away = ((points[:, None] - centres[..., None, None, None]) ** 2).sum(axis=0)
    labels = np.where(away < 3**2, 2, 0)
    labels = np.concatenate([labels, np.zeros_like(labels[:1])])
    assume(labels[:-1].any(axis=(1, 2, 3)).all())
    none, share = best_shares(count_others(refined(labels), 2))
    assert np.isnan(none)
    dice = dice_by_others([one == 2 for one in labels[:-1]])
    best = int(np.argmax(dice)) + 1
    # Between the whole numbers of others on both sides.
    assert (best - 1) / (atlases - 1) <= share <= best / (atlases - 1)


def test_atlases_that_lie_on_each_other_are_found_at_any_share() -> None:
    labels = np.zeros((FEWEST, 4, 4, 4), int)
    labels[:, 1:3, 1:3] = 1
    [share] = best_shares(count_others(refined(labels), 1))
    assert 0 < share < 1
    assert np.isnan(best_shares(count_others(refined(labels[1:]), 1))).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_conformity_is_the_soft_dice_with_the_other_atlases(seed: int, atlases: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (atlases, 3, 4, 5))
    labels[0][labels[0] == 1] = 0
    found = conformity(count_others(refined(labels), 4))
    assert found.shape == (4, atlases)
    for o, alike in enumerate(found):
        masks = {i: one == o + 1 for i, one in enumerate(labels) if (one == o + 1).any()}
        dice = {}
        for i, own in masks.items():
            others = [mask for j, mask in masks.items() if j != i]
            share = np.mean(others, axis=0) if others else np.zeros(own.shape)
            dice[i] = 2 * share[own].sum() / (own.sum() + share.sum())
        largest = max(dice.values(), default=0)
        relative = {i: max(d / largest, LEAST) if largest else 1.0 for i, d in dice.items()}
        mean = np.mean(list(relative.values())) if relative else 1.0
        assert alike == pytest.approx([relative.get(i, mean) for i in range(atlases)])
    assert conformity(count_others([], 4)).shape == (4, 0)
