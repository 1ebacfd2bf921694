"""Pictures: which slices, how they are turned, and that little is read."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atlas_store.organs import load_organs
from kpt_dask.atlases import profiles
from kpt_dask.errors import ParameterError
from kpt_dask.grid import Grid
from kpt_dask.report import overlay

ORGANS = load_organs("visceral")
SHAPE = (12, 9, 7)


def stored(
    array: NDArray[Any], axes: tuple[int, ...], flips: tuple[bool, ...]
) -> tuple[NDArray[Any], Grid]:
    """Turn an array (z, y, x) LPS as a scanner might, with the grid that says so."""
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (-50, 20, 7)
    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for new, old in enumerate(axes):
        turn[old, new] = -1 if flips[new] else 1
        turn[old, 3] = array.shape[old] - 1 if flips[new] else 0
    turned = array.transpose(axes)[tuple(slice(None, None, -1 if f else 1) for f in flips)]
    return turned, Grid(turned.shape, affine @ turn)


@settings(max_examples=48)
@given(
    axes=st.sampled_from(list(itertools.permutations(range(3)))),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_a_marker_at_the_left_front_top_lands_where_a_radiologist_looks(
    axes: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    plain = np.zeros(SHAPE, np.int16)
    plain[-1, 0, -1] = 1
    array, grid = stored(plain, axes, flips)
    k, j, i = (int(n) for n in np.argwhere(array)[0])
    np.testing.assert_allclose(grid.to_mm((k, j, i)), (-50 + 2 * 11, 20, 7 + 4 * 6))

    views = overlay.slices_for_display(array, grid, (k, j, i))

    assert views.coronal.shape == (12, 7)
    assert np.argwhere(views.coronal).tolist() == [[0, 6]]
    assert views.sagittal.shape == (12, 9)
    assert np.argwhere(views.sagittal).tolist() == [[0, 0]]
    assert views.axial.shape == (9, 7)
    assert np.argwhere(views.axial).tolist() == [[0, 6]]


def test_an_oblique_grid_is_refused() -> None:
    affine = np.eye(4)
    affine[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    with pytest.raises(ParameterError, match="resample"):
        overlay.slices_for_display(np.zeros(SHAPE), Grid(SHAPE, affine), (0, 0, 0))


def test_the_plane_that_shows_most_organs_is_chosen() -> None:
    profile = np.array([[0, 100, 40, 0, 0], [0, 0, 3, 10, 4], [0, 0, 0, 0, 0]])
    assert overlay.best_plane(profile) == 2
    assert overlay.best_plane(profile[:1]) == 1
    assert overlay.best_plane(profile[2:]) == 2


class Reads:
    """Count the voxels that are read of an array."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape: tuple[int, ...] = array.shape
        self.chunks: tuple[int, ...] = array.chunks
        self.reads: list[int] = []

    def __getitem__(self, region: Any) -> Any:
        part = self.array[region]
        self.reads.append(part.size)
        return part


def subject() -> tuple[zarr.Array[Any], zarr.Array[Any], Grid]:
    shape = (60, 40, 50)
    image = np.random.default_rng(1).normal(0, 100, shape).astype(np.float32)
    labels = np.zeros(shape, np.uint16)
    for organ in ORGANS:
        labels[5 * organ.value : 5 * organ.value + 4, 10:30, 12:40] = organ.value
    chunks = (16, 16, 16)
    return (
        zarr.create_array({}, data=image, chunks=chunks),
        zarr.create_array({}, data=labels, chunks=chunks),
        Grid.isotropic(shape, 2.0, (0, 0, 0)),
    )


def test_a_picture_is_drawn_from_three_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "SLAB_VOXELS", 16 * 40 * 50)
    stored_image, stored_labels, grid = subject()
    image, labels = Reads(stored_image), Reads(stored_labels)
    path = tmp_path / "picture.png"

    overlay.draw_overlay(path, image, labels, list(ORGANS), grid, title="a subject")

    assert sorted(image.reads) == sorted([60 * 50, 60 * 40, 40 * 50])
    assert max(labels.reads) <= 16 * 40 * 50
    picture = matplotlib.image.imread(path)[..., :3]
    assert min(picture.shape[:2]) > 400
    for organ in ORGANS:
        in_legend = (np.abs(picture - np.array(organ.colour) / 255) < 0.01).all(axis=-1)
        assert in_legend.sum() > 50, organ.name
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_a_picture_without_organs_or_of_one_plane_is_drawn_without_a_warning(
    tmp_path: Path,
) -> None:
    image = np.zeros((10, 8, 6), np.int16)
    grid = Grid.isotropic(image.shape, 2.0, (0, 0, 0))
    overlay.draw_overlay(tmp_path / "a.png", image, image.astype(np.uint8), list(ORGANS), grid)
    overlay.draw_overlay(
        tmp_path / "b.png", image, np.ones_like(image, np.uint8), list(ORGANS), grid
    )
    flat, grid = image[:1], Grid.isotropic((1, 8, 6), 2.0, (0, 0, 0))
    labels = np.arange(48).reshape(flat.shape).astype(np.uint8) % 3
    overlay.draw_overlay(tmp_path / "c.png", flat, labels, list(ORGANS), grid)
    assert len(list(tmp_path.iterdir())) == 3
