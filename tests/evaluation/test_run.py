"""Evaluation: figures against NumPy, on the right scans with the right atlases."""

import json
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from distributed import Client

from atlas_store import AtlasStore, EmptyStoreError, load_organs
from atlas_store.draft import Draft
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.errors import LabelError, ParameterError, ScanNotFoundError
from kpt_dask.evaluation import run
from kpt_dask.evaluation.run import evaluate
from kpt_dask.runtime import notices
from kpt_dask.scans.pairs import Pair, find_pairs
from kpt_dask.segmentation import segment
from tests.evaluation.judges import numpy_dice, simpleitk_measures
from tests.helpers import BODY_SPACING

ORGANS = load_organs("visceral")


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


def test_leaving_one_out_equals_segmenting_without_it(
    bodies: Path, body_store: AtlasStore, one_process: Client, tmp_path: Path
) -> None:
    """The phantoms lie on the working grid, so all ways must give the same figures."""
    before = content(Path(body_store.url))
    results = evaluate(body_store.url, limit=1, client=one_process)
    pairs = find_pairs(bodies)
    of_files = evaluate(body_store, pairs, limit=1, client=one_process)
    assert content(Path(body_store.url)) == before

    found = segment(
        bodies / "body_1_ct.nii.gz",
        body_store,
        tmp_path / "out.zarr",
        exclude=["body_1"],
        labels=tmp_path / "out.nii.gz",
        client=one_process,
    )
    labels = np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj)
    truth = np.asarray(nibabel.load(bodies / "body_1_seg.nii.gz").dataobj)
    expected = {
        organ.name: numpy_dice(truth == organ.value, labels == organ.value)
        for organ in ORGANS
        if (truth == organ.value).any()
    }
    voxel_ml = BODY_SPACING**3 / 1000
    for result in (results, of_files):
        assert result["dice"] == {"body_1": pytest.approx(expected)}
        assert result["dice_by_organ"] == pytest.approx(expected)
        assert result["mean_dice"] == pytest.approx(np.mean(list(expected.values())))
        assert result["mean_dice_interval"] is None
        for name, measures in result["measures"]["body_1"].items():
            value = ORGANS.by_name(name).value
            judged = simpleitk_measures(truth == value, labels == value, BODY_SPACING)
            assert measures == pytest.approx(judged, abs=1e-3)
            by_organ = result["measures_by_organ"][name]
            assert {measure: by_organ[measure]["mean"] for measure in measures} == measures
            claim = result["claims"]["body_1"][name]
            assert claim["reference_ml"] == pytest.approx((truth == value).sum() * voxel_ml)
            assert claim["volume_ml"] == pytest.approx(found.organs[name].volume_ml)
            assert claim["confidence"] == found.organs[name].confidence
            assert (claim["low_ml"], claim["high_ml"]) == found.organs[name].interval_ml
        assert result["trust"]["answers"] == len(expected)
        assert (result["scans"], result["atlases"], result["mode"]) == (1, 2, "local")
        inside = {name: counts["mean"] for name, counts in result["keypoints"].items()}
        stored = body_store["body_1"].organs
        assert inside == {name: stored[name].keypoints for name in expected}
        parts = [result["seconds"][name] for name in ("Extracting keypoints", "Matching")]
        assert 0 < sum(parts) <= result["seconds"]["total"]
        assert result["seconds_by_scan"] == {"body_1": pytest.approx(result["seconds"])}
        assert result["background"]["mean"] > 10
        assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert found.atlases == ("body_2", "body_3")


def test_limits_choose_the_first(bodies: Path, body_store: AtlasStore, one_process: Client) -> None:
    results = evaluate(body_store, limit=2, atlases=1, client=one_process)
    assert list(results["dice"]) == ["body_1", "body_2"]
    assert (results["scans"], results["atlases"]) == (2, 1)
    last = [pair for pair in find_pairs(bodies) if pair.id == "body_4"]
    results = evaluate(body_store, last, client=one_process)
    assert results["atlases"] == 3
    assert results["mean_dice"] > 0.45


