"""Scans and their label maps: which belongs to which."""

from pathlib import Path

import pytest

from kpt_dask.errors import ParameterError, ScanNotFoundError
from kpt_dask.scans.pairs import find_pairs


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_pairs_come_in_natural_order_with_labels_or_not(tmp_path: Path) -> None:
    fill(tmp_path, "pt_13_ct.nii.gz", "pt_3_ct.nii.gz", "pt_3_seg.nii.gz", "README.md")
    pairs = find_pairs(tmp_path)
    assert [pair.id for pair in pairs] == ["pt_3", "pt_13"]
    assert pairs[1].scan == tmp_path / "pt_13_ct.nii.gz"
    assert pairs[1].labels == tmp_path / "pt_13_seg.nii.gz"


def test_each_patient_may_have_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, "a/a [1].nii", "b/b [1].nii", "b/c [1].nii", "d/x/d [1].nii")
    pairs = find_pairs(tmp_path, "{id}/{id} [1].nii", "{id}/organs.nii.gz")
    assert [(pair.id, pair.scan.name) for pair in pairs] == [("a", "a [1].nii"), ("b", "b [1].nii")]
    assert pairs[0].labels == tmp_path / "a" / "organs.nii.gz"


def test_a_label_map_is_no_scan(tmp_path: Path) -> None:
    fill(tmp_path, "a.nii.gz", "a_seg.nii.gz")
    assert [pair.id for pair in find_pairs(tmp_path, "{id}.nii.gz", "{id}_seg.nii.gz")] == ["a"]


@pytest.mark.parametrize("pattern", ["ct.nii.gz", "/{id}.nii.gz", "../{id}.nii.gz", ""])
def test_a_pattern_must_name_files_of_the_folder(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ParameterError, match="pattern"):
        find_pairs(tmp_path, pattern)
    with pytest.raises(ParameterError, match="pattern"):
        find_pairs(tmp_path, labels_pattern=pattern)


def test_scans_and_labels_need_different_patterns(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="same pattern"):
        find_pairs(tmp_path, "{id}.nii.gz", "{id}.nii.gz")


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ScanNotFoundError, match="no folder"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(ScanNotFoundError, match="holds no scan"):
        find_pairs(tmp_path)
