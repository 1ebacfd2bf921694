"""Waiting for workers: reported within seconds, and limited in time.

The bound is Dask's configuration ``kpt.wait`` (``DASK_KPT__WAIT``, `dask.config.set`); the
command line sets it by ``--wait``.
"""

import contextvars
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from threading import Timer
from typing import Any

import dask.config
from dask.utils import parse_timedelta
from distributed import Client, as_completed

from kpt_dask.errors import ClusterError, ParameterError
from kpt_dask.runtime import progress

WAIT = "30s"
"""Default limit of waiting for workers that are missing, do not answer or do not work."""

SOON = 2.0
"""Seconds of waiting before it is reported."""

TICK = 0.1
"""Seconds between two polls for completed futures, as in `distributed.as_completed`."""

ASKED_EVERY = 1.0
"""Seconds between two requests to the scheduler, while no future completes."""

SILENT_AFTER = 10.0
"""Seconds without a heartbeat after which a worker counts as silent; usual are 0.5 to 1 s."""

_BUSY = ("executing", "flight")
"""Task states that show a worker at work. Tasks that seceded are not counted: they may just wait
for tasks of their own."""


def wait_seconds() -> float:
    """Get the limit of waiting for workers, seconds.

    Raises
    ------
    ParameterError
        If the configuration is no positive span of time.
    """
    wait = dask.config.get("kpt.wait", WAIT)
    try:
        seconds = float(parse_timedelta(wait))
    except (ValueError, KeyError, AttributeError, TypeError):
        seconds = 0.0
    if not seconds > 0:
        raise ParameterError(f"{wait!r} is no span of time to wait; write for instance 5m.")
    return seconds


