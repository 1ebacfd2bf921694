"""Threads that share work of several stages: each stage does one batch after the other.

While a thread is at a late stage of a batch, another may be at an early one of the next. So
they need not be kept from one another's results by waiting for all: a stage only waits until
it has done the batch before. Kernels wait without the interpreter, and not for long.
"""

import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import numpy as np
from dask.system import CPU_COUNT
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kpt_dask.kernels.jit import kernel

_LOOKS = 20_000
"""How often a kernel looks whether it may go on, some ten microseconds, before it gives up."""

_PLANNING = min(CPU_COUNT, 4)
"""Threads that plan. More would have next to nothing to do: all of it takes some milliseconds."""

T = TypeVar("T")
Jobs = Generator[Callable[[], None], None, None]

_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic

_HELPERS = ThreadPoolExecutor(256, "helper")
"""Threads that stay, begun when they are needed: what new ones give back of memory, others could
not use again."""


def turns(stages: int, first: int) -> NDArray[np.int64]:
    """Make the turns of so many stages, whose first batch begins at step `first`."""
    return np.full(stages, first, np.int64)


def later(function: Callable[[], T]) -> tuple[Callable[[], None], Callable[[], T]]:
    """Make a job of a function, and what waits until it is done and gives what it returned.

    If it raised, so does whoever waits, and not the job.
    """
    future: Future[T] = Future()

    def job() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    return job, future.result


def work_off(jobs: Jobs, threads: int) -> None:
    """Do jobs in several threads, this one among them.

    Parameters
    ----------
    jobs : generator of callable
        Asked for the next job by one thread at a time, while the others are busy with theirs;
        closed afterwards. A job may wait for earlier ones: those have begun.
    threads : int
        Of this process.

    Raises
    ------
    Exception
        Whatever a job, or the generator, raised first. No job runs any longer then.
    """
    lock, failed = threading.Lock(), threading.Event()

    def work() -> None:
        try:
            while True:
                with lock:
                    job = None if failed.is_set() else next(jobs, None)
                if job is None:
                    return
                job()
        except BaseException:
            failed.set()
            raise

    with closing(jobs):
        others = [_HELPERS.submit(work) for _ in range(threads - 1)]
        try:
            work()
        finally:
            wait(others)
    for other in others:
        other.result()


def each(function: Callable[..., T], tasks: Iterable[tuple[Any, ...]]) -> list[T]:
    """Compute ``function(*task)`` for every task, in threads of this process: for planning.

    Returns
    -------
    list
        The results, in the order of the tasks.
    """
    pairs = [later(partial(function, *task)) for task in tasks]
    work_off((job for job, _ in pairs), _PLANNING)
    return [result() for _, result in pairs]


@kernel
def may_begin(turns: NDArray[np.int64], stage: int, step: int) -> bool:
    """Whether a stage may do the batch that begins at a step, soon.

    If not, the caller should let other threads have this core for a moment, and ask again.
    """
    looks = 0
    while _look(turns, stage) != step and looks < _LOOKS:
        looks += 1
    return looks < _LOOKS


@_intrinsic
def _look(_: Any, turns: Any, stage: Any) -> Any:
    """Read a turn, and see whatever was written before it was set."""

    def code(context: Any, b: Any, own: Any, arguments: Any) -> Any:
        return b.load_atomic(_place(context, b, own, arguments), "acquire", 8)

    return types.int64(turns, types.intp), code


@_intrinsic
def done(_: Any, turns: Any, stage: Any, step: Any) -> Any:
    """Let a stage do the batch that begins at a step, and what it wrote be seen."""

    def code(context: Any, b: Any, own: Any, arguments: Any) -> Any:
        b.store_atomic(arguments[2], _place(context, b, own, arguments), "release", 8)
        return context.get_dummy_value()

    return types.void(turns, types.intp, types.int64), code


def _place(context: Any, b: Any, own: Any, arguments: Any) -> Any:
    data = context.make_array(own.args[0])(context, b, arguments[0]).data
    word = b.bitcast(data, ir.IntType(64).as_pointer())
    return b.gep(word, [arguments[1]])
