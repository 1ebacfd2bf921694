import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from kpt_dask.grid import Grid
from kpt_dask.resampling.axes import Orientation

SHAPE = (7, 5, 4)

orientations = st.tuples(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))


def turned(axes: list[int], flipped: tuple[bool, ...], spacing: list[float]) -> Grid:
    """A grid whose world axis a runs along array axis axes[a]."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for a in range(3):
        affine[a, axes[a]] = -spacing[a] if flipped[a] else spacing[a]
    affine[:3, 3] = (-300.5, 20.25, 7)
    return Grid(SHAPE, affine)


@given(orientations, st.lists(st.floats(0.2, 9), min_size=3, max_size=3))
@settings(deadline=None)
def test_axis_permutation_says_how_the_array_lies(
    orientation: tuple[list[int], tuple[bool, ...]], spacing: list[float]
) -> None:
    axes, flipped = orientation
    grid = turned(axes, flipped, spacing)
    assert grid.axis_permutation() == (tuple(axes), flipped)
    assert Orientation.of(grid) == Orientation(tuple(axes), flipped)
    np.testing.assert_allclose(grid.spacing[axes], spacing)
    assert grid.voxel_volume == pytest.approx(np.prod(spacing))


@given(orientations)
@settings(deadline=None)
def test_reorientation_keeps_every_voxel_in_its_place(
    orientation: tuple[list[int], tuple[bool, ...]],
) -> None:
    grid = turned(*orientation, [1.0, 2.0, 3.0])
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    own = Orientation.of(grid)
    by_axis = np.transpose(grid.to_mm(index), (*own.axes, 3))
    flip = tuple(slice(None, None, -1 if f else 1) for f in own.flipped)
    reordered = own.apply(grid)
    inner = np.stack(np.meshgrid(*map(np.arange, reordered.shape), indexing="ij"), axis=-1)
    np.testing.assert_allclose(reordered.to_mm(inner), by_axis[flip])
    assert reordered.axis_permutation() == ((0, 1, 2), (False, False, False))


@given(orientations, st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_the_same_voxels_in_another_order_are_known(
    orientation: tuple[list[int], tuple[bool, ...]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(rng=rng).as_matrix() @ np.diag(rng.uniform(0.5, 4, 3))
    affine[:3, 3] = rng.uniform(-99, 99, 3)
    grid, (axes, flipped) = Grid(SHAPE, affine), orientation
    # Which voxel of the grid is each one of the other: by numpy's own flips and permutations.
    number = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    stored = np.flip(number.transpose(axes), np.flatnonzero(flipped))
    at = np.stack(np.unravel_index(stored, SHAPE), axis=-1)
    places = grid.to_mm(at)
    other = np.eye(4)
    other[:3, 3] = places[0, 0, 0] + rng.uniform(-1e-3, 1e-3, 3)
    for a, step in enumerate(np.eye(3, dtype=int)):
        other[:3, a] = places[tuple(step)] - places[0, 0, 0]
    found = grid.stored_as(Grid(stored.shape, other))
    assert found is not None
    assert found.shape == stored.shape
    index = np.stack(np.meshgrid(*map(np.arange, stored.shape), indexing="ij"), axis=-1)
    np.testing.assert_allclose(found.to_mm(index), places, atol=1e-9)
    # A voxel aside, or of another size, they are others.
    other[:3, 3] += other[:3, 0]
    assert grid.stored_as(Grid(stored.shape, other)) is None
    assert grid.stored_as(Grid(stored.shape, np.diag([3.0, 3, 3, 1]))) is None


def test_oblique_grids_have_no_axis_permutation() -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("x", 5, degrees=True).as_matrix()
    assert Grid(SHAPE, affine).axis_permutation() is None


def test_sheared_grids_have_no_axis_permutation() -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.2  # a tilted gantry
    assert Grid(SHAPE, affine).axis_permutation() is None


@given(
    st.lists(st.floats(-180, 180), min_size=3, max_size=3),
    st.lists(st.floats(0.3, 6), min_size=3, max_size=3),
    st.floats(0.5, 4),
)
@settings(max_examples=50, deadline=None)
def test_working_grid_covers_the_field_of_view(
    angles: list[float], spacing: list[float], target: float
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = (100, -50, 3)
    grid = Grid((20, 30, 25), affine)
    working = grid.working(target)
    assert working.axis_permutation() == ((0, 1, 2), (False, False, False))
    np.testing.assert_allclose(working.spacing, target)
    ends = [(-0.5, n - 0.5) for n in grid.shape]
    corners = grid.to_mm(np.array(np.meshgrid(*ends)).reshape(3, -1).T)
    low = working.to_mm([-0.5, -0.5, -0.5])
    high = working.to_mm(np.array(working.shape) - 0.5)
    np.testing.assert_allclose(low, corners.min(axis=0), atol=1e-6)
    # One voxel at least; otherwise the far side is met up to half a voxel.
    assert (np.abs(high - corners.max(axis=0)) <= target / 2 + 1e-6).all()


@given(orientations)
@settings(deadline=None)
def test_an_isotropic_grid_is_its_own_working_grid(
    orientation: tuple[list[int], tuple[bool, ...]],
) -> None:
    grid = turned(*orientation, [2.0, 2.0, 2.0])
    assert grid.working(2.0).same_as(Orientation.of(grid).apply(grid), tolerance=1e-9)


@given(st.lists(st.floats(-500, 500), min_size=3, max_size=3))
@settings(deadline=None)
def test_to_index_undoes_to_mm(index: list[float]) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix() * (1, 2, 3)
    grid = Grid(SHAPE, affine)
    np.testing.assert_allclose(grid.to_index(grid.to_mm(index)), index, atol=1e-6)


def test_same_as_compares_where_voxels_lie() -> None:
    grid = Grid.isotropic(SHAPE, 2.0, (1, 2, 3))
    assert grid.same_as(Grid.isotropic(SHAPE, 2.0, (1, 2, 3.06)))
    assert not grid.same_as(Grid.isotropic(SHAPE, 2.0, (1, 2, 3.3)))
    assert not grid.same_as(Grid.isotropic(SHAPE, 2.1, (1, 2, 3)))
    assert not grid.same_as(Grid.isotropic((7, 5, 5), 2.0, (1, 2, 3)))
