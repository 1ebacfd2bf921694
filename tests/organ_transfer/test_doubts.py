"""Doubts about an answer: what is told, and of whom."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atlas_store import AtlasStore
from kpt_dask.errors import KptWarning
from kpt_dask.organ_transfer.doubts import (
    doubt_alone,
    doubt_hu,
    doubt_little,
    doubt_unshown,
    doubt_volumes,
    unshown,
)
from kpt_dask.organ_transfer.measures import OrganMeasures
from kpt_dask.runtime import notices

WHERE = "scan.nii.gz"


def measures(volume: float) -> OrganMeasures:
    return OrganMeasures(volume, (0.0, 2 * volume), None, None, None, 0, None, False, 0.5)


def sentence(told: Any) -> str:
    [one] = told.list
    return str(one.message)


def test_organs_that_other_atlases_show_are_told_apart(body_store: AtlasStore) -> None:
    atlases = list(body_store.atlases())
    assert unshown(["liver", "tail"], atlases) == ("tail",)
    with pytest.warns(KptWarning) as told:
        doubt_unshown(WHERE, ["liver"], atlases, asked=False)
    assert "no atlas that was selected shows liver" in sentence(told)
    with pytest.warns(KptWarning) as told:
        doubt_unshown(WHERE, ["tail"], atlases, asked=True)
    assert f"{WHERE}: no atlas shows tail" in sentence(told)
    # Of all organs of a table, some may be shown nowhere: nothing is new in that.
    doubt_unshown(WHERE, ["tail"], atlases, asked=False)


def test_a_single_atlas_that_decides_is_named(body_store: AtlasStore) -> None:
    one, two, *_ = atlases = list(body_store.atlases())
    found = {"liver": measures(9.0), "spleen": measures(9.0), "aorta": measures(0.0)}
    weights = np.zeros((3, len(atlases)))
    weights[0, :2], weights[1, 1], weights[2, 0] = 0.5, 1, 1
    with pytest.warns(KptWarning) as told:
        others = doubt_alone(WHERE, found, weights, [atlas.id for atlas in atlases])
    assert list(others) == ["liver", "aorta"]
    assert f"(spleen by {two.id})" in sentence(told)
    assert one.id not in sentence(told)


def test_a_volume_beyond_those_of_the_atlases_is_doubtful(body_store: AtlasStore) -> None:
    atlases = list(body_store.atlases())
    atlases += atlases
    volumes = [atlas.volume_ml("liver") for atlas in atlases]
    low, high = min(volumes), max(volumes)
    for ml in (low / 1.49, high * 1.49, 0.0):
        doubt_volumes(WHERE, {"liver": measures(ml)}, atlases)
    for ml in (low / 1.51, high * 1.51):
        found = {"liver": measures(ml), "spleen": measures(0.0)}
        with pytest.warns(KptWarning) as told:
            doubt_volumes(WHERE, found, atlases)
        assert f"unusual volume of liver {ml:.1f} mL (atlases: {low:.1f} to" in sentence(told)
        # A few atlases hardly tell what is usual.
        doubt_volumes(WHERE, found, atlases[:4])
    # What is cut off is smaller, and never larger.
    cut = {"liver": replace(measures(low / 9), at_border=True)}
    doubt_volumes(WHERE, cut, atlases)
    with pytest.warns(KptWarning, match="unusual volume"):
        doubt_volumes(WHERE, {"liver": replace(measures(high * 1.51), at_border=True)}, atlases)
    one = atlases[0].volume_ml("liver")
    for ml in (one / 3.9, one * 3.9):
        doubt_volumes(WHERE, {"liver": measures(ml)}, atlases[:1])
    for ml in (one / 4.1, one * 4.1):
        with pytest.warns(KptWarning, match="unusual volume"):
            doubt_volumes(WHERE, {"liver": measures(ml)}, atlases[:1])


def test_little_is_measured_by_the_atlases_that_show_an_organ(body_store: AtlasStore) -> None:
    atlases = list(body_store.atlases())
    usual = np.mean([a.organs["liver"].voxels * np.prod(a.info.spacing) / 1000 for a in atlases])
    with pytest.warns(KptWarning) as told:
        doubt_little(WHERE, {"liver": measures(0.009 * usual)}, 99, 9, atlases)
    assert f"where an atlas shows {usual:.0f} mL" in sentence(told)
    doubt_little(WHERE, {"liver": measures(0.011 * usual)}, 99, 9, atlases)
    with pytest.warns(KptWarning, match="with 3 keypoints"):
        doubt_little(WHERE, {"liver": measures(usual)}, 3, 9, atlases)


def test_a_density_far_from_those_of_the_atlases_is_doubtful(body_store: AtlasStore) -> None:
    atlases = list(body_store.atlases())
    value = body_store.organs.by_name("liver").value
    naive = [
        np.asarray(atlas.image["0"])[np.asarray(atlas.labels) == value].astype(float)
        for atlas in atlases
    ]
    means, deviations = [hu.mean() for hu in naive], [hu.std() for hu in naive]
    low, high, widest = min(means), max(means), max(deviations)
    usual = float(np.median(means))
    robust = 1.4826 * float(np.median([abs(mean - usual) for mean in means]))
    # The bodies are alike: the least deviation counts.
    assert robust < 10
    assert low > usual - 50
    assert high < usual + 50
    atlases += atlases

    def found(hu: float, sd: float = widest) -> dict[str, OrganMeasures]:
        organ = replace(measures(9.0), mean_hu=hu, sd_hu=sd)
        return {"liver": organ, "spleen": measures(0.0)}

    for hu in (usual - 49, usual + 49):
        doubt_hu(WHERE, found(hu), atlases)
    for hu in (usual - 51, usual + 51):
        with pytest.warns(KptWarning) as told:
            doubt_hu(WHERE, found(hu), atlases)
        expected = f"unusual density of liver {hu:.0f} HU (atlases: {low:.0f} to {high:.0f});"
        assert expected in sentence(told)
        doubt_hu(WHERE, found(hu), atlases[:4])
    narrowest = min(deviations)
    for sd, how in (
        (2 * widest + 51, f"at most ± {widest:.0f}"),
        (0.49 * narrowest, f"at least ± {narrowest:.0f}"),
    ):
        with pytest.warns(KptWarning) as told:
            doubt_hu(WHERE, found(low, sd), atlases)
        assert f"liver ± {sd:.0f} HU (atlases: {how})" in sentence(told)
    for sd in (2 * widest + 49, 0.51 * narrowest):
        doubt_hu(WHERE, found(low, sd), atlases)


def test_densities_that_differ_between_atlases_are_usual(
    body_store: AtlasStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wide range of the atlases' means is one of the organ, with at most 100 HU more."""
    atlases = list(body_store.atlases()) * 2
    means = iter([0.0, 100.0, 200.0, 300.0, 400.0, 500.0] * 20)
    monkeypatch.setattr(
        "kpt_dask.organ_transfer.doubts.hu_of_organs",
        lambda atlas, names: {"liver": (next(means), 20.0)},
    )
    for hu, doubted in ((-99.0, False), (599.0, False), (-101.0, True), (601.0, True)):
        organ = replace(measures(9.0), mean_hu=hu, sd_hu=20.0)
        with notices.recorded() as doubts:
            doubt_hu(WHERE, {"liver": organ}, atlases)
        assert bool(doubts) == doubted
