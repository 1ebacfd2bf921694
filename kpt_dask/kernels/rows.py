"""What is done to rows in vectors: symmetric filters, comparisons, strips that are added.

A symmetric filter adds up pairs of rows, each pair times its tap. As loops over rows, every
tap would read and write the whole sum again. Here `LANES` voxels at a time are summed up over
all taps in vectors that are explicit in LLVM's own language, which fits them to whatever
registers there are. Two neighbouring rows are made at once where they can share what is read.

Each voxel goes through the same operations in the same order, wherever it lies in a row and
whichever function makes it; as in all kernels, multiply-adds may be fused.
"""

import math
from collections.abc import Callable, Sequence
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
VECTORS = 4
"""Vectors that are summed up side by side, so that none waits for its own last sum."""

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_FUSED = ("contract",)

_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic
_register: Callable[[Any, Any], Any] = cgutils.alloca_once
_declare: Callable[..., Any] = cgutils.get_or_insert_function


def _check_order(*arrays: Any) -> None:
    """Refuse, while a kernel is compiled, arrays whose memory cannot be taken as it lies."""
    if any(array.layout != "C" for array in arrays):
        raise TypingError(f"arrays must be in C order: {arrays}")


def _everywhere(b: Any, value: Any, kind: Any) -> Any:
    """Put a number into all lanes of a vector."""
    index, nothing = ir.IntType(32), ir.Constant(kind, ir.Undefined)
    one = b.insert_element(nothing, value, ir.Constant(index, 0))
    first = ir.Constant(ir.VectorType(index, kind.count), kind.count * [0])
    return b.shuffle_vector(one, nothing, first)


LOG2_E = 1 / math.log(2)
_ROUNDING = 1.5 * 2.0**23
"""Added to a float32, leaves the nearest whole number in its last bits."""
_MANTISSA = 23
"""Bits of a float32 below its exponent."""
_POWERS = (1.0, 0.693146978, 0.240222421, 0.0555073374, 0.00967151279, 0.00132647273)
"""Of the polynomial that is 2^x for −½ ≤ x ≤ ½, to 1e-7, and exactly 1 at 0."""


def _exp2(b: Any, x: Sequence[Any]) -> list[Any]:
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
        product = [b.fmul(*both, flags=_FUSED) for both in zip(factor, rest, strict=True)]
        factor = [b.fadd(one, number(coefficient), flags=_FUSED) for one in product]
    # The whole number is added to the exponent.
    exponent = [b.shl(b.bitcast(one, bits), number(_MANTISSA, bits)) for one in moved]
    power = [b.add(b.bitcast(one, bits), e) for one, e in zip(factor, exponent, strict=True)]
    return [b.bitcast(one, kind) for one in power]


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
                    self._part(b.mul(loop.index, self._constant(wide)), VECTORS, _VECTOR)
                start, step = b.mul(blocks, self._constant(wide)), self._constant(LANES)
                last = b.sub(n, step)
                with cgutils.for_range_slice(b, start, n, step, inc=True) as (x, _):
                    # The last vector may do again what the one before it has done.
                    beyond = b.icmp_signed(">", x, last)
                    self._part(b.select(beyond, last, x), 1, _VECTOR)

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
        return _everywhere(self._b, self._b.load(self._b.gep(self._taps, [k])), kind)

    def _add(self, register: Any, tap: Any, before: Any, after: Any) -> None:
        b = self._b
        product = b.fmul(tap, b.fadd(before, after, flags=_FUSED), flags=_FUSED)
        b.store(b.fadd(b.load(register), product, flags=_FUSED), register)

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
                b.store(b.fmul(tap, ends[row], flags=_FUSED), sums[row][v])
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


@_intrinsic
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
    _check_order(source, low, high, taps, out)
    i = types.intp
    return types.void(source, i, low, high, i, taps, out, i, i), _code(1)


@_intrinsic
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
    _check_order(source, low, high, taps, out)
    i = types.intp
    return types.void(source, i, low, high, i, taps, out, i, i, i), _code(2)


@_intrinsic
def compare(_: Any, values: Any, at: Any, before: Any, after: Any) -> Any:
    """Compare `LANES` voxels from ``values[at]`` on with those at two distances from each.

    Returns
    -------
    int
        Bit i is set if voxel ``at + i`` lies above ``at + i + before`` and ``at + i + after``,
        bit ``LANES + i`` if it lies below both.
    """
    _check_order(values)
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


@_intrinsic
def exp2(_: Any, x: Any) -> Any:
    """Raise 2 to a power, float32, −126 … 127, to 3e-7 of itself; whole powers exactly.

    Compilers can do it to many numbers at a time, as there is no branch and no table. Not for
    kernels that may reassociate.
    """

    def code(context: Any, b: Any, own: Any, values: Any) -> Any:
        return _exp2(b, values)[0]

    signature = types.float32(types.float32)
    return signature, code


