"""Where the work runs: Dask for everyone, from one process to a cluster.

`session` gives a client, `run` keeps its workers busy. The stations say what to compute
and never where; nothing here knows what a scan is.
"""

import asyncio
import gc
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import dask
from dask.system import CPU_COUNT
from distributed import (
    Client,
    Future,
    KilledWorker,
    Security,
    Worker,
    as_completed,
    default_client,
    get_worker,
)
from distributed.comm.core import connect
from distributed.protocol.pickle import dumps, loads

from kpt_dask.errors import ParameterError
from kpt_dask.runtime import progress

T = TypeVar("T")

CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""

IN_FLIGHT_PER_THREAD = 4
"""Tasks handed out at a time: enough that no thread waits, few enough to hold their results."""

TEAM = 2
"""Threads of a process that work together on a task, if it has them. Of many, some would often
wait for others: of a sweep, for its slowest stage, which takes a quarter of the time."""

_LEADERS: "WeakKeyDictionary[Worker, ThreadPoolExecutor]" = WeakKeyDictionary()
"""Of each worker in this process, the threads that tasks of teams run in: no more than teams."""
_THREADS: "WeakKeyDictionary[Client, tuple[float, list[int]]]" = WeakKeyDictionary()
"""Of each client, until when it is known how many threads its workers have, and how many."""
_LOCK = Lock()


@contextmanager
def session(client: Client | None = None, scheduler: str | None = None) -> Iterator[Client]:
    """Give the Dask client to work with, and close it afterwards if it was made here.

    Parameters
    ----------
    client : distributed.Client, optional
        Used as it is and left open.
    scheduler : str, optional
        Address ("tcp://head:8786") or scheduler file of a running cluster.

    Yields
    ------
    client : distributed.Client
        The given one; else one connected to `scheduler`; else the process's current one;
        else a new one whose worker is this process, with a thread for every core that the
        process may use.

    Raises
    ------
    ParameterError
        `scheduler` does not answer, or is a file of something else.
    """
    if client is None and scheduler is None:
        client = _current()
    if client is not None:
        yield client
    elif scheduler is not None:
        with _connect(scheduler) as connected:
            yield connected
    else:
        with local(CPU_COUNT) as own:
            yield own


