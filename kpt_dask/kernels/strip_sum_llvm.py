"""Strips that are added in whole vectors, in LLVM's language."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kpt_dask.kernels.exponential import COEFFICIENTS, MANTISSA, ROUNDING
from kpt_dask.kernels.simd import FUSED, LANES, VECTOR, broadcast, check_order, llvm

_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)

_declare: Callable[..., Any] = cgutils.get_or_insert_function


@llvm
def add_vectors(
    _: Any, share: Any, scan: Any, at: Any, strips: Any, of: Any, likelihood: Any, n: Any
) -> Any:
    """Do what `kpt_dask.kernels.strip_sum.add_strips_plain` does; `n` is a literal number.

    So many strips of `n` voxels as fill a vector share it.
    """
    check_order(share, scan, strips)
    signature = types.void(share, scan, at, strips, of, likelihood, n)
    return signature, _code(LANES // n.literal_value)


def _code(parts: int) -> Callable[..., Any]:
    n = LANES // parts
    shorts, reals = ir.VectorType(ir.IntType(16), n), ir.VectorType(ir.FloatType(), n)

    def lanes(first: int, count: int) -> Any:
        index = ir.IntType(32)
        return ir.Constant(ir.VectorType(index, count), [*range(first, first + count)])

    def code(context: Any, b: Any, signature: Any, values: Any) -> Any:
        def places(array: int, at: Any, kind: Any) -> list[Any]:
            data = context.make_array(signature.args[array])(context, b, values[array]).data
            begins = [b.extract_value(at, i) for i in range(at.type.count)]
            return [b.bitcast(b.gep(data, [begin]), kind.as_pointer()) for begin in begins]

        def load(places: list[Any], align: int) -> list[Any]:
            loaded = [b.load(place, align=align) for place in places]
            if parts == 1:
                return loaded
            pairs = zip(loaded[::2], loaded[1::2], strict=True)
            return [b.shuffle_vector(*pair, lanes(0, LANES)) for pair in pairs]

        def store(vectors: list[Any], places: list[Any]) -> None:
            for i, place in enumerate(places):
                whole = vectors[i // parts]
                part = b.shuffle_vector(whole, whole, lanes(i % parts * n, n))
                b.store(whole if parts == 1 else part, place, align=4)

        scales = (b.extract_value(values[5], i) for i in range(3))
        power, slope, most = (broadcast(b, value, VECTOR) for value in scales)
        here = load(places(1, values[2], shorts), 2)
        there = load(places(3, values[4], shorts), 2)
        kind = ir.FunctionType(_SHORTS, [_SHORTS, _SHORTS])
        subtract = _declare(b.module, kind, f"llvm.ssub.sat.v{LANES}i16")
        # Each step of all strips together: none waits for its own last step.
        apart = [b.call(subtract, pair) for pair in zip(here, there, strict=True)]
        apart = [b.sitofp(d, VECTOR) for d in apart]
        squared = [b.fmul(d, d) for d in apart]
        lower = [b.fmul(slope, d, flags=FUSED) for d in squared]
        counts = [b.fcmp_ordered("<", d, most) for d in squared]
        powers = _exp2(b, [b.fsub(power, d, flags=FUSED) for d in lower])
        out = places(0, values[2], reals)
        before = load(out, 4)
        sums = [b.fadd(*both, flags=FUSED) for both in zip(before, powers, strict=True)]
        store([b.select(*choice) for choice in zip(counts, sums, before, strict=True)], out)
        return context.get_dummy_value()

    return code


def _exp2(b: Any, x: list[Any]) -> list[Any]:
    """Do what `kpt_dask.kernels.exponential.exp2` does, to vectors."""

    def number(value: float, kind: Any = VECTOR) -> Any:
        return ir.Constant(kind, LANES * [value])

    shifted = [b.fadd(one, number(ROUNDING)) for one in x]
    whole = [b.fsub(one, number(ROUNDING)) for one in shifted]
    rest = [b.fsub(*both) for both in zip(x, whole, strict=True)]
    power = len(x) * [number(COEFFICIENTS[-1])]
    for coefficient in COEFFICIENTS[-2::-1]:
        product = [b.fmul(*both, flags=FUSED) for both in zip(power, rest, strict=True)]
        power = [b.fadd(one, number(coefficient), flags=FUSED) for one in product]
    shift = number(MANTISSA, _INTEGERS)
    exponent = [b.shl(b.bitcast(one, _INTEGERS), shift) for one in shifted]
    pairs = zip(power, exponent, strict=True)
    return [b.bitcast(b.add(b.bitcast(p, _INTEGERS), e), VECTOR) for p, e in pairs]