def test_several_numbers_of_atlases_give_what_each_gives_alone(
    body_store: AtlasStore, one_process: Client
) -> None:
    what: Any = {"limit": 2, "mode": "organ", "client": one_process}
    several = evaluate(body_store, atlases=(2, 1), **what)
    alone = [evaluate(body_store, atlases=number, **what) for number in (1, 2)]
    assert several["dice"] == alone[1]["dice"]
    assert several["atlases"] == 2
    assert [row["atlases"] for row in several["by_atlases"]] == [1, 2]
    for row, one in zip(several["by_atlases"], alone, strict=True):
        assert row["voting"] == one["atlases"]
        for key in ("mean_dice", "mean_dice_interval", "dice_by_organ"):
            assert row[key] == one[key]
    assert "by_atlases" not in alone[0]


def test_cropped_scans_are_judged_as_files_would_be(
    bodies: Path, body_store: AtlasStore, one_process: Client, tmp_path: Path
) -> None:
    """The planes that are left are written to a file, which is segmented as any other."""
    found = evaluate(
        body_store, limit=1, mode="organ", cropped=["spleen", "trachea"], client=one_process
    )
    assert any("No scan annotates trachea" in sentence for sentence in found["warnings"])
    limited = found["limited_view"]
    assert list(limited["modes"]) == ["organ", "across"]
    truth = nibabel.load(bodies / "body_1_seg.nii.gz")
    values = np.asarray(truth.dataobj)
    planes = np.flatnonzero((values == ORGANS.by_name("spleen").value).any(axis=(0, 1)))
    length = -(-values.shape[2] // 3)
    first = (planes[0] + planes[-1] + 1 - length) // 2
    left = slice(int(first), int(first) + length)
    scan = nibabel.load(bodies / "body_1_ct.nii.gz").slicer[:, :, left]
    nibabel.save(scan, tmp_path / "scan.nii.gz")
    inside = {
        organ.name
        for organ in ORGANS
        if 0 < (values == organ.value).sum() == (values[:, :, left] == organ.value).sum()
    }
    rows = limited["rows"]
    for mode in ("organ", "across"):
        segment(
            tmp_path / "scan.nii.gz",
            body_store,
            tmp_path / f"{mode}.zarr",
            mode=mode,
            exclude=["body_1"],
            labels=tmp_path / f"{mode}.nii.gz",
            client=one_process,
        )
        labels = np.asarray(nibabel.load(tmp_path / f"{mode}.nii.gz").dataobj)
        expected = {
            name: numpy_dice(
                *(v == ORGANS.by_name(name).value for v in (values[:, :, left], labels))
            )
            for name in inside
        }
        scores = {row["organ"]: row["cropped"] for row in rows if row["mode"] == mode}
        assert scores == pytest.approx(expected)
        assert limited["modes"][mode]["cropped"] == pytest.approx(np.mean(list(expected.values())))
    whole = {row["organ"]: row["whole"] for row in rows if row["mode"] == "organ"}
    assert whole == {name: found["dice"]["body_1"][name] for name in whole}
    assert 0 < len(inside) < len(found["dice"]["body_1"])


def test_what_the_reference_does_not_annotate_is_left_out(
    bodies: Path, one_process: Client, tmp_path: Path
) -> None:
    store = AtlasStore.create(tmp_path / "store", ORGANS, store_parameters(8.0))
    names = {"a": ["liver"], "b": ["liver", "lung_left"]}
    for seed, (name, annotated) in enumerate(names.items(), start=1):
        scan, labels = (bodies / f"body_{seed}_{what}.nii.gz" for what in ("ct", "seg"))
        add_atlas(store, scan, labels, atlas_id=name, annotated=annotated, client=one_process)
    results = evaluate(store, cropped=["spleen"], client=one_process)
    assert {name: list(scores) for name, scores in results["dice"].items()} == names
    assert "limited_view" not in results
    assert "No scan annotates spleen" in results["warnings"][-1]
    assert "No atlas that was used shows lung_left of b" in results["warnings"][-2]
    assert results["dice"]["b"]["lung_left"] == 0
    # Nobody else annotates the left lung of b, and so it is not found; not a word of a's.
    assert results["dice_by_organ"]["lung_left"] == 0
    assert list(results["keypoints"]) == ["liver", "lung_left"]
    values = [score for scores in results["dice"].values() for score in scores.values()]
    assert results["mean_dice"] == pytest.approx(np.mean(values))


def test_temporary_files_are_removed(
    body_store: AtlasStore,
    one_process: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    evaluate(body_store, limit=1, atlases=1, client=one_process)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atlases": 0}, "at least 1"),
        ({"limit": -1}, "at least 1"),
        ({"atlases": 3}, "has 2 atlases besides body_1"),
        ({"atlases": (1, 3)}, "has 2 atlases besides body_1"),
        ({"atlases": (1, 0)}, "at least 1"),
        ({"mode": "organs"}, "mode 'organs' is unknown"),
        ({"cropped": ("liver", "heart")}, "cropped around heart: the atlases know liver"),
    ],
)
def test_options_must_make_sense(
    body_store: AtlasStore, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        evaluate(body_store, **options)


def test_scans_are_checked_before_the_first_is_segmented(
    bodies: Path, body_store: AtlasStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "segment_volume", lambda *_, **__: pytest.fail("too early"))
    pairs = find_pairs(bodies)
    gone = [Pair(f"gone_{n}", pairs[n].scan, tmp_path / f"gone_{n}.nii.gz") for n in (0, 1)]
    with (
        notices.shown(lambda _: None),
        notices.recorded() as told,
        pytest.raises(ScanNotFoundError, match="gone_1"),
    ):
        evaluate(body_store, gone)
    [sentence] = told
    assert sentence.startswith("The scan gone_0 is left out: ")


def test_a_reference_must_have_the_organs_of_the_store(bodies: Path, tmp_path: Path) -> None:
    store = AtlasStore.create(tmp_path / "s", load_organs("openkbp"), store_parameters(8.0))
    with pytest.raises(EmptyStoreError):
        evaluate(store)
    labels = nibabel.load(bodies / "body_1_seg.nii.gz")
    values = np.asarray(labels.dataobj)
    known = np.where(values <= max(store.organs.values), values, 0)
    nibabel.save(nibabel.Nifti1Image(known, labels.affine), tmp_path / "known.nii.gz")
    add_atlas(store, bodies / "body_1_ct.nii.gz", tmp_path / "known.nii.gz", atlas_id="a")
    with pytest.raises(LabelError, match=r"body_2_seg.*does not know: 8"):
        evaluate(store, find_pairs(bodies)[1:2])


SMALL = (56, 33, 40)
"""At 8 mm."""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of three phantoms."""
    folder = tmp_path / "small"
    folder.mkdir()
    for seed in (1, 2, 3):
        scan, labels = (folder / f"s{seed}_{what}.nii.gz" for what in ("ct", "seg"))
        write_phantom(scan, labels, seed, SMALL, 8.0)
    return folder


@pytest.mark.parametrize("age", ["new", "old"])
def test_no_scan_is_judged_by_its_own_atlas_whatever_it_is_called(
    small: Path, tmp_path: Path, one_process: Client, age: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a marker of an older version has no digest of the scan."""
    store = AtlasStore.create(tmp_path / "store", ORGANS, store_parameters(8.0))
    pairs = find_pairs(small)
    if age == "old":
        draft, commit = Draft, Draft.commit
        monkeypatch.setattr(
            draft, "commit", lambda *a, **k: commit(*a, **{**k, "scan_digest": None})
        )
    for pair in pairs:
        added = add_atlas(
            store, pair.scan, pair.labels, atlas_id=f"{pair.id}_ct", client=one_process
        )
        assert (added.scan_digest is None) == (age == "old")
    [first, *_] = pairs
    # Another file of the same scan: of another type, not compressed, the first axis turned.
    image, other = nibabel.load(first.scan), tmp_path / "first.nii"
    turned = image.as_reoriented([[0, -1], [1, 1], [2, 1]])
    values = np.asarray(turned.dataobj).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, turned.affine), other)
    labels = tmp_path / "labels.nii"
    turned = nibabel.load(first.labels).as_reoriented([[0, -1], [1, 1], [2, 1]])
    nibabel.save(nibabel.Nifti1Image(np.asarray(turned.dataobj), turned.affine), labels)

    with notices.shown(lambda _: None):
        found = evaluate(store, [Pair("first", other, labels)], client=one_process)
    assert found["left_out"] == {"first": ["s1_ct"]}
    assert "first as s1_ct" in found["warnings"][0]
    assert found["atlases"] == 2
    expected = evaluate(store, limit=1, client=one_process)
    assert found["dice"]["first"] == pytest.approx(expected["dice"]["s1_ct"])
    assert expected["left_out"] == {}

    # One scan twice in the store: neither is segmented by the other.
    with notices.shown(lambda _: None), notices.recorded() as told:
        add_atlas(store, other, labels, atlas_id="again", client=one_process)
    assert f"The scan of again is in {store.url} already, as s1_ct" in told[0]
    with notices.shown(lambda _: None):
        twice = evaluate(store, limit=2, client=one_process)
    assert twice["left_out"] == {"again": ["s1_ct"], "s1_ct": ["again"]}
    assert twice["dice"]["again"] == pytest.approx(expected["dice"]["s1_ct"])


