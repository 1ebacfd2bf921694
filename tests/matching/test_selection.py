"""Selecting atlases: the best are kept, and what is kept is as if nothing else had been there."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from distributed import Client

from atlas_store import AtlasKeypoints, AtlasStore, load_organs
from kpt_dask.atlases.add import store_parameters
from kpt_dask.errors import ParameterError
from kpt_dask.matching.first_pass import match
from kpt_dask.matching.selection import (
    annotating,
    check_selection,
    choose_covering,
    propose_atlases,
    restrict_to,
    select_atlases,
    shares_of_votes,
)
from kpt_dask.segmentation import choose_atlases, segment


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_best_atlases_are_chosen_and_no_organ_is_lost() -> None:
    score = np.array([0.9, 0.8, 0.7, 0.6, 0.3])
    everything = np.ones((5, 3), bool)
    assert choose_covering(score, everything, 2) == [0, 1]
    assert choose_covering(score, everything, 9) == [0, 1, 2, 3, 4]
    rare = everything.copy()
    rare[:4, 2] = False
    # First 1.8 against 0.9, then 0.8 against 0.6, then 0.47 against 0.5.
    assert choose_covering(score, rare, 2) == [0, 1]
    assert choose_covering(score, rare, 3) == [0, 1, 4]
    assert choose_covering(score[:0], everything[:0], 2) == []


def test_atlases_without_the_organs_are_not_chosen() -> None:
    score = np.array([0.9, 0.8, 0.7, 0.6])
    annotated = np.array([[False], [True], [False], [True]])
    assert choose_covering(score, annotated, 3) == [1, 3]
    # Where no atlas has them, the best show at least that.
    assert choose_covering(score, ~annotated & annotated, 2) == [0, 1]


def test_shares_are_counted_for_each_organ() -> None:
    atlas = np.array([0, 0, 1, 2, 2, 2, 1])
    label = np.array([1, 7, 1, 7, 7, 0, 3])
    weight = np.array([3.0, 1.0, 1.0, 2.0, 1.0, 9.0, 0.0])
    organs = load_organs("visceral")
    np.testing.assert_allclose(
        shares_of_votes(atlas, label, weight, 4, organs), [0.75 + 0.25, 0.25, 0.75, 0]
    )
    only = organs.only([organs.by_value(7).name])
    np.testing.assert_allclose(shares_of_votes(atlas, label, weight, 4, only), [0.25, 0, 0.75, 0])
    assert shares_of_votes(atlas[:0], label[:0], weight[:0], 2, organs).tolist() == [0, 0]


def test_agreement_is_the_soft_jaccard_index(patients: AtlasStore, one_process: Client) -> None:
    scan, *others = patients.ids()
    keypoints = patients[scan].keypoints()
    atlases = AtlasKeypoints.load(patients, others)
    matches = match(keypoints, atlases, client=one_process)
    tau = matches.attrs["largest_squared_distance"]
    score = []
    for a, name in enumerate(others):
        own = matches.isel(match=matches.atlas.values == a)
        w = sum(
            np.exp(-float(d) / (2 * tau)) * float(p)
            for d, p in zip(own.squared_distance, own.probability, strict=True)
        )
        n = keypoints.sizes["keypoint"] + patients[name].info.keypoints
        score.append(w / (n - w))
    annotated = np.array(
        [[n in patients[i].annotated for n in patients.organs.names] for i in others]
    )
    for k in (1, 2, 4):
        chosen = select_atlases(matches, keypoints, atlases, patients, k)
        assert chosen == choose_covering(np.array(score), annotated, k)


@pytest.mark.parametrize("mode", ["local", "across", "affine", "organ"])
def test_atlases_that_annotate_the_organs_are_selected(
    patients: AtlasStore, one_process: Client, mode: str
) -> None:
    scan, *others = patients.ids()
    having = {n: [i for i in others if n in patients[i].annotated] for n in patients.organs.names}
    rare = min(having, key=lambda name: len(having[name]) or len(others))
    with_it = having[rare]
    assert 0 < len(with_it) < len(others)
    organs = patients.organs.only([rare])
    keypoints = patients[scan].keypoints()
    atlases = AtlasKeypoints.load(patients, others)
    matches = match(keypoints, atlases, client=one_process)
    most = len(others) - 1
    across = {rare: ["mandible"]}
    chosen = select_atlases(
        matches, keypoints, atlases, patients, most, mode=mode, organs=organs, across=across
    )
    assert [others[i] for i in chosen] == with_it
    assert annotating(patients, others, organs) == tuple(with_it)
    proposed = propose_atlases(keypoints, patients, others, 1, mode=mode, organs=organs)
    assert {*proposed} <= {*with_it}


def test_matches_of_some_atlases_are_those_of_matching_only_them(
    patients: AtlasStore, one_process: Client
) -> None:
    scan, *others = patients.ids()
    keypoints = patients[scan].keypoints()
    matches = match(keypoints, AtlasKeypoints.load(patients, others), client=one_process)
    chosen = [0, 2, 3]
    few = AtlasKeypoints.load(patients, [others[i] for i in chosen])
    expected = match(keypoints, few, client=one_process)
    xr.testing.assert_identical(restrict_to(matches, chosen, len(others)), expected)


@pytest.mark.parametrize(("index", "mode"), [("auto", "local"), ("exact", "organ")])
def test_of_a_store_that_holds_the_scan_itself_this_is_selected(
    patients: AtlasStore, one_process: Client, index: str, mode: str
) -> None:
    ids = patients.ids()
    # One that lacks an organ has no share of its votes, and may come after one that has all.
    whole = [i for i in ids if set(patients[i].organs) == set(patients.organs.names)]
    assert whole
    for scan in whole:
        keypoints = patients[scan].keypoints()
        proposed = propose_atlases(keypoints, patients, ids, 1, mode=mode, index=index)
        assert len(proposed) == 3
        assert scan in proposed
        atlases = AtlasKeypoints.load(patients, proposed)
        matches = match(keypoints, atlases, client=one_process)
        [best] = select_atlases(matches, keypoints, atlases, patients, 1, mode=mode)
        assert proposed[best] == scan


def test_a_segmentation_says_which_atlases_were_selected(
    bodies: Path, body_store: AtlasStore, tmp_path: Path, one_process: Client
) -> None:
    scan = bodies / "body_4_ct.nii.gz"
    selected = segment(scan, body_store, tmp_path / "a.zarr", select=2, client=one_process)
    left = set(body_store.ids()) - set(selected.atlases)
    assert len(left) == 1
    other = segment(scan, body_store, tmp_path / "b.zarr", exclude=sorted(left), client=one_process)
    assert (selected.atlases, selected.organs) == (other.atlases, other.organs)


@pytest.mark.parametrize("spacing", [1e-6, 1e6, float("inf"), "2", None, True])
def test_a_store_of_an_absurd_spacing_is_refused(tmp_path: Path, spacing: object) -> None:
    store = AtlasStore.create(tmp_path / "store", load_organs("openkbp"), store_parameters())
    store.parameters = {**store.parameters, "spacing": spacing}
    with pytest.raises(ParameterError, match="has the spacing"):
        choose_atlases(store, ())


def test_what_cannot_be_selected_is_refused() -> None:
    with pytest.raises(ParameterError, match="at least 1, not 0"):
        check_selection(0, "auto")
    with pytest.raises(ParameterError, match="'faiss' is unknown; use auto, pynndescent, exact"):
        check_selection(None, "faiss")
