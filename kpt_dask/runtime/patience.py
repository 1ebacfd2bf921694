"""Waiting: what is waited for is said within seconds, and ends after a bound.

The bound is Dask's configuration ``kpt.wait`` (``DASK_KPT__WAIT``, `dask.config.set`); the
command line sets it by ``--wait``.
"""

import contextvars
import time
from collections import Counter
from collections.abc import Iterator
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
"""How long workers may take that are not there, do not answer or do not work."""

SOON = 2.0
"""Seconds until it is said what is waited for."""

TICK = 0.1
"""Seconds between two looks at what has landed, as in `distributed.as_completed`."""

ASKED_EVERY = 1.0
"""Seconds between two questions to the scheduler, while nothing lands."""

SILENT_AFTER = 10.0
"""Seconds without a word from a worker, which usually sends one or two each second."""

_BUSY = ("executing", "flight")
"""States of tasks on a worker that does something. Those that left their thread to others, as whose
own tasks are waited for here, may just wait."""

LOST = (OSError, CancelledError, TimeoutError)
"""What a client raises whose scheduler went away."""


def wait_seconds() -> float:
    """Seconds that workers are waited for.

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
    """Say what is waited for if the block takes longer than a moment."""
    context = contextvars.copy_context()
    timer = Timer(
        SOON,
        context.run,
        (
            progress.say,
            f"{waiting} ({_bound()}).",
        ),
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


class Vigil:
    """A look at the workers whenever nothing has landed for a while.

    Parameters
    ----------
    client : distributed.Client
        Whose workers compute.
    description : str
        What they do.
    """

    def __init__(self, client: Client, description: str) -> None:
        self._client = client
        self._description = description
        self._seen: dict[str, tuple[float, float]] = {}
        self.calm()

    def calm(self) -> None:
        """Something has landed."""
        self._asked = self._landed = time.monotonic()
        self._idle_since: float | None = None
        self._shown = ""

    def look(self) -> None:
        """Say that nobody works if that is so; give up after the bound.

        Raises
        ------
        ClusterError
            If nobody has worked for too long, or the scheduler has gone.
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
        """Say why nobody works, None if somebody does."""
        where = scheduler_address(self._client)
        try:
            # Two seconds are much for a question that takes a millisecond.
            scheduler: Any = self._client.scheduler
            known = self._client.sync(scheduler.identity, callback_timeout=SOON)
        except LOST:
            return f"the Dask scheduler at {where} does not answer"
        workers: dict[str, dict[str, Any]] = known["workers"]
        if not workers:
            return f"there is no worker at {where}; start one with: dask worker {where}"
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
    """Address of a client's scheduler, for a person."""
    return str(getattr(client.scheduler, "address", "an unknown address"))


def landing(landed: as_completed, vigil: Vigil | None) -> Iterator[tuple[Any, Any]]:
    """Iterate over futures with their results, as `as_completed` does, kept up by a vigil."""
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
        If none comes, or the scheduler has gone.
    """
    vigil = Vigil(client, "Looking for workers")
    while True:
        try:
            scheduler: Any = client.scheduler
            found = client.sync(scheduler.ncores, callback_timeout=wait_seconds())
        except LOST as error:
            raise lost(client, "Looking for workers") from error
        if found:
            return list(found.values())
        time.sleep(TICK)
        vigil.look()


def lost(client: Client, description: str) -> ClusterError:
    """Say that the scheduler went away, or took tasks away."""
    if client.status == "running":
        return ClusterError(
            f"{description}: the workers died that held what others needed; see their logs, then "
            "run the same command again."
        )
    return ClusterError(
        f"{description}: the connection to the Dask scheduler was lost; see its log, then run the "
        "same command again."
    )
