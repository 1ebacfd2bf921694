"""Dice of label maps that stream by, against NumPy and SimpleITK."""

from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store import load_organs
from kpt_dask.evaluation.overlap import dice
from tests.evaluation.judges import numpy_dice

ORGANS = load_organs("visceral")
sitk: Any = SimpleITK


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    parts=st.integers(1, 4),
    annotated=st.lists(st.sampled_from(ORGANS.names), min_size=1, unique=True),
)
def test_dice_is_what_numpy_and_simpleitk_say(seed: int, parts: int, annotated: list[str]) -> None:
    rng = np.random.default_rng(seed)
    reference, found = rng.choice([0, 0, 1, 2, 3], (2, 6, 5, 4)).astype(np.uint8)
    scores = dice(
        np.array_split(reference, parts),
        np.array_split(found.astype(np.uint16), parts),
        annotated,
        ORGANS,
    )
    assert list(scores) == [name for name in ORGANS.names if name in annotated]
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(labels) for labels in (reference, found)))
    for name, score in scores.items():
        value = ORGANS.by_name(name).value
        assert score == pytest.approx(numpy_dice(reference == value, found == value))
        if (reference == value).any():
            assert score == pytest.approx(overlap.GetDiceCoefficient(value))
