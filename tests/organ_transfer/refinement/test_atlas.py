"""The refinement of one atlas: what the equations say, and a shift that intensities show."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

from kpt_dask.matching.displacement import Field
from kpt_dask.organ_transfer.refinement import atlas
from kpt_dask.organ_transfer.refinement.agreement import correlations
from kpt_dask.organ_transfer.refinement.atlas import PER_MM, WEIGHT, refine_atlas
from kpt_dask.organ_transfer.refinement.lattice import (
    FAST,
    FULL,
    Lattice,
    fitting,
    lattices,
    typical_size,
)
from kpt_dask.organ_transfer.refinement.schedule import compare_with, create_fields
from tests.helpers import ORGANS, SPACING, make_store, volume_of
from tests.naive import refinement as naive
from tests.naive.stations import AnnotatedImage

Array = NDArray[Any]

SHAPE = (24, 26, 28)
ORIGIN = (10.0, -40.0, 7.0)
LEVELS = ((8.0, 3), (6.0, 2), (4.0, 2))


def body(seed: int, shape: tuple[int, int, int] = SHAPE) -> Array:
    """Soft tissue, smooth at the scale of organs."""
    noise = np.random.default_rng(seed).normal(0, 1, shape)
    smooth = gaussian_filter(noise, 2.5)
    return np.asarray((200 * smooth / smooth.std()).round())


def labels() -> Array:
    found = np.zeros(SHAPE, np.uint16)
    found[8:16, 8:18, 6:14] = 5
    found[10:14, 10:20, 16:22] = 2
    return found


def refine(tmp_path: Path, scan: Array, atlas: Array, field: Field, levels: Any) -> Any:
    """Run the task: the map and the weight at the points of the finest lattice, and the rest."""
    store = make_store(tmp_path / "s", [AnnotatedImage(atlas, labels(), ORIGIN)])
    volume = volume_of(tmp_path / "v.zarr", AnnotatedImage(scan, labels(), ORIGIN))
    box: Any = tuple((0, n) for n in SHAPE)
    comparison = compare_with(volume, [box], ORGANS, (25.0, 10.0), levels)
    out = create_fields(zarr.create_group(str(tmp_path / "out")), comparison, 1)
    [one] = store.atlases(store.ids())
    found = refine_atlas(comparison, one, field, out, 0)
    assert found is not None
    stored = np.asarray(out[0]).astype(float)
    u = stored[:3] / PER_MM + np.array(found.base)[:, None, None, None]
    return u, stored[3] / WEIGHT, found, comparison


def test_a_refined_field_is_what_the_equations_say(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scan, atlas = body(1), body(1)
    by = np.array([1.2, -0.8, 0.5])[:, None, None, None]
    shifted = map_coordinates(atlas, np.indices(SHAPE) + by, order=1)
    atlas = shifted.round()
    position = (np.array(ORIGIN) + rng.uniform(0, 50, (20, 3))).astype(np.float32)
    field = Field.of(position, rng.normal(0, 2, (20, 3)).astype(np.float32))
    u, weight, found, comparison = refine(tmp_path, scan, atlas, field, LEVELS)

    finest = comparison.levels[-1].lattice.shape
    counts = [int(np.ceil((n - 1) * 4.0 / 16)) + 1 for n in finest]
    points = np.array(ORIGIN) + 16 * np.indices(counts).reshape(3, -1).T
    nodes = field.at(points).astype(float)
    nodes[:, :3] *= -1
    nodes = nodes.T.reshape(4, *counts)

    def start(h: float, shape: Any, pad: int = naive.PAD) -> Array:
        nothing = np.zeros((3, *shape))
        where = np.full(3, -pad * h / 16), h / 16, nothing, 1.0
        return np.array([naive.sampled(one, *where) for one in nodes])

    def start_of_field(h: float, shape: Any) -> Array:
        return start(h, shape)[:3]

    def near(h: float, shape: Any) -> Array:
        """Within a cube of 18 mm of where organs land, on the finest lattice and from there."""
        u0 = start(4.0, finest, 0)
        landed = np.zeros(finest, bool)
        for x in np.ndindex(*finest):
            at = np.floor(2 * np.array(x) + u0[(slice(3), *x)] / SPACING + 0.5).astype(int)
            if (at >= 0).all() and (at < SHAPE).all():
                landed[x] = labels()[tuple(at)] > 0
        grown = np.zeros(finest, bool)
        for x in np.argwhere(landed):
            grown[tuple(slice(max(i - 4, 0), i + 5) for i in x)] = True
        if h == 4.0:
            return grown
        coarse = np.zeros(shape, bool)
        for x in np.argwhere(grown):
            at = np.minimum(np.floor(x / (h / 4) + 0.5).astype(int), np.array(shape) - 1)
            coarse[tuple(at)] = True
        return coarse

    expected, cc = naive.refined(scan, atlas, start_of_field, near, LEVELS, SPACING)
    # The percentile is good to 0.4 %, and steps of a mm to 1/128.
    np.testing.assert_allclose(u, expected, atol=0.06)
    first = start(4.0, finest, 0)
    assert np.abs(u - first[:3]).max() > 1
    cc = np.maximum(cc, 0.02)
    np.testing.assert_allclose(weight, cc * first[3] ** 0.25, atol=0.02)
    np.testing.assert_allclose(found.correlation / 255, cc, atol=0.03)
    said = [found.labels == o for o in (1, 2)]
    assert all(one.sum() > 20 for one in said)
    [mean] = correlations([found], 3)
    by_hand = [found.correlation[one].mean() / 255 for one in said]
    np.testing.assert_allclose(mean, [*by_hand, 0])
    other = replace(found, labels=np.where(found.labels == 1, 3, found.labels).astype(np.uint16))
    np.testing.assert_allclose(correlations([found, other], 3)[1], [*by_hand, by_hand[0]])


def test_a_shift_that_the_matches_do_not_know_is_found(tmp_path: Path) -> None:
    scan = body(3)
    by = np.array([3.0, -4.0, 5.0])
    moved = np.indices(SHAPE) - (by / SPACING)[:, None, None, None]
    atlas = map_coordinates(scan, moved, order=1, mode="nearest").round()
    position = (np.array(ORIGIN) + np.indices((3, 3, 3)).reshape(3, -1).T * 20).astype(np.float32)
    field = Field.of(position, np.zeros_like(position))
    u, _, found, _ = refine(tmp_path, scan, atlas, field, ((12.0, 12), (8.0, 8), (6.0, 8)))
    inner = u[:, 2:-2, 2:-2, 2:-2].reshape(3, -1)
    np.testing.assert_allclose(np.median(inner, axis=1), by, atol=1)
    assert found.correlation[found.labels == 1].mean() > 0.8 * 255


def test_where_no_organ_may_lie_is_left_out(tmp_path: Path) -> None:
    """The rest is the same, to the byte."""
    shape = 20, 22, 70
    scan = body(5, shape)
    organ = np.zeros(shape, np.uint16)
    organ[8:14, 8:16, 8:20] = 5
    shifted = map_coordinates(scan, np.indices(shape) + 0.8, order=1, mode="nearest").round()
    store = make_store(tmp_path / "s", [AnnotatedImage(shifted, organ, ORIGIN)])
    volume = volume_of(tmp_path / "v.zarr", AnnotatedImage(scan, organ, ORIGIN))
    position = (np.array(ORIGIN) + np.indices((2, 2, 5)).reshape(3, -1).T * 25).astype(np.float32)
    field = Field.of(position, np.zeros_like(position))
    [atlas] = store.atlases(store.ids())
    whole: Any = tuple((0, n) for n in shape)
    parts: Any = [(*whole[:2], (0, 40)), ((0, 4), (0, 4), (60, 70))]
    arrays, results = [], []
    for i, boxes in enumerate(([whole], parts)):
        comparison = compare_with(volume, boxes, ORGANS, (25.0, 10.0), LEVELS)
        out = create_fields(zarr.create_group(str(tmp_path / f"out{i}")), comparison, 1)
        results.append(refine_atlas(comparison, atlas, field, out, 0))
        arrays.append(np.asarray(out[0]))
    assert arrays[0].shape == arrays[1].shape
    assert (arrays[0] == arrays[1])[..., :21].all()
    assert arrays[0][..., 21:30].any()
    assert not arrays[1][..., 21:30].any()
    for one in results:
        assert one is not None
        assert (one.labels == 1).sum() > 20


def test_large_organs_are_not_refined_on_fine_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of 5.1 mL and 1.9 mL."""
    field = Field.of(np.array([ORIGIN], np.float32), np.zeros((1, 3), np.float32))
    shifted = map_coordinates(body(1), np.indices(SHAPE) + 0.7, order=1, mode="nearest").round()

    def refined(name: str, small: float, levels: Any) -> Array:
        monkeypatch.setattr(atlas, "SMALL", small)
        u, *_ = refine(tmp_path / name, body(1), shifted, field, levels)
        return np.asarray(u)

    coarse = *LEVELS[:2], (4.0, 0)
    neither, one, both = (refined(f"below_{small}", small, LEVELS) for small in (1.0, 3.0, 100.0))
    assert (neither == refined("coarse", 100.0, coarse)).all()
    assert (one != neither).any()
    assert (one != both).any()


def test_organs_say_where_to_begin(tmp_path: Path) -> None:
    """Of the atlas, the longest sides are 20 and 20 mm; then as of heads and of trunks."""
    store = make_store(tmp_path / "s", [AnnotatedImage(body(1), labels(), ORIGIN)])
    assert typical_size(store.atlases(store.ids())) == 20
    assert typical_size([]) == 0
    assert [h for h, _ in fitting(FULL, 60)] == [6, 4, 3]
    assert [h for h, _ in fitting(FULL, 90)] == [8, 6, 4, 3]
    assert fitting(FAST, 140) == list(FAST)


def test_levels_of_large_scans_end_before_the_finest(tmp_path: Path) -> None:
    volume = volume_of(tmp_path / "v.zarr", AnnotatedImage(body(1), labels(), ORIGIN))
    small: Any = tuple((0, n) for n in SHAPE)
    assert [one.spacing for one, _ in lattices(small, volume.grid, LEVELS)] == [8, 6, 4]
    large: Any = ((0, 700), (0, 256), (0, 256))
    found = [one for one, _ in lattices(large, volume.grid, LEVELS)]
    assert [one.spacing for one in found] == [8, 6]
    assert found[-1] == Lattice.over(large, volume.grid, 6.0)
