"""New labels for an atlas, and notes on it."""

import hashlib
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner
from distributed import Client

from atlas_store import AtlasExistsError, AtlasNotFoundError, AtlasStore, load_organs
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.cli.main import kpt
from kpt_dask.errors import GridMismatchError, KptWarning, LabelError
from kpt_dask.exports import export_atlas
from kpt_dask.relabelling import relabel

ORGANS = load_organs("visceral")


@pytest.fixture
def store(tmp_path: Path, body_store: AtlasStore) -> AtlasStore:
    shutil.copytree(body_store.url, tmp_path / "store")
    return AtlasStore.open(tmp_path / "store")


def test_an_atlas_gets_new_labels_and_keeps_its_scan_and_its_note(
    tmp_path: Path, store: AtlasStore, one_process: Client
) -> None:
    """The liver of the new labels is what was the spleen."""
    before = store["body_1"]
    image, known = np.asarray(before.image["0"]), before.keypoints()
    store.set_note("body_1", "to be drawn again")
    _, path = export_atlas(before, tmp_path / "drawn")
    file = nibabel.load(path)
    labels = np.asarray(file.dataobj)
    liver, spleen = (ORGANS.by_name(name).value for name in ("liver", "spleen"))
    drawn = np.where(labels == spleen, liver, 0).astype(labels.dtype)
    nibabel.save(nibabel.Nifti1Image(drawn, file.affine), path)
    with pytest.warns(KptWarning, match="spleen"):
        info = relabel(store.url, "body_1", path, client=one_process)
    after = store["body_1"]
    assert info.annotated == ("liver",)
    assert info.organs["liver"].voxels == before.organs["spleen"].voxels
    assert info.organs["liver"].keypoints == before.organs["spleen"].keypoints
    assert info.scan_digest == before.info.scan_digest
    assert info.source[0] == before.info.source[0] == "body_1_ct.nii.gz"
    assert info.source_digests[0] == before.info.source_digests[0]
    assert info.source_digests[1] == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(np.asarray(after.image["0"]), image)
    keypoints = after.keypoints()
    for name in ("position", "scale", "descriptor"):
        np.testing.assert_array_equal(keypoints[name], known[name])
    assert store.note("body_1") == "to be drawn again"
    assert [one.info for one in store.removed()] == [before.info]
    assert store.verify() == []


def test_labels_of_another_grid_leave_the_atlas_as_it_was(
    tmp_path: Path, store: AtlasStore, bodies: Path
) -> None:
    uuid = store["body_1"].info.uuid
    labels = tmp_path / "other.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 9, 9), np.uint8), np.eye(4)), labels)
    with pytest.raises(GridMismatchError, match=r"other\.nii\.gz .* kpt atlas export"):
        relabel(store, "body_1", labels)
    _, empty = export_atlas(store["body_1"], tmp_path / "drawn")
    file = nibabel.load(empty)
    nibabel.save(nibabel.Nifti1Image(np.zeros(file.shape, np.uint8), file.affine), empty)
    with pytest.raises(LabelError):
        relabel(store, "body_1", empty)
    assert store["body_1"].info.uuid == uuid
    assert store.verify() == []


def test_the_marker_tells_which_files_an_atlas_was_made_from(
    tmp_path: Path, bodies: Path, one_process: Client
) -> None:
    made = AtlasStore.create(tmp_path / "s", ORGANS, store_parameters(4.0))
    scan, labels = bodies / "body_1_ct.nii.gz", bodies / "body_1_seg.nii.gz"
    info = add_atlas(made, scan, labels, atlas_id="a", client=one_process)
    expected = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in (scan, labels))
    assert info.source_digests == expected
    assert made["a"].info == info


def test_notes_stay_with_what_they_were_written_about(tmp_path: Path, store: AtlasStore) -> None:
    store.set_note("body_1", "zwei Lebern – ärgerlich")
    assert AtlasStore.open(store.url).note("body_1") == "zwei Lebern – ärgerlich"
    assert store.note("body_2") == ""
    store.remove("body_1")
    store.restore("body_1")
    assert store.note("body_1") == "zwei Lebern – ärgerlich"
    store.remove("body_1")
    store.copy_from(store["body_2"], "body_1")
    assert store.note("body_1") == ""
    store.set_note("body_1", "a copy")
    store.copy_from(store["body_1"], "body_9")
    assert store.note("body_9") == "a copy"
    store.set_note("body_9", "")
    store.prune()
    assert [path.name.split(".")[0] for path in (Path(store.url) / "notes").iterdir()] == ["body_1"]
    with pytest.raises(ValueError, match="shorten"):
        store.set_note("body_2", "x" * 10_001)
    assert store.verify() == []


def test_an_add_that_loses_to_another_leaves_no_note(store: AtlasStore) -> None:
    with store.draft("body_8", store.parameters) as draft:
        draft.note = "lost"
        store.copy_from(store["body_2"], "body_8")
        with pytest.raises(AtlasExistsError):
            draft.commit_copy(store["body_3"])
    assert store.note("body_8") == ""
    assert list(Path(store.url).glob("notes/*")) == []
    assert store.verify() == []


def test_the_commands(tmp_path: Path, store: AtlasStore) -> None:
    run = CliRunner()
    assert run.invoke(kpt, ["atlas", "note", store.url, "body_1", "cyst"]).exit_code == 0
    assert run.invoke(kpt, ["atlas", "note", store.url, "body_1"]).output == "cyst\n"
    assert "Note: cyst" in run.invoke(kpt, ["atlas", "info", store.url, "body_1"]).output
    told = run.invoke(kpt, ["atlas", "info", store.url, "body_1", "--json"]).output
    assert json.loads(told)["note"] == "cyst"
    assert run.invoke(kpt, ["atlas", "note", store.url, "body_1", ""]).exit_code == 0
    assert "no note" in run.invoke(kpt, ["atlas", "note", store.url, "body_1"]).output
    assert run.invoke(kpt, ["atlas", "note", store.url, "nobody", "x"]).exit_code == 1
    _, labels = export_atlas(store["body_1"], tmp_path / "drawn")
    answer = run.invoke(
        kpt, ["atlas", "relabel", store.url, "body_1", str(labels), "--annotated", "liver,spleen"]
    )
    assert answer.exit_code == 0, answer.output
    assert store["body_1"].annotated == ("liver", "spleen")


def test_of_two_who_relabel_at_once_the_second_is_told(
    tmp_path: Path, store: AtlasStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, labels = export_atlas(store["body_1"], tmp_path / "drawn")
    copied = store["body_2"].info

    def replaced_meanwhile(*arguments: object) -> tuple[Path, Path]:
        exported = export_atlas(*arguments)  # type: ignore[arg-type]
        with store.draft("body_1", store.parameters, replace=True) as draft:
            draft.commit_copy(store["body_2"])
        return exported

    monkeypatch.setattr("kpt_dask.relabelling.export_atlas", replaced_meanwhile)
    with pytest.raises(AtlasNotFoundError, match="'body_1' was added, replaced or removed"):
        relabel(store, "body_1", labels)
    assert store["body_1"].info.scan_digest == copied.scan_digest
    assert store.verify() == []
