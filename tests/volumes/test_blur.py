"""Blurred planes against scipy, with the same bytes wherever the array begins."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kpt_dask.volumes.scale_space import LEVEL_TAPS, gaussian_taps
from tests.helpers import blurred, integer_noise

SHAPES = st.tuples(*3 * [st.integers(1, 23)])


@given(SHAPES, st.floats(0.3, 4), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_blur_is_scipys(shape: tuple[int, int, int], sigma: float, batch: int) -> None:
    """Volumes thinner than the taps' radius included; edges repeat."""
    volume, taps = integer_noise(shape, 3), gaussian_taps(sigma)
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
    full = integer_noise((inner[0] + before[0], inner[1] + before[1], inner[2] + before[2]), seed)
    part = np.ascontiguousarray(full[before[0] :, before[1] :, before[2] :])
    own = blurred(part, taps, 5)[r:-r, r:-r, r:-r]
    z, y, x = (b + r for b in before)
    whole = blurred(full, taps)[z : z + shape[0], y : y + shape[1], x : x + shape[2]]
    assert own.tobytes() == whole.tobytes()
