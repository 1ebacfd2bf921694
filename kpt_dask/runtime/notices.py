"""Doubts about an input or an answer: shown at once, and stored with the output.

Whoever has a doubt calls `warn`; it knows neither who listens nor whether anybody does. A library's
user gets a `KptWarning` by Python's own warnings; the command line asks for the sentences with
`shown`; and whoever writes an output collects them with `recorded`. Both hold for the code inside
their `with`, on the thread that entered it.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kpt_dask.errors import KptWarning

_show: ContextVar[Callable[[str], None] | None] = ContextVar("show", default=None)
_records: ContextVar[tuple[list[str], ...]] = ContextVar("notices", default=())


def warn(sentence: str) -> None:
    """Tell a doubt: one sentence that names the file, says what is doubtful and what to do."""
    for record in _records.get():
        if sentence not in record:
            record.append(sentence)
    show = _show.get()
    if show is None:
        warnings.warn(sentence, KptWarning, stacklevel=2)
    else:
        show(sentence)


@contextmanager
def shown(show: Callable[[str], None]) -> Iterator[None]:
    """Give every doubt inside the `with` to `show`, each once, instead of to Python's warnings."""
    shown_before: set[str] = set()

    def show_once(sentence: str) -> None:
        if sentence not in shown_before:
            shown_before.add(sentence)
            show(sentence)

    token = _show.set(show_once)
    try:
        yield
    finally:
        _show.reset(token)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Collect the doubts inside the `with`, each once, in the order in which they came.

    Yields
    ------
    list of str
        Filled as doubts arise.
    """
    record: list[str] = []
    token = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(token)
