"""Powers of two, which a compiler can raise many at a time: no branch, no table."""

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

from kpt_dask.kernels.simd import FUSED, llvm

LOG2_E = 1 / math.log(2)
_ROUNDING = 1.5 * 2.0**23
"""Added to a float32, leaves the nearest whole number in its last bits."""
_MANTISSA = 23
"""Bits of a float32 below its exponent."""
_POWERS = (1.0, 0.693146978, 0.240222421, 0.0555073374, 0.00967151279, 0.00132647273)
"""Of the polynomial that is 2^x for −½ ≤ x ≤ ½, to 1e-7, and exactly 1 at 0."""


def exp2_code(b: Any, x: Sequence[Any]) -> list[Any]:
    """Raise 2 to powers, float32 or vectors of them: see `exp2`. Each step of all together."""
    kind = x[0].type
    lanes = getattr(kind, "count", 0)
    bits = ir.VectorType(ir.IntType(32), lanes) if lanes else ir.IntType(32)

    def number(value: float, kind: Any = kind) -> Any:
        return ir.Constant(kind, lanes * [value] if lanes else value)

    moved = [b.fadd(one, number(_ROUNDING)) for one in x]
    whole = [b.fsub(one, number(_ROUNDING)) for one in moved]
    rest = [b.fsub(*both) for both in zip(x, whole, strict=True)]
    factor = len(x) * [number(_POWERS[-1])]
    for coefficient in _POWERS[-2::-1]:
        product = [b.fmul(*both, flags=FUSED) for both in zip(factor, rest, strict=True)]
        factor = [b.fadd(one, number(coefficient), flags=FUSED) for one in product]
    # The whole number is added to the exponent.
    exponent = [b.shl(b.bitcast(one, bits), number(_MANTISSA, bits)) for one in moved]
    power = [b.add(b.bitcast(one, bits), e) for one, e in zip(factor, exponent, strict=True)]
    return [b.bitcast(one, kind) for one in power]


@llvm
def exp2(_: Any, x: Any) -> Any:
    """Raise 2 to a power, float32, −126 … 127, to 3e-7 of itself; whole powers exactly.

    Compilers can do it to many numbers at a time, as there is no branch and no table. Not for
    kernels that may reassociate.
    """

    def code(context: Any, b: Any, own: Any, values: Any) -> Any:
        return exp2_code(b, values)[0]

    signature = types.float32(types.float32)
    return signature, code
