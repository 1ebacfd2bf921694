"""Agreement of masks, against distances of all pairs of surface voxels, and against SimpleITK."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from kpt_dask.measures.surfaces import agreement

sitk: Any = SimpleITK

Masks = arrays(np.bool_, array_shapes(min_dims=3, max_dims=3, max_side=6))


def naive_surface(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    voxels = []
    for at in np.argwhere(padded):
        steps = [(a, s) for a, s in product(range(3), (-1, 1))]
        if not all(padded[tuple(at + s * np.eye(3, dtype=int)[a])] for a, s in steps):
            voxels.append(at)
    return np.array(voxels).reshape(-1, 3)


@given(st.data(), Masks)
@settings(max_examples=60, deadline=None)
def test_distances_are_those_of_all_pairs(data: st.DataObject, one: np.ndarray) -> None:
    other = data.draw(arrays(np.bool_, one.shape))
    # As of a tilted gantry.
    axes = np.array([[2.5, 0, 0], [0.9, 1.0, 0], [0, 0, 0.7]])
    found = agreement(one, other, axes, tolerance_mm=1.0)
    if not (one.any() and other.any()):
        same = float(one.any() == other.any())
        assert found == (same, None, None, same)
        return
    z, y, x = axes.T
    a, b = (
        np.array([k * z + j * y + i * x for k, j, i in naive_surface(mask)])
        for mask in (one, other)
    )
    apart = np.linalg.norm(a[:, None] - b[None], axis=2)
    there, back = apart.min(axis=1), apart.min(axis=0)
    both = np.concatenate([there, back])
    assert found.dice == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))
    assert found.mean_distance_mm == pytest.approx(both.mean())
    expected = max(np.percentile(there, 95), np.percentile(back, 95))
    assert found.distance_95_mm == pytest.approx(expected)
    # Distances of exactly the tolerance may be rounded either way.
    inside = [(both <= limit).mean() for limit in (1.0 - 1e-9, 1.0 + 1e-9)]
    assert inside[0] <= found.surface_dice <= inside[1]


def test_simpleitk_finds_the_same_of_balls() -> None:
    grid = np.indices((40, 40, 40)).transpose(1, 2, 3, 0)
    one = np.linalg.norm(grid - 18, axis=3) < 9
    other = np.linalg.norm(grid - (20, 21, 18), axis=3) < 11
    spacing = (3.0, 1.0, 1.5)
    images = [sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in (one, other)]
    for image in images:
        image.SetSpacing(spacing[::-1])
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    found = agreement(one, other, np.diag(spacing))
    assert found.dice == pytest.approx(overlap.GetDiceCoefficient())
    contours = [sitk.LabelContour(image, fullyConnected=False) for image in images]
    distances = [
        sitk.GetArrayFromImage(
            sitk.SignedMaurerDistanceMap(
                contour, squaredDistance=False, useImageSpacing=True, insideIsPositive=False
            )
        )
        for contour in contours
    ]
    on = [sitk.GetArrayFromImage(contour) > 0 for contour in contours]
    there, back = np.abs(distances[1][on[0]]), np.abs(distances[0][on[1]])
    expected = np.concatenate([there, back]).mean()
    assert found.mean_distance_mm == pytest.approx(expected, abs=1e-3)
    limit = max(np.percentile(there, 95), np.percentile(back, 95))
    assert found.distance_95_mm == pytest.approx(limit, abs=1e-3)