@contextmanager
def saying(waiting: str) -> Iterator[None]:
    """Report what is waited for if the block takes longer than `SOON`."""
    context = contextvars.copy_context()
    timer = Timer(
        SOON,
        context.run,
        (progress.say, f"{waiting} ({_bound()})."),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _bound() -> str:
    return f"ends after {wait_seconds():g} s; --wait sets it"


def ask(client: Client, request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Wait for the answer to a request that a client makes of its scheduler.

    Parameters
    ----------
    client : distributed.Client
    request : callable
        Coroutine function that makes the request.
    *arguments, **options
        Arguments of the request; option ``callback_timeout``: limit of waiting, seconds.

    Raises
    ------
    TimeoutError
        If the answer does not come in time.
    OSError
        If the scheduler has gone.
    """
    try:
        return client.sync(request, *arguments, **options)
    except (AttributeError, CancelledError) as error:
        # A client that knows that its scheduler has gone has None for it, and cancels requests.
        if isinstance(error, AttributeError) and client.scheduler is not None:
            raise
        raise ConnectionError("the scheduler has gone") from error


async def _call(client: Client, name: str) -> Any:
    return await getattr(client.scheduler, name)()


class Vigil:
    """A check of the workers whenever no future has completed for a while.

    Parameters
    ----------
    client : distributed.Client
        Client whose workers compute.
    description : str
        Name of their work in messages.
    """

    def __init__(self, client: Client, description: str) -> None:
        self._client = client
        self._description = description
        self._seen: dict[str, tuple[float, float]] = {}
        self.calm()

    def calm(self) -> None:
        """Start over: a future has completed."""
        self._asked = self._landed = time.monotonic()
        self._idle_since: float | None = None
        self._shown = ""

    def look(self) -> None:
        """Report if no worker works; give up after the limit of waiting.

        Raises
        ------
        ClusterError
            If no worker has worked for too long, or the scheduler has gone.
        """
        now = time.monotonic()
        if now - max(self._asked, self._landed + SOON - ASKED_EVERY) < ASKED_EVERY:
            return
        trouble = self._trouble()
        self._asked = time.monotonic()
        if trouble is None:
            self._idle_since, self._shown = None, ""
            return
        if self._idle_since is None:
            self._idle_since = now
        if time.monotonic() - self._idle_since >= wait_seconds():
            raise ClusterError(f"{self._description}: {trouble}.")
        if trouble != self._shown:
            self._shown = trouble
            progress.say(f"{self._description}: {trouble}; waiting ({_bound()}).")

    def _trouble(self) -> str | None:
        """Find why no worker works; None if one does."""
        where = scheduler_address(self._client)
        try:
            # The request takes 1 ms, so 2 s are ample.
            known = ask(self._client, _call, self._client, "identity", callback_timeout=SOON)
        except OSError:
            return f"the Dask scheduler at {where} does not answer"
        workers: dict[str, dict[str, Any]] = known["workers"]
        if not workers:
            there = f"there is no worker at {where}"
            # What started the scheduler starts its workers.
            owned = self._client.cluster is not None
            return (
                f"{there}, see their logs"
                if owned
                else f"{there}; start one with: dask worker {where}"
            )
        states = Counter(self._state(address, one) for address, one in workers.items())
        if states["works"]:
            return None
        if states["is idle"] == len(workers):
            return f"no worker of the {len(workers)} at {where} has begun a task"
        summary = ", ".join(
            f"{n} {state}" for state, n in sorted(states.items()) if state != "is idle"
        )
        return f"of {len(workers)} workers at {where} none works: {summary}"

    def _state(self, address: str, worker: dict[str, Any]) -> str:
        now, last = time.monotonic(), float(worker["last_seen"])
        heard, since = self._seen.get(address, (last, now))
        if heard != last:
            since = now
        self._seen[address] = last, since
        if now - since > SILENT_AFTER:
            return "does not answer"
        counts = worker["metrics"].get("task_counts", worker["metrics"])
        if any(counts.get(state, 0) for state in _BUSY):
            return "works"
        if worker["status"] == "paused":
            return "paused for lack of memory (give it more, or stop what else takes it)"
        return "is idle" if worker["status"] == "running" else worker["status"].replace("_", " ")


def scheduler_address(client: Client) -> str:
    """Address of a client's scheduler, for messages."""
    return str(getattr(client.scheduler, "address", "an unknown address"))


def landing(landed: as_completed, vigil: Vigil | None) -> Iterator[tuple[Any, Any]]:
    """Iterate over futures with their results, as `as_completed` does; meanwhile check workers."""
    while not landed.is_empty():
        if vigil is None:
            yield next(landed)
            continue
        with landed.thread_condition:
            if not landed.has_ready():
                landed.thread_condition.wait(timeout=TICK)
        if not landed.has_ready():
            vigil.look()
            continue
        vigil.calm()
        yield next(landed)


def threads_of_workers(client: Client) -> list[int]:
    """Threads of each worker; while there is no worker, wait for one.

    Raises
    ------
    ClusterError
        If none connects in time, or the scheduler has gone.
    """
    vigil = Vigil(client, "Looking for workers")
    while True:
        try:
            threads = ask(client, _call, client, "ncores", callback_timeout=wait_seconds())
        except OSError as error:
            raise lost(client, "Looking for workers", error) from error
        if threads:
            return list(threads.values())
        time.sleep(TICK)
        vigil.look()


def memory_of_workers(client: Client) -> list[int]:
    """Bytes at which Dask ends workers; of those that have a limit.

    Raises
    ------
    ClusterError
        If the scheduler has gone.
    """
    try:
        known = ask(client, _call, client, "identity", callback_timeout=wait_seconds())
    except OSError as error:
        raise lost(client, "Looking for workers", error) from error
    limits = (worker["memory_limit"] for worker in known["workers"].values())
    return [int(limit) for limit in limits if limit]


def lost(client: Client, description: str, error: BaseException) -> ClusterError:
    """Make the error for a scheduler that has gone, or has cancelled tasks."""
    if client.status == "running" and not isinstance(error, OSError):
        return ClusterError(
            f"{description}: the workers died that held what others needed; see their logs, then "
            "run the same command again."
        )
    return ClusterError(
        f"{description}: the connection to the Dask scheduler was lost; see its log, then run the "
        "same command again."
    )
