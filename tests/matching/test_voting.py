from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store import Organ, OrganTable
from kpt_dask.matching.voting import likelihood, vote
from tests.naive import stations

ORGANS = OrganTable(
    (
        Organ(9, "liver", 50.0, (1, 2, 3)),
        Organ(2, "lung_left", 300.0, (1, 2, 3)),
        Organ(700, "spleen", 50.0, (1, 2, 3)),
    )
)


def matches(rows: list[tuple[int, int, float, float]], tau_squared: float | None = None) -> Any:
    """Matches from (keypoint, label, squared distance, p(m))."""
    keypoint, label, squared, probability = (np.array(c) for c in zip(*rows, strict=True))
    return xr.Dataset(
        {
            "keypoint": ("match", keypoint.astype(np.int32)),
            "label": ("match", label.astype(np.uint16)),
            "squared_distance": ("match", squared.astype(np.float32)),
            "probability": ("match", probability.astype(np.float32)),
        },
        attrs={"largest_squared_distance": float(squared.max())},
    )


ROWS = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from([0, 2, 9, 700]),
        st.integers(1, 87_360),
        st.integers(1, 64).map(lambda k: k / 64),
    ),
    min_size=1,
    max_size=25,
)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_votes_are_those_of_the_equations(rows: list[tuple[int, int, float, float]]) -> None:
    votes = vote(matches(rows), 7, ORGANS)
    posterior, label = stations.votes(7, ORGANS.values, *zip(*rows, strict=True))
    np.testing.assert_allclose(votes.posterior, posterior, rtol=1e-6)
    for k, p in enumerate(posterior):
        # Votes that differ by a rounding may go either way.
        if p.count(max(p)) == 1 and sorted(p)[-1] > sorted(p)[-2] * (1 + 1e-9):
            assert votes.label[k] == label[k]
    assert votes.label[6] == 0


def test_what_comes_back() -> None:
    votes = vote(matches([(1, 9, 5, 1)]), 3, ORGANS)
    assert votes.posterior.dims == ("keypoint", "organ")
    assert votes.posterior.dtype == np.float32
    assert votes.label.dtype == np.uint16
    assert votes.organ.values.tolist() == ["liver", "lung_left", "spleen"]
    assert votes.posterior.values.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert votes.label.values.tolist() == [0, 9, 0]


def test_the_likelihood_is_a_gaussian_of_the_distance() -> None:
    squared = np.float32([0, 10, 400])
    expected = [stations.likelihood(float(s), 400.0) for s in squared]
    np.testing.assert_allclose(likelihood(squared, 400.0), expected, rtol=1e-12)
    # τ² is squared already: at the largest distance e^(−1/2) of the highest is left.
    at = likelihood(squared, 400.0)
    assert at[2] / at[0] == pytest.approx(np.exp(-0.5))


def test_the_distances_of_other_keypoints_set_tau() -> None:
    alone = vote(matches([(0, 9, 100, 0.5), (0, 2, 50, 0.5)]), 2, ORGANS)
    beside = vote(matches([(0, 9, 100, 0.5), (0, 2, 50, 0.5), (1, 2, 900, 1)]), 2, ORGANS)
    assert alone.posterior[0, 0] == pytest.approx(1 / (1 + np.exp(0.25)), rel=1e-6)
    assert beside.posterior[0, 0] == pytest.approx(1 / (1 + np.exp(50 / 1800)), rel=1e-6)


def test_many_that_agree_outvote_one_that_is_closer() -> None:
    rows = [(0, 9, 80, 0.5), (0, 9, 80, 0.4), (0, 2, 1, 0.5), (0, 9, 80, 0.3)]
    assert vote(matches(rows), 1, ORGANS).label[0] == 9


def test_background_does_not_vote() -> None:
    rows = [(0, 0, 1, 1.0), (0, 0, 1, 1.0), (0, 700, 80, 0.01), (1, 0, 1, 1.0)]
    votes = vote(matches(rows), 2, ORGANS)
    assert votes.label.values.tolist() == [700, 0]
    assert votes.posterior.values.tolist() == [[0, 0, 1], [0, 0, 0]]


def test_ties_go_to_the_organ_that_comes_first_in_the_table() -> None:
    rows = [(0, 2, 10, 0.5), (0, 9, 10, 0.5), (1, 700, 10, 0.5), (1, 2, 10, 0.5)]
    votes = vote(matches(rows), 2, ORGANS)
    assert votes.label.values.tolist() == [9, 2]


def test_matches_without_any_distance_vote_equally() -> None:
    votes = vote(matches([(0, 2, 0, 0.75), (0, 9, 0, 0.25)]), 1, ORGANS)
    assert votes.posterior.values.tolist() == [[0.25, 0.75, 0]]


@pytest.mark.parametrize("n", [0, 4])
def test_no_match_is_no_vote(n: int) -> None:
    empty = matches([(0, 9, 5, 1)]).isel(match=slice(0, 0))
    votes = vote(empty.assign_attrs(largest_squared_distance=0.0), n, ORGANS)
    assert votes.posterior.shape == (n, 3)
    assert not votes.posterior.values.any()
    assert not votes.label.values.any()
