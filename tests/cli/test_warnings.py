"""A doubt is a line on standard error and part of the answer for programs."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import kpt_dask
from atlas_store import AtlasStore, load_organs
from kpt_dask.cli.main import kpt
from kpt_dask.errors import ScanFormatError


@pytest.fixture
def doubtful(tmp_path: Path, bodies: Path) -> Path:
    """A scan whose values run from 0 to 1."""
    image: Any = nibabel.load(bodies / "body_4_ct.nii.gz")
    values = (image.get_fdata().clip(-1024, 976) + 1024) / 2000
    nibabel.save(nibabel.Nifti1Image(values.astype("f4"), image.affine), tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz"


@pytest.mark.parametrize("command", ["convert", "segment"])
def test_doubts_are_told(
    tmp_path: Path, body_store: AtlasStore, doubtful: Path, command: str
) -> None:
    out = tmp_path / "o.zarr"
    rest = [str(out)] if command == "convert" else [body_store.url, str(out)]
    result = CliRunner().invoke(kpt, [command, str(doubtful), *rest, "--json"])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("kpt: warning: ")]
    assert f"kpt: warning: {doubtful} holds values from 0" in lines[0]
    assert "normalised intensities, not HU" in lines[0]
    assert json.loads(result.stdout)["warnings"] == [
        line.removeprefix("kpt: warning: ") for line in lines
    ]
    about: Any = zarr.open_group(str(out), mode="r").attrs["kpt"]
    assert about["warnings"] == json.loads(result.stdout)["warnings"]


def test_scans_that_may_be_clipped_become_atlases_with_a_warning(
    tmp_path: Path, bodies: Path
) -> None:
    image: Any = nibabel.load(bodies / "body_4_ct.nii.gz")
    clipped = image.get_fdata().clip(-125, 275).astype("i2")
    nibabel.save(nibabel.Nifti1Image(clipped, image.affine), tmp_path / "ct.nii.gz")
    labels = str(bodies / "body_4_seg.nii.gz")
    store = str(tmp_path / "store")
    run = CliRunner().invoke
    assert run(kpt, ["atlas", "create", store, "--spacing", "8"]).exit_code == 0
    scan = str(tmp_path / "ct.nii.gz")
    result = run(kpt, ["atlas", "add", store, scan, labels, "--id", "a", "--json"])
    assert result.exit_code == 0, result.output
    [sentence] = json.loads(result.stdout)["warnings"]
    assert "it may be clipped" in sentence
    assert f"kpt: warning: {sentence}" in result.stderr


def test_scans_that_cannot_be_hu_become_no_atlases(
    tmp_path: Path, bodies: Path, doubtful: Path
) -> None:
    labels = str(bodies / "body_4_seg.nii.gz")
    store = AtlasStore.create(tmp_path / "store", load_organs(), kpt_dask.store_parameters(8.0))
    with pytest.raises(ScanFormatError, match=r"normalised.*an atlas must be a CT in HU"):
        kpt_dask.add_atlas(store, doubtful, labels)
    image: Any = nibabel.load(bodies / "body_4_ct.nii.gz")
    mr = (600 - 2 * np.abs(image.get_fdata())).clip(5).astype("i2")
    nibabel.save(nibabel.Nifti1Image(mr, image.affine), doubtful)
    with pytest.raises(ScanFormatError, match=r"hardly any below 0 HU.*an atlas must be"):
        kpt_dask.add_atlas(store, doubtful, labels)
    assert len(AtlasStore.open(store.url)) == 0
