"""A scan is known by its voxels, not by its file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert
from kpt_dask.volumes.identity import BRICK, VoxelDigest, digest_of, digest_voxels

SHAPE = (36, 140, 150)
"""(z, y, x): more than a brick along each axis."""

VALUES = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)
AFFINE = np.diag([-3.0, -3, 3, 1])
MOVED = AFFINE + np.array([[0, 0, 0, 30]] * 3 + [[0] * 4])


def digest(path: Path, image: Any, spacing: float = 3.0) -> str:
    """Digest of an image, written and converted."""
    nibabel.save(image, path)
    out = path.with_name(path.name + ".zarr")
    return digest_of(convert(open_scan(path), out, spacing=spacing, overwrite=True).group)


def image_of(values: NDArray[Any], affine: NDArray[Any] = AFFINE) -> Any:
    return nibabel.Nifti1Image(values.T, affine)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest(tmp_path_factory.mktemp("identity") / "a.nii", image_of(VALUES))


OTHERWISE: dict[str, tuple[str, Callable[[], Any]]] = {
    "compressed": ("b.nii.gz", lambda: image_of(VALUES)),
    "float": ("b.nii", lambda: image_of(VALUES.astype(np.float32))),
    "turned": ("b.nii", lambda: image_of(VALUES).as_reoriented([[1, -1], [2, 1], [0, -1]])),
    "moved": ("b.nii", lambda: image_of(VALUES, MOVED)),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_the_same_scan_in_another_file_is_recognised(tmp_path: Path, plain: str, name: str) -> None:
    file, image = OTHERWISE[name]
    assert digest(tmp_path / file, image()) == plain


def test_another_scan_is_another(tmp_path: Path, plain: str) -> None:
    changed = VALUES.copy()
    changed[35, 139, 149] += 1
    assert digest(tmp_path / "b.nii", image_of(changed)) != plain
    assert digest(tmp_path / "b.nii", image_of(VALUES[::-1])) != plain
    assert digest(tmp_path / "b.nii", image_of(VALUES), spacing=4.0) != plain


def test_regions_may_come_in_any_order(tmp_path: Path, plain: str) -> None:
    assert digest_voxels(VALUES) == plain
    with VoxelDigest(SHAPE) as total:
        for x in reversed(range(0, SHAPE[2], BRICK[2])):
            part = VALUES[:, :, x : x + BRICK[2]].astype(np.float32)
            region = slice(0, SHAPE[0]), slice(0, SHAPE[1]), slice(x, x + part.shape[2])
            total.add(region, part)
        assert total.hexdigest() == plain


def test_an_older_volume_is_digested_when_asked(tmp_path: Path, plain: str) -> None:
    nibabel.save(image_of(VALUES), tmp_path / "a.nii")
    group = convert(open_scan(tmp_path / "a.nii"), tmp_path / "a.zarr", spacing=3.0).group
    about: Any = group.attrs["kpt"]
    del about["source"]["digest"]
    group.update_attributes({"kpt": about})
    assert digest_of(group) == plain
