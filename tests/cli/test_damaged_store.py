"""What a sentence on a damaged store says to do can be done."""

import zipfile
from pathlib import Path

from click.testing import CliRunner

from kpt_dask.cli.main import kpt

ARCHIVED = Path(__file__).parents[1] / "atlas_store" / "archived" / "version_1.zip"


def test_an_atlas_that_cannot_be_read_can_be_removed(tmp_path: Path) -> None:
    with zipfile.ZipFile(ARCHIVED) as archive:
        archive.extractall(tmp_path)
    marker = tmp_path / "markers" / "pt_1.json"
    marker.write_bytes(marker.read_bytes().replace(b'"keypoints":20', b'"keypoints":21'))
    listed = CliRunner().invoke(kpt, ["atlas", "list", str(tmp_path)])
    assert listed.exit_code == 1
    assert "pt_1.json is damaged" in listed.stderr
    unknown = CliRunner().invoke(kpt, ["atlas", "remove", str(tmp_path), "pt_1", "pt_3"])
    assert unknown.exit_code == 1
    assert "has no atlas pt_3" in unknown.stderr
    assert marker.exists()
    removed = CliRunner().invoke(kpt, ["atlas", "remove", str(tmp_path), "pt_1"])
    assert (removed.exit_code, removed.stdout) == (0, "pt_1: removed.\n")
    assert CliRunner().invoke(kpt, ["atlas", "list", str(tmp_path)]).exit_code == 0
