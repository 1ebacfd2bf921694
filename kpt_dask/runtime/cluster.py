"""Execution of tasks by Dask, from one process to a cluster.

`session` yields a client, `run` keeps its workers busy. The stations decide what to compute, never
where; this module does not know what a scan is.
"""

# Most releases of Dask allow no `Future[T]` when annotations are evaluated.
from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from distributed import Client, Future, KilledWorker, Worker, as_completed, get_worker
from distributed.protocol.pickle import dumps, loads

from kpt_dask.errors import ClusterError
from kpt_dask.runtime import memory as own_memory
from kpt_dask.runtime import progress, witness
from kpt_dask.runtime.connect import IN_FLIGHT_PER_THREAD, is_own, local, session
from kpt_dask.runtime.patience import (
    Vigil,
    ask,
    landing,
    lost,
    memory_of_workers,
    threads_of_workers,
    wait_seconds,
)

__all__ = [
    "budget",
    "count_teams",
    "local",
    "run",
    "run_in_teams",
    "run_small",
    "session",
    "share",
    "teams",
    "threads",
]

T = TypeVar("T")

TEAM = 2
"""Threads of a process that share a task, at most. A sweep's slowest stage takes a
quarter of its time, so more threads would often wait for that stage."""

_LEADERS = "kpt-leaders"
"""Name of the executor of a worker that team leaders run in, one thread per team."""
_THREADS: WeakKeyDictionary[Client, tuple[float, list[int]]] = WeakKeyDictionary()
"""Per client: expiry and value of the cached thread counts of its workers."""
_LOCK = Lock()


def run(
    client: Client,
    function: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    description: str,
) -> Iterator[tuple[int, T]]:
    """Compute ``function(*task)`` for every task on the client's workers.

    Parameters
    ----------
    client : distributed.Client
        Client whose workers compute.
    function : callable
        Must be safe to run again after it was cut off, as happens when a worker is lost.
    tasks : sequence of tuple
        Arguments of each task, in the order in which tasks begin. They are sent with the task, so
        they must be small: paths, regions, parameters.
    description : str
        Name of the stage in `kpt_dask.runtime.progress`.

    Yields
    ------
    index : int
        Index of the task; tasks come in the order in which they finish.
    result
        Its result, to which no other reference is kept.

    Raises
    ------
    ClusterError
        If workers die repeatedly, do not see the files of the run, or do not work for longer
        than `kpt_dask.runtime.patience` allows; or if the scheduler has gone.
    Exception
        Any error of a task, unchanged. When the iteration has ended, by an error or because the
        consumer stops early, no task is running any more: its outputs can be removed safely.
    """
    name = f"{getattr(function, '__name__', 'task')}-{uuid.uuid4().hex}"
    waiting = enumerate(tasks)
    flying: dict[Future[T], int] = {}
    landed = as_completed(loop=client.loop, with_results=True)
    call = partial(_call, function, witness.current())

    def submit() -> None:
        # Counted each time: a cluster's workers come and go.
        limit = IN_FLIGHT_PER_THREAD * max(sum(threads(client)), 1)
        batch = list(islice(waiting, max(limit - len(flying), 0)))
        if not batch:
            return
        # Submitted as one batch, because successive messages to the scheduler and the workers are
        # delayed by milliseconds. Keys are padded because tasks of a batch begin in key order.
        futures = client.map(
            call,
            [task for _, task in batch],
            key=[f"{name}-{index:09}" for index, _ in batch],
            pure=False,
            priority=-batch[0][0],
        )
        for future, (index, _) in zip(futures, batch, strict=True):
            flying[future] = index
            landed.add(future)

    # A worker that is this process can neither disappear nor be paused.
    vigil = None if is_own(client) else Vigil(client, description)
    complete = False
    with progress.stage(description, total=len(tasks)) as advance:
        try:
            submit()
            for future, result in landing(landed, vigil):
                if future.cancelled():
                    raise result
                index = flying.pop(future)
                future.release()
                submit()
                advance(1)
                yield index, result
                del result
            complete = True
        except KilledWorker as error:
            raise ClusterError(
                f"{description}: {error.allowed_failures + 1} workers died one after another at "
                "the same task, most often for lack of memory: see their logs, then give each more "
                "memory, fewer threads, or the environment that you have here."
            ) from error
        except CancelledError as error:
            raise lost(client, description, error) from error
        except ModuleNotFoundError as error:
            raise witness.lacking(error.name or str(error), f"{description}: a worker") from error
        finally:
            # Even if `flying` is empty: an interruption may have come during a submission.
            if not complete:
                _abandon(client, name, list(flying))


