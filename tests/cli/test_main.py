"""The command line: the whole way, what it prints, how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result
from distributed import Client

from atlas_store import AtlasStore, load_organs
from kpt_dask.cli.main import LATER, kpt
from kpt_dask.demo import run as demonstration
from kpt_dask.volumes.volume import open_volume
from tests.cli.test_damaged_store import ARCHIVED
from tests.helpers import BODY, BODY_SPACING

KPT = [sys.executable, "-m", "kpt_dask"]


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(kpt, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def answer(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def words(result: Result) -> list[list[str]]:
    return [line.split() for line in result.stdout.splitlines()]


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_help_comes_at_once_and_names_all_commands() -> None:
    """Heavy imports stay inside the commands."""
    heavy = "{'numpy', 'zarr', 'dask', 'numba', 'rich'}"
    code = f"import sys, kpt_dask.cli; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shown = run("--help").stdout
    for command in ("atlas", "convert", "demo", "evaluate", "segment"):
        assert re.search(rf"^  {command} ", shown, re.MULTILINE)
    for command in kpt.list_commands(click.Context(kpt)):
        assert "Example" in run(command, "--help").stdout or command == "atlas"
    for command in kpt.commands["atlas"].commands:  # type: ignore[attr-defined]
        assert f"kpt atlas {command} " in run("atlas", command, "--help").stdout
    assert re.fullmatch(r"kpt-dask \d+\.\d+\.\d+\n", run("--version").stdout)


def test_a_store_says_how_its_keypoints_are_described(tmp_path: Path) -> None:
    run("atlas", "create", tmp_path / "s", "--descriptor", "invariant", "--finer")
    made_with = AtlasStore.open(tmp_path / "s").parameters
    assert (made_with["descriptor"], made_with["finer"]) == ("invariant", True)
    shown = run("atlas", "info", tmp_path / "s").stdout
    assert "descriptor invariant" in shown
    assert "finer True" in shown
    refused = run("atlas", "create", tmp_path / "t", "--descriptor", "round", code=2)
    assert "'round'" in refused.stderr


def test_what_two_mistakes_replaced_is_found_and_restored(tmp_path: Path) -> None:
    with zipfile.ZipFile(ARCHIVED) as archive:
        archive.extractall(tmp_path)
    store = AtlasStore.open(tmp_path)
    first = store["pt_1"].info
    for _ in range(2):
        with store.draft("pt_1", store.parameters, replace=True) as draft:
            draft.commit_copy(store["pt_1"])
    restored = run("atlas", "restore", tmp_path, "pt_1", "--overwrite").stdout
    assert restored.endswith(
        ", the last removed of 2; --version takes another of list --removed.\n"
    )
    assert store["pt_1"].info != first
    listed = words(run("atlas", "list", tmp_path, "--removed"))
    assert listed[0][-2:] == ["(UTC)", "version"]
    [version] = {row[-1] for row in listed} & {first.uuid[:8]}
    removed = {
        one["uuid"]: one["removed"] for one in answer("atlas", "list", tmp_path, "--removed")
    }
    assert removed[first.uuid].endswith("+00:00")
    run("atlas", "restore", tmp_path, "pt_1", "pt_2", "--version", version, code=1)
    command = "atlas", "restore", tmp_path, "pt_1", "--version", version
    run(*command, code=1)
    assert "last removed" not in run(*command, "--overwrite").stdout
    assert store["pt_1"].info == first


def test_a_store_is_made_filled_listed_and_emptied(bodies: Path, tmp_path: Path) -> None:
    store = tmp_path / "my atlases"
    made = run("atlas", "create", store, "--spacing", 8)
    assert "liver, spleen" in made.stdout
    assert AtlasStore.open(store).parameters["spacing"] == 8

    files = bodies / "body_1_ct.nii.gz", bodies / "body_1_seg.nii.gz"
    added = run("atlas", "add", store, *files, "--id", "anna", "--annotated", "liver, lung_left")
    assert re.match(r"anna: 2 organs annotated, \d+ keypoints", added.stdout)
    again = run("atlas", "add", store, *files, "--id", "anna", code=1)
    assert "anna" in again.stderr
    assert answer("atlas", "add", store, *files, "--id", "anna", "--overwrite")["id"] == "anna"

    result = run("atlas", "add-folder", store, bodies, "--scan", "{id}_ct.nii.gz")
    assert result.stdout == "4 added, 0 there already, 0 failed.\n"
    assert re.search(r"^body_4: \d+ organs annotated", result.stderr, re.MULTILINE)
    assert answer("atlas", "add-folder", store, bodies) == {
        "added": [],
        "present": ["body_1", "body_2", "body_3", "body_4"],
        "failed": {},
        "warnings": [],
    }

    listed = words(run("atlas", "list", store))
    ids = ["anna", "body_1", "body_2", "body_3", "body_4"]
    assert [row[0] for row in listed[2:7]] == ids
    assert listed[-1][-5:] == ["5", "atlases", "at", "8", "mm."]
    assert [atlas["id"] for atlas in answer("atlas", "list", store)] == ids
    info = run("atlas", "info", store, "body_2").stdout
    assert "body_2_ct.nii.gz and body_2_seg.nii.gz" in info
    assert answer("atlas", "info", store, "body_2")["organs"]["liver"]["voxels"] > 0
    assert "10200004 Liver" in run("atlas", "info", store).stdout
    assert answer("atlas", "info", store)["atlases"] == ids

    run("atlas", "remove", store, "anna", "nobody", code=1)
    run("atlas", "remove", store, "anna", "body_1")
    assert AtlasStore.open(store).ids() == ids[2:]
    assert len(answer("atlas", "list", store, "--removed")) == 3  # one was replaced
    run("atlas", "restore", store, "anna")
    assert [a["id"] for a in answer("atlas", "list", store, "--where", "id~ann")] == ["anna"]
    copies = tmp_path / "copies"
    run("atlas", "create", copies, "--spacing", "8")
    copied = run("atlas", "copy", store, copies, "anna", ids[2])
    assert "2 copied, 0 there already." in copied.stdout
    assert "2 copied, 2 there already." in run("atlas", "copy", store, copies).stdout
    run("atlas", "note", copies, ids[3], "cyst")
    given: Any = nibabel.load(bodies / "body_2_seg.nii.gz")
    fewer = np.where(np.asarray(given.dataobj) == 1, 0, np.asarray(given.dataobj))
    nibabel.save(nibabel.Nifti1Image(fewer, given.affine), tmp_path / "fewer.nii.gz")
    scan = bodies / "body_2_ct.nii.gz"
    run("atlas", "add", copies, scan, tmp_path / "fewer.nii.gz", "--id", ids[2], "--overwrite")
    told = run("atlas", "copy", store, copies)
    assert f"has other labels by the ids {ids[2]} than" in told.stderr
    assert f"has other notes by the ids {ids[3]} than" in told.stderr
    assert "0 copied, 4 there already." in told.stdout
    found = run("atlas", "copy", store, copies, ids[2], "--as", "anna", code=1)
    assert "has other scans by the ids anna" in found.stderr
    run("atlas", "remove", store, "anna")
    pruned = run("atlas", "prune", store, "--older-than", "0")
    assert "3 removed atlases deleted, 0 can be restored still." in pruned.stdout
    assert "3 atlases, all sound." in run("atlas", "verify", store).stdout
    assert answer("atlas", "verify", store) == []
    assert "too few keypoints for a graph" in run("atlas", "index", store).stdout


def test_damage_is_found_and_leftovers_are_repaired(bodies: Path, tmp_path: Path) -> None:
    run("atlas", "create", tmp_path / "s", "--spacing", 8)
    files = bodies / "body_1_ct.nii.gz", bodies / "body_1_seg.nii.gz"
    run("atlas", "add", tmp_path / "s", *files)
    marker = tmp_path / "s" / "markers" / "body_1_ct.json"
    [data] = (tmp_path / "s" / "atlases").glob("body_1_ct.*")
    copy = data.with_name(f"interrupted.{'0' * 32}")
    shutil.copytree(data, copy)
    described = json.loads((copy / "zarr.json").read_text())
    # As another machine leaves it that went down before the data was complete.
    described["attributes"].update(started="2020-01-01T00:00:00+00:00", machine="other")
    del described["attributes"]["digests"]
    (copy / "zarr.json").write_text(json.dumps(described))
    found = run("atlas", "verify", tmp_path / "s", code=1)
    assert "interrupted" in found.stdout
    assert found.stderr == f"kpt: {tmp_path / 's'} has 1 problem.\n"
    run("atlas", "verify", tmp_path / "s", "--repair")
    assert marker.exists()
    assert not copy.exists()
    chunk = next((tmp_path / "s" / "atlases").rglob("image/0/c/0/0/0"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert "damaged" in run("atlas", "verify", tmp_path / "s", code=1).stdout


def test_a_folder_with_a_bad_scan_ends_with_1(bodies: Path, tmp_path: Path) -> None:
    run("atlas", "create", tmp_path / "s", "--spacing", 8)
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "bad_ct.nii.gz").write_bytes(b"no scan")
    (folder / "bad_seg.nii.gz").symlink_to(bodies / "body_1_seg.nii.gz")
    for what in ("ct", "seg"):
        (folder / f"good_{what}.nii.gz").symlink_to(bodies / f"body_1_{what}.nii.gz")
    result = run("atlas", "add-folder", tmp_path / "s", folder, code=1)
    assert result.stdout == "1 added, 0 there already, 1 failed.\n"
    assert "bad: not added: " in result.stderr
    assert result.stderr.endswith("kpt: 1 of 2 scans were not added: bad.\n")
    assert AtlasStore.open(tmp_path / "s").ids() == ["good"]


def test_convert(bodies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scan = os.path.relpath(bodies / "body_1_ct.nii.gz")
    assert "55 × 32 × 40 at 8 mm" in run("convert", scan, "a b.zarr", "--spacing", 8).stdout
    assert open_volume("a b.zarr").grid.shape == (55, 32, 40)
    told = answer("convert", scan, "a b.zarr", "--spacing", 16, "--overwrite")
    assert (told["path"], told["spacing"]) == ("a b.zarr", [16, 16, 16])
    assert tuple(told["shape"]) == open_volume("a b.zarr").grid.shape


def test_segment(bodies: Path, body_store: AtlasStore, tmp_path: Path) -> None:
    scan, out, labels = bodies / "body_4_ct.nii.gz", tmp_path / "o.zarr", tmp_path / "o.nii.gz"
    result = run("segment", scan, body_store.url, out, "--labels", labels)
    liver = next(row for row in words(result) if row[:1] == ["liver"])
    assert f"Written: {out}, {labels}." in result.stdout
    values = np.asarray(nibabel.load(labels).dataobj)
    volume = np.count_nonzero(values == load_organs().by_name("liver").value) * 0.064
    assert float(liver[1]) == pytest.approx(volume, abs=0.05)

    told = answer("segment", scan, body_store.url, out, "--exclude", "body_1", "--overwrite")
    assert told["atlases"] == ["body_2", "body_3"]
    assert list(told["organs"]) == list(load_organs().names)
    liver_measures = told["organs"]["liver"]
    assert told["keypoints"] > liver_measures["votes"] > 0
    assert liver_measures["interval_ml"][0] <= liver_measures["volume_ml"]
    assert 0 < liver_measures["confidence"] <= 1


def test_evaluate(bodies: Path, body_store: AtlasStore, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("older")
    arguments = ("evaluate", body_store.url, "--limit", 1, "--atlases", 1)
    result = run(*arguments, "--json", file)
    results = json.loads(file.read_text())
    assert {"mean_dice", "dice_by_organ", "scans", "atlases", "seconds"} <= set(results)
    rows = {row[0]: row[1:] for row in words(result) if row}
    assert rows["liver"][0] == f"{results['dice_by_organ']['liver']:.3f}"
    assert rows["mean"] == [f"{results['mean_dice']:.3f}"]
    *_, grid, last = result.stdout.splitlines()
    assert f"on the grid of the store, {body_store.parameters['spacing']:g} mm, not" in grid
    assert last.endswith("over 1 scans, 1 atlases for each.")
    again = run(*arguments, "--scans", bodies, "--json", file)
    assert json.loads(file.read_text())["dice"] == results["dice"]
    assert "\nMeasured on the scans' own grids.\n" in again.stdout


def test_a_scan_that_cannot_be_evaluated_is_named_at_the_end(
    bodies: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    for part in ("ct", "seg"):
        shutil.copy(bodies / f"body_4_{part}.nii.gz", tmp_path)
        (tmp_path / f"bad_{part}.nii.gz").write_bytes(b"nothing")
    arguments = ("evaluate", body_store.url, "--scans", tmp_path, "--mode", "affine")
    result = run(*arguments, "--json", "-", code=1)
    assert list(json.loads(result.stdout)["dice"]) == ["body_4"]
    assert "The scan bad is left out" in result.stderr
    assert result.stderr.splitlines()[-1] == "kpt: 1 of 2 scans were not evaluated: bad."


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = partial(demonstration.demo, shape=BODY, spacing=BODY_SPACING)
    monkeypatch.setattr(demonstration, "demo", smaller)
    monkeypatch.setattr(demonstration, "ATLASES", 2)
    monkeypatch.chdir(tmp_path)
    first = run("demo")
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    assert made == {
        "atlases",
        "labels.nii.gz",
        "overlay.png",
        "report.html",
        "scan.nii.gz",
        "scan.zarr",
    }
    for name in made:
        assert f"{Path('demo') / name}" in first.stdout
    assert (tmp_path / "demo" / "overlay.png").read_bytes().startswith(b"\x89PNG")
    atlases = listing(tmp_path / "demo" / "atlases")
    second = run("demo")
    assert listing(tmp_path / "demo" / "atlases") == atlases
    assert words(second)[:13] == words(first)[:13]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "something else" in run("demo", "--out", "mine", code=1).stderr


def test_a_running_cluster_is_used(bodies: Path, tmp_path: Path, two_processes: Client) -> None:
    address = two_processes.scheduler.address
    scan = bodies / "body_1_ct.nii.gz"
    run("convert", scan, tmp_path / "here.zarr", "--spacing", 8)
    run("convert", scan, tmp_path / "there.zarr", "--spacing", 8, "--scheduler", address)
    here, there = (open_volume(tmp_path / f"{name}.zarr") for name in ("here", "there"))
    for a, b in zip(here.levels, there.levels, strict=True):
        np.testing.assert_array_equal(a[...], b[...])


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGXCPU, 152)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP", "SIGXCPU"],
)
def test_interrupted_it_leaves_nothing(
    bodies: Path, body_store: AtlasStore, tmp_path: Path, signum: int, code: int
) -> None:
    scan = bodies / "body_4_ct.nii.gz"
    # Whoever runs the tests may have it ignored, as nohup does, and so would the program.
    heeding = ["env", f"--default-signal={signum}"]
    command = [*heeding, *KPT, "segment", scan, body_store.url, tmp_path / "out.zarr"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signum)
    time.sleep(0.01)
    # Impatience does not stop the removing.
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimized", [{"PYTHONOPTIMIZE": "2"}, {}])
def test_an_optimizing_python_changes_nothing(tmp_path: Path, optimized: dict[str, str]) -> None:
    """Zarr needs its assertions, and help is made of docstrings."""
    program = "from kpt_dask.cli.main import main; main()"
    python = [sys.executable, *([] if optimized else ["-O"]), "-c", program]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*python, *arguments],
            cwd=tmp_path,
            env=os.environ | optimized,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "kpt atlas create atlases --organs openkbp" in run("atlas", "create", "--help")
    run("atlas", "create", "store", "--organs", "openkbp")
    assert "0 atlases" in run("atlas", "list", "store")


def test_kernels_are_compiled_where_numba_is_told_not_to(bodies: Path, tmp_path: Path) -> None:
    def run(*python: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *python],
            env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    scan, out = bodies / "body_1_ct.nii.gz", tmp_path / "out.zarr"
    done = run("-m", "kpt_dask", "convert", str(scan), str(out), "--spacing", "4")
    assert done.returncode == 0, done.stderr
    # In a program of somebody else's it is theirs.
    refused = run("-c", "import kpt_dask; kpt_dask.segment")
    assert refused.stderr.endswith("kpt-dask needs compiled kernels: unset NUMBA_DISABLE_JIT.\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_an_output_is_begun_it_leaves_nothing(
    bodies: Path, body_store: AtlasStore, tmp_path: Path, signum: int
) -> None:
    """The signal comes when the lock is there, and the stack of what is to be left is not told."""
    program = f"""
