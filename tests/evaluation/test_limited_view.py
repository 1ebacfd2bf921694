"""Cropped fields of view: which planes are left, which organs lie inside, what is summed up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpt_dask.evaluation.limited_view import (
    MARGIN_MM,
    Judged,
    crop_around,
    limited_view_summary,
)


@given(st.data(), st.integers(1, 300), st.floats(0.5, 5))
def test_a_crop_holds_its_organ_and_a_third(
    data: st.DataObject, planes: int, spacing: float
) -> None:
    ends = st.tuples(st.integers(0, planes - 1), st.integers(1, planes)).map(
        lambda pair: (min(pair[0], pair[1] - 1), max(pair[0] + 1, pair[1]))
    )
    extents = data.draw(st.dictionaries(st.sampled_from("abcd"), ends, min_size=1).map(dict))
    organ = data.draw(st.sampled_from(sorted(extents)))
    crop = crop_around(organ, extents, planes, spacing)
    low, high = extents[organ]
    shown = range(planes)[crop.first : crop.last]
    assert {low, high - 1} <= set(shown)
    assert len(shown) >= planes / 3
    for name, (first, last) in extents.items():
        assert (name in crop.inside) == (set(range(first, last)) <= set(shown))
    margins = low - crop.first, crop.last - high
    if crop.first > 0 and crop.last < planes:
        # In the middle, and never without a margin.
        assert abs(margins[0] - margins[1]) <= 1
        assert min(margins) * spacing >= MARGIN_MM - spacing
    assert len(shown) <= max(planes / 3 + 1, high - low + 2 * (MARGIN_MM / spacing + 1))


def test_losses_are_means_over_organs_with_intervals_over_scans() -> None:
    judged = [
        Judged("a", "x", "local", "x", 0.8, 0.7),
        Judged("a", "x", "local", "y", 0.6, 0.6),
        Judged("b", "x", "local", "x", 0.9, 0.9),
        Judged("b", "x", "organ", "x", 0.5, 0.2),
    ]
    found = limited_view_summary(judged, ["x"])
    local, organ = found["modes"]["local"], found["modes"]["organ"]
    assert local["whole"] == pytest.approx(2.3 / 3)
    assert local["cropped"] == pytest.approx(2.2 / 3)
    assert local["loss"] == pytest.approx(0.1 / 3)
    assert local["by_organ"]["x"]["loss"] == pytest.approx(0.05)
    # Of two scans: both a, both b, or one of each.
    assert local["interval"] == pytest.approx([0.0, 0.05])
    assert organ["interval"] is None
    assert np.isclose(organ["loss"], 0.3)
    assert len(found["rows"]) == 4
