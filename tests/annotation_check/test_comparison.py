"""What is counted while label maps stream by is what NumPy says of whole ones."""

import numpy as np
import zarr
from scipy import ndimage

from atlas_store import OrganTable
from kpt_dask.annotation_check.comparison import compare
from kpt_dask.grid import Grid
from tests.helpers import ORGANS, Array

SHAPE = (21, 17, 19)
GRID = Grid.isotropic(SHAPE, 3.0, (100.0, -50.0, 20.0))


def blobs(seed: int, organs: OrganTable) -> Array:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=SHAPE), 2.0)
    labels = np.zeros(SHAPE, np.uint16)
    for k, value in enumerate(organs.values):
        labels[smooth > np.quantile(smooth, 0.7 + 0.1 * k)] = value
    return labels


def naive_dice(one: Array, other: Array) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_it_equals_numpy_on_whole_arrays() -> None:
    labels, predicted = blobs(0, ORGANS), blobs(1, ORGANS)
    scan = np.random.default_rng(2).integers(-1000, 3000, SHAPE).astype(np.float32)
    chunked = [
        zarr.create_array({}, shape=SHAPE, chunks=(4, 8, 8), dtype=a.dtype)
        for a in (labels, predicted, scan)
    ]
    for array, values in zip(chunked, (labels, predicted, scan), strict=True):
        array[:] = values
    found = compare(chunked[0], chunked[1], chunked[2], GRID, ORGANS)
    for i, value in enumerate(ORGANS.values):
        own = labels == value
        dice = [naive_dice(own, predicted == other) for other in ORGANS.values]
        assert found.own_dice[i] == dice[i]
        dice[i] = -1
        assert found.other_dice[i] == max(dice)
        assert found.other[i] == dice.index(max(dice))
        for axis in range(3):
            assert found.mirrored[axis, i] == naive_dice(np.flip(own, axis), predicted == value)
        centre = GRID.to_mm(np.argwhere(own).mean(axis=0))
        np.testing.assert_allclose(found.layout.centroid[i], centre)
        there = GRID.to_mm(np.argwhere(predicted == value).mean(axis=0))
        np.testing.assert_allclose(found.offset[i], centre - there)
        assert found.layout.volume_ml[i] == np.count_nonzero(own) * 27 / 1000
        expected = np.quantile(scan[own], [0.1, 0.5], method="inverted_cdf")
        assert found.hu[i].tolist() == expected.tolist()


def test_missing_organs_are_no_number_and_gaps_are_seen() -> None:
    labels = np.zeros(SHAPE, np.uint16)
    labels[2:4, 5, 5] = labels[9:12, 5, 5] = labels[13:15, 6, 6] = ORGANS.values[0]
    found = compare(labels, labels, np.zeros(SHAPE), GRID, ORGANS)
    assert found.own_dice[0] == 1.0
    assert found.gap_mm[0] == 5 * 3.0
    for values in (found.own_dice, found.hu, found.gap_mm):
        assert np.isnan(values[1:]).all()
    assert np.isnan(found.layout.centroid[1:]).all()
    assert found.layout.volume_ml.tolist() == [7 * 27 / 1000, 0.0, 0.0]
