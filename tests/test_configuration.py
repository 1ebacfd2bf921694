"""Whatever Zarr is configured to do, the same bytes come out."""

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zarr
from distributed import Client

from atlas_store import AtlasStore
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.resampling.labels_on_scan import Shares, labels_onto
from kpt_dask.scans.scan import open_scan
from kpt_dask.segmentation import segment
from kpt_dask.volumes.conversion import convert


@pytest.fixture
def fortran() -> Iterator[None]:
    """Zarr gives arrays in Fortran order, as ``ZARR_ARRAY__ORDER=F`` asks for."""
    with zarr.config.set({"array.order": "F"}):
        yield


def chunks(folder: Path) -> dict[str, bytes]:
    """Every chunk below a folder."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "zarr.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture
def oblique(bodies: Path, tmp_path: Path) -> Path:
    """A scan that lies along no axis of the world."""
    image = nib.load(bodies / "body_4_ct.nii.gz")
    turn = np.eye(4)
    turn[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    path = tmp_path / "oblique.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine), path)
    return path


@pytest.mark.parametrize("which", ["straight", "oblique"])
def test_a_volume_is_the_same_in_any_order(
    bodies: Path, oblique: Path, tmp_path: Path, one_process: Client, which: str
) -> None:
    scan = oblique if which == "oblique" else bodies / "body_4_ct.nii.gz"
    for order in ("C", "F"):
        with zarr.config.set({"array.order": order}):
            convert(open_scan(scan), tmp_path / order, spacing=4.0, client=one_process)
    assert chunks(tmp_path / "F") == chunks(tmp_path / "C")


@pytest.mark.usefixtures("fortran")
def test_an_atlas_is_the_same_in_any_order(
    bodies: Path, body_store: AtlasStore, tmp_path: Path, one_process: Client
) -> None:
    store = AtlasStore.create(tmp_path / "store", body_store.organs, store_parameters(4.0))
    scan, labels = (bodies / f"body_1_{what}.nii.gz" for what in ("ct", "seg"))
    add_atlas(store, scan, labels, atlas_id="body_1", client=one_process)
    [ours, theirs] = (chunks(Path(s.url) / s["body_1"].path) for s in (store, body_store))
    assert len(ours) > 10
    assert ours == theirs


@pytest.mark.parametrize("mode", ["local", "affine"])
def test_a_segmentation_is_the_same_in_any_order(
    bodies: Path, body_store: AtlasStore, tmp_path: Path, one_process: Client, mode: str
) -> None:
    written = []
    for order in ("C", "F"):
        labels = tmp_path / f"{order}.nii.gz"
        with zarr.config.set({"array.order": order}):
            found = segment(
                bodies / "body_4_ct.nii.gz",
                body_store,
                tmp_path / order,
                labels=labels,
                mode=mode,
                client=one_process,
            )
        written.append((chunks(found.path), np.asarray(nib.load(labels).dataobj).tobytes()))
    assert written[0] == written[1]


def test_probabilities_may_lie_in_any_order(bodies: Path) -> None:
    target = open_scan(bodies / "body_4_ct.nii.gz").grid
    grid = target.working(8.0)
    share = np.random.default_rng(0).random((2, *grid.shape), np.float32)
    maps = [
        np.concatenate(list(labels_onto(Shares(given, (1, 2), 0.5, grid), target)))
        for given in (share, np.asfortranarray(share))
    ]
    assert maps[0].any()
    np.testing.assert_array_equal(*maps)
