"""Symmetric filters along whole rows, their sums kept in registers.

A symmetric filter adds up pairs of rows, each pair times its tap. As loops over rows, every
tap would read and write the whole sum again. Here `LANES` voxels at a time are summed up over
all taps in vectors that are explicit in LLVM's own language, which fits them to whatever
registers there are. Two neighbouring rows are made at once where they can share what is read.

Each voxel goes through the same operations in the same order, wherever it lies in a row and
whichever function makes it; as in all kernels, multiply-adds may be fused.
"""

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from kpt_dask.jit import kernel

Flat = Annotated[NDArray[np.float32], "voxels"]
Table = Annotated[NDArray[np.int64], "rows taps"]

LANES = 16
"""Voxels of a vector: as many float32 as the widest registers hold."""
VECTORS = 4
"""Vectors that are summed up side by side, so that none waits for its own last sum."""

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_FUSED = ("contract",)


def _emit(b: Any, data: list[Any], where: list[Any], n_taps: Any, rows: int, vectors: int) -> None:
    """Write the instructions of one `_summing`, into an LLVM builder."""
    source, low, high, taps, out = data
    base, at, step = where

    def constant(value: int) -> Any:
        return ir.Constant(base.type, value)

    def vector(array: Any, first: Any, v: int) -> Any:
        place = b.gep(array, [b.add(first, constant(v * LANES))])
        return b.bitcast(place, _VECTOR.as_pointer())

    def pair(k: Any, v: int) -> list[Any]:
        firsts = (b.add(base, b.load(b.gep(table, [k]))) for table in (low, high))
        return [b.load(vector(source, first, v), align=4) for first in firsts]

    def spread_tap(k: Any) -> Any:
        index, nothing = ir.IntType(32), ir.Constant(_VECTOR, ir.Undefined)
        one = b.insert_element(nothing, b.load(b.gep(taps, [k])), ir.Constant(index, 0))
        return b.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(index, LANES), LANES * [0]))

    def registers() -> list[Any]:
        return [cgutils.alloca_once(b, _VECTOR) for _ in range(vectors)]

    def add(register: Any, tap: Any, before: Any, after: Any) -> None:
        product = b.fmul(tap, b.fadd(before, after, flags=_FUSED), flags=_FUSED)
        b.store(b.fadd(b.load(register), product, flags=_FUSED), register)

    sums = [registers() for _ in range(rows)]
    # Of two rows, what the first has after it is what the second had there one tap before,
    # and the other way round.
    last = [registers() for _ in range(2)]
    tap = spread_tap(constant(0))
    for v in range(vectors):
        ends = pair(constant(0), v)
        for row in range(rows):
            b.store(b.fmul(tap, ends[row], flags=_FUSED), sums[row][v])
        for end, register in zip(ends, last, strict=True):
            b.store(end, register[v])
    with cgutils.for_range(b, n_taps, start=constant(1)) as loop:
        tap = spread_tap(loop.index)
        for v in range(vectors):
            before, after = pair(loop.index, v)
            if rows == 1:
                add(sums[0][v], tap, before, after)
                continue
            add(sums[0][v], tap, before, b.load(last[1][v]))
            add(sums[1][v], tap, b.load(last[0][v]), after)
            b.store(before, last[0][v])
            b.store(after, last[1][v])
    for row in range(rows):
        first = b.add(at, b.mul(step, constant(row)))
        for v in range(vectors):
            b.store(b.load(sums[row][v]), vector(out, first, v), align=4)


def _summing(rows: int, vectors: int) -> Callable[..., None]:
    """Make a function that sums up `vectors` vectors of one row, or of two neighbours.

    Its arguments are those of `sum_rows`; the second row of two has the next row of the tables,
    and is written `step` voxels behind the first.
    """

    def typed(
        _: Any,
        source: Any,
        base: Any,
        low: Any,
        high: Any,
        row: Any,
        taps: Any,
        out: Any,
        at: Any,
        step: Any,
    ) -> Any:
        n = types.intp
        signature = types.void(source, n, low, high, n, taps, out, n, n)

        def code(context: Any, builder: Any, own: Any, values: Any) -> Any:
            arrays = {
                i: context.make_array(own.args[i])(context, builder, values[i])
                for i in (0, 2, 3, 5, 6)
            }
            n_taps = builder.extract_value(arrays[5].shape, 0)
            first = builder.mul(values[4], n_taps)
            last = builder.add(first, builder.mul(n_taps, ir.Constant(n_taps.type, rows - 1)))
            data = [
                arrays[0].data,
                builder.gep(arrays[2].data, [first]),
                builder.gep(arrays[3].data, [last]),
                arrays[5].data,
                arrays[6].data,
            ]
            where = [values[1], values[7], values[8]]
            _emit(builder, data, where, n_taps, rows, vectors)
            return context.get_dummy_value()

        return signature, code

    made: Callable[..., None] = intrinsic(typed)
    return made


