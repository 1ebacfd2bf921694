"""The Gaussian scale space against scipy, and the pyramid's blocks against the whole."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kpt_dask.runtime import cluster
from kpt_dask.volumes.omezarr import CHUNKS, create_levels
from kpt_dask.volumes.pyramid import fill_pyramid
from kpt_dask.volumes.scale_space import (
    FIRST_TAPS,
    LEVEL_TAPS,
    MAX_OCTAVES,
    SMALLEST_OCTAVE,
    blur_planes,
    blur_scratch,
    gaussian_taps,
    next_octave_taps,
    octave_shapes,
)
from tests.naive import keypoints

SHAPES = st.tuples(*3 * [st.integers(1, 23)])


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cluster.session() as one:
        yield one


def noise(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.float32)


def blurred(volume: np.ndarray, taps: np.ndarray, batch: int = 1) -> np.ndarray:
    """All planes through `blur_planes`, from a ring as small as may be."""
    n, r = volume.shape[0], taps.size - 1
    ring = np.full((min(2 * r + batch, n), *volume.shape[1:]), np.nan, np.float32)
    scratch = blur_scratch(batch, volume.shape[2], r)
    out = np.empty_like(volume)
    filled = 0
    for first in range(0, n, batch):
        last = min(first + batch, n)
        for plane in range(filled, min(last + r, n)):
            ring[plane % len(ring)] = volume[plane]
        filled = min(last + r, n)
        blur_planes(ring, first, last - first, n, taps, scratch, out)
    return out


@given(st.floats(0.3, 6))
def test_taps_are_scipys(sigma: float) -> None:
    taps = gaussian_taps(sigma)
    radius = taps.size - 1
    assert radius == int(np.ceil(3 * sigma))
    impulse = np.zeros(2 * radius + 1)
    impulse[radius] = 1
    expected = ndimage.gaussian_filter1d(impulse, sigma, radius=radius, mode="constant")
    np.testing.assert_allclose(np.concatenate([taps[:0:-1], taps]), expected, rtol=1e-6)


def test_increments_add_up_to_an_octave() -> None:
    """Variances of the taps that lead from the input to G[3] are those of 2·σ0 at once."""

    def variance(taps: np.ndarray) -> float:
        return float(2 * (taps * np.arange(taps.size) ** 2).sum())

    steps = variance(FIRST_TAPS) + sum(variance(taps) for taps in LEVEL_TAPS[:3])
    assert steps == pytest.approx(variance(next_octave_taps(0)), rel=0.01)
    steps = sum(variance(taps) for taps in LEVEL_TAPS[:3])
    assert steps == pytest.approx(variance(next_octave_taps(1)), rel=0.01)


@given(SHAPES, st.floats(0.3, 4), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_blur_is_scipys(shape: tuple[int, int, int], sigma: float, batch: int) -> None:
    """Volumes thinner than the taps' radius included; edges repeat."""
    volume, taps = noise(shape, 3), gaussian_taps(sigma)
    expected = volume.astype(np.float64)
    for axis in range(3):
        both = np.concatenate([taps[:0:-1], taps]).astype(np.float64)
        expected = ndimage.correlate1d(expected, both, axis, mode="nearest")
    np.testing.assert_allclose(blurred(volume, taps, batch), expected, atol=2e-3)


@given(SHAPES, st.integers(0, 9), st.tuples(*3 * [st.integers(0, 30)]))
@settings(max_examples=25, deadline=None)
def test_a_voxels_bytes_do_not_depend_on_where_the_array_begins(
    shape: tuple[int, int, int], seed: int, before: tuple[int, int, int]
) -> None:
    """Vector bodies and remainders of the loops must round alike."""
    taps = LEVEL_TAPS[1]
    r = taps.size - 1
    inner = tuple(n + 2 * r for n in shape)
    full = noise((inner[0] + before[0], inner[1] + before[1], inner[2] + before[2]), seed)
    part = np.ascontiguousarray(full[before[0] :, before[1] :, before[2] :])
    own = blurred(part, taps, 5)[r:-r, r:-r, r:-r]
    z, y, x = (b + r for b in before)
    whole = blurred(full, taps)[z : z + shape[0], y : y + shape[1], x : x + shape[2]]
    assert own.tobytes() == whole.tobytes()


@given(st.tuples(*3 * [st.integers(1, 3000)]))
def test_octaves_halve_until_they_are_too_small(shape: tuple[int, int, int]) -> None:
    shapes = octave_shapes(shape)
    assert shapes[0] == shape
    assert len(shapes) <= MAX_OCTAVES
    for fine, coarse in pairwise(shapes):
        assert coarse == tuple(len(range(0, n, 2)) for n in fine)
        assert min(coarse) >= SMALLEST_OCTAVE
    following = min((n + 1) // 2 for n in shapes[-1])
    assert len(shapes) == MAX_OCTAVES or following < SMALLEST_OCTAVE


@pytest.mark.parametrize("shape", [(159, 27, 30), (258, 24, 25), (26, 265, 24)])
def test_pyramid_in_blocks_is_the_whole(
    shape: tuple[int, int, int], client: Client, tmp_path: Path
) -> None:
    """Bytes of the whole volume blurred at once; and the float64 reference."""
    assert shape[0] > 2 * CHUNKS[0] or shape[1] > 2 * CHUNKS[1]
    group = zarr.create_group(str(tmp_path / "volume.zarr"), zarr_format=3)
    levels = create_levels(group, octave_shapes(shape), np.float32)
    assert len(levels) >= 2
    levels[0][:] = noise(shape, 4)
    fill_pyramid(levels, client=client)
    for octave, (fine, coarse) in enumerate(pairwise(levels)):
        source = np.asarray(fine[:])
        whole = blurred(source, next_octave_taps(octave), 16)[::2, ::2, ::2]
        assert np.asarray(coarse[:]).tobytes() == whole.tobytes()
        expected = keypoints.next_octave(source, octave == 0)
        np.testing.assert_allclose(coarse[:], expected, atol=2e-3)
