from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xarray as xr

from atlas_store import load_organs
from atlas_store.arrays.boxes import box_of
from atlas_store.arrays.regions import blocks_of
from kpt_dask.grid import Grid
from kpt_dask.organ_transfer.decision import BoxLabels
from kpt_dask.organ_transfer.measures import (
    OrganCounts,
    OrganMeasures,
    count_labels,
    organ_measures,
)

SHAPE = (20, 24, 30)
GRID = Grid.isotropic(SHAPE, 2.0, (100.0, -50.0, 20.0))
ORGANS = load_organs("openkbp")
THRESHOLD = 0.4


Arrays = tuple[Any, Any, Any]
"""HU, labels, and shares (organ, z, y, x)."""


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    random = np.random.default_rng(0)
    shares = np.zeros((len(ORGANS), *SHAPE), np.float32)
    shares[0, 2:9, 4:12, 5:13] = random.random((7, 8, 8), np.float32)
    shares[2, 0:6, 10:20, 8:22] = random.random((6, 10, 14), np.float32)
    shares[4] = np.float32(0.1) * (random.random(SHAPE) > 0.5)
    winner = np.array(ORGANS.values)[shares.argmax(axis=0)]
    labels = np.where(shares.max(axis=0) >= THRESHOLD, winner, 0).astype(np.uint16)
    return random.integers(-1000, 1000, SHAPE).astype(np.float32), labels, shares


SHOWING = [3, 4, 5, 3, 4, 5, 3]
"""Atlases that show each organ."""


def found(
    arrays: Arrays, block: tuple[int, int, int], overlap: Any = None
) -> dict[str, OrganMeasures]:
    hu, labels, shares = arrays
    position = np.array([[100, -50, 20], [106, -50, 20], [103, -46, 20]], np.float32)
    keypoints = xr.Dataset({"position": (("keypoint", "axis"), position)})
    label = np.array([ORGANS.values[0]] * 2 + [0], np.uint16)
    votes = xr.Dataset({"label": ("keypoint", label)})
    total = OrganCounts.empty(len(ORGANS))
    for region in blocks_of(SHAPE, block):
        counts = OrganCounts.empty(len(ORGANS))
        decided = BoxLabels(box_of(region), THRESHOLD, np.uint16)
        for o, value in enumerate(ORGANS.values):
            part = shares[o][region]
            rows = decided.update(value, box_of(region), part, counts.above[o])
            np.testing.assert_array_equal(rows, part.any(axis=2))
        np.testing.assert_array_equal(decided.labels, labels[region])
        corner = np.array([part.start for part in region])
        count_labels(labels[region], hu[region], ORGANS.values, corner, counts)
        total += counts
    if overlap is not None:
        total = replace(total, overlap=overlap)
    # Three atlases moved each organ.
    total = replace(total, weights=np.array([[0.5, 0.0, 0.2, 0.3]] * len(ORGANS)))
    return organ_measures(total, ORGANS, GRID, keypoints, votes, SHOWING)


def test_measures_follow_from_their_definitions(
    arrays: Arrays,
) -> None:
    hu, labels, shares = arrays
    measured = found(arrays, (8, 16, 32))
    assert list(measured) == list(ORGANS.names)
    for o, organ in enumerate(ORGANS):
        mask, one = labels == organ.value, measured[organ.name]
        assert one.volume_ml == pytest.approx(mask.sum() * 0.008)
        if not mask.any():
            assert (one.mean_hu, one.centroid, one.extent, one.confidence) == (None,) * 3 + (0,)
            continue
        where = GRID.to_mm(np.argwhere(mask))
        assert one.mean_hu == pytest.approx(hu[mask].mean())
        assert one.sd_hu == pytest.approx(hu[mask].std())
        np.testing.assert_allclose(one.centroid, where.mean(axis=0))
        np.testing.assert_allclose(one.extent, [where.min(axis=0), where.max(axis=0)])
        p = shares[o].astype(float)
        whole, firm = (p >= 0.4).sum(), (p >= 0.5).sum()
        radius = (3 * mask.sum() * 8 / (4 * np.pi)) ** (1 / 3)
        agreement = 2 * firm / (whole + firm)
        expected = agreement * max(1 - 3 / radius, 0) * 3 / SHOWING[o]
        assert one.confidence == pytest.approx(expected)
        low, high = one.interval_ml
        assert low <= one.volume_ml <= high
        volume = mask.sum() * 0.008
        inner, outer = (volume * max(1 + e / radius, 0) ** 3 for e in (-5, 5))
        assert low == pytest.approx(min((p >= 0.7).sum() * 0.008, inner))
        assert high == pytest.approx(max((p >= 0.15).sum() * 0.008, outer))


def test_confidence_is_the_overlap_of_atlases_where_it_is_known(arrays: Arrays) -> None:
    overlap = np.array([0.7, np.nan, 0.5, 0.6, 0.8, 0.2, np.nan])
    usual, measured = found(arrays, (8, 16, 32)), found(arrays, (8, 16, 32), overlap)
    for organ, expected in zip(ORGANS, overlap, strict=True):
        one = measured[organ.name].confidence
        if np.isnan(expected) or not measured[organ.name].volume_ml:
            assert one == usual[organ.name].confidence
        else:
            assert one == expected != usual[organ.name].confidence
    assert measured[ORGANS.names[0]].volume_ml


def test_an_organ_at_the_border_and_the_spread_of_votes_are_told(
    arrays: Arrays,
) -> None:
    measured = list(found(arrays, (8, 16, 32)).values())
    assert [one.at_border for one in measured[:3]] == [False, False, True]
    assert [one.votes for one in measured[:3]] == [2, 0, 0]
    assert measured[0].spread_mm == pytest.approx(3)
    assert measured[1].spread_mm is None


def test_blocks_make_no_difference(arrays: Arrays) -> None:
    assert found(arrays, (8, 8, 8)) == found(arrays, (32, 32, 32))
