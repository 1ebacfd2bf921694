"""Sessions: a Dask client, on this machine alone or connected to a running cluster."""

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
"""Tasks submitted at a time: enough to keep threads busy, few enough to hold their results."""

_OWN: "WeakSet[Client]" = WeakSet()
"""Clients whose only worker is this process."""
_LOCK = Lock()
_DASK_THREADS = ("IO loop", "Dask-")


@contextmanager
def session(client: Client | None = None, scheduler: str | None = None) -> Iterator[Client]:
    """Choose or make a Dask client; close it afterwards only if it was made here.

    Parameters
    ----------
    client : distributed.Client, optional
        Client to use; it is left open.
    scheduler : str, optional
        Address ("tcp://head:8786") or scheduler file of a running cluster.

    Yields
    ------
    client : distributed.Client
        The given one; else one connected to `scheduler`; else the process's current one;
        else a new one whose worker is this process, with a thread for every core that the
        process may use. Inside a Dask task it is always a new one with a single thread, unless a
        client is given: then the task secedes, so that its thread is free until the session ends.

    Raises
    ------
    ParameterError
        If `scheduler` is a file, but not a scheduler file; or if the client is none, or
        asynchronous.
    ClusterError
        If `scheduler` does not answer, or this process was forked from one in which Dask ran.
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
        if not isinstance(client, Client):
            raise ParameterError(
                f"{client!r} is no Dask client: make one of an address by distributed.Client(…)."
            )
        if client.asynchronous:
            raise ParameterError(
                "The Dask client is asynchronous, and nothing may wait for it in its event loop:"
                " call this in a thread, by asyncio.to_thread(…)."
            )
        with _stepping_aside(client):
            yield client
    elif scheduler is not None:
        with _connect(scheduler) as connected:
            yield connected
    elif in_task:
        # Tasks of this session must not wait for the threads that this task holds.
        with local(1) as new:
            yield new
    else:
        with local(CPU_COUNT) as new:
            yield new


@contextmanager
def local(threads: int) -> Iterator[Client]:
    """Make this process a worker with `threads` threads; yield its client."""
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
        # Batched streams between client, scheduler and worker delay messages by some milliseconds.
        comms = *cluster.scheduler.client_comms.values(), *cluster.scheduler.stream_comms.values()
        streams = (worker.batched_stream for worker in cluster.workers.values())
        for stream in (client.scheduler_comm, *comms, *streams):
            stream.interval = 0.0
        yield client


def is_own(client: Client) -> bool:
    """Whether the client's only worker is this process."""
    return client in _OWN


class _LoopbackWorker(Worker):
    """A worker whose HTTP server listens on the loopback interface only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "dashboard_address": "127.0.0.1:0"})


class _Settings:
    """Settings of local sessions, counted: several threads may have a session at once."""

    sessions = 0
    stack = ExitStack()


@contextmanager
def _own_settings() -> Iterator[None]:
    """Replace the user's configuration of Dask by what local sessions need.

    The user's is meant for clusters: memory limits, TLS, preloads, the address of a scheduler.
    """
    with _LOCK:
        if _Settings.sessions == 0:
            # The worker holds all tasks in flight, so that it never waits for the next one.
            # Dask's profiler samples 100 times a second and would slow the tasks.
            defaults = dask.config.merge(*dask.config.defaults)
            tuning = {
                "distributed.scheduler.worker-saturation": IN_FLIGHT_PER_THREAD,
                "distributed.worker.profile.enabled": False,
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
            _Settings.stack.enter_context(dask.config.set(tuning))
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
    """Secede in a Dask task, so that the tasks it waits for get its thread, as `worker_client`."""
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
        # Tried first without a client, because one that cannot connect leaks threads.
        with saying(waiting):
            problem = _try(address, wait)
        if problem is not None:
            raise problem
        with warnings.catch_warnings():
            # `witness` compares versions, in more detail.
            warnings.simplefilter("ignore", VersionMismatchWarning)
            return Client(address, timeout=wait, set_as_default=False)
    # Libraries raise many kinds of errors for odd addresses and missing certificates.
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
    """Connect and check that a scheduler answers; return the error, None if one does."""
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            asyncio.run(asyncio.wait_for(_greet(address, wait), wait))
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # In a new thread, because a notebook's thread already runs an event loop.
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
