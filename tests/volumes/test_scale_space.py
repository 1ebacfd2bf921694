"""The scale space: its taps are scipy's, and its octaves halve."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from kpt_dask.volumes.scale_space import (
    FIRST_TAPS,
    LEVEL_TAPS,
    MAX_OCTAVES,
    SMALLEST_OCTAVE,
    gaussian_taps,
    next_octave_taps,
    octave_shapes,
)


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
