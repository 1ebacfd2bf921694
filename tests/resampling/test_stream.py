from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from kpt_dask.grid import Grid
from kpt_dask.resampling.axes import Orientation, along_own_axes, axis_table
from kpt_dask.resampling.blocks import interpolate, interpolate_labels, window
from kpt_dask.resampling.stream import resample, resample_labels

WHOLE = (10**6, 10**6, 10**6)
"""Slabs as thick as the volume."""

sizes = st.tuples(*[st.integers(1, 9)] * 3)
spacings = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 2.0, 3.3, 5.0])] * 3)
orientations = st.tuples(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
quick = settings(max_examples=40, deadline=None)


def ct(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.float32)


def blobs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A label map of a few touching regions, background among them."""
    noise = np.random.default_rng(seed).normal(size=(4, *shape))
    return np.argmax(ndimage.gaussian_filter(noise, (0, 1, 1, 1)), axis=0).astype(np.uint16) * 7


def grid_of(shape: tuple[int, ...], spacing: tuple[float, ...]) -> Grid:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-31.5, 12.25, 100.75)
    return Grid(shape, affine)  # type: ignore[arg-type]


def stored(
    values: np.ndarray, grid: Grid, orientation: tuple[list[int], tuple[bool, ...]]
) -> tuple[np.ndarray, Grid]:
    """The same voxels as another file might store them."""
    axes, flipped = orientation
    affine = grid.affine.copy()
    for a in range(3):
        affine[:3, axes[a]] = grid.affine[:3, a] * (-1 if flipped[a] else 1)
        if flipped[a]:
            affine[:3, 3] += (grid.shape[a] - 1) * grid.affine[:3, a]
    flips = tuple(slice(None, None, -1 if f else 1) for f in flipped)
    turned = np.transpose(values[flips], np.argsort(axes))
    return np.ascontiguousarray(turned), Grid(turned.shape, affine)


def slabs(values: np.ndarray, n: int = 2) -> Iterator[np.ndarray]:
    return (values[first : first + n] for first in range(0, len(values), n))


def collect(stream: Iterator[Any], grid: Grid, dtype: type = np.float32) -> np.ndarray:
    out = np.full(grid.shape, 77, dtype)
    filled = np.zeros(grid.shape, int)
    for region, part in stream:
        out[region] = part
        filled[region] += 1
    assert (filled == 1).all()
    return out


def run(values: np.ndarray, source: Grid, target: Grid, thickness: Any = WHOLE) -> np.ndarray:
    return collect(resample(slabs(values), source, target, thickness), target)


def run_labels(values: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    return collect(resample_labels(slabs(values), source, target, WHOLE), target, np.uint16)


def matrix(n_in: int, n_out: int, ratio: float, first: float) -> np.ndarray:
    """The weights of one axis, from the definition: a normalized triangle, ends repeated."""
    half = max(ratio, 1.0)
    weights = np.zeros((n_out, n_in))
    for o in range(n_out):
        position = first + o * ratio
        around = range(int(np.floor(position - half)), int(np.ceil(position + half)) + 1)
        triangle = {m: max(0.0, 1 - abs(m - position) / half) for m in around}
        for m, weight in triangle.items():
            weights[o, min(max(m, 0), n_in - 1)] += weight / sum(triangle.values())
    return weights


def reference(values: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """Float64, both grids in world order and axis-aligned."""
    out = values.astype(np.float64)
    for a in range(3):
        ratio = target.spacing[a] / source.spacing[a]
        first = (target.origin[a] - source.origin[a]) / source.spacing[a]
        weights = matrix(source.shape[a], target.shape[a], ratio, first)
        out = np.moveaxis(np.tensordot(weights, out, (1, a)), 0, a)
    return out


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.1, 9), st.floats(-15, 25))
@settings(deadline=None)
def test_axis_tables_follow_the_definition(
    n_in: int, n_out: int, ratio: float, first: float
) -> None:
    table = axis_table(n_in, n_out, ratio, first)
    dense = np.zeros((n_out, n_in))
    for o in range(n_out):
        taps = table.weights.shape[1]
        dense[o, table.start[o] : table.start[o] + taps] += table.weights[o]
    np.testing.assert_allclose(dense, matrix(n_in, n_out, ratio, first), atol=1e-6)
    assert (np.diff(table.start) >= 0).all()


@given(sizes, spacings, st.sampled_from([1.0, 2.0, 2.5]))
@quick
def test_resampling_agrees_with_the_reference(
    shape: tuple[int, ...], spacing: tuple[float, ...], target: float
) -> None:
    values, source = ct(shape), grid_of(shape, spacing)
    working = source.working(target)
    np.testing.assert_allclose(
        run(values, source, working), reference(values, source, working), atol=0.01
    )


@given(sizes, spacings, orientations, st.integers(1, 3))
@quick
def test_permuted_and_flipped_scans_give_the_same_bits(
    shape: tuple[int, ...], spacing: tuple[float, ...], orientation: Any, thickness: int
) -> None:
    values, source = ct(shape), grid_of(shape, spacing)
    working = source.working(2.0)
    plain = run(values, source, working)
    other, other_grid = stored(values, source, orientation)
    target = other_grid.working(2.0)
    assert target.same_as(working, tolerance=1e-6)
    turned = run(other, other_grid, target, (thickness,) * 3)
    np.testing.assert_array_equal(turned.view(np.uint32), plain.view(np.uint32))


@given(sizes, orientations)
@quick
def test_a_scan_on_the_working_grid_stays_as_it_is(shape: tuple[int, ...], turn: Any) -> None:
    values, source = ct(shape), grid_of(shape, (2.0, 2.0, 2.0))
    other, grid = stored(values, source, turn)
    np.testing.assert_array_equal(run(other, grid, grid.working(2.0)), values)


def test_slabs_begin_at_multiples_of_their_thickness() -> None:
    values, source = ct((20, 6, 5)), grid_of((20, 6, 5), (1.0, 1.0, 1.0))
    down, grid = stored(values, source, ([0, 1, 2], (True, False, False)))
    working = source.working(1.0)
    ups = [r[0] for r, _ in resample(slabs(values), source, working, (8, 8, 8))]
    downs = [r[0] for r, _ in resample(slabs(down), grid, working, (8, 8, 8))]
    assert ups == [slice(0, 8), slice(8, 16), slice(16, 20)]
    assert downs == ups[::-1]


def test_a_coarser_grid_averages() -> None:
    shape = (60, 60, 60)
    values = np.indices(shape).sum(axis=0).astype(np.float32) % 2 * 1000  # a chequerboard
    source = grid_of(shape, (1.0, 1.0, 1.0))
    out = run(values, source, source.working(3.0))
    assert np.abs(out - 500).max() < 40


def test_a_constant_scan_stays_constant() -> None:
    source = grid_of((11, 13, 9), (0.7, 1.3, 4.1))
    out = run(np.full(source.shape, -1000, np.float32), source, source.working(2.0))
    np.testing.assert_allclose(out, -1000, atol=1e-3)


def tilted(shape: tuple[int, ...], spacing: tuple[float, ...], degrees: float) -> Grid:
    affine = np.eye(4)
    turn = Rotation.from_euler("zyx", [degrees, degrees / 2, -degrees], degrees=True)
    affine[:3, :3] = turn.as_matrix() * spacing
    affine[:3, 3] = (5, -7, 11)
    return Grid(shape, affine)  # type: ignore[arg-type]


def run_oblique(values: np.ndarray, source: Grid, spacing: float) -> np.ndarray:
    own, target = along_own_axes(source, spacing), source.working(spacing)
    lowpass = run(values, source, own)
    out = np.empty(target.shape, np.float32)
    for first in range(0, target.shape[0], 5):
        block = (
            slice(first, min(first + 5, target.shape[0])),
            *map(slice, (0, 0), target.shape[1:]),
        )
        plan = window(own, target, block)
        out[block] = interpolate(lowpass[plan.region], plan)
    return out


def test_oblique_scans_agree_with_the_reference() -> None:
    source = tilted((24, 20, 18), (0.8, 1.0, 3.0), 12)
    values = ndimage.gaussian_filter(ct(source.shape), 1).astype(np.float32)
    own, target = along_own_axes(source, 2.0), source.working(2.0)
    np.testing.assert_allclose(own.spacing, (2, 2, 3))
    # The same two steps in float64: low-pass along the own axes, then trilinear.
    straight = Grid(source.shape, np.diag([*source.spacing, 1.0]))
    offset = (own.spacing - source.spacing) / 2
    straight_own = Grid(own.shape, np.diag([*own.spacing, 1.0]))
    straight_own.affine[:3, 3] = offset
    np.testing.assert_allclose(own.to_mm([0, 0, 0]), source.to_mm(offset / source.spacing))
    lowpass = reference(values, straight, straight_own)
    index = own.to_index(target.to_mm(np.moveaxis(np.indices(target.shape), 0, -1)))
    expected = ndimage.map_coordinates(
        lowpass, np.moveaxis(index, -1, 0), order=1, mode="nearest", output=np.float64
    )
    np.testing.assert_allclose(run_oblique(values, source, 2.0), expected, atol=0.05)


def test_an_oblique_scan_shows_the_world_where_it_is() -> None:
    source = tilted((40, 40, 40), (1.0, 1.0, 1.0), 20)
    place = source.to_mm(np.moveaxis(np.indices(source.shape), 0, -1))
    ramp = (3 * place[..., 0] - 2 * place[..., 1] + place[..., 2]).astype(np.float32)
    target = source.working(2.0)
    out = run_oblique(ramp, source, 2.0)
    mm = target.to_mm(np.moveaxis(np.indices(target.shape), 0, -1))
    index = source.to_index(mm)
    inside = ((index > 4) & (index < 35)).all(axis=-1)
    expected = 3 * mm[..., 0] - 2 * mm[..., 1] + mm[..., 2]
    assert inside.sum() > 500
    np.testing.assert_allclose(out[inside], expected[inside], atol=0.01)
    assert out.min() >= ramp.min()
    assert out.max() <= ramp.max()


@given(orientations)
@settings(max_examples=10, deadline=None)
def test_oblique_scans_may_be_stored_in_any_order(orientation: Any) -> None:
    source = tilted((10, 9, 8), (1.0, 1.5, 2.5), 15)
    values = ct(source.shape)
    other, grid = stored(values, source, orientation)
    np.testing.assert_allclose(
        run_oblique(other, grid, 2.0), run_oblique(values, source, 2.0), atol=0.01
    )


@given(st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_interpolation_does_not_depend_on_blocks(height: int, width: int) -> None:
    source, target = tilted((9, 9, 9), (1.0, 1.5, 2.5), 15), grid_of((8, 7, 9), (2.0, 2.0, 2.0))
    values, labels = ct(source.shape), blobs(source.shape)
    everything = tuple(slice(0, n) for n in target.shape)
    whole = window(source, target, everything)  # type: ignore[arg-type]
    image = interpolate(values[whole.region], whole)
    map_ = interpolate_labels(labels[whole.region], whole)
    for z in range(0, 8, height):
        for y in range(0, 7, width):
            block = (slice(z, min(z + height, 8)), slice(y, min(y + width, 7)), slice(2, 9))
            plan = window(source, target, block)
            np.testing.assert_array_equal(interpolate(values[plan.region], plan), image[block])
            np.testing.assert_array_equal(
                interpolate_labels(labels[plan.region], plan), map_[block]
            )


def label_reference(
    labels: np.ndarray, source: Grid, target: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """The label with most weight, and whether the decision is clear."""
    values = np.unique(np.append(labels, 0))
    weights = np.stack([reference(labels == value, source, target) for value in values])
    ordered = np.sort(weights, axis=0)
    clear = np.ones(target.shape, bool) if len(values) < 2 else ordered[-1] - ordered[-2] > 1e-4
    lowest = np.argmax(weights > ordered[-1] - 2e-6, axis=0)
    return values[lowest], clear


@given(sizes, spacings, orientations, st.integers(0, 9))
@quick
def test_the_label_with_most_weight_wins(
    shape: tuple[int, ...], spacing: tuple[float, ...], orientation: Any, seed: int
) -> None:
    labels, source = blobs(shape, seed), grid_of(shape, spacing)
    target = source.working(2.0)
    expected, clear = label_reference(labels, source, target)
    out = run_labels(labels, source, target)
    np.testing.assert_array_equal(out[clear], expected[clear])
    other, grid = stored(labels, source, orientation)
    np.testing.assert_array_equal(run_labels(other, grid, target), out)


@pytest.mark.parametrize("factor", [2, 4])
def test_ties_go_to_the_lower_label(factor: int) -> None:
    # Target voxels that lie half in one label and half in the other.
    labels = np.repeat(np.array([5, 3, 3, 9], np.uint16), factor)[factor // 2 : -factor // 2]
    labels = np.broadcast_to(labels, (factor, factor, len(labels)))
    source = grid_of(labels.shape, (2 / factor,) * 3)
    assert run_labels(labels, source, source.working(2.0)).ravel().tolist() == [3, 3, 3]
    empty = np.where(labels == 3, 0, labels)
    assert run_labels(empty, source, source.working(2.0)).ravel().tolist() == [0, 0, 0]


def test_labels_are_not_mixed_into_others() -> None:
    labels = np.zeros((12, 12, 12), np.uint16)
    labels[3:9] = 600
    labels[6:9] = 2
    source = grid_of(labels.shape, (1.0, 1.0, 1.0))
    out = run_labels(labels, source, source.working(0.7))
    assert set(np.unique(out)) == {0, 2, 600}


def test_orientation_of_a_nearly_aligned_grid_ignores_the_tilt() -> None:
    grid = grid_of((4, 5, 6), (1.0, 2.0, 3.0))
    grid.affine[0, 1] = 5e-4
    assert grid.axis_permutation() is not None
    assert Orientation.of(grid) == Orientation((0, 1, 2), (False, False, False))
    values = ct(grid.shape)
    straight = grid_of((4, 5, 6), (1.0, 2.0, 3.0))
    np.testing.assert_allclose(
        run(values, grid, straight.working(2.0)),
        run(values, straight, straight.working(2.0)),
        atol=10,
    )