_one, _one_wide = _summing(1, 1), _summing(1, VECTORS)
_two, _two_wide = _summing(2, 1), _summing(2, VECTORS)


@kernel
def sum_row(
    source: Flat,
    base: int,
    low: Table,
    high: Table,
    row: int,
    taps: NDArray[np.float32],
    out: Flat,
    at: int,
    n: int,
) -> None:
    """Filter a row: out[at + x] = Σ_k taps[k] · (source[low_k + x] + source[high_k + x]).

    The term of k = 0 is taps[0] · source[low_0 + x] alone.

    Parameters
    ----------
    source, out : float32 arrays
        Flat, and not the same voxels.
    base : int
        Added to whatever the tables say.
    low, high : int64 arrays (rows, taps), C order
        Where the row before and the row after begin in `source`, for each tap.
    row : int
        Which row of the tables.
    taps : float32 array (taps)
    at : int
        Where the result begins in `out`.
    n : int
        Voxels of the row.
    """
    x = 0
    while x + VECTORS * LANES <= n:
        _one_wide(source, base + x, low, high, row, taps, out, at + x, 0)
        x += VECTORS * LANES
    if n < LANES:
        for i in range(n):
            value = taps[0] * source[base + low[row, 0] + i]
            for k in range(1, taps.size):
                before = source[base + low[row, k] + i]
                value += taps[k] * (before + source[base + high[row, k] + i])
            out[at + i] = value
        return
    while x < n:
        # The last vector begins before the end of the one before it, and does its part again.
        i = min(x, n - LANES)
        _one(source, base + i, low, high, row, taps, out, at + i, 0)
        x += LANES


@kernel
def sum_two_rows(
    source: Flat,
    base: int,
    low: Table,
    high: Table,
    row: int,
    taps: NDArray[np.float32],
    out: Flat,
    at: int,
    step: int,
    n: int,
) -> None:
    """Do what `sum_row` does for two rows of the tables, the second to ``out[at + step]`` on.

    They must be neighbours: where the second has its rows after it, the first has them one tap
    later, ``high[row, k + 1] == high[row + 1, k]``, and so have ``low[row + 1, k + 1]`` and
    ``low[row, k]``; the first ones before and after are ``low[row, 0]`` and ``low[row + 1, 0]``.
    """
    if n < LANES:
        sum_row(source, base, low, high, row, taps, out, at, n)
        sum_row(source, base, low, high, row + 1, taps, out, at + step, n)
        return
    x = 0
    while x + VECTORS * LANES <= n:
        _two_wide(source, base + x, low, high, row, taps, out, at + x, step)
        x += VECTORS * LANES
    while x < n:
        i = min(x, n - LANES)
        _two(source, base + i, low, high, row, taps, out, at + i, step)
        x += LANES


@intrinsic
def compare(_: Any, values: Any, at: Any, before: Any, after: Any) -> Any:
    """Compare `LANES` voxels from ``values[at]`` on with those at two distances from each.

    Returns
    -------
    int
        Bit i is set if voxel ``at + i`` lies above ``at + i + before`` and ``at + i + after``,
        bit ``LANES + i`` if it lies below both.
    """
    n = types.intp
    signature = types.uint32(values, n, n, n)

    def code(context: Any, b: Any, own: Any, arguments: Any) -> Any:
        data = context.make_array(own.args[0])(context, b, arguments[0]).data
        at = arguments[1]

        def vector(first: Any) -> Any:
            return b.load(b.bitcast(b.gep(data, [first]), _VECTOR.as_pointer()), align=4)

        here = vector(at)
        others = [vector(b.add(at, distance)) for distance in arguments[2:]]
        bits = []
        for relation in (">", "<"):
            each = [b.fcmp_ordered(relation, here, other) for other in others]
            lanes = b.bitcast(b.and_(*each), ir.IntType(LANES))
            bits.append(b.zext(lanes, ir.IntType(32)))
        return b.or_(bits[0], b.shl(bits[1], ir.Constant(ir.IntType(32), LANES)))

    return signature, code