def share(client: Client, value: T) -> Future[T]:
    """Send a value that many tasks take to all workers.

    Raises
    ------
    ClusterError
        If the scheduler has gone.
    """
    # Not `Client.scatter`: inside a Dask task it would go to that task's worker. No hash as the
    # key: releasing an equal value of an earlier call would race.
    try:
        [shared] = ask(client, client._scatter, [value], broadcast=True, hash=False, direct=False)
    except OSError as error:
        raise lost(client, "Sending to workers", error) from error
    return shared  # type: ignore[no-any-return]


def threads(client: Client) -> list[int]:
    """Threads of each worker, cached for 1 s: a request takes 1 ms.

    Raises
    ------
    ClusterError
        If no worker connects in time, or the scheduler has gone.
    """
    expiry, counts = _THREADS.get(client, (0.0, []))
    if time.monotonic() >= expiry or not counts:
        counts = threads_of_workers(client)
        _THREADS[client] = time.monotonic() + 1, counts
    return counts


def budget(client: Client, memory: int | None = None) -> int:
    """Bytes that the large arrays of each worker may take.

    Parameters
    ----------
    client : distributed.Client
        Client whose workers compute.
    memory : int, optional
        What the user wants. Without it, what `kpt_dask.runtime.memory.budget` says of this machine,
        at most half of the limit that Dask holds a worker to.

    Raises
    ------
    ClusterError
        If the scheduler has gone.
    """
    usual = own_memory.budget(memory)
    if memory is not None or is_own(client):
        return usual
    return max(min([usual, *(limit // 2 for limit in memory_of_workers(client))]), 1)


def teams(threads: int) -> tuple[int, int]:
    """Divide the threads of a process into teams; return their number, and the threads of each."""
    n = max(threads // TEAM, 1)
    return n, threads // n


def count_teams(client: Client) -> int:
    """Count the teams of all workers."""
    return sum(teams(n)[0] for n in threads(client))


def run_in_teams(
    client: Client,
    function: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    description: str,
) -> Iterator[tuple[int, T]]:
    """Compute ``function(*task, threads)`` like `run`, each by a team of threads of a process.

    For tasks so large that few should be in memory at once: a process runs one per team.
    """
    named = partial(_in_team, function)
    named.__name__ = function.__name__  # type: ignore[attr-defined]
    # Pickled here, or the scheduler would deserialise and serialise them again.
    return run(client, named, [(dumps(task),) for task in tasks], description)


def _in_team(function: Callable[..., T], pickled: bytes) -> T:
    task = loads(pickled)
    worker = get_worker()
    at_once, threads = teams(worker.state.nthreads)
    with _LOCK:
        # Long-lived threads: glibc keeps the memory that a thread frees in its own arena.
        # A worker that is closed shuts its executors down.
        if _LEADERS not in worker.executors:
            worker.executors[_LEADERS] = ThreadPoolExecutor(at_once, "leader")
        leaders = worker.executors[_LEADERS]
    return leaders.submit(function, *task, threads).result()


def run_small(
    client: Client,
    function: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    description: str,
) -> list[T]:
    """Compute ``function(*task)`` like `run`, for work of milliseconds: one Dask task per thread.

    A Dask task costs the scheduler's only thread 1 ms.

    Returns
    -------
    list
        Results, in the order of the tasks.
    """
    size = -(-len(tasks) // max(sum(threads(client)), 1)) or 1
    batches = [(function, tasks[a : a + size]) for a in range(0, len(tasks), size)]
    done = dict(run(client, _each, batches, description))
    return [result for i in range(len(batches)) for result in done[i]]


def _call(function: Callable[..., T], proof: witness.Proof | None, task: tuple[Any, ...]) -> T:
    witness.check(proof)
    return function(*task)


def _each(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]]) -> list[T]:
    return [function(*task) for task in tasks]


def _abandon(client: Client, name: str, futures: list[Future[T]]) -> None:
    """Cancel tasks, and wait for those that had begun: Dask cannot stop a thread."""
    if client.status != "running":
        return
    # A scheduler may disappear, and a worker hang, during the request.
    with suppress(OSError):
        ask(client, client._cancel, futures, callback_timeout=wait_seconds())
        # Twice, because a task may be on its way to a worker at the first poll.
        quiet, deadline = 0, time.monotonic() + wait_seconds()
        while quiet < 2 and time.monotonic() < deadline:
            busy = ask(
                client,
                client._run,
                _holds_tasks,
                name,
                on_error="ignore",
                callback_timeout=wait_seconds(),
            )
            quiet = 0 if any(busy.values()) else quiet + 1
            time.sleep(0.01)


def _holds_tasks(name: str, dask_worker: Worker) -> bool:
    return any(str(key).startswith(name) for key in dask_worker.state.tasks)
