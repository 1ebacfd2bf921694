"""Where outputs may go; what is the user's is never replaced."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kpt_dask.errors import KptError, OutputExistsError, ParameterError
from kpt_dask.output.contents import OWN, STORE, encoding_of
from kpt_dask.output.places import check_outputs, printable, target_of
from kpt_dask.volumes import volume

ROOT = os.geteuid() == 0


def folder(path: Path, kind: str, *entries: str) -> Path:
    path.mkdir(parents=True)
    (path / "zarr.json").write_text(json.dumps({"attributes": {"encoding-type": kind}}))
    for entry in entries:
        (path / entry).mkdir(parents=True)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of a user: scan, store, an old output, a thesis."""
    mine = tmp_path / "mine"
    folder(mine / "atlases", STORE, "atlases/ph1/image")
    folder(mine / "old.zarr", "kpt-volume", "0", "labels/organs", "probability")
    (mine / "scan.nii.gz").write_bytes(b"a scan")
    (mine / "thesis.txt").write_bytes(b"years of work")
    (mine / "link").symlink_to(mine)
    return mine


def test_the_encodings_are_those_that_are_written() -> None:
    assert {volume.ENCODING_TYPE} == OWN


@pytest.mark.parametrize(
    ("out", "labels", "message"),
    [
        ("atlases", None, "is .*atlases, which is read"),
        ("link/atlases", None, "is .*atlases, which is read"),
        ("atlases/new.zarr", None, "lies in .*atlases, which is read"),
        (".", None, "contains .*scan.nii.gz, which is read"),
        ("../", None, "contains"),
        ("new.zarr", "scan.nii.gz", "is .*scan.nii.gz, which is read"),
        ("new.zarr", "hard.nii.gz", "is .*scan.nii.gz, which is read"),
        ("new.zarr", "soft.nii.gz", "is .*scan.nii.gz, which is read"),
        ("scan.nii.gz/new.zarr", None, "lies in"),
        ("new.zarr", "new.zarr/labels.nii.gz", "lies in .*new.zarr, which is written too"),
        ("new.zarr", "link/new.zarr/labels.nii.gz", "lies in .*, which is written too"),
        ("new.nii.gz", "new.nii.gz", "is .*, which is written too"),
        ("labels.nii.gz/new.zarr", "labels.nii.gz", "contains .*, which is written too"),
        ("s3://bucket/new.zarr", None, "local folders only, not to s3"),
        ("new.zarr", "https://host/l.nii.gz", "local folders only, not to https"),
        ("", None, "needs a path"),
        ("loop", None, "leads back to itself"),
        ("x" * 256, None, "name too long"),
    ],
)
def test_outputs_that_meet_inputs_are_refused(
    data: Path, out: str, labels: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.link(data / "scan.nii.gz", data / "hard.nii.gz")
    (data / "soft.nii.gz").symlink_to("scan.nii.gz")
    (data / "loop").symlink_to("loop")
    monkeypatch.chdir(data)
    files = [] if labels is None else [labels]
    inputs = ["scan.nii.gz", f"file://{data}/atlases", "s3://bucket/atlases"]
    before = sorted(os.listdir(data))
    with pytest.raises(ParameterError, match=f"(?i){message}") as caught:
        check_outputs(folders=[out], files=files, inputs=inputs, overwrite=True)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert sorted(os.listdir(data)) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda old: (old / "thesis.txt").touch(), "thesis.txt in it"),
        (lambda old: (old / "labels" / "corrected").mkdir(), "labels/corrected in it"),
        (lambda old: (old / "zarr.json").write_text("{}"), "does not say"),
        (lambda old: (old / "zarr.json").write_text("[" * 100_000), "does not say"),
        (lambda old: (old / "zarr.json").unlink(), "does not say"),
    ],
    ids=["thesis", "labels", "nothing", "nested", "gone"],
)
def test_only_what_is_ours_alone_is_replaced(
    data: Path, spoil: Callable[[Path], object], message: str
) -> None:
    out = data / "old.zarr"
    with pytest.raises(OutputExistsError, match="exists already"):
        check_outputs(folders=[out])
    assert check_outputs(folders=[out], overwrite=True) == [out]
    spoil(out)
    with pytest.raises(OutputExistsError, match=message):
        check_outputs(folders=[out], overwrite=True)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("files", "atlases"), ("folders", "thesis.txt"), ("files", "fifo"), ("folders", "fifo")],
)
def test_a_file_is_no_folder(data: Path, kind: str, name: str) -> None:
    os.mkfifo(data / "fifo")
    targets = {kind: [data / name]}
    with pytest.raises(KptError, match=r"exists and is|no regular file|an atlas store"):
        check_outputs(**targets, overwrite=True)  # type: ignore[arg-type]


def test_nothing_is_written_in_a_store_that_is_not_read(data: Path) -> None:
    image = folder(data / "atlases/atlases/ph1/image/old.zarr", "kpt-volume")
    with pytest.raises(ParameterError, match="which is an atlas store"):
        check_outputs(folders=[image], overwrite=True)


@pytest.mark.parametrize("kind", ["files", "images"])
def test_nothing_is_written_into_an_output(data: Path, kind: str) -> None:
    """It would go with it, when that is replaced."""
    folder(data / "first.zarr", "kpt-volume")
    with pytest.raises(ParameterError, match=r"lies in .*first\.zarr, an output of kpt"):
        check_outputs(**{kind: [data / "first.zarr" / "labels" / "mine"]})  # type: ignore[arg-type]


def test_a_file_on_the_way_is_no_folder(data: Path) -> None:
    with pytest.raises(ParameterError, match=r"thesis\.txt is no folder"):
        check_outputs(files=[data / "thesis.txt" / "deep" / "l.nii.gz"])


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_forbidden_place_is_refused(data: Path) -> None:
    (data / "kept").mkdir(mode=0o555)
    with pytest.raises(ParameterError, match="kept does not allow it"):
        check_outputs(files=[data / "kept" / "deep" / "l.nii.gz"])


def test_links_are_followed_and_homes_found(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(data))
    monkeypatch.chdir(data)
    (data / "dangling").symlink_to("nowhere")
    assert target_of("~/o.zarr") == data / "o.zarr"
    assert target_of(f"file://{data}/o.zarr") == data / "o.zarr"
    assert target_of("dangling") == data / "nowhere"
    assert target_of("link/old.zarr/") == data / "old.zarr"
    assert target_of("./~/o") == data / "~" / "o"


def test_names_that_are_no_utf8_are_printed() -> None:
    name = os.fsdecode(b"M\xfcller\xc3\xbc.zarr")
    assert printable(name) == "M�llerü.zarr"
    assert encoding_of(Path(name)) is None