def test_an_organ_that_is_lost_on_the_working_grid_is_not_judged(
    small: Path, tmp_path: Path, one_process: Client
) -> None:
    store = AtlasStore.create(tmp_path / "store", ORGANS, store_parameters(16.0))
    for pair in find_pairs(small)[:2]:
        add_atlas(store, pair.scan, pair.labels, atlas_id=pair.id, client=one_process)
    image = nibabel.load(small / "s3_seg.nii.gz")
    values = np.asarray(image.dataobj).copy()
    spleen = ORGANS.by_name("spleen").value
    values[values == spleen] = 0
    values[0, 0, 0] = spleen
    nibabel.save(nibabel.Nifti1Image(values, image.affine), tmp_path / "stray.nii.gz")
    pair = Pair("s3", small / "s3_ct.nii.gz", tmp_path / "stray.nii.gz")
    with notices.shown(lambda _: None):
        found = evaluate(store, [pair], client=one_process)
    assert "liver" in found["dice"]["s3"]
    assert "spleen" not in found["dice"]["s3"]
    assert any("shows spleen in so few voxels" in sentence for sentence in found["warnings"])


def test_what_cannot_be_read_does_not_stop_the_others(
    small: Path, tmp_path: Path, one_process: Client
) -> None:
    store = AtlasStore.create(tmp_path / "store", ORGANS, store_parameters(8.0))
    pairs = find_pairs(small)
    for pair in pairs[1:]:
        add_atlas(store, pair.scan, pair.labels, atlas_id=pair.id, client=one_process)
    expected = evaluate(store, pairs[:1], client=one_process)
    broken = []
    for name, scan, labels in (
        ("half_scan", _truncated(pairs[1].scan, tmp_path), pairs[1].labels),
        ("half_labels", pairs[1].scan, _truncated(pairs[1].labels, tmp_path)),
        ("no_labels", pairs[1].scan, tmp_path / "nothing.nii.gz"),
    ):
        broken.append(Pair(name, scan, labels))
    with notices.shown(lambda _: None):
        found = evaluate(store, [*broken, pairs[0]], out=tmp_path / "out", client=one_process)
    assert found["dice"] == expected["dice"]
    assert (found["scans"], set(found["failed"])) == (1, {"half_scan", "half_labels", "no_labels"})
    for name, file in (
        ("half_scan", broken[0].scan),
        ("half_labels", broken[1].labels),
        ("no_labels", broken[2].labels),
    ):
        assert str(file) in found["failed"][name]
        assert f"The scan {name} is left out: {found['failed'][name]}" in found["warnings"]
    assert expected["failed"] == {}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["failed"] == found["failed"]


def _truncated(file: Path, folder: Path) -> Path:
    half = folder / f"half_{file.name}"
    half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return half


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_an_atlas_that_goes_meanwhile_is_left_out(
    small: Path, tmp_path: Path, one_process: Client, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    store = AtlasStore.create(tmp_path / "store", ORGANS, store_parameters(8.0))
    pairs = find_pairs(small)
    for pair in pairs:
        add_atlas(store, pair.scan, pair.labels, atlas_id=pair.id, client=one_process)
    segment_volume = run.segment_volume

    def meanwhile(*args: Any, **options: Any) -> Any:
        found = segment_volume(*args, **options)
        if how == "removed" and "s2" in store:
            store.remove("s2")
        elif how == "replaced":
            [_, _, third] = pairs
            add_atlas(
                store, third.scan, third.labels, atlas_id="s2", replace=True, client=one_process
            )
        return found

    monkeypatch.setattr(run, "segment_volume", meanwhile)
    with notices.shown(lambda _: None):
        found = evaluate(store, client=one_process)
    assert list(found["dice"]) == ["s1", "s3"]
    assert found["failed"] == {}
    assert any("the atlas s2 was removed or replaced" in told for told in found["warnings"])
