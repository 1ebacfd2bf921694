"""Bad input gets one clear sentence and a non-zero exit, and leaves nothing half-written."""

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from atlas_store import AtlasStore, load_organs
from kpt_dask.atlases.add import store_parameters
from kpt_dask.cli.main import kpt

SHAPE = (20, 18, 16)


def listing(folder: Path) -> dict[str, bytes]:
    """Give the names of all folders and files, and the content of the files."""
    paths = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


def refused(folder: Path, *arguments: object) -> str:
    """Run a command that must be refused and leave the folder as it was; give its sentence."""
    before = listing(folder)
    result = CliRunner().invoke(kpt, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert listing(folder) == before
    [sentence] = result.stderr.splitlines()
    assert sentence.startswith("kpt: ")
    assert sentence.endswith(".")
    return sentence


def save(
    path: Path, values: NDArray[np.generic], affine: NDArray[np.float64] | None = None
) -> None:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) * 4 if affine is None else affine), path)


def ct(shape: tuple[int, ...] = SHAPE) -> NDArray[np.int16]:
    return np.random.default_rng(0).normal(0, 100, shape).astype(np.int16)


def no_nifti(path: Path) -> None:
    path.write_bytes(gzip.compress(b"A letter to my aunt." * 100))


def truncated_gzip(path: Path) -> None:
    save(path, ct())
    path.write_bytes(path.read_bytes()[:-500])


def two_dimensions(path: Path) -> None:
    save(path, ct(SHAPE[:2]))


def four_dimensions(path: Path) -> None:
    save(path, ct((*SHAPE, 3)))


def not_a_number(path: Path) -> None:
    values = ct().astype(np.float32)
    values[3, 4, 5] = np.nan
    save(path, values)


def infinite(path: Path) -> None:
    values = ct().astype(np.float32)
    values[-1, -1, -1] = np.inf
    save(path, values)


def zero_spacing(path: Path) -> None:
    save(path, ct())
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[84:88] = np.float32(0).tobytes()  # pixdim[2]
    data[296:300] = data[300:304] = np.float32(0).tobytes()  # srow_y
    path.write_bytes(gzip.compress(bytes(data)))


def missing(path: Path) -> None:
    path.unlink(missing_ok=True)


def folder(path: Path) -> None:
    path.mkdir()


