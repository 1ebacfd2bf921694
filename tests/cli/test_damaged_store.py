"""What a sentence on a damaged store says to do can be done."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from click.testing import CliRunner
from distributed import Client

from atlas_store import AtlasStore
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
    listed = CliRunner().invoke(kpt, ["atlas", "list", str(tmp_path)])
    assert listed.exit_code == 0
    assert "complete data of pt_1 without a marker" in listed.stderr


def test_what_a_worker_finds_damaged_is_one_line(
    bodies: Path, body_store: AtlasStore, two_processes: Client, tmp_path: Path
) -> None:
    store = shutil.copytree(body_store.url, tmp_path / "store")
    for chunk in store.glob("atlases/*/strips/c/**/*"):
        if chunk.is_file():
            data = bytearray(chunk.read_bytes())
            data[len(data) // 2] ^= 1
            chunk.write_bytes(data)
    command = [sys.executable, "-m", "kpt_dask", "segment", bodies / "body_4_ct.nii.gz", store]
    command += [tmp_path / "o.zarr", "--mode", "organ"]
    command += ["--scheduler", two_processes.scheduler.address]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    # On a slow machine stages say how long they took, and what is waited for.
    said = re.compile(r"[A-Z][^:]*: [\d.]+ s|.*\(ends after .*")
    [line] = [line for line in ended.stderr.splitlines() if not said.fullmatch(line)]
    assert re.fullmatch(r"kpt: .*strips/c/0/0 of the atlas 'body_\d' is damaged: remove .*", line)
    assert ended.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_how_long_ago_is_a_number_of_days(tmp_path: Path) -> None:
    with zipfile.ZipFile(ARCHIVED) as archive:
        archive.extractall(tmp_path)
    ids = AtlasStore.open(tmp_path).ids()
    AtlasStore.open(tmp_path).remove(ids[0])
    command = ["atlas", "prune", str(tmp_path), "--older-than"]
    for days in ("nan", "inf", "-inf", "-1"):
        answer = CliRunner().invoke(kpt, [*command, days])
        assert answer.exit_code == 1, days
        assert f"must be a number of days, 0 or more, not {days}." in answer.stderr
    for days in ("1e9", "1e300"):
        answer = CliRunner().invoke(kpt, [*command, days])
        assert (answer.exit_code, answer.stderr) == (0, "")
        assert "0 removed atlases deleted, 1 can be restored still" in answer.stdout


def test_a_damaged_description_of_a_removed_atlas_hides_no_other(tmp_path: Path) -> None:
    with zipfile.ZipFile(ARCHIVED) as archive:
        archive.extractall(tmp_path)
    store = AtlasStore.open(tmp_path)
    store.copy_from(store["pt_1"], "pt_9")
    for name in ("pt_1", "pt_9"):
        store.remove(name)
    [path] = tmp_path.glob("removed/pt_1.*")
    path.write_text("{")
    listed = subprocess.run(
        [sys.executable, "-m", "kpt_dask", "atlas", "list", tmp_path, "--removed"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pt_9" in listed.stdout
    assert path.name in listed.stderr
