"""Nothing is labelled where an oblique scan shows nothing."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from atlas_store import AtlasStore
from kpt_dask.grid import Grid
from kpt_dask.options import MODES
from kpt_dask.organ_transfer.field_of_view import FieldOfView
from kpt_dask.segmentation import segment


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_depth_is_the_distance_from_the_nearest_face(seed: int) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    shear = np.eye(3)
    shear[1, 0] = rng.uniform(-0.3, 0.3)
    affine[:3, :3] = Rotation.random(rng=rng).as_matrix() @ shear @ np.diag(rng.uniform(1, 4, 3))
    affine[:3, 3] = rng.uniform(-9, 9, 3)
    scan = Grid((5, 6, 7), affine)
    working = scan.working(2.0)
    box = tuple((int(a), int(a + rng.integers(1, 9))) for a in rng.integers(-3, 3, 3))
    depth = FieldOfView(working, scan).depth(box)
    corners = scan.to_mm(scan._corners())
    assert depth.shape == tuple(b - a for a, b in box)
    for at in np.ndindex(depth.shape):
        point = working.to_mm(np.array(at) + [a for a, _ in box])
        distances = []
        for axis in range(3):
            others = [scan.affine[:3, a] for a in range(3) if a != axis]
            normal = np.cross(*others)
            normal /= np.linalg.norm(normal)
            ends = np.sort(corners @ normal)[[0, -1]]
            distances += [point @ normal - ends[0], ends[1] - point @ normal]
        assert depth[at] == pytest.approx(min(distances), abs=1e-4)


@pytest.fixture(scope="module")
def slab(bodies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of slices that lean by 20°, and that cuts through organs."""
    image = nib.load(bodies / "body_4_ct.nii.gz")
    values = np.asarray(image.dataobj, np.float32)
    step = Rotation.from_euler("x", 20, degrees=True).as_matrix() * 4.0
    shape = 60, 40, 40
    middle = image.affine[:3] @ [*(np.array(values.shape) / 2), 1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = step, middle - step @ (np.array(shape) / 2)
    index = np.indices(shape).reshape(3, -1)
    at = np.linalg.inv(image.affine) @ affine @ np.vstack([index, np.ones(index.shape[1])])
    ct = map_coordinates(values, at[:3], order=1, cval=-1000).reshape(shape)
    path: Path = tmp_path_factory.mktemp("slab") / "ct.nii.gz"
    nib.save(nib.Nifti1Image(np.rint(ct).astype(np.int16), affine), path)
    return path


@pytest.mark.parametrize("mode", MODES)
def test_organs_lie_in_the_scan(
    slab: Path, body_store: AtlasStore, tmp_path: Path, mode: str
) -> None:
    labels = tmp_path / "organs.nii.gz"
    whole = segment(slab, body_store, tmp_path / "a.zarr", mode=mode)
    on_scan = segment(slab, body_store, tmp_path / "b.zarr", mode=mode, labels=labels)
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")
    about = json.loads(json.dumps(group.attrs["kpt"]))["source"]
    scan = Grid(tuple(about["shape"]), np.array(about["affine"]))
    working = scan.working(4.0)
    found = np.argwhere(np.asarray(group["labels/organs/0"][...]) > 0)  # type: ignore[index]
    assert len(found) > 1000
    index = scan.to_index(working.to_mm(found))
    assert (index >= -0.5 - 1e-6).all()
    assert (index <= np.array(scan.shape) - 0.5 + 1e-6).all()
    image = np.asarray(nib.load(labels).dataobj)
    rim = np.ones(image.shape, bool)
    rim[1:-1, 1:-1, 1:-1] = False
    for organ in body_store.organs:
        one = whole.organs[organ.name]
        assert one.volume_ml == pytest.approx(on_scan.organs[organ.name].volume_ml, rel=0.1, abs=4)
        # A few voxels may lie at the rim of one grid, and not of the other.
        if (image[rim] == organ.value).sum() > 20:
            assert one.at_border
        elif not (image[rim] == organ.value).any() and one.volume_ml:
            inner = np.zeros(image.shape, bool)
            inner[2:-2, 2:-2, 2:-2] = True
            assert not one.at_border or (image[~inner] == organ.value).any()
