"""Evaluation: figures against NumPy, on the right scans with the right atlases."""

import json
import tempfile
from hashlib import sha256
from pathlib import Path

import nibabel
import numpy as np
import pytest
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atlas_store import AtlasStore, EmptyStoreError, load_organs
from atlas_store.draft import Draft
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.errors import LabelError, ParameterError, ScanNotFoundError
from kpt_dask.evaluation import dice, evaluate, keypoint_votes
from kpt_dask.runtime import notices
from kpt_dask.scans.pairs import Pair, find_pairs
from kpt_dask.segmentation import segment

ORGANS = load_organs("visceral")


def numpy_dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum())) if (a | b).any() else 1.0


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    parts=st.integers(1, 4),
    annotated=st.lists(st.sampled_from(ORGANS.names), min_size=1, unique=True),
)
def test_dice_is_what_numpy_says(seed: int, parts: int, annotated: list[str]) -> None:
    rng = np.random.default_rng(seed)
    reference, found = rng.choice([0, 0, 1, 2, 3], (2, 6, 5, 4)).astype(np.uint8)
    scores = dice(
        np.array_split(reference, parts),
        np.array_split(found.astype(np.uint16), parts),
        annotated,
        ORGANS,
    )
    assert list(scores) == [name for name in ORGANS.names if name in annotated]
    for name, score in scores.items():
        value = ORGANS.by_name(name).value
        assert score == pytest.approx(numpy_dice(reference == value, found == value))


def test_votes_are_counted_where_keypoints_lie() -> None:
    liver, spleen = (ORGANS.by_name(name).value for name in ("liver", "spleen"))
    inside = np.array([liver, liver, liver, liver, spleen, 0], np.uint16)
    voted = np.array([liver, liver, spleen, 0, 0, liver], np.uint16)
    counts = keypoint_votes(inside, voted, ["liver", "spleen", "aorta"], ORGANS)
    assert counts == {"liver": (4, 3, 2), "spleen": (1, 0, 0), "aorta": (0, 0, 0)}


def test_leaving_one_out_equals_segmenting_without_it(
    bodies: Path, body_store: AtlasStore, one_process: Client, tmp_path: Path
) -> None:
    """The phantoms lie on the working grid, so all ways must give the same figures."""
    before = content(Path(body_store.url))
    results = evaluate(body_store, limit=1, client=one_process)
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
    for result in (results, of_files):
        assert result["dice"] == {"body_1": pytest.approx(expected)}
        assert result["dice_by_organ"] == pytest.approx(expected)
        assert result["mean_dice"] == pytest.approx(np.mean(list(expected.values())))
        assert (result["scans"], result["atlases"], result["mode"]) == (1, 2, "local")
        inside = {name: counts["mean"] for name, counts in result["keypoints"].items()}
        stored = body_store["body_1"].organs
        assert inside == {name: stored[name].keypoints for name in expected}
        parts = [result["seconds"][name] for name in ("Extracting keypoints", "Matching")]
        assert 0 < sum(parts) <= result["seconds"]["total"]
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


def test_what_the_reference_does_not_annotate_is_left_out(
    bodies: Path, one_process: Client, tmp_path: Path
) -> None:
    store = AtlasStore.create(tmp_path / "store", ORGANS, store_parameters(8.0))
    names = {"a": ["liver"], "b": ["liver", "lung_left"]}
    for seed, (name, annotated) in enumerate(names.items(), start=1):
        scan, labels = (bodies / f"body_{seed}_{what}.nii.gz" for what in ("ct", "seg"))
        add_atlas(store, scan, labels, atlas_id=name, annotated=annotated, client=one_process)
    results = evaluate(store, client=one_process)
    assert {name: list(scores) for name, scores in results["dice"].items()} == names
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
        ({"mode": "organs"}, "mode 'organs' is unknown"),
    ],
)
def test_options_must_make_sense(
    body_store: AtlasStore, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        evaluate(body_store, **options)


def test_scans_are_checked_before_the_first_is_segmented(
    bodies: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    pairs = find_pairs(bodies)
    gone = [pairs[0], Pair("gone", pairs[1].scan, tmp_path / "gone_seg.nii.gz")]
    with pytest.raises(ScanNotFoundError, match="gone_seg"):
        evaluate(body_store, gone)


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
    assert f"{other} is in {store.url} already, as s1_ct" in told[0]
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
