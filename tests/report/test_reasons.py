"""Why: the atlases' parts in the votes, and the matches that speak for an organ."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

import kpt_dask
from atlas_store import AtlasStore, load_organs
from kpt_dask.report.findings import Findings, open_findings
from kpt_dask.report.gallery import Gallery
from kpt_dask.report.reasons import atlas_parts, matches_of

ORGANS = load_organs("visceral")


@pytest.fixture(scope="module")
def moved(
    bodies: Path,
    body_store: AtlasStore,
    one_process: Client,
    tmp_path_factory: pytest.TempPathFactory,
) -> Findings:
    out = tmp_path_factory.mktemp("moved") / "out.zarr"
    scan = bodies / "body_4_ct.nii.gz"
    kpt_dask.segment(scan, body_store, out, mode="organ", client=one_process)
    return open_findings(str(out))


def test_parts_of_atlases_are_those_of_the_weights_of_their_matches(moved: Findings) -> None:
    """Eqs. 8 to 11: w = p(L) p(m), of matches whose label is what their keypoint voted for."""
    posterior = np.asarray(moved.volume.group["votes/posterior"])
    density = np.asarray(moved.volume.group["matches/probability"])
    found = moved.keypoints
    for o, organ in enumerate(ORGANS):
        expected = np.zeros(len(moved.atlases))
        for m in range(len(found.keypoint)):
            k = found.keypoint[m]
            if found.label[m] == organ.value == found.vote[k]:
                expected[found.atlas[m]] += posterior[k, o] * density[m]
        assert moved.weights is not None
        np.testing.assert_allclose(
            moved.weights[o] * expected.sum(), expected, rtol=1e-4, atol=1e-6 * expected.sum()
        )
        parts = atlas_parts(moved, organ.name)
        assert [part for _, part in parts] == sorted((p for _, p in parts), reverse=True)
        assert sum(part for _, part in parts) == pytest.approx(float(expected.sum() > 0), abs=1e-4)
    older = atlas_parts(replace(moved, weights=None), "liver")
    assert sum(part for _, part in older) == pytest.approx(1, abs=1e-4)


def test_warped_atlases_have_parts_too_and_a_cluster_changes_nothing(
    bodies: Path,
    body_store: AtlasStore,
    one_process: Client,
    two_processes: Client,
    tmp_path: Path,
) -> None:
    scan = bodies / "body_4_ct.nii.gz"
    for name, client in (("one", one_process), ("two", two_processes)):
        out, page = tmp_path / name / "out.zarr", tmp_path / name / "page.html"
        page.parent.mkdir()
        kpt_dask.segment(scan, body_store, out, report=page, client=client)
    found = open_findings(str(tmp_path / "one" / "out.zarr"))
    assert found.weights is not None
    for o, organ in enumerate(ORGANS):
        shown = [organ.name in body_store[one].annotated for one in found.atlases]
        assert found.weights[o].sum() == pytest.approx(float(any(shown)), abs=1e-4)
        assert not found.weights[o][~np.array(shown)].any()
    pages = [(tmp_path / name / "page.html").read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_matches_of_an_organ_are_of_its_label_first_and_of_many_atlases(moved: Findings) -> None:
    found = moved.keypoints
    for organ in ORGANS:
        chosen = matches_of(found, organ.value, moved.organs[organ.name], 6)
        keypoints = [int(found.keypoint[one.number]) for one in chosen]
        assert len(set(keypoints)) == len(keypoints) <= 6
        own = [one.label == organ.value for one in chosen]
        assert own == sorted(own, reverse=True)
        best = [
            m
            for m in range(len(found.keypoint))
            if found.label[m] == organ.value == found.vote[found.keypoint[m]]
        ]
        if best:
            assert chosen[0].number == max(best, key=lambda m: found.weight[m])
            assert len({one.atlas for one in chosen}) > 1
    assert matches_of(found, 1, moved.organs["liver"], 0) == []


def test_keypoints_are_those_of_the_atlases_and_other_scans_are_not_shown(
    moved: Findings, bodies: Path, body_store: AtlasStore, one_process: Client, tmp_path: Path
) -> None:
    chosen = matches_of(moved.keypoints, 1, moved.organs["liver"], 6)
    for one in chosen:
        there = body_store[moved.atlases[one.atlas]].keypoint_arrays()
        np.testing.assert_allclose(
            there["position"][one.atlas_keypoint], one.atlas_position, atol=0.01
        )
        assert there["label"][one.atlas_keypoint] == one.label
    gallery = Gallery(moved, body_store)
    assert all(gallery.pair_of(one, 1).other for one in chosen)
    assert gallery.missing == {}
    # Another store knows the same ids, for other scans, or does not know them.
    other = AtlasStore.create(tmp_path / "other", load_organs("visceral"), body_store.parameters)
    scan, labels = (bodies / f"body_4_{what}.nii.gz" for what in ("ct", "seg"))
    first = moved.atlases[chosen[0].atlas]
    kpt_dask.add_atlas(other, scan, labels, atlas_id=first, client=one_process)
    gallery = Gallery(moved, other)
    assert not any(gallery.pair_of(one, 1).other for one in chosen)
    assert gallery.missing[first] == "is another scan now"
    assert len(gallery.missing) == len({one.atlas for one in chosen})