@_intrinsic
def add_strips(
    _: Any,
    share: Any,
    scan: Any,
    at: Any,
    strips: Any,
    of: Any,
    height: Any,
    slope: Any,
    most: Any,
) -> Any:
    """Add strips to a share: 2^(height − slope · d²), d = I − I_a, where d² is below `most`.

    As loops over `LANES` voxels, compilers do not see that share and scan are not the same. Of
    several strips each step is taken together, so that none waits for its own last step.

    Parameters
    ----------
    share : float32 array
    scan, strips : int16 arrays
        HU; all flat.
    at, of : tuples of int
        Where each strip begins in share and scan, and in `strips`. They do not overlap there.
    height, slope, most : float32
        Nothing is added where d² reaches `most`, and the power must be one for `exp2` elsewhere.
    """
    _check_order(share, scan, strips)
    real = types.float32
    return types.void(share, scan, at, strips, of, real, real, real), _adding(1)


@_intrinsic
def add_halves(
    _: Any,
    share: Any,
    scan: Any,
    at: Any,
    strips: Any,
    of: Any,
    height: Any,
    slope: Any,
    most: Any,
) -> Any:
    """Do what `add_strips` does for strips that have only `HALF` voxels, two in each vector."""
    _check_order(share, scan, strips)
    real = types.float32
    return types.void(share, scan, at, strips, of, real, real, real), _adding(2)


def _adding(parts: int) -> Callable[..., Any]:
    """Code of `add_strips`, for strips of which so many share a vector."""
    n = LANES // parts
    shorts, reals = ir.VectorType(ir.IntType(16), n), ir.VectorType(ir.FloatType(), n)

    def lanes(first: int, count: int) -> Any:
        index = ir.IntType(32)
        return ir.Constant(ir.VectorType(index, count), [*range(first, first + count)])

    def code(context: Any, b: Any, own: Any, values: Any) -> Any:
        def places(array: int, at: Any, kind: Any) -> list[Any]:
            data = context.make_array(own.args[array])(context, b, values[array]).data
            begins = [b.extract_value(at, i) for i in range(at.type.count)]
            return [b.bitcast(b.gep(data, [begin]), kind.as_pointer()) for begin in begins]

        def load(places: list[Any], align: int) -> list[Any]:
            found = [b.load(place, align=align) for place in places]
            if parts == 1:
                return found
            pairs = zip(found[::2], found[1::2], strict=True)
            return [b.shuffle_vector(*pair, lanes(0, LANES)) for pair in pairs]

        def store(vectors: list[Any], places: list[Any]) -> None:
            for i, place in enumerate(places):
                whole = vectors[i // parts]
                part = b.shuffle_vector(whole, whole, lanes(i % parts * n, n))
                b.store(whole if parts == 1 else part, place, align=4)

        height, slope, most = (_everywhere(b, value, _VECTOR) for value in values[5:])
        here = load(places(1, values[2], shorts), 2)
        there = load(places(3, values[4], shorts), 2)
        kind = ir.FunctionType(_SHORTS, [_SHORTS, _SHORTS])
        subtract = _declare(b.module, kind, f"llvm.ssub.sat.v{LANES}i16")
        apart = [b.call(subtract, pair) for pair in zip(here, there, strict=True)]
        apart = [b.sitofp(d, _VECTOR) for d in apart]
        squared = [b.fmul(d, d) for d in apart]
        lower = [b.fmul(slope, d, flags=_FUSED) for d in squared]
        counts = [b.fcmp_ordered("<", d, most) for d in squared]
        powers = _exp2(b, [b.fsub(height, d, flags=_FUSED) for d in lower])
        out = places(0, values[2], reals)
        before = load(out, 4)
        sums = [b.fadd(*both, flags=_FUSED) for both in zip(before, powers, strict=True)]
        store([b.select(*choice) for choice in zip(counts, sums, before, strict=True)], out)
        return context.get_dummy_value()

    return code


@_intrinsic
def fetch(_: Any, values: Any, at: Any) -> Any:
    """Ask for the cache line of ``values[at]``, which need not be a voxel of the array."""

    def code(context: Any, b: Any, own: Any, arguments: Any) -> Any:
        data = context.make_array(own.args[0])(context, b, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = _declare(b.module, kind, "llvm.prefetch.p0")
        place = b.bitcast(b.gep(data, [arguments[1]]), byte)
        # To read, as near as can be, data.
        b.call(function, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(values, types.intp), code