@contextmanager
def local(threads: int) -> Iterator[Client]:
    """Make this process a worker of so many threads, and give its client."""
    # No memory limit: it would count the whole process and pause its only worker. A port of
    # its own: the default one warns when another session has it. All tasks in flight on the
    # worker, or it would wait for each to come. What Dask measures of itself a hundred times a
    # second takes the cores from the tasks.
    settings = {
        "distributed.scheduler.worker-saturation": IN_FLIGHT_PER_THREAD,
        "distributed.worker.profile.enabled": False,
        "distributed.admin.tick.interval": "1s",
    }
    with (
        _collecting_rarely(),
        dask.config.set(settings),
        Client(
            processes=False,
            n_workers=1,
            threads_per_worker=threads,
            memory_limit=None,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.ERROR,
        ) as client,
    ):
        # Else whoever has just sent a message keeps the next one back for some milliseconds, on
        # every way between client, scheduler and worker.
        scheduler, workers = client.cluster.scheduler, client.cluster.workers.values()
        ways = *scheduler.client_comms.values(), *scheduler.stream_comms.values()
        for way in (client.scheduler_comm, *ways, *(w.batched_stream for w in workers)):
            way.interval = 0.0
        yield client


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Let Python seldom look through all that there is for garbage.

    That takes a tenth of a second, of all threads, as the libraries are made of so much; it finds
    next to nothing, and would come four times in a segmentation.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


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
        Whose workers compute.
    function : callable
        May run again after a worker was lost, so it must not mind having half run before.
    tasks : sequence of tuple
        In the order in which they begin. Arguments, small (paths, regions, parameters): each
        tuple travels with its task.
    description : str
        Name of the stage in `kpt_dask.runtime.progress`.

    Yields
    ------
    index : int
        Which task, in the order in which they finish.
    result
        What it returned. Nothing else holds it any longer.

    Raises
    ------
    ParameterError
        Workers died again and again, or the scheduler went away.
    Exception
        Whatever a task raised, as it was. Once this, or a consumer that stops early, has
        ended the iteration, tasks that had begun have ended too: what they wrote can be
        removed safely.
    """
    name = f"{getattr(function, '__name__', 'task')}-{uuid.uuid4().hex}"
    waiting = enumerate(tasks)
    flying: dict[Future[T], int] = {}
    landed = as_completed(loop=client.loop, with_results=True)

    def submit() -> None:
        # A cluster's workers come and go.
        limit = IN_FLIGHT_PER_THREAD * max(sum(threads(client)), 1)
        batch = list(islice(waiting, max(limit - len(flying), 0)))
        if not batch:
            return
        # At once: messages to the scheduler and from it to a worker wait for some milliseconds
        # after the one before. Keys are padded because tasks of a batch begin in their order.
        futures = client.map(
            partial(_call, function),
            [task for _, task in batch],
            key=[f"{name}-{index:09}" for index, _ in batch],
            pure=False,
            priority=-batch[0][0],
        )
        for future, (index, _) in zip(futures, batch, strict=True):
            flying[future] = index
            landed.add(future)

    complete = False
    with progress.stage(description, total=len(tasks)) as advance:
        try:
            submit()
            for future, result in landed:
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
            raise ParameterError(
                f"{description}: {error.allowed_failures + 1} workers died one after another at "
                "the same task, most often for lack of memory: give each more memory or fewer "
                "threads."
            ) from error
        except CancelledError as error:
            raise ParameterError(
                f"{description}: the connection to the Dask scheduler was lost; see its log, "
                "then run the same command again."
            ) from error
        finally:
            # Also if none is known to fly: an interruption may have come while one was submitted.
            if not complete:
                _abandon(client, name, list(flying))


def threads(client: Client) -> list[int]:
    """Threads of each worker, as they were at most a second ago: to ask takes a millisecond."""
    known_until, found = _THREADS.get(client, (0.0, []))
    if time.monotonic() >= known_until or not found:
        found = list(client.nthreads().values())
        _THREADS[client] = time.monotonic() + 1, found
    return found


def teams(threads: int) -> tuple[int, int]:
    """Divide the threads of a process into teams; return how many, and the threads of each."""
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
    """Compute ``function(*task, threads)`` like `run`, each in so many threads of a process.

    For large tasks that can share more than memory: there are no more at once than `teams` says.
    """
    named = partial(_in_team, function)
    named.__name__ = function.__name__  # type: ignore[attr-defined]
    # Or the scheduler would unpack them, and pack them again.
    return run(client, named, [(dumps(task),) for task in tasks], description)


def _in_team(function: Callable[..., T], packed: bytes) -> T:
    task = loads(packed)
    worker = get_worker()
    at_once, threads = teams(worker.state.nthreads)
    with _LOCK:
        # Always the same threads: memory that one gives back is not used again by others.
        if worker not in _LEADERS:
            _LEADERS[worker] = ThreadPoolExecutor(at_once, "leader")
        leaders = _LEADERS[worker]
    return leaders.submit(function, *task, threads).result()


def run_small(
    client: Client,
    function: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    description: str,
) -> list[T]:
    """Compute ``function(*task)`` like `run`, for work of milliseconds: a Dask task a thread.

    A Dask task costs a millisecond of the one thread that hands all of them out.

    Returns
    -------
    list
        The results, in the order of the tasks.
    """
    size = -(-len(tasks) // max(sum(threads(client)), 1)) or 1
    batches = [(function, tasks[a : a + size]) for a in range(0, len(tasks), size)]
    done = dict(run(client, _each, batches, description))
    return [result for i in range(len(batches)) for result in done[i]]


def _call(function: Callable[..., T], task: tuple[Any, ...]) -> T:
    return function(*task)


def _each(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]]) -> list[T]:
    return [_call(function, task) for task in tasks]


def _abandon(client: Client, name: str, futures: "list[Future[T]]") -> None:
    """Cancel tasks, and wait for those that had begun: Dask cannot stop a thread."""
    if client.status != "running":
        return
    client.cancel(futures)
    # Twice, because a task may be on its way to a worker when the first look comes.
    quiet = 0
    while quiet < 2:
        busy = client.run(_holds_tasks, name, on_error="ignore")
        quiet = 0 if any(busy.values()) else quiet + 1
        time.sleep(0.01)


def _holds_tasks(name: str, dask_worker: Worker) -> bool:
    return any(str(key).startswith(name) for key in dask_worker.state.tasks)


def _current() -> Client | None:
    try:
        client: Client = default_client()
    except ValueError:
        return None
    return client


def _connect(scheduler: str) -> Client:
    address = scheduler
    if Path(scheduler).is_file():
        try:
            address = json.loads(Path(scheduler).read_text())["address"]
        except (ValueError, KeyError, TypeError) as error:
            raise ParameterError(
                f"{scheduler} is not a scheduler file: give the file that "
                "`dask scheduler --scheduler-file` wrote, or an address such as tcp://head:8786."
            ) from error
    try:
        # Asked first, because a client that could not connect leaves threads behind; on a
        # thread of its own, because a notebook's thread runs an event loop already.
        with ThreadPoolExecutor(1) as executor:
            executor.submit(asyncio.run, _greet(address)).result()
        return Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"No Dask scheduler answers at {scheduler}: check the address, and that it runs."
        ) from error


async def _greet(address: str) -> None:
    security = Security().get_connection_args("client")
    comm = await connect(address, timeout=CONNECT_SECONDS, **security)
    await comm.close()
