"""Sessions: how a client of Dask comes about, on this machine alone or on a running cluster."""

import asyncio
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakSet

import dask.config
from dask.system import CPU_COUNT
from distributed import (
    Client,
    LocalCluster,
    Security,
    Worker,
    default_client,
    get_worker,
    rejoin,
    secede,
)
from distributed.comm.core import connect
from distributed.threadpoolexecutor import thread_state
from distributed.versions import VersionMismatchWarning

from kpt_dask.errors import ClusterError, ParameterError
from kpt_dask.runtime.patience import saying, wait_seconds

IN_FLIGHT_PER_THREAD = 4
"""Tasks handed out at a time: enough that no thread waits, few enough to hold their results."""

_OWN: "WeakSet[Client]" = WeakSet()
"""Clients whose only worker is this process."""
_LOCK = Lock()
_DASK_THREADS = ("IO loop", "Dask-")


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
        process may use. Inside a Dask task, whose worker has threads of its own, it is always
        a new one, with a single thread. A client that is given there gets the thread of the task
        as well, which waits until the session ends.

    Raises
    ------
    ParameterError
        `scheduler` is a file of something else.
    ClusterError
        `scheduler` does not answer, or this process was forked from one in which Dask ran.
    """
    if _forked:
        raise ClusterError(
            "This process was forked while Dask's threads ran in its parent, and they do not "
            "survive a fork: start processes with "
            "multiprocessing.get_context('spawn') or 'forkserver'."
        )
    in_task = client is None and scheduler is None and _in_task()
    if client is None and scheduler is None and not in_task:
        client = _current()
    if client is not None:
        with _stepping_aside(client):
            yield client
    elif scheduler is not None:
        with _connect(scheduler) as connected:
            yield connected
    elif in_task:
        # Tasks of this session must not wait for the threads that this task holds.
        with local(1) as own:
            yield own
    else:
        with local(CPU_COUNT) as own:
            yield own


@contextmanager
def local(threads: int) -> Iterator[Client]:
    """Make this process a worker of so many threads, and give its client."""
    # No memory limit: it would count the whole process and pause its only worker.
    with (
        _own_settings(),
        LocalCluster(
            processes=False,
            n_workers=1,
            threads_per_worker=threads,
            memory_limit=None,
            worker_class=_LoopbackWorker,
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        _OWN.add(client)
        # Else whoever has just sent a message keeps the next one back for some milliseconds, on
        # every way between client, scheduler and worker.
        ways = *cluster.scheduler.client_comms.values(), *cluster.scheduler.stream_comms.values()
        streams = (worker.batched_stream for worker in cluster.workers.values())
        for way in (client.scheduler_comm, *ways, *streams):
            way.interval = 0.0
        yield client


def is_own(client: Client) -> bool:
    """Whether the client's only worker is this process."""
    return client in _OWN


class _LoopbackWorker(Worker):
    """A worker whose HTTP server, which every worker has, is not seen from other machines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "dashboard_address": "127.0.0.1:0"})


class _Settings:
    """The settings of local sessions, as long as there is one: several threads may have some."""

    sessions = 0
    stack = ExitStack()


@contextmanager
def _own_settings() -> Iterator[None]:
    """Set what local sessions rely on, whatever the user's configuration of Dask says.

    That is meant for clusters: memory limits, TLS, preloads, the address of a scheduler.
    """
    with _LOCK:
        if _Settings.sessions == 0:
            # All tasks in flight on the worker, or it would wait for each to come. What Dask
            # measures of itself a hundred times a second takes the cores from the tasks.
            defaults = dask.config.merge(*dask.config.defaults)
            own = {
                "distributed.scheduler.worker-saturation": IN_FLIGHT_PER_THREAD,
                "distributed.worker.profile.enabled": False,
                "distributed.admin.tick.interval": "1s",
            }
            _Settings.stack.enter_context(
                dask.config.set(
                    {
                        "distributed": defaults["distributed"],
                        "temporary-directory": None,
                        "scheduler-address": None,
                    }
                )
            )
            _Settings.stack.enter_context(dask.config.set(own))
        _Settings.sessions += 1
    try:
        yield
    finally:
        with _LOCK:
            _Settings.sessions -= 1
            if _Settings.sessions == 0:
                _Settings.stack.close()


@contextmanager
def _stepping_aside(client: Client) -> Iterator[None]:
    """In a Dask task, leave its thread to the tasks that it waits for, as `worker_client` does."""
    if is_own(client) or not (_in_task() and getattr(thread_state, "proceed", False)):
        yield
        return
    secede()
    try:
        yield
    finally:
        rejoin()


def _in_task() -> bool:
    try:
        get_worker()
    except ValueError:
        return False
    return True


def _current() -> Client | None:
    try:
        client: Client = default_client()
    except ValueError:
        return None
    return client


def _connect(scheduler: str) -> Client:
    address, wait = _address(scheduler), wait_seconds()
    waiting = f"waiting for a Dask scheduler at {scheduler}"
    try:
        # Asked first, because a client that could not connect leaves threads behind.
        with saying(waiting):
            problem = _try(address, wait)
        if problem is not None:
            raise problem
        with warnings.catch_warnings():
            # Every worker is asked for its versions before it works.
            warnings.simplefilter("ignore", VersionMismatchWarning)
            return Client(address, timeout=wait, set_as_default=False)
    # Whatever libraries make of an odd address or of missing certificates.
    except Exception as error:
        raise ClusterError(
            f"No Dask scheduler answers at {scheduler}: check the address, and that it runs."
        ) from error


def _address(scheduler: str) -> str:
    if not Path(scheduler).is_file():
        return scheduler
    try:
        address = json.loads(Path(scheduler).read_text())["address"]
    except (ValueError, KeyError, TypeError):
        address = None
    if not isinstance(address, str):
        raise ParameterError(
            f"{scheduler} is not a scheduler file: give the file that "
            "`dask scheduler --scheduler-file` wrote, or an address such as tcp://head:8786."
        )
    return address


def _try(address: str, wait: float) -> Exception | None:
    """Connect and ask who is there; return what went wrong."""
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            asyncio.run(asyncio.wait_for(_greet(address, wait), wait))
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # On a thread of its own, because a notebook's thread runs an event loop already.
    thread = threading.Thread(target=ask, name="greeting", daemon=True)
    thread.start()
    thread.join()
    return outcome[0] if outcome else RuntimeError("interrupted")


async def _greet(address: str, wait: float) -> None:
    security = Security().get_connection_args("client")
    comm = await connect(address, timeout=wait, **security)
    try:
        await comm.write({"op": "identity", "reply": True})
        answer = await comm.read()
    finally:
        comm.abort()
    if "workers" not in answer:
        raise ValueError("that is no scheduler")


_forked = False
_dask_ran = False


def _before_fork() -> None:
    global _dask_ran
    _dask_ran = any(thread.name.startswith(_DASK_THREADS) for thread in threading.enumerate())


def _after_fork() -> None:
    global _forked
    _forked = _forked or _dask_ran


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
