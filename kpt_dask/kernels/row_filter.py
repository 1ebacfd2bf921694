"""Symmetric filters of rows, in vectors.

A symmetric filter adds up pairs of rows, each pair times its tap. As loops over rows, every
tap would read and write the whole sum again. Here `LANES` voxels at a time are summed up over
all taps in vectors that are explicit in LLVM's own language, which fits them to whatever
registers there are. Two neighbouring rows are made at once where they can share what is read.

Each voxel goes through the same operations in the same order, wherever it lies in a row and
whichever function makes it; as in all kernels, multiply-adds may be fused.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kpt_dask.kernels.simd import FUSED, LANES, VECTOR, broadcast, check_order, llvm

VECTORS = 4
"""Vectors that are summed up side by side, so that none waits for its own last sum."""

_register: Callable[[Any, Any], Any] = cgutils.alloca_once


class _Filter:
    """Writes the instructions of a filter, with an LLVM builder.

    Parameters
    ----------
    data : sequence of LLVM pointers
        To the source, the tables before and after (of the last row made), the taps, the output.
    where : sequence of LLVM integers
        Added to the tables; where the output begins; from there to the second row.
    n_taps : LLVM integer
    rows : int
        1, or 2 that are neighbours.
    """

    def __init__(
        self, builder: Any, data: Sequence[Any], where: Sequence[Any], n_taps: Any, rows: int
    ) -> None:
        self._b = builder
        self._source, self._low, self._high, self._taps, self._out = data
        self._base, self._at, self._step = where
        self._n_taps = n_taps
        self._rows = rows

    def row(self, n: Any) -> None:
        """Make `n` voxels of each row."""
        b, wide = self._b, VECTORS * LANES
        short = b.icmp_signed("<", n, self._constant(LANES))
        with b.if_else(short) as (then, otherwise):
            with then, cgutils.for_range(b, n) as loop:
                self._part(loop.index, 1, ir.VectorType(ir.FloatType(), 1))
            with otherwise:
                blocks = b.sdiv(n, self._constant(wide))
                with cgutils.for_range(b, blocks) as loop:
                    self._part(b.mul(loop.index, self._constant(wide)), VECTORS, VECTOR)
                start, step = b.mul(blocks, self._constant(wide)), self._constant(LANES)
                last = b.sub(n, step)
                with cgutils.for_range_slice(b, start, n, step, inc=True) as (x, _):
                    # The last vector may do again what the one before it has done.
                    beyond = b.icmp_signed(">", x, last)
                    self._part(b.select(beyond, last, x), 1, VECTOR)

    def _constant(self, value: int) -> Any:
        return ir.Constant(self._base.type, value)

    def _vector(self, array: Any, first: Any, v: int, kind: Any) -> Any:
        place = self._b.gep(array, [self._b.add(first, self._constant(v * kind.count))])
        return self._b.bitcast(place, kind.as_pointer())

    def _ends(self, k: Any, x: Any, v: int, kind: Any) -> list[Any]:
        b = self._b
        firsts = (b.load(b.gep(table, [k])) for table in (self._low, self._high))
        shift = b.add(self._base, x)
        places = (self._vector(self._source, b.add(shift, first), v, kind) for first in firsts)
        return [b.load(place, align=4) for place in places]

    def _tap(self, k: Any, kind: Any) -> Any:
        return broadcast(self._b, self._b.load(self._b.gep(self._taps, [k])), kind)

    def _add(self, register: Any, tap: Any, before: Any, after: Any) -> None:
        b = self._b
        product = b.fmul(tap, b.fadd(before, after, flags=FUSED), flags=FUSED)
        b.store(b.fadd(b.load(register), product, flags=FUSED), register)

    def _part(self, x: Any, vectors: int, kind: Any) -> None:
        """Make the voxels of some vectors from `x` on."""
        b = self._b

        def registers() -> list[Any]:
            return [_register(b, kind) for _ in range(vectors)]

        sums = [registers() for _ in range(self._rows)]
        # Of two rows, what the first has after it is what the second had there one tap before,
        # and the other way round.
        last = [registers() for _ in range(2)]
        tap = self._tap(self._constant(0), kind)
        for v in range(vectors):
            ends = self._ends(self._constant(0), x, v, kind)
            for row in range(self._rows):
                b.store(b.fmul(tap, ends[row], flags=FUSED), sums[row][v])
            for end, register in zip(ends, last, strict=True):
                b.store(end, register[v])
        with cgutils.for_range(b, self._n_taps, start=self._constant(1)) as loop:
            tap = self._tap(loop.index, kind)
            for v in range(vectors):
                before, after = self._ends(loop.index, x, v, kind)
                if self._rows == 1:
                    self._add(sums[0][v], tap, before, after)
                    continue
                self._add(sums[0][v], tap, before, b.load(last[1][v]))
                self._add(sums[1][v], tap, b.load(last[0][v]), after)
                b.store(before, last[0][v])
                b.store(after, last[1][v])
        for row in range(self._rows):
            first = b.add(b.add(self._at, x), b.mul(self._step, self._constant(row)))
            for v in range(vectors):
                b.store(b.load(sums[row][v]), self._vector(self._out, first, v, kind), align=4)


def _code(rows: int) -> Callable[..., Any]:
    def code(context: Any, builder: Any, own: Any, values: Any) -> Any:
        arrays = {
            i: context.make_array(own.args[i])(context, builder, values[i]) for i in (0, 2, 3, 5, 6)
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
        step = values[8] if rows == 2 else ir.Constant(n_taps.type, 0)
        _Filter(builder, data, (values[1], values[7], step), n_taps, rows).row(values[-1])
        return context.get_dummy_value()

    return code


@llvm
def sum_row(
    _: Any,
    source: Any,
    base: Any,
    low: Any,
    high: Any,
    row: Any,
    taps: Any,
    out: Any,
    at: Any,
    n: Any,
) -> Any:
    """Filter a row: out[at + x] = Σ_k taps[k] · (source[low_k + x] + source[high_k + x]).

    The term of k = 0 is taps[0] · source[low_0 + x] alone.

    Parameters
    ----------
    source, out : float32 arrays, C order
        Taken as flat, and not the same voxels.
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
    check_order(source, low, high, taps, out)
    i = types.intp
    return types.void(source, i, low, high, i, taps, out, i, i), _code(1)


@llvm
def sum_two_rows(
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
    n: Any,
) -> Any:
    """Do what `sum_row` does for two rows of the tables, the second to ``out[at + step]`` on.

    They must be neighbours: where the second has its rows after it, the first has them one tap
    later, ``high[row, k + 1] == high[row + 1, k]``, and so have ``low[row + 1, k + 1]`` and
    ``low[row, k]``.
    """
    check_order(source, low, high, taps, out)
    i = types.intp
    return types.void(source, i, low, high, i, taps, out, i, i, i), _code(2)
