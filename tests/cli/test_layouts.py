"""Annotated scans as they are in the wild: public layouts, contours, series of a folder."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result

from atlas_store import AtlasStore, load_organs
from kpt_dask.atlases.add import store_parameters
from kpt_dask.cli.main import kpt
from kpt_dask.label_files.formats import LabelFile
from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.scans.scan import open_scan
from tests.scans.dicom_writer import write_folder
from tests.scans.formats import LPS, by_nibabel

NUMBERS = {"spleen": 1, "kidney_right": 2, "kidney_left": 3, "liver": 6, "aorta": 8}
"""Of AMOS, those that the phantom shows."""


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(kpt, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def store(tmp_path: Path) -> AtlasStore:
    return AtlasStore.create(tmp_path / "store", load_organs(), store_parameters(4.0))


def test_public_layouts_are_added_by_name(
    bodies: Path, body_store: AtlasStore, store: AtlasStore, tmp_path: Path
) -> None:
    values, affine = by_nibabel(bodies / "body_2_seg.nii.gz")
    total = tmp_path / "total" / "s2"
    (total / "segmentations").mkdir(parents=True)
    (total / "ct.nii.gz").symlink_to(bodies / "body_2_ct.nii.gz")
    names = {organ.value: organ.name for organ in load_organs()} | {0: "gallbladder"}
    for value, name in names.items():
        mask = ((values == value) & (value > 0)).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask.T, LPS @ affine), total / "segmentations" / f"{name}.nii.gz")
    run("atlas", "add-folder", store.url, tmp_path / "total", "--layout", "totalsegmentator")
    np.testing.assert_array_equal(store["s2"].labels[...], body_store["body_2"].labels[...])

    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "amos" / folder).mkdir(parents=True)
    (tmp_path / "amos" / "imagesTr" / "amos_0002.nii.gz").symlink_to(bodies / "body_2_ct.nii.gz")
    numbers = np.zeros_like(values)
    for name, number in NUMBERS.items():
        numbers[values == load_organs().by_name(name).value] = number
    image = nib.Nifti1Image(numbers.T, LPS @ affine)
    nib.save(image, tmp_path / "amos" / "labelsTr" / "amos_0002.nii.gz")
    command = ("atlas", "add-folder", store.url, tmp_path / "amos", "--layout", "amos", "--json")
    answer = json.loads(run(*command).stdout)
    assert answer["added"] == ["amos_0002"]
    assert any("gallbladder" in sentence for sentence in answer["warnings"])
    assert set(store["amos_0002"].annotated) == set(NUMBERS)
    for name in NUMBERS:
        assert store["amos_0002"].organs[name] == body_store["body_2"].organs[name]


def test_contours_on_a_series_make_an_atlas(
    bodies: Path, body_store: AtlasStore, store: AtlasStore, tmp_path: Path
) -> None:
    hu, affine = by_nibabel(bodies / "body_1_ct.nii.gz")
    values, _ = by_nibabel(bodies / "body_1_seg.nii.gz")
    write_folder(tmp_path / "ct", hu, affine)
    scan = open_scan(tmp_path / "ct")
    in_order = values if scan.grid.affine[0, 0] * affine[2, 2] > 0 else values[::-1]
    voxels = PackedLabels.of(scan.grid.shape, values.dtype, [in_order])
    made = LabelMap(voxels, scan.grid, load_organs().organs, scan.file)
    file = LabelFile.parse(f"rtstruct:{tmp_path / 'contours.dcm'}")
    file.format.write(Path(file.path), made)
    command = ["atlas", "add", store.url, tmp_path / "ct", tmp_path / "contours.dcm"]
    run(*command, "--id", "berta", "--series", "thorax")
    np.testing.assert_array_equal(store["berta"].labels[...], body_store["body_1"].labels[...])
    result = run(*command, "--id", "c", "--series", "head", code=1)
    assert "holds no series head" in result.stderr


def test_scans_with_masks_are_evaluated(
    bodies: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    values, affine = by_nibabel(bodies / "body_4_seg.nii.gz")
    folder = tmp_path / "total" / "s4"
    (folder / "segmentations").mkdir(parents=True)
    (folder / "ct.nii.gz").symlink_to(bodies / "body_4_ct.nii.gz")
    liver = nib.Nifti1Image((values == 1).astype(np.uint8).T, LPS @ affine)
    nib.save(liver, folder / "segmentations" / "Liver.nii.gz")
    command = ["evaluate", body_store.url, "--scans", tmp_path / "total", "--mode", "affine"]
    answer = json.loads(run(*command, "--layout", "totalsegmentator", "--json", "-").stdout)
    assert list(answer["dice_by_organ"]) == ["liver"]
    assert answer["mean_dice"] > 0.5
    assert "unknown; use one of" in run(*command, "--layout", "flat", code=1).stderr
