"""Statistics of keypoints, against counting in plain Python."""

from collections import Counter

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store import load_organs
from kpt_dask.evaluation.table1 import (
    background_statistics,
    background_votes,
    keypoint_votes,
    organ_statistics,
)
from kpt_dask.matching.voting import vote

ORGANS = load_organs("visceral")
LIVER, SPLEEN, AORTA = (ORGANS.by_name(name).value for name in ("liver", "spleen", "aorta"))


def test_votes_are_counted_where_keypoints_lie() -> None:
    inside = np.array([LIVER, LIVER, LIVER, LIVER, SPLEEN, 0], np.uint16)
    voted = np.array([LIVER, LIVER, SPLEEN, 0, 0, LIVER], np.uint16)
    counts = keypoint_votes(inside, voted, ["liver", "spleen", "aorta"], ORGANS)
    assert counts == {"liver": (4, 3, 2), "spleen": (1, 0, 0), "aorta": (0, 0, 0)}


def matches_of(labels: list[list[tuple[int, float]]]) -> xr.Dataset:
    """Matches of each keypoint: label and weight, by descriptors that all are equal."""
    rows = [(i, label, weight) for i, some in enumerate(labels) for label, weight in some]
    keypoint, label, weight = zip(*rows, strict=True) if rows else ((), (), ())
    return xr.Dataset(
        {
            "keypoint": ("match", np.array(keypoint, np.int64)),
            "label": ("match", np.array(label, np.uint16)),
            "probability": ("match", np.array(weight, np.float32)),
            "squared_distance": ("match", np.zeros(len(rows), np.float32)),
        },
        attrs={"largest_squared_distance": 0.0},
    )


def test_background_is_a_label_of_its_own() -> None:
    labels: list[list[tuple[int, float]]] = [
        [(0, 1.0)],  # right
        [(LIVER, 1.0)],  # wrong
        [(0, 3.0), (LIVER, 2.0)],  # right, but the segmentation says liver
        [],  # without a match
        [(AORTA, 1.0)],  # nobody knows: the aorta is not annotated
        [(0, 1.0)],  # in the liver: not a keypoint of the background
        [(0, 9.0)],  # another frame of the first
    ]
    inside = np.array([0, 0, 0, 0, 0, LIVER, 0], np.uint16)
    counted = np.arange(6)
    found = background_votes(inside, matches_of(labels), ["liver", "spleen"], ORGANS, counted)
    assert found == (4, 3, 2, 2)
    statistics = background_statistics([found, found])
    assert statistics == pytest.approx(
        {"mean": 4.0, "labelled": 75.0, "correct": 200 / 3, "in_organ": 50.0}
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([0, 0, LIVER, SPLEEN, AORTA]), st.integers(1, 50)), max_size=4
        ),
        min_size=1,
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_counting_in_python_finds_the_same(labels, random) -> None:  # type: ignore[no-untyped-def]
    inside = np.array([random.choice([0, 0, LIVER]) for _ in labels], np.uint16)
    annotated = [LIVER, SPLEEN]
    # Weights of no two labels of a keypoint are equal: no ties.
    weights = [[(label, weight + 0.001 * label) for label, weight in some] for some in labels]
    matches = matches_of(weights)
    voted = vote(matches, len(labels), ORGANS).label.values
    expected = Counter[str]()
    for place, some, organ in zip(inside, weights, voted, strict=True):
        if place or (organ and organ not in annotated):
            continue
        sums: dict[int, float] = {}
        for label, weight in some:
            sums[label] = sums.get(label, 0.0) + float(np.float32(weight))
        best = max(sums, key=lambda label: sums[label]) if sums else None
        expected["keypoints"] += 1
        expected["labelled"] += best is not None
        expected["correct"] += best == 0
        expected["in_organ"] += bool(organ)
    everything = np.arange(len(labels))
    found = background_votes(inside, matches, ["liver", "spleen"], ORGANS, everything)
    assert found._asdict() == {name: expected[name] for name in found._fields}


def test_statistics_are_those_of_all_scans_together() -> None:
    counts = [{"liver": (4, 2, 1)}, {"liver": (6, 3, 3), "spleen": (0, 0, 0)}]
    assert organ_statistics(counts, ORGANS) == {
        "liver": {"mean": 5.0, "labelled": 50.0, "correct": 80.0},
        "spleen": {"mean": 0.0, "labelled": None, "correct": None},
    }
