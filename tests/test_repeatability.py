"""Keypoints of a real scan are found again when it is turned or scaled, and know each other.

The figures are printed; ``pytest -rP`` shows them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from distributed import Client
from scipy import ndimage
from scipy.spatial.distance import cdist

from kpt_dask.grid import Grid
from kpt_dask.keypoints.descriptors import PATCH, STEP
from kpt_dask.keypoints.extraction import extract
from kpt_dask.keypoints.parameters import CHOICES
from kpt_dask.matching.search import Keypoints
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.pyramid import fill_pyramid
from kpt_dask.volumes.volume import create_volume

DESCRIPTORS = CHOICES["descriptor"]
REACH = STEP * (PATCH // 2 + 1)
"""Half the side of what a descriptor looks at, in units of the keypoint's σ."""

Extract = Callable[[np.ndarray, str], Keypoints]


@pytest.fixture(scope="module")
def trunk(openkbp: Path) -> np.ndarray:
    """An abdomen at 3 mm, as it lies in the file."""
    slabs = open_scan(openkbp.parent / "trunk_example" / "ct.nii.gz").slabs()
    return np.concatenate(list(slabs))


@pytest.fixture(scope="module")
def extracted(one_process: Client, tmp_path_factory: pytest.TempPathFactory) -> Extract:
    """Keypoints of voxels, their positions and scales in voxels."""

    def of(values: np.ndarray, descriptor: str) -> Keypoints:
        z, y, x = values.shape
        grid = Grid.isotropic((z, y, x), 1.0, (0, 0, 0))
        volume = create_volume(tmp_path_factory.mktemp("v") / "v.zarr", grid, grid, name="trunk")
        volume.levels[0][:] = values
        fill_pyramid(volume.levels, client=one_process)
        found = extract(volume, descriptor=descriptor, client=one_process)
        fields = ("position", "scale", "sign", "descriptor")
        return Keypoints.of(tuple(found[name].values for name in fields))  # type: ignore[arg-type]

    return of


@pytest.fixture(scope="module")
def here(trunk: np.ndarray, extracted: Extract) -> dict[str, Keypoints]:
    return {descriptor: extracted(trunk, descriptor) for descriptor in DESCRIPTORS}


def turn(axis: int, degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    matrix = np.eye(3)
    i, j = (a for a in range(3) if a != axis)
    matrix[[i, j], [i, j]] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def squared_distances(here: Keypoints, there: Keypoints) -> np.ndarray:
    """Of all pairs, (n, m): those of their closest frames."""
    found = cdist(here.descriptor, there.descriptor, "sqeuclidean")
    found = np.minimum.reduceat(found, there.first, axis=1)
    return np.minimum.reduceat(found, here.first, axis=0)


def repeated(
    here: Keypoints, there: Keypoints, moved: np.ndarray, factor: float, shapes: tuple[tuple, tuple]
) -> tuple[int, float, float]:
    """How many keypoints stay inside, the share found again, and that of mutual nearest ones."""
    inside = np.ones(len(moved), bool)
    for position, scale, shape in (
        (here.position, here.scale, shapes[0]),
        (moved, factor * here.scale, shapes[1]),
    ):
        reach = REACH * scale[:, None]
        inside &= ((position > reach) & (position < np.array(shape) - 1 - reach)).all(axis=1)
    apart = np.linalg.norm(moved[:, None] - there.position, axis=2)
    ratio = factor * here.scale[:, None] / there.scale
    same = (apart <= 1.5) & (ratio <= 1.2) & (ratio >= 1 / 1.2)
    again = np.flatnonzero(inside & same.any(axis=1))
    squared = squared_distances(here, there)
    nearest = squared.argmin(axis=1)[again]
    mutual = (squared.argmin(axis=0)[nearest] == again) & same[again, nearest]
    return int(inside.sum()), again.size / inside.sum(), float(mutual.mean())


@pytest.mark.parametrize(
    ("axis", "factor"), [(0, 1.0), (1, 1.0), (2, 1.0), (None, 1.3)], ids=["z", "y", "x", "scaled"]
)
def test_keypoints_are_found_again(
    trunk: np.ndarray,
    here: dict[str, Keypoints],
    extracted: Extract,
    axis: int | None,
    factor: float,
) -> None:
    """Turned by 25° or scaled by 1.3; upright descriptors are only asked to bear the scaling."""
    matrix = np.eye(3) if axis is None else turn(axis, 25)
    shape = tuple(round(factor * n) for n in trunk.shape)
    middle, target = (np.array(trunk.shape) - 1) / 2, (np.array(shape) - 1) / 2
    back = matrix.T / factor
    values = np.rint(
        ndimage.affine_transform(trunk, back, middle - back @ target, shape, mode="nearest")
    )
    for descriptor in DESCRIPTORS:
        there = extracted(values, descriptor)
        moved = factor * (here[descriptor].position - middle) @ matrix.T + target
        n, again, mutual = repeated(
            here[descriptor], there, moved, factor, (trunk.shape, values.shape)
        )
        print(f"{descriptor}: {again:.0%} of {n} again, {mutual:.0%} of these mutual nearest")
        assert n > 150
        assert again >= 0.7
        if descriptor == "invariant" or axis is None:
            assert mutual >= 0.5
