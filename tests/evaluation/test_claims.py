"""What answers say of themselves, counted: against SciPy's ranks and plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from kpt_dask.evaluation.claims import FAILED, Claim, trust
from kpt_dask.measures.surfaces import Agreement
from kpt_dask.organ_transfer.measures import UNSURE

parts = st.integers(0, 20).map(lambda n: n / 20)


@given(st.lists(st.tuples(parts, parts, parts), min_size=1, max_size=12))
def test_counts_are_those_of_plain_loops(answers: list[tuple[float, float, float]]) -> None:
    scans = [
        (
            {"liver": Claim(confidence, 10.0, 8.0, 12.0, 16 * volume)},
            {"liver": Agreement(dice, None, None, dice)},
        )
        for confidence, dice, volume in answers
    ]
    found = trust(scans)
    unsure = [confidence < UNSURE for confidence, _, _ in answers]
    failed = [dice < FAILED for _, dice, _ in answers]
    assert found["answers"] == len(answers)
    assert (found["unsure"], found["failed"]) == (sum(unsure), sum(failed))
    assert found["failed_and_unsure"] == sum(a and b for a, b in zip(unsure, failed, strict=True))
    held = sum(8 <= 16 * volume <= 12 for _, _, volume in answers)
    assert found["volume_in_interval"] == pytest.approx(held / len(answers))
    confidence, dice, _ = np.array(answers).T
    if np.ptp(confidence) == 0 or np.ptp(dice) == 0:
        assert found["rank_correlation"] is None
    else:
        ranks = rankdata(confidence), rankdata(dice)
        assert found["rank_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_only_annotated_organs_count() -> None:
    claim = Claim(0.0, 0.0, 0.0, 0.0, 5.0)
    found = trust([({"liver": claim}, {"liver": Agreement(0.0, None, None, 0.0)}), ({}, {})])
    assert found["answers"] == 1
    # What was not found is no matter of confidence.
    assert (found["not_found"], found["unsure"], found["failed_and_unsure"]) == (1, 0, 1)
    assert found["volume_in_interval"] == 0.0
