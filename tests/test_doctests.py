"""The examples of the public names run, in a folder with four phantoms and a store of three."""

import doctest
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import atlas_store
import kpt_dask
from atlas_store import AtlasStore

PUBLIC = [(package, name) for package in (atlas_store, kpt_dask) for name in package.__all__]


@pytest.fixture(scope="session")
def example_folder(
    bodies: Path,
    body_store: AtlasStore,
    one_process: Client,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Scans body_1 to body_4, one of them in ``scans``, ``atlases``, and the segmented body_4."""
    folder = tmp_path_factory.mktemp("examples")
    for scan in bodies.glob("body_?_*.nii.gz"):
        shutil.copy(scan, folder)
    (folder / "scans").mkdir()
    for scan in bodies.glob("body_2_*.nii.gz"):
        shutil.copy(scan, folder / "scans")
    shutil.copytree(body_store.url, folder / "atlases")
    kpt_dask.segment(
        folder / "body_4_ct.nii.gz",
        folder / "atlases",
        folder / "body_4.zarr",
        mode="affine",
        client=one_process,
    )
    return folder


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_examples_of_public_names_run(
    package: Any, name: str, example_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(example_folder)
    public = getattr(package, name)
    module = sys.modules[public.__module__]
    [test] = doctest.DocTestFinder(recurse=False).find(public, name, module, globs={})
    assert test.examples, "no example"
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
