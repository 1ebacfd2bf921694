"""Powers of two, which LLVM vectorises: no branch, no table, the same bytes on every processor."""

import math

import numpy as np

from kpt_dask.kernels.jit import kernel

LOG2_E = 1 / math.log(2)
ROUNDING = 1.5 * 2.0**23
"""Added to a float32, leaves the nearest whole number in its last bits."""
MANTISSA = 23
"""Bits of a float32 below its exponent."""
COEFFICIENTS = (1.0, 0.693146978, 0.240222421, 0.0555073374, 0.00967151279, 0.00132647273)
"""Coefficients of the polynomial that is 2^x for −½ ≤ x ≤ ½, to 1e-7; it is exactly 1 at 0."""
_C0, _C1, _C2, _C3, _C4, _C5 = (np.float32(c) for c in COEFFICIENTS)


@kernel
def exp2(x: np.float32) -> np.float32:
    """Raise 2 to a power, float32, −126 … 127, to 3e-7 of itself; whole powers exactly."""
    x = np.float32(x)
    shifted = np.float32(x + np.float32(ROUNDING))
    rest = x - (shifted - np.float32(ROUNDING))
    power = _C5 * rest + _C4
    power = power * rest + _C3
    power = power * rest + _C2
    power = power * rest + _C1
    power = power * rest + _C0
    # The whole number is added to the exponent.
    exponent = np.int32(shifted.view(np.int32) << np.int32(MANTISSA))
    return np.int32(np.float32(power).view(np.int32) + exponent).view(np.float32)
