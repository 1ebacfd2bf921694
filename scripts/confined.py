"""A process that may use some cores only, for benchmarks that compare one core with two."""

import os
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

from distributed import Client

from kpt_dask.runtime import cluster
from kpt_dask.runtime.allocator import share_freed_memory

_LASTING = ExitStack()

P = ParamSpec("P")
T = TypeVar("T")


class Confined:
    """A process of its own, confined to some cores from its first moment, as `taskset` would.

    Whatever it does, such as reading and handing out tasks, is confined to the same cores. Its
    memory is that of `kpt`.
    """

    def __init__(self, cores: Collection[int]) -> None:
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        try:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), share_freed_memory)
            self._pool.submit(os.getpid).result()
        finally:
            os.sched_setaffinity(0, everywhere)

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function there, and wait for what it gives."""
        return self._pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        """End the process, its client first: one that is left to the end of Python complains."""
        self.run(_close)
        self._pool.shutdown()


@cache
def client() -> Client:
    """Give this process's own client, with a thread for each core, as long as it lives."""
    return _LASTING.enter_context(cluster.session())


def _close() -> None:
    _LASTING.close()
