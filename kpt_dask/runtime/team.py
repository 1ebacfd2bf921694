"""Teams: threads of one process that share a list of jobs.

A task of a team is a generator of jobs. A free thread takes the next one, so none waits for
a slower one. Jobs may depend on earlier ones; these have always begun.
"""

import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from dask.system import CPU_COUNT

_PLANNERS = min(CPU_COUNT, 4)
"""Threads of `map_in_threads`. Planning takes milliseconds, so more would not pay."""

T = TypeVar("T")
Jobs = Generator[Callable[[], None], None, None]

_HELPERS = ThreadPoolExecutor(256, "helper")
"""Long-lived helper threads, started on demand: glibc would keep the memory that short-lived ones
freed in arenas of their own."""


def deferred(function: Callable[[], T]) -> tuple[Callable[[], None], Callable[[], T]]:
    """Split a call into a job that makes it and a function that waits for its result.

    An exception is raised where the result is asked for, not in the job.
    """
    future: Future[T] = Future()

    def job() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    return job, future.result


def run_jobs(jobs: Jobs, threads: int) -> None:
    """Run jobs in several threads, the calling one among them.

    Parameters
    ----------
    jobs : generator of callable
        Asked for the next job by one thread at a time, while the others are busy with theirs;
        closed afterwards. A job may wait for earlier ones: those have begun.
    threads : int
        Number of threads of this process.

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


def map_in_threads(function: Callable[..., T], tasks: Iterable[tuple[Any, ...]]) -> list[T]:
    """Compute ``function(*task)`` for every task, in a few threads of this process: for planning.

    Returns
    -------
    list
        The results, in the order of the tasks.
    """
    pairs = [deferred(partial(function, *task)) for task in tasks]
    run_jobs((job for job, _ in pairs), _PLANNERS)
    return [result() for _, result in pairs]
