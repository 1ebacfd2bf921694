"""Outputs in an object store: whole or not there, and nothing of others is touched."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import kpt_dask
from atlas_store.storage.objects import Objects
from kpt_dask.errors import (
    KptError,
    OutputExistsError,
    OutputVanishedError,
    ParameterError,
    ScanNotFoundError,
    UnreachableError,
)
from kpt_dask.output.commit import replacing, replacing_together
from kpt_dask.output.contents import STORE
from kpt_dask.output.object_store import CLAIM, ENCODING, SCRATCH
from kpt_dask.output.partial import machine
from kpt_dask.output.places import check_outputs
from kpt_dask.remote import Remote

OURS = json.dumps({"attributes": {"encoding-type": "kpt-volume"}}).encode()
OUTPUT = {"zarr.json": OURS, "0/zarr.json": b"{}", "0/c/0/0": b"new", "labels/zarr.json": b"{}"}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv(SCRATCH, str(folder))
    return folder


@pytest.fixture
def url(bucket: str) -> str:
    """A place that no other test uses."""
    return f"{bucket}/out/{uuid.uuid4().hex}/scan.zarr"


def there(url: str) -> dict[str, bytes | None]:
    """Give every object below a URL."""
    parent, _, name = url.rpartition("/")
    objects = Objects.at(parent)
    return {key: objects.read(f"{name}/{key}") for key in objects.keys(name)}


def put(url: str, content: Mapping[str, bytes]) -> None:
    for key, data in content.items():
        Objects.at(url).write(key, data)


def fill(folder: Path, content: Mapping[str, bytes] = OUTPUT) -> None:
    for key, data in content.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)


def claimed(**changed: object) -> dict[str, bytes]:
    """The claim of another run, and a part of its output."""
    run = {**ENCODING, **machine(), "pid": os.getpid(), "token": "x", "at": time.time()}
    return {CLAIM: json.dumps(run | changed).encode(), "0/c/0/0": b"old", "0/c/0/1": b"old"}


def dead() -> int:
    """Give the id of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_an_output_appears_whole_and_leaves_nothing_else(url: str, scratch: Path) -> None:
    with replacing(url) as path:
        assert path.parent == scratch
        assert set(there(url)) == {CLAIM}
        fill(path)
    assert there(url) == OUTPUT
    assert list(scratch.iterdir()) == []


def test_a_failure_leaves_nothing(url: str, scratch: Path, tmp_path: Path) -> None:
    def run() -> None:
        with replacing_together([url, tmp_path / "labels"]) as [path, labels]:
            fill(path)
            labels.write_bytes(b"labels")
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        run()
    assert there(url) == {}
    assert list(tmp_path.iterdir()) == [scratch]
    assert list(scratch.iterdir()) == []


def test_files_beside_it_appear_with_it_or_neither(url: str, scratch: Path, tmp_path: Path) -> None:
    def run() -> None:
        with replacing_together([url, tmp_path / "labels"]) as [path, labels]:
            fill(path)
            labels.write_bytes(b"labels")

    run()
    assert there(url) == OUTPUT
    assert (tmp_path / "labels").read_bytes() == b"labels"
    other = url.replace("scan", "other")

    def meet() -> None:
        with replacing_together([other, tmp_path / "more"]) as [path, labels]:
            fill(path)
            labels.write_bytes(b"labels")
            (tmp_path / "more").write_bytes(b"drawn by hand meanwhile")

    with pytest.raises(OutputExistsError):
        meet()
    assert there(other) == {}
    assert (tmp_path / "more").read_bytes() == b"drawn by hand meanwhile"


