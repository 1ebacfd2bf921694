"""Sums of a symmetric filter that stay in registers over all taps, in LLVM's language.

LLVM fits vectors of `LANES` voxels to the registers of the processor.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kpt_dask.kernels.simd import FUSED, broadcast, check_order, llvm

_register: Callable[[Any, Any], Any] = cgutils.alloca_once


@llvm
def filter_voxels(
    _: Any,
    source: Any,
    tables: Any,
    taps: Any,
    out: Any,
    where: Any,
    rows: Any,
    vectors: Any,
    lanes: Any,
) -> Any:
    """Make ``vectors · lanes`` voxels of one row or two, all three literal numbers.

    The other parameters are those of `kpt_dask.kernels.row_filter.sum_two_rows`.
    """
    check_order(source, *tables, taps, out)
    code = _code(rows.literal_value, vectors.literal_value, lanes.literal_value)
    return types.void(source, tables, taps, out, where, rows, vectors, lanes), code


def _code(rows: int, vectors: int, lanes: int) -> Callable[..., Any]:
    kind = ir.VectorType(ir.FloatType(), lanes)

    def code(context: Any, b: Any, signature: Any, values: Any) -> Any:
        def array(kind: Any, value: Any) -> Any:
            return context.make_array(kind)(context, b, value)

        source, taps, out = (array(signature.args[i], values[i]) for i in (0, 2, 3))
        table = signature.args[1].dtype
        tables = [array(table, b.extract_value(values[1], i)).data for i in range(2)]
        base, row, at, step = (b.extract_value(values[4], i) for i in range(4))
        n_taps = b.extract_value(taps.shape, 0)
        number = n_taps.type
        # Rows before the first row made, and after the last.
        tables[0] = b.gep(tables[0], [b.mul(row, n_taps)])
        tables[1] = b.gep(tables[1], [b.mul(b.add(row, number(rows - 1)), n_taps)])

        def vector(data: Any, first: Any, v: int) -> Any:
            return b.bitcast(b.gep(data, [b.add(first, number(v * lanes))]), kind.as_pointer())

        def ends(k: Any) -> list[list[Any]]:
            starts = [b.add(base, b.load(b.gep(table, [k]))) for table in tables]
            every = range(vectors)
            return [[b.load(vector(source.data, s, v), align=4) for v in every] for s in starts]

        def tap(k: Any) -> Any:
            return broadcast(b, b.load(b.gep(taps.data, [k])), kind)

        def add(register: Any, factor: Any, before: Any, after: Any) -> None:
            product = b.fmul(factor, b.fadd(before, after, flags=FUSED), flags=FUSED)
            b.store(b.fadd(b.load(register), product, flags=FUSED), register)

        def registers() -> list[Any]:
            return [_register(b, kind) for _ in range(vectors)]

        sums = [registers() for _ in range(rows)]
        # What the first of two rows has after it is what the second had there one tap before,
        # and the other way round.
        last = [registers() for _ in range(2)]
        innermost, factor = ends(number(0)), tap(number(0))
        for v in range(vectors):
            for end, register in zip(innermost, last, strict=True):
                b.store(end[v], register[v])
            for end, total in zip(innermost, sums, strict=False):
                b.store(b.fmul(factor, end[v], flags=FUSED), total[v])
        with cgutils.for_range(b, n_taps, start=number(1)) as loop:
            (before, after), factor = ends(loop.index), tap(loop.index)
            for v in range(vectors):
                if rows == 1:
                    add(sums[0][v], factor, before[v], after[v])
                    continue
                add(sums[0][v], factor, before[v], b.load(last[1][v]))
                add(sums[1][v], factor, b.load(last[0][v]), after[v])
                b.store(before[v], last[0][v])
                b.store(after[v], last[1][v])
        for i, total in enumerate(sums):
            first = b.add(at, b.mul(step, number(i)))
            for v in range(vectors):
                b.store(b.load(total[v]), vector(out.data, first, v), align=4)
        return context.get_dummy_value()

    return code
