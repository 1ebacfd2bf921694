"""Summaries of judged scans."""

import numpy as np
import pytest

from atlas_store import AtlasStore
from kpt_dask.evaluation.claims import Claim
from kpt_dask.evaluation.summary import ScanResult, numbers_of_atlases, summarize
from kpt_dask.evaluation.table1 import Background
from kpt_dask.measures.surfaces import Agreement
from kpt_dask.options import DEFAULTS

NOTHING = Agreement(0.0, None, None, 0.0)
BOTH_EMPTY = Agreement(1.0, None, None, 1.0)


def result(
    measures: dict[str, Agreement],
    seconds: dict[str, float],
    fewer: dict[int, dict[str, float]] | None = None,
) -> ScanResult:
    counts = dict.fromkeys(measures, (2, 1, 1))
    claims = dict.fromkeys(measures, Claim(0.5, 10.0, 8.0, 12.0, 11.0))
    return ScanResult(measures, claims, counts, Background(4, 2, 1, 1), seconds, 9.0, fewer or {})


def test_means_are_over_the_scans_that_annotate(body_store: AtlasStore) -> None:
    results = {
        "a": result({"liver": Agreement(0.8, 1.0, 4.0, 0.9), "spleen": NOTHING}, {"x": 1.0}),
        "b": result({"liver": NOTHING}, {"x": 3.0, "z": 1.0}),
        "c": result({"liver": BOTH_EMPTY}, {"y": 1.0, "z": 2.0}),
    }
    found = summarize(results, body_store, "local", DEFAULTS, 2)
    assert found["mean_dice"] == pytest.approx((0.8 + 0 + 0 + 1) / 4)
    assert found["dice_by_organ"] == pytest.approx({"liver": 0.6, "spleen": 0.0})
    liver, spleen = (found["measures_by_organ"][name] for name in ("liver", "spleen"))
    # Of three scans one has distances; in one both show nothing, which is right.
    assert (liver["scans"], liver["only_one_shows"]) == (3, 1)
    assert liver["mean_distance_mm"] == {"mean": 1.0, "interval": None}
    assert liver["surface_dice"]["mean"] == pytest.approx(1.9 / 3)
    assert (spleen["scans"], spleen["only_one_shows"]) == (1, 1)
    assert spleen["distance_95_mm"] == {"mean": None, "interval": None}
    assert found["background"]["in_organ"] == 25.0
    # A station that a scan lacks took no time, and stands where it comes.
    assert list(found["seconds"]) == ["y", "x", "z", "total"]
    assert found["seconds"] == pytest.approx({"x": 4 / 3, "y": 1 / 3, "z": 1.0, "total": 9.0})
    assert found["seconds_by_scan"]["a"] == {"x": 1.0, "y": 0.0, "z": 0.0, "total": 9.0}


def test_numbers_of_atlases_keep_the_same_scans(body_store: AtlasStore) -> None:
    good, bad = Agreement(0.8, 1.0, 4.0, 0.9), Agreement(0.4, 1.0, 4.0, 0.9)
    results = {
        "a": result({"liver": good}, {}, {1: {"liver": 0.3}}),
        "b": result({"liver": bad}, {}, {1: {"liver": 0.1}}),
    }
    few, many = numbers_of_atlases(results, {1: 1, 30: 20}, body_store.organs)
    assert (few["atlases"], few["voting"], few["mean_dice"]) == (1, 1, pytest.approx(0.2))
    assert few["mean_dice_interval"] == pytest.approx([0.1, 0.3])
    assert (many["atlases"], many["voting"], many["mean_dice"]) == (30, 20, pytest.approx(0.6))
    assert np.isclose(many["dice_by_organ"]["liver"], 0.6)
