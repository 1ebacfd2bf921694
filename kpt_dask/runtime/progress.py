"""Progress of the program: named stages, shown on a terminal and timed.

A stage reports its name and its progress, whether or not anybody watches. A library shows
nothing; the command line shows stages with `shown`, and `recorded` collects their seconds. Both
hold for the code inside their ``with``, on the thread that entered it.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

VISIBLE_AFTER = 1.0
"""Seconds that a stage must last before it is shown."""


class _Display(Progress):
    """Bars of the running stages; those that may end in a moment stay invisible."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table([task for task in self.tasks if _lasting(task)])


def _lasting(task: Task) -> bool:
    return (task.elapsed or 0.0) >= VISIBLE_AFTER


_display: ContextVar[_Display | None] = ContextVar("display", default=None)
_records: ContextVar[tuple[dict[str, float], ...]] = ContextVar("records", default=())


@contextmanager
def stage(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Name the work done inside the ``with``.

    Parameters
    ----------
    description : str
        Name that is shown ("Reading scan"), and key of the seconds in `recorded`.
    total : int, optional
        Number of steps, if known.

    Yields
    ------
    advance : callable
        ``advance(n)`` reports that n more steps are done; any thread may call it.
    """
    display = _display.get()
    start = time.perf_counter()
    task = None if display is None else display.add_task(description, total=total)

    def advance(steps: int) -> None:
        if display is not None and task is not None:
            display.advance(task, steps)

    try:
        yield advance
    finally:
        seconds = time.perf_counter() - start
        for record in _records.get():
            record[description] = record.get(description, 0.0) + seconds
        if display is not None and task is not None:
            display.remove_task(task)
    if display is not None and seconds >= VISIBLE_AFTER:
        display.console.print(f"{description}: {seconds:.1f} s", highlight=False, markup=False)


def say(sentence: str) -> None:
    """Report a sentence at once: on the display if there is one, else as a warning of the log."""
    display = _display.get()
    if display is None:
        log.warning(sentence)
    else:
        display.console.print(f"kpt: {sentence}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def shown(console: Console | None = None) -> Iterator[None]:
    """Show the stages inside the `with`: bars on a terminal, elsewhere a line when one ends.

    Parameters
    ----------
    console : rich.console.Console, optional
        Where to write; standard error by default, so that standard output
        carries nothing but results.
    """
    console = console or Console(stderr=True)
    display = _Display(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        disable=not console.is_terminal,
    )
    with display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)


@contextmanager
def recorded() -> Iterator[dict[str, float]]:
    """Collect the seconds that each stage inside the `with` takes.

    Yields
    ------
    seconds : dict of str to float
        Wall time in s by description, filled as stages end; a stage that runs several
        times adds up, and one inside another counts in both.
    """
    seconds: dict[str, float] = {}
    token = _records.set((*_records.get(), seconds))
    try:
        yield seconds
    finally:
        _records.reset(token)