import contextlib, os, signal, sys
from pathlib import Path
push = contextlib.ExitStack._push_cm_exit
def interrupted(stack, cm, leave):
    if list(Path({str(tmp_path)!r}).iterdir()):
        os.kill(os.getpid(), {int(signum)})
    push(stack, cm, leave)
contextlib.ExitStack._push_cm_exit = interrupted
from kpt_dask.cli.main import main
main()
"""
    scan = bodies / "body_4_ct.nii.gz"
    arguments = ["segment", scan, body_store.url, tmp_path / "out.zarr"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signum, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(
    bodies: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    """As nohup has it: the terminal may go, the work goes on."""
    scan = bodies / "body_4_ct.nii.gz"
    command = [*KPT, "segment", scan, body_store.url, tmp_path / "out.zarr"]
    process = subprocess.Popen(
        ["nohup", *map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]


def test_wrong_usage_ends_with_2(tmp_path: Path) -> None:
    run("segment", "scan.nii.gz", code=2)
    for memory in ("much", "-1GiB", "0"):
        shown = run("demo", "--out", tmp_path, "--memory", memory, code=2)
        assert "no amount of memory" in shown.stderr
    shown = run("atlas", "add", tmp_path, "a", "b", "--annotated", "liver,,spleen", code=2)
    assert "separated by commas" in shown.stderr


def test_a_fault_is_told_in_a_sentence_and_shown_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(AtlasStore, "open", broken)
    monkeypatch.delenv("KPT_DEBUG", raising=False)
    shown = run("atlas", "list", tmp_path, code=1)
    assert shown.stderr.startswith("kpt: ZeroDivisionError: by nothing.")
    monkeypatch.setenv("KPT_DEBUG", "1")
    assert isinstance(run("atlas", "list", tmp_path, code=1).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "kpt: out of memory: "),
        (ValueError("A dask config file at 'dask.yaml' is malformed."), "Mend the file"),
        (OSError(28, "No space left on device", "out.zarr/0"), "out.zarr/0: No space left"),
    ],
)
def test_what_is_no_fault_of_the_program_is_not_called_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(AtlasStore, "open", fail)
    shown = run("atlas", "list", "store", code=1).stderr
    assert sentence in shown
    assert "fault of the program" not in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize("wait", ["soon", "-1s", "0"])
def test_a_wait_that_is_no_span_of_time(wait: str) -> None:
    shown = run("segment", "scan", "store", "out", "--wait", wait, code=2).stderr
    assert "is no span of time to wait" in shown


def test_commands_that_are_imported_later_are_listed_as_they_say_themselves() -> None:
    for name, sentence in LATER.items():
        command = kpt.get_command(click.Context(kpt), name)
        assert command is not None
        assert command.get_short_help_str(200) == sentence
    listed = CliRunner().invoke(kpt, ["--help"]).output.split("Commands:")[1]
    for name in kpt.list_commands(click.Context(kpt)):
        assert f"\n  {name} " in listed