def test_a_local_file_that_cannot_be_moved_takes_the_upload_back(
    url: str, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def run() -> None:
        with replacing_together([url, tmp_path / "labels"]) as [path, labels]:
            fill(path)
            labels.write_bytes(b"labels")

    with monkeypatch.context() as patch:
        patch.setattr("kpt_dask.output.commit._move", refuse)
        with pytest.raises(OSError, match="No space"):
            run()
    assert there(url) == {}
    assert not (tmp_path / "labels").exists()


def test_a_full_disk_is_that_of_the_scratch(url: str, scratch: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught, replacing(url):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(scratch)
    assert there(url) == {}


def test_what_is_there_is_not_replaced_unasked(url: str, scratch: Path) -> None:
    put(url, OUTPUT)
    for attempt in (lambda: check_outputs(images=[url]), lambda: replacing(url).__enter__()):
        with pytest.raises(OutputExistsError, match="exists already"):
            attempt()
    assert there(url) == OUTPUT
    with replacing(url, overwrite=True) as path:
        fill(path, {"zarr.json": OURS, "1/c/0": b"newer"})
        assert there(url).items() >= OUTPUT.items()
    assert there(url) == {"zarr.json": OURS, "1/c/0": b"newer"}


@pytest.mark.parametrize(
    "foreign",
    [
        {"thesis.txt": b"years of work"},
        {"0/c/0/0": b"somebody's array"},
        {"zarr.json": b"{}", "0/c/0/0": b"somebody's array"},
        OUTPUT | {"thesis.txt": b"years of work"},
        OUTPUT | {"labels/corrected/0": b"by hand"},
        {CLAIM: b"no claim of ours"},
        {CLAIM: b"[" * 100_000},
    ],
    ids=["thesis", "array", "group", "thesis in ours", "labels in ours", "claim", "nested"],
)
def test_what_is_somebody_elses_is_never_replaced(
    url: str, scratch: Path, foreign: Mapping[str, bytes]
) -> None:
    put(url, foreign)
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError) as caught:
            check_outputs(images=[url], overwrite=overwrite)
        assert str(caught.value).startswith(url)
        assert "\n" not in str(caught.value)
        with pytest.raises(OutputExistsError), replacing(url, overwrite=overwrite):
            pass
    assert there(url) == foreign
    assert list(scratch.iterdir()) == []


def test_neighbours_with_a_like_name_stay(url: str, scratch: Path) -> None:
    put(url, claimed(pid=dead()))
    for neighbour in (f"{url}2", f"{url}.old", url.removesuffix(".zarr")):
        put(neighbour, OUTPUT)
    put(f"{url}/0", {"c/0/2": b"old"})
    with replacing(url, overwrite=True) as path:
        fill(path)
    assert there(url) == OUTPUT
    for neighbour in (f"{url}2", f"{url}.old", url.removesuffix(".zarr")):
        assert there(neighbour) == OUTPUT


def test_of_two_runs_at_once_one_is_refused(url: str, scratch: Path) -> None:
    with replacing(url) as path:
        for overwrite in (False, True):
            with (
                pytest.raises(OutputExistsError, match=r"is being written by process \d+ .*wait"),
                replacing(url, overwrite=overwrite),
            ):
                pass
        fill(path)
    assert there(url) == OUTPUT


@pytest.mark.parametrize("who", ["ended", "of a dead run of this process", "before a boot", "old"])
def test_what_a_run_left_that_is_over_makes_way(url: str, scratch: Path, who: str) -> None:
    change: dict[str, object] = {
        "ended": {"pid": dead()},
        "of a dead run of this process": {},
        "before a boot": {"boot": "another", "machine": "same", "host": "same"},
        "old": {"boot": "another", "host": "far", "at": time.time() - 8 * 86400},
    }[who]
    if who == "before a boot":
        change |= {name: machine()[name] for name in ("host", "machine")}
        if machine()["machine"] is None:
            pytest.skip("this machine has no identity")
    put(url, claimed(**change))
    with replacing(url) as path:
        assert set(there(url)) == {CLAIM}
        fill(path)
    assert there(url) == OUTPUT


def test_a_run_elsewhere_is_waited_for_unless_overwritten(url: str, scratch: Path) -> None:
    before = claimed(boot="another", host="far")
    put(url, before)
    with pytest.raises(OutputExistsError, match=r"left half-written, by process \d+ on far"):
        check_outputs(images=[url])
    assert there(url) == before
    with replacing(url, overwrite=True) as path:
        fill(path)
    assert there(url) == OUTPUT


def test_who_was_taken_over_changes_nothing(url: str, scratch: Path) -> None:
    other = claimed() | {"zarr.json": OURS}

    def run() -> None:
        with replacing(url) as path:
            fill(path)
            Objects.at(url).delete(CLAIM)
            put(url, other)

    with pytest.raises(OutputVanishedError, match="taken over by another run"):
        run()
    assert there(url) == other


def test_an_object_that_appears_meanwhile_stays(url: str, scratch: Path) -> None:
    def run() -> None:
        with replacing(url) as path:
            fill(path)
            put(url, {"0/c/0/0": b"somebody's", "notes": b"somebody's"})

    with pytest.raises(OutputExistsError, match="by somebody else meanwhile"):
        run()
    assert there(url) == {"0/c/0/0": b"somebody's", "notes": b"somebody's"}


def test_a_scratch_that_was_cleaned_is_told(url: str, scratch: Path) -> None:
    with pytest.raises(OutputVanishedError, match=SCRATCH), replacing(url):
        pass
    assert there(url) == {}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("s3://bucket", "is no place in a bucket"),
        ("s3://bucket/", "is no place in a bucket"),
        ("s3:///key/scan.zarr", "is no place in a bucket"),
        ("s3://bucket/a//b.zarr", "may be empty"),
        ("s3://bucket/a/../b.zarr", "may be empty"),
        ("s3://bucket/scan*.zarr", "may be empty"),
        ("s3://bucket/scan[1].zarr", "may be empty"),
        ("s3:/bucket/scan.zarr", "local folders only"),
        ("gs://bucket/scan.zarr", "local folders only, not to gs"),
        ("s3://in/scan.zarr", r"is s3://in/scan\.zarr/, which is read"),
        ("s3://in/scan.zarr/deep/a.zarr", r"lies in s3://in/scan\.zarr/, which is read"),
        ("s3://in", "is no place"),
        ("s3://atlas", "is no place"),
        ("s3://in/store", "contains s3://in/store/atlases, which is read"),
    ],
)
def test_places_that_cannot_be_written_are_told(out: str, message: str) -> None:
    """Before the object store is asked: there is none."""
    inputs = ["scan.nii.gz", "s3://in/scan.zarr/", Remote("s3://in/store/atlases")]
    with pytest.raises(ParameterError, match=message) as caught:
        check_outputs(images=[out], inputs=inputs, overwrite=True)
    assert str(caught.value).startswith(out)
    assert "\n" not in str(caught.value)


