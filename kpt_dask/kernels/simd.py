"""What the kernels that are written in LLVM's language share: the vector, and two single pieces.

A vector has `LANES` numbers on every processor; LLVM fits it to the registers that there are.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES = 16
"""Voxels, or other numbers, of a vector: as many float32 as the widest registers hold."""
HALF = LANES // 2
"""Voxels of half a vector."""

VECTOR = ir.VectorType(ir.FloatType(), LANES)
FUSED = ("contract",)
"""Flags of an addition or a multiplication: the two may be fused, as in all kernels."""

llvm: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic
declare: Callable[..., Any] = cgutils.get_or_insert_function


def check_order(*arrays: Any) -> None:
    """Refuse, while a kernel is compiled, arrays whose memory cannot be taken as it lies."""
    if any(array.layout != "C" for array in arrays):
        raise TypingError(f"arrays must be in C order: {arrays}")


def broadcast(b: Any, value: Any, kind: Any) -> Any:
    """Put a number into all lanes of a vector."""
    index, nothing = ir.IntType(32), ir.Constant(kind, ir.Undefined)
    one = b.insert_element(nothing, value, ir.Constant(index, 0))
    first = ir.Constant(ir.VectorType(index, kind.count), kind.count * [0])
    return b.shuffle_vector(one, nothing, first)


@llvm
def extremum_mask(_: Any, values: Any, at: Any, before: Any, after: Any) -> Any:
    """Compare `LANES` voxels from ``values[at]`` on with those at two distances from each.

    Returns
    -------
    int
        Bit i is set if voxel ``at + i`` lies above ``at + i + before`` and ``at + i + after``,
        bit ``LANES + i`` if it lies below both.
    """
    check_order(values)
    n = types.intp
    signature = types.uint32(values, n, n, n)

    def code(context: Any, b: Any, own: Any, arguments: Any) -> Any:
        data = context.make_array(own.args[0])(context, b, arguments[0]).data
        at = arguments[1]

        def vector(first: Any) -> Any:
            return b.load(b.bitcast(b.gep(data, [first]), VECTOR.as_pointer()), align=4)

        here = vector(at)
        others = [vector(b.add(at, distance)) for distance in arguments[2:]]
        bits = []
        for relation in (">", "<"):
            each = [b.fcmp_ordered(relation, here, other) for other in others]
            lanes = b.bitcast(b.and_(*each), ir.IntType(LANES))
            bits.append(b.zext(lanes, ir.IntType(32)))
        return b.or_(bits[0], b.shl(bits[1], ir.Constant(ir.IntType(32), LANES)))

    return signature, code
