"""OME-Zarr images at URLs: of a web server, and of an object store."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from kpt_dask.cli.main import kpt
from kpt_dask.errors import KptError, ScanFormatError, ScanNotFoundError
from kpt_dask.remote import scheme_of
from kpt_dask.scans.scan import open_scan
from tests.scans.formats import omezarr
from tests.scans.test_contract import AFFINE, VALUES


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Give a folder and the URL under which a web server shows it."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_image_on_a_web_server_is_read(version: str, served: tuple[Path, str]) -> None:
    folder, url = served
    omezarr(version)(folder / "ct.zarr", VALUES, AFFINE)
    scan = open_scan(f"{url}/ct.zarr")
    np.testing.assert_array_equal(np.concatenate(list(scan.slabs())), VALUES)
    assert scan.grid.same_as(open_scan(folder / "ct.zarr").grid, 1e-9)
    assert scan.path.name == "ct.zarr"


def test_an_output_of_the_program_is_read_whole_or_not_at_all(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = served
    omezarr("0.5")(tmp_path / "ct.zarr", np.tile(VALUES, (4, 4, 4)), AFFINE)

    def convert(source: object, target: Path, code: int = 0) -> str:
        command = ["convert", str(source), str(target), "--spacing", "2"]
        result = CliRunner().invoke(kpt, command)
        assert result.exit_code == code, result.output
        return result.stderr

    convert(tmp_path / "ct.zarr", folder / "first.zarr")
    convert(f"{url}/first.zarr", tmp_path / "second.zarr")
    first, second = (
        np.concatenate(list(open_scan(path).slabs()))
        for path in (folder / "first.zarr", tmp_path / "second.zarr")
    )
    np.testing.assert_array_equal(first, second)
    next(part for part in (folder / "first.zarr" / "0" / "c").rglob("*") if part.is_file()).unlink()
    [sentence] = convert(f"{url}/first.zarr", tmp_path / "third.zarr", code=1).splitlines()
    assert "lacks 0/c/" in sentence
    assert not (tmp_path / "third.zarr").exists()


def test_what_is_not_there_is_told_with_its_url(served: tuple[Path, str]) -> None:
    folder, url = served
    (folder / "page.html").write_text("<html>")
    for place in ("none.zarr", "page.html"):
        with pytest.raises(ScanNotFoundError) as caught:
            open_scan(f"{url}/{place}")
        assert f"{url}/{place}" in str(caught.value)
    with pytest.raises(KptError, match=r"127\.0\.0\.1:9"):
        open_scan("http://127.0.0.1:9/ct.zarr")


def test_other_urls_are_no_scans(tmp_path: Path) -> None:
    with pytest.raises(ScanFormatError, match=r"ftp://host/ct\.zarr cannot be read"):
        open_scan("ftp://host/ct.zarr")
    omezarr("0.5")(tmp_path / "ct.zarr", VALUES, AFFINE)
    assert open_scan(f"file://{tmp_path}/ct.zarr").grid.shape == VALUES.shape
    assert scheme_of("C:/scans/ct.nii") is None
    assert scheme_of("scans/a:b") is None


def test_an_image_in_an_object_store_is_read(
    bucket: str,
    tmp_path: Path,
) -> None:
    import s3fs

    omezarr("0.5")(tmp_path / "ct.zarr", VALUES, AFFINE)
    url = f"{bucket}/scans/ct.zarr"
    s3fs.S3FileSystem().put(str(tmp_path / "ct.zarr"), url, recursive=True)
    scan = open_scan(url)
    np.testing.assert_array_equal(np.concatenate(list(scan.slabs())), VALUES)
    with pytest.raises(ScanNotFoundError, match="nowhere"):
        open_scan(f"{bucket}/nowhere.zarr")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("localhost:9000", "AWS_ENDPOINT_URL must begin with http://"),
        ("http://127.0.0.1:9", "s3://bucket/scan.zarr cannot be reached ("),
    ],
)
def test_a_bucket_that_cannot_be_reached_is_told_in_one_sentence(
    tmp_path: Path, address: str, told: str
) -> None:
    # A process of its own: clients of object stores outlive what they were made from, and what
    # they leave is told when it ends.
    environment = {"AWS_ENDPOINT_URL": address, "AWS_MAX_ATTEMPTS": "2"}
    secrets = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
    done = subprocess.run(
        [sys.executable, "-m", "kpt_dask", "convert", "s3://bucket/scan.zarr", "out.zarr"],
        cwd=tmp_path,
        env=os.environ | environment | secrets,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    [sentence] = done.stderr.splitlines()
    assert told in sentence
