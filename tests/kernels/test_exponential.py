"""Powers of two, against numpy in float64."""

import numpy as np

from kpt_dask.kernels.exponential import exp2
from kpt_dask.kernels.jit import kernel


@kernel
def powers(x, out):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        out[i] = exp2(x[i])


def test_powers_of_two() -> None:
    """All fractions that a number of 1 or more can have, and samples of all others.

    One alone gives the bytes that many give, vectorised.
    """
    one_to_two = np.arange(127 << 23, 128 << 23, dtype=np.int32).view(np.float32)
    tiny = np.geomspace(2.0**-40, 1, 99_991)
    everywhere = np.linspace(-126, 127, 99_991)
    whole = np.arange(-126, 128)
    parts = one_to_two, -one_to_two, tiny, -tiny, everywhere, whole
    x = np.concatenate([part.astype(np.float32) for part in parts])
    found = np.empty_like(x)
    powers(x, found)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(found / exact - 1).max() < 3e-7
    np.testing.assert_array_equal(found[-whole.size :], np.exp2(np.arange(-126.0, 128)))
    some = np.linspace(0, x.size - 1, 500, dtype=np.int64)
    np.testing.assert_array_equal([exp2(x[i]) for i in some], found[some])
