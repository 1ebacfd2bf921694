"""Strips of an organ's voxels, added to its share."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types

from kpt_dask.kernels.simd import FUSED, LANES, VECTOR, broadcast, check_order, declare, llvm

_ROUNDING = 1.5 * 2.0**23
"""Added to a float32, leaves the nearest whole number in its last bits."""
_MANTISSA = 23
"""Bits of a float32 below its exponent."""
_POWERS = (1.0, 0.693146978, 0.240222421, 0.0555073374, 0.00967151279, 0.00132647273)
"""Of the polynomial that is 2^x for −½ ≤ x ≤ ½, to 1e-7, and exactly 1 at 0."""
_SHORTS = ir.VectorType(ir.IntType(16), LANES)


@llvm
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
    check_order(share, scan, strips)
    real = types.float32
    return types.void(share, scan, at, strips, of, real, real, real), _adding(1)


@llvm
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
    check_order(share, scan, strips)
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

        height, slope, most = (broadcast(b, value, VECTOR) for value in values[5:])
        here = load(places(1, values[2], shorts), 2)
        there = load(places(3, values[4], shorts), 2)
        kind = ir.FunctionType(_SHORTS, [_SHORTS, _SHORTS])
        subtract = declare(b.module, kind, f"llvm.ssub.sat.v{LANES}i16")
        apart = [b.call(subtract, pair) for pair in zip(here, there, strict=True)]
        apart = [b.sitofp(d, VECTOR) for d in apart]
        squared = [b.fmul(d, d) for d in apart]
        lower = [b.fmul(slope, d, flags=FUSED) for d in squared]
        counts = [b.fcmp_ordered("<", d, most) for d in squared]
        powers = _exp2(b, [b.fsub(height, d, flags=FUSED) for d in lower])
        out = places(0, values[2], reals)
        before = load(out, 4)
        sums = [b.fadd(*both, flags=FUSED) for both in zip(before, powers, strict=True)]
        store([b.select(*choice) for choice in zip(counts, sums, before, strict=True)], out)
        return context.get_dummy_value()

    return code


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
        product = [b.fmul(*both, flags=FUSED) for both in zip(factor, rest, strict=True)]
        factor = [b.fadd(one, number(coefficient), flags=FUSED) for one in product]
    # The whole number is added to the exponent.
    exponent = [b.shl(b.bitcast(one, bits), number(_MANTISSA, bits)) for one in moved]
    power = [b.add(b.bitcast(one, bits), e) for one, e in zip(factor, exponent, strict=True)]
    return [b.bitcast(one, kind) for one in power]
