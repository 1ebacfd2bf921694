"""A doubt is a line on standard error and part of the answer for programs."""

import json
from pathlib import Path
from typing import Any

import nibabel
import pytest
import zarr
from click.testing import CliRunner

from atlas_store import AtlasStore
from kpt_dask.cli.main import kpt


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


def test_atlases_of_doubtful_scans_say_so(tmp_path: Path, bodies: Path, doubtful: Path) -> None:
    labels = str(bodies / "body_4_seg.nii.gz")
    store = str(tmp_path / "store")
    run = CliRunner().invoke
    assert run(kpt, ["atlas", "create", store, "--spacing", "8"]).exit_code == 0
    result = run(kpt, ["atlas", "add", store, str(doubtful), labels, "--id", "a", "--json"])
    assert result.exit_code == 0, result.output
    [sentence] = json.loads(result.stdout)["warnings"]
    assert "normalised" in sentence
    assert f"kpt: warning: {sentence}" in result.stderr