BAD_SCANS = [
    (no_nifti, "scan.nii.gz"),
    (truncated_gzip, "truncated"),
    (two_dimensions, "3-D|2-D|dimension"),
    (four_dimensions, "3-D|4-D|dimension"),
    (not_a_number, "NaN"),
    (infinite, "infinite"),
    (zero_spacing, "scan.nii.gz"),
    (missing, "does not exist"),
    (folder, "is a folder"),
]
bad_scans = pytest.mark.parametrize(
    ("spoil", "message"), BAD_SCANS, ids=[spoil.__name__ for spoil, _ in BAD_SCANS]
)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A store without atlases, at 4 mm."""
    path = tmp_path / "empty"
    AtlasStore.create(path, load_organs("visceral"), store_parameters(4.0))
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A good scan."""
    save(tmp_path / "good.nii.gz", ct())
    return tmp_path / "good.nii.gz"


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A good label map of it."""
    save(tmp_path / "labels.nii.gz", (ct() > 0).astype(np.uint8))
    return tmp_path / "labels.nii.gz"


def matches(sentence: str, message: str) -> bool:
    return any(part in sentence for part in message.split("|"))


@bad_scans
def test_convert_refuses_a_bad_scan(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    bad = tmp_path / "scan.nii.gz"
    spoil(bad)
    sentence = refused(tmp_path, "convert", bad, tmp_path / "scan.zarr")
    assert str(bad) in sentence
    assert matches(sentence, message)


@bad_scans
def test_segment_refuses_a_bad_scan(
    tmp_path: Path, body_store: AtlasStore, spoil: Callable[[Path], None], message: str
) -> None:
    bad = tmp_path / "scan.nii.gz"
    spoil(bad)
    outputs = tmp_path / "out.zarr", "--labels", tmp_path / "out.nii.gz"
    sentence = refused(tmp_path, "segment", bad, body_store.url, *outputs)
    assert str(bad) in sentence
    assert matches(sentence, message)


@bad_scans
def test_the_store_refuses_a_bad_scan(
    tmp_path: Path, empty: Path, labels: Path, spoil: Callable[[Path], None], message: str
) -> None:
    bad = tmp_path / "scan.nii.gz"
    spoil(bad)
    sentence = refused(tmp_path, "atlas", "add", empty, bad, labels)
    assert str(bad) in sentence
    assert matches(sentence, message)


@bad_scans
def test_the_store_refuses_a_bad_label_map(
    tmp_path: Path, empty: Path, scan: Path, spoil: Callable[[Path], None], message: str
) -> None:
    bad = tmp_path / "scan.nii.gz"
    spoil(bad)
    sentence = refused(tmp_path, "atlas", "add", empty, scan, bad)
    assert str(bad) in sentence
    assert matches(sentence, message) or spoil in (not_a_number, infinite)


def test_labels_must_be_those_of_the_scan(tmp_path: Path, empty: Path, scan: Path) -> None:
    values = (ct() > 0).astype(np.uint8)
    bad = tmp_path / "bad.nii.gz"
    turned = np.eye(4) * 4
    turned[0, 0] = -4
    for name, affine, other in (
        ("moved", np.eye(4) * 4 + np.diag([0, 0, 0], 1), values[1:]),
        ("turned", turned, values),
    ):
        save(bad, other, affine)
        sentence = refused(tmp_path, "atlas", "add", empty, scan, bad)
        assert f"{bad} does not lie on the grid of {scan}" in sentence, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.where(ct() > 0, 11, 1).astype(np.uint8), "does not know: 11"),
        (np.where(ct() > 0, 300, 99).astype(np.uint16), "does not know: 99, 300"),
        (np.zeros(SHAPE, np.uint8), "holds no label"),
        (np.full(SHAPE, 0.5, np.float32), "no label map"),
        (np.full(SHAPE, -1, np.int16), "no label map"),
    ],
    ids=["unknown", "more unknown", "empty", "fractions", "negative"],
)
def test_labels_must_be_in_the_organ_table(
    tmp_path: Path, empty: Path, scan: Path, values: NDArray[np.generic], message: str
) -> None:
    save(tmp_path / "bad.nii.gz", values)
    sentence = refused(tmp_path, "atlas", "add", empty, scan, tmp_path / "bad.nii.gz")
    assert str(tmp_path / "bad.nii.gz") in sentence
    assert message in sentence


def test_an_id_must_be_usable(tmp_path: Path, empty: Path, scan: Path, labels: Path) -> None:
    sentence = refused(tmp_path, "atlas", "add", empty, scan, labels, "--id", "../mine")
    assert "'../mine' cannot be the id" in sentence
    sentence = refused(tmp_path, "atlas", "add", empty, scan, labels, "--annotated", "livr")
    assert "no organ 'livr'" in sentence


def test_an_empty_store_segments_nothing(tmp_path: Path, empty: Path, scan: Path) -> None:
    assert "has no atlas" in refused(tmp_path, "segment", scan, empty, tmp_path / "out.zarr")
    assert "has no atlas" in refused(tmp_path, "evaluate", empty)


def test_without_its_only_atlas_a_store_is_empty(
    tmp_path: Path, body_store: AtlasStore, scan: Path
) -> None:
    arguments = ("segment", scan, body_store.url, tmp_path / "out.zarr")
    excluded = [part for name in body_store for part in ("--exclude", name)]
    assert "has no atlas to use" in refused(tmp_path, *arguments, *excluded)
    assert "no atlas nobody" in refused(tmp_path, *arguments, "--exclude", "nobody")


@pytest.mark.parametrize("command", ["segment", "evaluate"])
def test_a_mode_must_be_known(
    tmp_path: Path, body_store: AtlasStore, scan: Path, command: str
) -> None:
    arguments = [scan, body_store.url, tmp_path / "out.zarr"]
    arguments = arguments if command == "segment" else [body_store.url]
    sentence = refused(tmp_path, command, *arguments, "--mode", "magic")
    assert "mode 'magic' is unknown; use local" in sentence


def test_an_output_is_not_overwritten_unasked(
    tmp_path: Path, body_store: AtlasStore, scan: Path
) -> None:
    there = tmp_path / "there.zarr"
    there.mkdir()
    (there / "thesis.txt").write_text("years of work")
    assert f"{there} exists" in refused(tmp_path, "convert", scan, there)
    assert f"{there} exists" in refused(tmp_path, "segment", scan, body_store.url, there)
    labels = tmp_path / "labels.nii.gz"
    labels.write_bytes(b"drawn by hand")
    out = ("segment", scan, body_store.url, tmp_path / "new.zarr", "--labels", labels)
    assert f"{labels} exists" in refused(tmp_path, *out)


def test_an_old_output_outlives_a_failed_overwrite(tmp_path: Path, body_store: AtlasStore) -> None:
    bad, there = tmp_path / "scan.nii.gz", tmp_path / "there.zarr"
    truncated_gzip(bad)
    there.mkdir()
    (there / "zarr.json").write_text('{"attributes": {"encoding-type": "kpt-volume"}}')
    refused(tmp_path, "convert", bad, there, "--overwrite")
    refused(tmp_path, "segment", bad, body_store.url, there, "--overwrite")


def test_labels_need_a_known_ending(tmp_path: Path, body_store: AtlasStore, scan: Path) -> None:
    out = ("segment", scan, body_store.url, tmp_path / "out.zarr")
    sentence = refused(tmp_path, *out, "--labels", tmp_path / "labels.png")
    assert "labels.png has an unknown extension" in sentence


@pytest.mark.parametrize("spacing", ["0", "-2", "nan", "inf"])
def test_a_spacing_must_be_positive(tmp_path: Path, scan: Path, spacing: str) -> None:
    out = tmp_path / "out"
    assert "spacing" in refused(tmp_path, "convert", scan, out, f"--spacing={spacing}")
    assert "spacing" in refused(tmp_path, "atlas", "create", out, f"--spacing={spacing}")


def test_a_store_must_be_one(tmp_path: Path, scan: Path) -> None:
    nothing = tmp_path / "nothing"
    for command in ("list", "info", "verify"):
        assert "holds no atlas store" in refused(tmp_path, "atlas", command, nothing)
    assert "no atlas store" in refused(tmp_path, "segment", scan, tmp_path, tmp_path / "out.zarr")
    assert "exists already" in refused(tmp_path, "atlas", "create", tmp_path)
    assert "no folder" in refused(tmp_path, "evaluate", _copy(tmp_path), "--scans", nothing)


def _copy(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    AtlasStore.create(path, load_organs("visceral"), store_parameters(4.0))
    return path


def test_an_organ_table_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[[organ]]\nname = 'liver'\n")
    out = tmp_path / "out"
    for table, message in (("nowhere", "does not exist"), (tmp_path / "bad.toml", "bad.toml")):
        assert message in refused(tmp_path, "atlas", "create", out, "--organs", table)


def test_a_scheduler_must_answer(tmp_path: Path, scan: Path) -> None:
    (tmp_path / "scheduler.json").write_text("{}")
    arguments = ("convert", scan, tmp_path / "out.zarr", "--scheduler")
    assert "scheduler" in refused(tmp_path, *arguments, tmp_path / "scheduler.json")


def test_a_full_or_forbidden_disk_is_told(tmp_path: Path, scan: Path) -> None:
    (tmp_path / "file").touch()
    sentence = refused(tmp_path, "convert", scan, tmp_path / "file" / "out.zarr")
    assert str(tmp_path / "file") in sentence


def test_the_real_program_says_it_too(tmp_path: Path) -> None:
    """As a process of its own: one line on standard error, no traceback, exit code 1."""
    truncated_gzip(tmp_path / "scan.nii.gz")
    command = [sys.executable, "-m", "kpt_dask", "convert", "scan.nii.gz", "out.zarr"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kpt: scan.nii.gz is truncated")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]
