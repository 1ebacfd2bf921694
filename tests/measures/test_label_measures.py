"""Measures of label maps, against plain numpy on whole arrays."""

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner

from atlas_store import Organ, OrganTable
from kpt_dask.cli.main import kpt
from kpt_dask.errors import GridMismatchError, LabelError
from kpt_dask.label_files.formats import LabelFile
from kpt_dask.measures.label_measures import measure
from kpt_dask.measures.surfaces import agreement
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert
from tests.label_files.maps import label_map

nib: Any = nibabel
AFFINE = np.array([[0, -1.5, 0, 30], [0.8, 0, 1.3, -20], [0, 0, -4.0, 5], [0, 0, 0, 1]])
"""Sheared, as of a tilted gantry."""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A scan and two label maps of it, with axes in another order than the world's."""
    rng = np.random.default_rng(3)
    scan = rng.integers(-1000, 1500, (20, 30, 12)).astype(np.int16)
    one = np.zeros(scan.shape, np.uint16)
    one[4:11, 5:14, 2:7] = 3
    one[12:20, 20:25, 3:9] = 700
    other = np.roll(one, 2, axis=1)
    other[other == 3] = 5
    paths = {}
    for name, array in {"scan": scan, "one": one, "other": other}.items():
        paths[name] = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(array, AFFINE), paths[name])
    return {"scan": scan, "one": one, "other": other, "path": paths}


def test_measures_are_those_of_the_voxels(files: dict[str, Any]) -> None:
    found = measure(files["path"]["scan"], files["path"]["one"])
    assert [(one.name, one.value) for one in found] == [("label 3", 3), ("label 700", 700)]
    for one in found:
        mask = files["one"] == one.value
        hu = files["scan"][mask].astype(float)
        assert one.voxels == mask.sum()
        assert one.volume_ml == pytest.approx(mask.sum() * 1.5 * 0.8 * 4 / 1000)
        assert one.mean_hu == pytest.approx(hu.mean())
        assert one.sd_hu == pytest.approx(hu.std())
        x, y, z = (AFFINE @ np.append(np.argwhere(mask).mean(axis=0), 1))[:3]
        # NIfTI counts x and y towards left and front, this project towards right and back.
        assert one.centroid_mm == pytest.approx((z, -y, -x))
    assert [one.at_border for one in found] == [False, True]


def test_labels_are_compared_in_mm(files: dict[str, Any]) -> None:
    paths = files["path"]
    found = measure(paths["scan"], paths["one"], reference=paths["other"], tolerance_mm=2.0)
    assert [one.value for one in found] == [3, 5, 700]
    for one in found:
        masks = [files[name] == one.value for name in ("one", "other")]
        assert one.agreement is not None
        expected = agreement(*masks, AFFINE[:3, :3], tolerance_mm=2.0)
        assert one.agreement == pytest.approx(expected)
    assert found[0].agreement == (0.0, None, None, 0.0)


def test_a_table_names_labels_and_hides_none(files: dict[str, Any]) -> None:
    table = OrganTable((Organ(3, "liver", 50.0, (1, 2, 3)), Organ(9, "spleen", 50.0, (3, 2, 1))))
    paths = files["path"]
    found = measure(paths["scan"], paths["one"], organs=table)
    named = [("liver", True), ("spleen", False)]
    assert [(one.name, one.voxels > 0) for one in found] == [*named, ("label 700", True)]
    assert found[1].mean_hu is None
    assert found[2] == measure(paths["scan"], paths["one"])[1]
    found = measure(paths["scan"], paths["one"], organs=table, reference=paths["other"])
    others = [("label 5", False), ("label 700", True)]
    assert [(one.name, one.voxels > 0) for one in found] == [*named, *others]
    assert found[2].agreement == (0.0, None, None, 0.0)


def test_labels_of_another_grid_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(files["one"][:-1], AFFINE), tmp_path / "less.nii.gz")
    with pytest.raises(GridMismatchError, match=r"less\.nii\.gz does not lie on the grid"):
        measure(files["path"]["scan"], tmp_path / "less.nii.gz")


def test_the_command_prints_and_writes_tables(files: dict[str, Any], tmp_path: Path) -> None:
    paths = {name: str(path) for name, path in files["path"].items()}
    table = tmp_path / "m.csv"
    command = ["measure", paths["scan"], paths["one"], "--to", paths["other"]]
    shown = CliRunner().invoke(kpt, [*command, "--csv", str(table)], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "label 700" in shown.stdout
    assert "surface Dice" in shown.stdout
    told = CliRunner().invoke(kpt, [*command, "--json"], catch_exceptions=False)
    answer = json.loads(told.stdout)
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [one["label"] for one in answer["labels"]]
    assert float(rows[2]["dice"]) == answer["labels"][2]["dice"] > 0
    again = CliRunner().invoke(kpt, [*command, "--csv", str(table)])
    assert again.exit_code == 1
    assert "exists" in again.stderr
    refused = CliRunner().invoke(kpt, [*command, "--csv", paths["one"], "--overwrite"])
    assert refused.exit_code == 1
    assert nib.load(paths["one"]).shape == (20, 30, 12)


@pytest.mark.parametrize("kind", ["masks", "seg", "rtstruct"])
def test_labels_that_have_names_only_need_a_table(
    files: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    if kind == "masks":
        labels = tmp_path / "masks"
        labels.mkdir()
        nib.save(nib.load(files["path"]["one"]), labels / "liver.nii.gz")
    else:
        labels = tmp_path / "l.dcm"
        asked = LabelFile.parse(f"rtstruct:{labels}" if kind == "rtstruct" else str(labels))
        asked.format.write(labels, label_map())
    with pytest.raises(LabelError, match=r"has names for its labels .* give --organs") as caught:
        measure(files["path"]["scan"], labels)
    assert str(labels) in str(caught.value)


@pytest.mark.parametrize("organs", [None, OrganTable((Organ(3, "liver", 50.0, (1, 2, 3)),))])
def test_labels_of_the_working_grid_are_to_be_exported_first(
    files: dict[str, Any], tmp_path: Path, organs: OrganTable | None
) -> None:
    convert(open_scan(files["path"]["scan"]), tmp_path / "out.zarr", spacing=4.0)
    with pytest.raises(GridMismatchError, match=r"out\.zarr has its labels .* kpt export"):
        measure(files["path"]["scan"], tmp_path / "out.zarr", organs=organs)
