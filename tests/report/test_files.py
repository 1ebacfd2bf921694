"""Files of reports: what is asked for and what is refused, and where the viewer is found."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from atlas_store import AtlasStore
from kpt_dask.cli.main import kpt
from kpt_dask.errors import ParameterError
from kpt_dask.report.viewer import VARIABLE, find_viewer

SCRIPT = '(function(){self.niivue={};})(); const a = "</script><script>bad()<!--";'


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(kpt, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No viewer but those of a test; the user's cache."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "kpt-dask").mkdir(parents=True)
    return tmp_path / "cache" / "kpt-dask"


def pack(path: Path, name: str = "package/dist/niivue.umd.js") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(SCRIPT)
        archive.addfile(entry, io.BytesIO(SCRIPT.encode()))
    return path


def test_the_viewer_is_found_where_npm_leaves_it_or_where_it_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_viewer() is None
    for version in ("0.9.1", "0.69.0"):
        pack(home / f"niivue-niivue-{version}.tgz")
    found = find_viewer()
    assert found is not None
    assert found.origin == "NiiVue 0.69.0"
    # It cannot end the element that it stands in.
    assert "</script" not in found.script
    assert "<!--" not in found.script
    plain = tmp_path / "niivue.umd.js"
    plain.write_text(SCRIPT)
    monkeypatch.setenv(VARIABLE, str(plain))
    assert find_viewer() is not None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.js"))
    with pytest.raises(ParameterError, match=r"none\.js cannot be read"):
        find_viewer()
    assert find_viewer(plain) is not None


def test_what_is_no_viewer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text("let x = 1;")
    (tmp_path / "b.tgz").write_text("no archive")
    pack(tmp_path / "c.tgz", "package/index.js")
    (tmp_path / "d.js").write_bytes(b"\xff\xfe")
    for name in ("a.js", "b.tgz", "c.tgz", "d.js"):
        with pytest.raises(ParameterError, match=rf"{name} is no"):
            find_viewer(tmp_path / name)


def test_the_command_writes_page_and_picture_and_says_what_to_install(
    segmented: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    out = segmented / "out.zarr"
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    said = run("report", out, "--out", page, "--picture", picture, "--store", body_store.url)
    assert "npm pack @niivue/niivue" in said.stdout
    assert page.read_bytes().startswith(b"<!DOCTYPE html>")
    assert picture.read_bytes() == (segmented / "out.png").read_bytes()
    refused = run("report", out, "--out", page, code=1)
    assert "exists already" in refused.stderr
    again = run("report", out, "--picture", picture, "--overwrite", "--json")
    assert json.loads(again.stdout) == {"page": None, "picture": str(picture), "warnings": []}
    assert sorted(path.name for path in tmp_path.glob("p*")) == ["page.html", "picture.png"]


def test_what_cannot_be_shown_or_written_is_refused_before_any_work(
    segmented: Path, bodies: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    out, scan = segmented / "out.zarr", bodies / "body_4_ct.nii.gz"
    missing = run("report", tmp_path / "none.zarr", "--out", tmp_path / "a.html", code=1)
    assert "does not exist" in missing.stderr
    run("convert", scan, tmp_path / "scan.zarr", "--spacing", 8)
    other = run("report", tmp_path / "scan.zarr", "--out", tmp_path / "a.html", code=1)
    assert "is no segmentation" in other.stderr
    ending = run("report", out, "--out", tmp_path / "a.txt", code=1)
    assert "must end in .html" in ending.stderr
    inside = run("report", out, "--out", out / "a.html", code=1)
    assert "lies in" in inside.stderr
    store = run("report", out, "--out", tmp_path / "a.html", "--store", tmp_path / "no", code=1)
    assert "no" in store.stderr
    for options, sentence in (
        (("--report", tmp_path / "a.pdf"), "must end in .html"),
        (("--picture", tmp_path / "a.jpg"), "must end in .png"),
        (("--report", segmented / "out.html"), "exists already"),
    ):
        told = run("segment", scan, body_store.url, tmp_path / "new.zarr", *options, code=1)
        assert sentence in told.stderr
    assert not list(tmp_path.glob("a.*"))
    assert not (tmp_path / "new.zarr").exists()
