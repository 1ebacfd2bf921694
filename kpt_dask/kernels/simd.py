"""What the pieces in LLVM's language share: the vector, the decorator, a check of their arrays.

A vector has `LANES` numbers on every processor; LLVM fits it to the registers that there are.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES = 16
"""Voxels, or other numbers, of a vector: as many float32 as the widest registers hold."""
HALF = LANES // 2
"""Voxels of half a vector."""

VECTOR = ir.VectorType(ir.FloatType(), LANES)
FUSED = ("contract",)
"""Flags of an addition or a multiplication: the two may be fused, as in all kernels."""

llvm: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic(prefer_literal=True)
"""Decorator of what writes LLVM's language; numbers that are written in a call come as literals."""


def check_order(*arrays: Any) -> None:
    """Refuse arrays that are not in C order, while a kernel is compiled."""
    if any(array.layout != "C" for array in arrays):
        raise TypingError(f"arrays must be in C order: {arrays}")


def broadcast(b: Any, value: Any, kind: Any) -> Any:
    """Put a number into all lanes of a vector."""
    index, nothing = ir.IntType(32), ir.Constant(kind, ir.Undefined)
    one = b.insert_element(nothing, value, ir.Constant(index, 0))
    first = ir.Constant(ir.VectorType(index, kind.count), kind.count * [0])
    return b.shuffle_vector(one, nothing, first)
