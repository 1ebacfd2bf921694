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
        doubt_alone(WHERE, found, weights, [atlas.id for atlas in atlases])
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
        # What is cut off is smaller, and a few atlases do not tell what is usual.
        doubt_volumes(WHERE, {"liver": replace(found["liver"], at_border=True)}, atlases)
        doubt_volumes(WHERE, found, atlases[:4])


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
    low, high = min(hu.mean() for hu in naive), max(hu.mean() for hu in naive)
    widest = max(hu.std() for hu in naive)
    atlases += atlases

    def found(hu: float, sd: float = 0.0) -> dict[str, OrganMeasures]:
        organ = replace(measures(9.0), mean_hu=hu, sd_hu=sd)
        return {"liver": organ, "spleen": measures(0.0)}

    for hu in (low - 99, high + 99):
        doubt_hu(WHERE, found(hu), atlases)
    for hu in (low - 101, high + 101):
        with pytest.warns(KptWarning) as told:
            doubt_hu(WHERE, found(hu), atlases)
        expected = f"unusual density of liver {hu:.0f} HU (atlases: {low:.0f} to {high:.0f});"
        assert expected in sentence(told)
        doubt_hu(WHERE, found(hu), atlases[:4])
    doubt_hu(WHERE, found(low, 2 * widest + 49), atlases)
    with pytest.warns(KptWarning) as told:
        doubt_hu(WHERE, found(low, 2 * widest + 51), atlases)
    assert f"liver ± {2 * widest + 51:.0f} HU (atlases: at most ± {widest:.0f})" in sentence(told)
