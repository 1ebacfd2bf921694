"""Warnings about an input or an answer: shown at once, and stored with the output.

`warn` issues a `KptWarning` through Python's `warnings`, for users of the library. The command line
redirects the sentences with `shown`, and code that writes an output collects them with `recorded`.
Both apply to the code inside their `with`, in the thread that entered it.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kpt_dask.errors import KptWarning

_show: ContextVar[Callable[[str], None] | None] = ContextVar("show", default=None)
_records: ContextVar[tuple[list[str], ...]] = ContextVar("notices", default=())


def warn(sentence: str) -> None:
    """Issue a warning: one sentence that names the file, the doubt and the remedy."""
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
    """Pass every warning inside the `with` to `show`, each once, instead of to `warnings`."""
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
    """Collect the warnings inside the `with`, each once, in order.

    Yields
    ------
    list of str
        Sentences, appended as they are issued.
    """
    record: list[str] = []
    token = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(token)
