"""An output in an object store: made, read and shown as one on disk, by the command line."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from distributed import Client

import kpt_dask
from atlas_store import AtlasStore
from atlas_store.errors import MissingChunkError
from atlas_store.storage.objects import Objects
from kpt_dask.cli.main import kpt
from kpt_dask.napari_plugin.reader import get_reader
from kpt_dask.output.object_store import SCRATCH


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(kpt, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def files(folder: Path) -> Mapping[str, bytes]:
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def objects(url: str) -> Mapping[str, bytes | None]:
    parent, _, name = url.rpartition("/")
    return {key: Objects.at(url).read(key) for key in Objects.at(parent).keys(name)}


def test_a_segmentation_in_a_bucket_is_that_on_disk(
    bucket: str,
    bodies: Path,
    body_store: AtlasStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    url = f"{bucket}/cases/body.zarr"
    command = ["segment", bodies / "body_4_ct.nii.gz", body_store.url, "--mode", "organ"]
    run(*command, tmp_path / "local.zarr", "--labels", tmp_path / "local.nii.gz")
    said = run(*command, url, "--labels", "far.nii.gz", "--report", "far.html", "--json")
    assert json.loads(said.stdout)["path"] == url
    local, far = files(tmp_path / "local.zarr"), objects(url)
    assert far == local
    assert (tmp_path / "far.nii.gz").read_bytes() == (tmp_path / "local.nii.gz").read_bytes()
    assert not any((tmp_path / "scratch").iterdir())

    run("export", url, "again.nii.gz", "few.seg.nrrd", "--organs", "liver")
    run("export", tmp_path / "local.zarr", "l.nii.gz", "l.seg.nrrd", "--organs", "liver")
    for one, two in (("again.nii.gz", "l.nii.gz"), ("few.seg.nrrd", "l.seg.nrrd")):
        assert (tmp_path / one).read_bytes() == (tmp_path / two).read_bytes()
    run("report", url, "--picture", "far.png")
    run("report", tmp_path / "local.zarr", "--picture", "local.png")
    assert (tmp_path / "far.png").read_bytes() == (tmp_path / "local.png").read_bytes()
    run("report", url)
    assert (tmp_path / "body.html").stat().st_size > 1000

    np.testing.assert_array_equal(
        kpt_dask.open_probability(url), kpt_dask.open_probability(tmp_path / "local.zarr")
    )
    [sentence] = run(*command, url, code=1).stderr.splitlines()
    assert sentence == f"kpt: {url} exists already; choose another name or overwrite it."
    assert objects(url) == far

    read = get_reader(url)
    assert read is not None
    for one, two in zip(read(url), read(str(tmp_path / "local.zarr")), strict=True):
        assert one[2] == two[2]
        first, second = (data if kind == "points" else data[0] for data, _, kind in (one, two))
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert get_reader(f"{bucket}/nothing.zarr") is None
    assert get_reader("s3://no-such-bucket/nothing.zarr") is None

    lost = min(key for key in far if key.startswith("probability/"))
    assert "zarr.json" not in lost
    probability = kpt_dask.open_probability(url)
    Objects.at(url).delete(lost)
    with pytest.raises(MissingChunkError, match=lost):
        probability.sum().compute()
    [sentence] = run("export", url, "lost.nii.gz", code=1).stderr.splitlines()
    assert lost in sentence
    assert not (tmp_path / "lost.nii.gz").exists()
    run(*command, url, "--overwrite")
    assert objects(url) == local


def test_workers_write_to_the_scratch(
    bucket: str,
    bodies: Path,
    body_store: AtlasStore,
    two_processes: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    url = f"{bucket}/cluster/body.zarr"
    scheduler = two_processes.scheduler.address
    command = ["segment", bodies / "body_4_ct.nii.gz", body_store.url]
    run(*command, url, "--scheduler", scheduler, "--mode", "organ")
    run(*command, tmp_path / "local.zarr", "--mode", "organ")
    far, local = objects(url), files(tmp_path / "local.zarr")
    assert far == local
