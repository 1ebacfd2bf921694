"""Rows that are filtered in registers, against plain loops and numpy."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.kernels.row_filter import WIDE, row_llvm, row_plain, two_rows_llvm, two_rows_plain
from kpt_dask.kernels.simd import LANES

WIDTHS = st.integers(1, 2 * WIDE + LANES + 3)


@given(WIDTHS, st.integers(0, 12), st.integers(0, 20), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_rows_are_filtered(n: int, radius: int, shift: int, seed: int) -> None:
    """Nothing beside the row is touched; twins, and two rows at once, give the same bytes."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1000, 2000, (2 * radius + 2, n)).astype(np.float32)
    taps = rng.random(radius + 1).astype(np.float32)
    k = np.arange(radius + 1)
    centre = np.array([[radius], [radius + 1]])
    low, high = (centre - k) * n, (centre + k) * n
    source = np.concatenate([np.zeros(shift, np.float32), rows.ravel()])
    untouched, step = np.float32(7), n + 5
    made = [np.full(shift + 2 * step, untouched) for _ in range(4)]
    for row in range(2):
        where = shift, row, shift + row * step
        row_plain(source, (low, high), taps, made[0], where, n)
        row_llvm(source, (low, high), taps, made[1], where, n)
    both = shift, 0, shift, step
    two_rows_plain(source, (low, high), taps, made[2], both, n)
    two_rows_llvm(source, (low, high), taps, made[3], both, n)
    assert len({out.tobytes() for out in made}) == 1
    exact = rows.astype(np.float64)
    expected = np.full(made[0].shape, float(untouched))
    for row in range(2):
        weights = np.concatenate([taps[:0:-1], taps]).astype(np.float64)
        start = shift + row * step
        expected[start : start + n] = weights @ exact[row : row + 2 * radius + 1]
    np.testing.assert_allclose(made[0], expected, rtol=1e-5, atol=5e-3)
