"""What a scanner did not see makes no keypoints, on a real scan."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import xarray as xr
from distributed import Client

from kpt_dask.grid import Grid
from kpt_dask.keypoints.extraction import extract
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert
from kpt_dask.volumes.volume import Volume

RADIUS = 132.0
"""Of the field of view, mm: part of the body is outside."""


@pytest.fixture(scope="module")
def trunk(openkbp: Path) -> nib.Nifti1Image:
    """An abdomen at 3 mm."""
    return nib.load(openkbp.parent / "trunk_example" / "ct.nii.gz")


def converted(folder: Path, values: np.ndarray, affine: np.ndarray, client: Client) -> Volume:
    path = folder / "ct.nii.gz"
    nib.save(nib.Nifti1Image(values.astype(np.int16), affine), path)
    return convert(open_scan(path), folder / "ct.zarr", spacing=4.0, overwrite=True, client=client)


def from_axis(at: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How far voxels of the file (i, j, k) are from the middle of their slice, mm."""
    return 3 * np.hypot(*(at[a] - (shape[a] - 1) / 2 for a in (0, 1)))


@pytest.fixture(scope="module")
def in_air(
    trunk: nib.Nifti1Image, tmp_path_factory: pytest.TempPathFactory, one_process: Client
) -> xr.Dataset:
    """Keypoints where everything outside a circular field of view is air."""
    values = np.asarray(trunk.dataobj)
    outside = from_axis(np.indices(values.shape), values.shape) > RADIUS
    air = np.where(outside, -1000, values)
    volume = converted(tmp_path_factory.mktemp("air"), air, trunk.affine, one_process)
    return extract(volume, client=one_process)


@pytest.mark.parametrize("padding", [-1024, -2000, -3024, -32768])
def test_padding_is_as_good_as_air(
    trunk: nib.Nifti1Image, in_air: xr.Dataset, tmp_path: Path, one_process: Client, padding: int
) -> None:
    values = np.asarray(trunk.dataobj)
    outside = from_axis(np.indices(values.shape), values.shape) > RADIUS
    padded = converted(tmp_path, np.where(outside, padding, values), trunk.affine, one_process)
    assert in_air.sizes["keypoint"] > 50
    assert extract(padded, client=one_process).identical(in_air)


def test_the_edge_of_the_padding_attracts_no_keypoints(
    trunk: nib.Nifti1Image, in_air: xr.Dataset, tmp_path: Path, one_process: Client
) -> None:
    """No more lie there than in the whole scan, at the same distance from its axis."""
    whole = converted(tmp_path, np.asarray(trunk.dataobj), trunk.affine, one_process)
    on_edge = []
    for found in (extract(whole, client=one_process), in_air):
        at = whole.source_grid.to_index(found.position.values)[:, ::-1]
        away = from_axis(at.T, trunk.shape) - RADIUS
        on_edge.append(int((np.abs(away) <= found.scale.values).sum()))
    print(f"{on_edge[1]} keypoints within σ of the padding's edge, {on_edge[0]} in the whole scan")
    assert on_edge[1] <= on_edge[0]


@pytest.mark.parametrize("padding", [-1000, -3024])
def test_a_table_alone_is_nothing(tmp_path: Path, one_process: Client, padding: int) -> None:
    """A hollow plate in air, as long as the scan, whose sides the field of view cuts off."""
    shape = 110, 110, 60
    at = np.indices(shape)
    values = np.full(shape, -1000)
    height = np.abs(at[1] - 20)
    values[height <= 4] = 150
    values[height <= 3] = -850
    values[from_axis(at, shape) > RADIUS] = padding
    volume = converted(tmp_path, values, np.diag([3.0, 3.0, 3.0, 1.0]), one_process)
    assert np.ptp(volume.levels[0][20]) > 500
    assert extract(volume, client=one_process).sizes["keypoint"] == 0


def test_nothing_is_found_where_an_oblique_scan_saw_nothing(
    trunk: nib.Nifti1Image, tmp_path: Path, one_process: Client
) -> None:
    """In the corners of its bounding box, where its outermost voxels are repeated."""
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    volume = converted(tmp_path, np.asarray(trunk.dataobj), turn @ trunk.affine, one_process)
    found = extract(volume, client=one_process)
    source: Grid = volume.source_grid
    at = source.to_index(found.position.values)
    assert found.sizes["keypoint"] > 100
    assert (at >= -0.5 - 1e-3).all()
    assert (at <= np.array(source.shape) - 0.5 + 1e-3).all()
    corners = source.to_index(volume.grid.to_mm(np.indices(volume.grid.shape).reshape(3, -1).T))
    unseen = ((corners < -1) | (corners > np.array(source.shape))).any(axis=1)
    assert unseen.mean() > 0.2
