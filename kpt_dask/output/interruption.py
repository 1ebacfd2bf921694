"""Signals wait while something must not be left in the middle."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals that end a program and can be handled; SIGQUIT is left to who wants it gone at once."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals that would end the program wait until the block is done.

    In other threads than the main one nothing happens: Python handles no signal there.
    """
    if current_thread() is not main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {}
    try:
        for signum in ENDING:
            handler = signal.getsignal(signum)
            # None: set by somebody else than Python, who could not get it back.
            if handler is not None and handler is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, lambda number, _: came.append(number))
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for signum in dict.fromkeys(came):
            signal.raise_signal(signum)
