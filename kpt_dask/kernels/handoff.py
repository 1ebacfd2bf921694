"""Hand over work between threads that run kernels, without the GIL and without locks.

Several stages take the same batches of steps, each stage one batch after the other. An int64 array
``next_step`` holds, per stage, the first step that the stage has not done. The invariant: only the
thread whose batch begins at ``next_step[stage]`` may run that stage, and only it may then store
the step after its batch. The store is a release and the load an acquire, so the next thread sees
whatever the stage wrote. Numba has neither for the CPU, hence the few lines of LLVM. Plain
numba does for one thread, so that is how many share the work then: `BETWEEN_THREADS`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from kpt_dask.kernels.jit import PLAIN, either, kernel
from kpt_dask.kernels.simd import llvm

SPINS = 20_000
"""Loads of `next_step` before `wait_for_turn` gives up: some ten microseconds."""

BETWEEN_THREADS = not PLAIN
"""Whether stages may be handed over between threads."""


def first_steps(stages: int, step: int) -> NDArray[np.int64]:
    """Make the array ``next_step`` of stages that all begin at `step`."""
    return np.full(stages, step, np.int64)


@llvm
def _load_atomic(_: Any, next_step: Any, stage: Any) -> Any:
    """Load with acquire: everything written before the matching store is visible."""

    def code(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.load_atomic(_address(context, b, signature, arguments), "acquire", 8)

    return types.int64(next_step, types.intp), code


@llvm
def _store_atomic(_: Any, next_step: Any, stage: Any, step: Any) -> Any:
    """Store with release: everything written before becomes visible."""

    def code(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        b.store_atomic(arguments[2], _address(context, b, signature, arguments), "release", 8)
        return context.get_dummy_value()

    return types.void(next_step, types.intp, types.int64), code


def _address(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
    data = context.make_array(signature.args[0])(context, b, arguments[0]).data
    return b.gep(b.bitcast(data, ir.IntType(64).as_pointer()), [arguments[1]])


@kernel
def _load_plain(next_step: NDArray[np.int64], stage: int) -> int:
    return int(next_step[stage])


@kernel
def _store_plain(next_step: NDArray[np.int64], stage: int, step: int) -> None:
    next_step[stage] = step


_load = either(_load_atomic, _load_plain)
_store = either(_store_atomic, _store_plain)


@kernel
def wait_for_turn(next_step: NDArray[np.int64], stage: int, step: int) -> bool:
    """Spin until `stage` may do the batch that begins at `step`; False if that takes too long.

    Then the caller should yield the processor to another thread, and ask again.
    """
    spins = 0
    while _load(next_step, stage) != step and spins < SPINS:
        spins += 1
    return spins < SPINS


@kernel
def pass_turn(next_step: NDArray[np.int64], stage: int, step: int) -> None:
    """Let `stage` do the batch that begins at `step`; publishes whatever was written before."""
    _store(next_step, stage, step)
