from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from kpt_dask.grid import Grid
from kpt_dask.resampling import labels_on_scan
from kpt_dask.resampling.labels_on_scan import Shares, labels_onto

VALUES = (3, 700, 5)
THRESHOLD = 0.3

GRID = Grid(
    (12, 14, 11),
    np.array([[2.0, 0, 0, -31.5], [0, 2.0, 0, 12.25], [0, 0, 2.0, 100.75], [0, 0, 0, 1]]),
)


def shares(seed: int = 0) -> np.ndarray:
    """Three smooth blobs that overlap; 0 far from them, as the transfer leaves it."""
    noise = np.random.default_rng(seed).normal(size=(3, *GRID.shape))
    smooth = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 1.5))
    return np.maximum(smooth / smooth.max(), 0).astype(np.float32)


def naive(probability: np.ndarray, target: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Labels in float64, and where they are too close to call."""
    index = GRID.to_index(target.to_mm(np.moveaxis(np.indices(target.shape), 0, -1)))
    far = np.maximum(-index, index - (np.array(GRID.shape) - 1)).max(axis=-1)
    places = np.moveaxis(index, -1, 0)
    value = np.stack(
        [
            ndimage.map_coordinates(p.astype(float), places, order=1, mode="nearest")
            for p in probability
        ]
    )
    ordered = np.sort(value, axis=0)
    close = (np.abs(ordered[-1] - THRESHOLD) < 1e-5) | (ordered[-1] - ordered[-2] < 1e-5)
    close &= ordered[-1] > THRESHOLD - 1e-5
    labels = np.where(ordered[-1] >= THRESHOLD, np.array(VALUES)[value.argmax(axis=0)], 0)
    return np.where(far > 1, 0, labels), close | (np.abs(far - 1) < 1e-6)


def onto(probability: Any, target: Grid) -> np.ndarray:
    return np.concatenate(list(labels_onto(Shares(probability, VALUES, THRESHOLD, GRID), target)))


@given(
    st.tuples(*[st.integers(1, 25)] * 3),
    st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 2.0, 3.3])] * 3),
    st.tuples(*[st.integers(-40, 40)] * 3),
    st.tuples(*[st.integers(-8, 8)] * 3),
    st.integers(1, 4000),
)
@settings(max_examples=60, deadline=None)
def test_labels_are_those_of_interpolated_shares(
    shape: tuple[int, int, int],
    spacing: tuple[float, ...],
    degrees: tuple[float, ...],
    shift: tuple[float, ...],
    slab: int,
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("zyx", degrees, degrees=True).as_matrix() * spacing
    affine[:3, 3] = GRID.origin + np.array(shift)
    target = Grid(shape, affine)
    probability = shares()
    expected, close = naive(probability, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_on_scan, "SLAB_VOXELS", slab)
        found = onto(probability, target)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[~close], expected[~close])


def test_on_the_working_grid_it_is_the_decision_there() -> None:
    probability = shares(1)
    expected = np.where(
        probability.max(axis=0) >= np.float32(THRESHOLD),
        np.array(VALUES)[probability.argmax(axis=0)],
        0,
    )
    np.testing.assert_array_equal(onto(probability, GRID), expected)


def test_borders_do_not_show_the_steps_of_the_working_grid() -> None:
    fine = Grid((48, 56, 44), GRID.affine @ np.diag([0.25, 0.25, 0.25, 1]))
    distance = np.linalg.norm(
        GRID.to_mm(np.moveaxis(np.indices(GRID.shape), 0, -1)) - GRID.to_mm([5, 6, 5]), axis=-1
    )
    ball = np.clip(1 - distance / 14, 0, 1).astype(np.float32)
    found = onto(np.stack([ball, 0 * ball, 0 * ball]), fine) > 0
    away = np.linalg.norm(
        fine.to_mm(np.moveaxis(np.indices(fine.shape), 0, -1)) - GRID.to_mm([5, 6, 5]), axis=-1
    )
    radius = 14 * (1 - THRESHOLD)
    assert not found[away > radius + 0.6].any()
    assert found[away < radius - 0.6].all()