def test_nothing_is_written_in_a_store(bucket: str, scratch: Path) -> None:
    put(f"{bucket}/mine", {"zarr.json": OURS.replace(b"kpt-volume", STORE.encode())})
    for name in ("mine", "mine/atlases/out.zarr"):
        with pytest.raises(ParameterError, match="mine, which is an atlas store"):
            check_outputs(images=[f"{bucket}/{name}"], overwrite=True)


def test_only_images_go_to_an_object_store(bucket: str) -> None:
    for targets in ({"files": [f"{bucket}/l.nii.gz"]}, {"folders": [f"{bucket}/dir"]}):
        with pytest.raises(ParameterError, match="local folders only, not to s3"):
            check_outputs(**targets)  # type: ignore[arg-type]


def test_a_missing_bucket_is_told_before_any_work(bucket: str, scratch: Path) -> None:
    with (
        pytest.raises(UnreachableError, match=r"s3://nowhere/scan\.zarr .*no such bucket"),
        replacing("s3://nowhere/scan.zarr"),
    ):
        pass
    with pytest.raises(KptError):
        kpt_dask.open_volume("s3://nowhere/scan.zarr")
    assert list(scratch.iterdir()) == []


SCAN = np.random.default_rng(1).integers(-1000, 1000, (40, 40, 40)).astype(np.int16)


def kpt(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kpt_dask", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    nib.save(nib.Nifti1Image(SCAN, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def refused(scan: Path, **environment: str) -> str:
    process = kpt("convert", scan, "s3://bucket/scan.zarr", **environment)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, "")
    [sentence] = err.splitlines()
    assert sentence.startswith("kpt: s3://bucket/scan.zarr ")
    return sentence


def test_a_server_that_refuses_is_told(
    bucket: str, forbidding_server: str, scan: Path, scratch: Path
) -> None:
    said = refused(scan, AWS_ENDPOINT_URL=forbidding_server)
    assert "is refused by its server" in said
    assert list(scratch.iterdir()) == []


def test_a_network_without_a_server_is_told(bucket: str, scan: Path, scratch: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        said = refused(scan, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free.getsockname()[1]}")
    assert "cannot be reached" in said
    assert "check the network" in said
    assert list(scratch.iterdir()) == []


def test_without_credentials_it_is_told(bucket: str, scan: Path, scratch: Path) -> None:
    nobody = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(scratch)}
    said = refused(scan, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="", **nobody)
    assert "credentials" in said


MANY = """
import sys
from pathlib import Path
from kpt_dask.output.commit import replacing
with replacing(sys.argv[1]) as path:
    for name in ("zarr.json", *(f"0/c/{i}" for i in range(400))):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(Path(sys.argv[2]).read_bytes())
"""


def test_a_killed_upload_opens_as_nothing_and_the_next_run_takes_its_place(
    url: str, scan: Path, scratch: Path, tmp_path: Path
) -> None:
    (tmp_path / "root").write_bytes(OURS)
    command = [sys.executable, "-c", MANY, url, str(tmp_path / "root")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment) as process:
        objects = Objects.at(url)
        while process.poll() is None and "0" not in objects.names(""):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = there(url)
    assert CLAIM in left
    assert 1 < len(left) < 401
    assert "zarr.json" not in left
    assert len(list(scratch.iterdir())) == 2
    for path in (url, Remote(url)):
        with pytest.raises(ScanNotFoundError, match="does not exist"):
            kpt_dask.open_volume(path)
    with pytest.raises(ScanNotFoundError):
        kpt_dask.open_scan(url)
    with pytest.raises(ScanNotFoundError):
        kpt_dask.export(url, tmp_path / "labels.nii.gz")
    volume = kpt_dask.convert(kpt_dask.open_scan(scan), url)
    local = kpt_dask.convert(kpt_dask.open_scan(scan), tmp_path / "local.zarr")
    assert there(url) == {
        file.relative_to(tmp_path / "local.zarr").as_posix(): file.read_bytes()
        for file in (tmp_path / "local.zarr").rglob("*")
        if file.is_file()
    }
    np.testing.assert_array_equal(volume.levels[0][...], local.levels[0][...])
    assert list(scratch.iterdir()) == []


def test_an_interrupted_upload_leaves_nothing(url: str, scratch: Path, tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(OURS)
    command = [sys.executable, "-c", MANY, url, str(tmp_path / "root")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        objects = Objects.at(url)
        while process.poll() is None and "0" not in objects.names(""):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    assert process.returncode not in (0, None)
    assert there(url) == {}
    assert list(scratch.iterdir()) == []
