"""Signals delayed during steps that must not be cut off."""

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
"""Signals that end a program and can be handled; SIGQUIT still ends it at once."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay signals that would end the program until the block is done.

    Has no effect outside the main thread, where Python handles no signals.
    """
    if current_thread() is not main_thread():
        yield
        return
    received: list[int] = []
    before: dict[int, Any] = {}
    try:
        for signum in ENDING:
            handler = signal.getsignal(signum)
            # None: a handler that Python did not set, and could not restore.
            if handler is not None and handler is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, lambda number, _: received.append(number))
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for signum in dict.fromkeys(received):
            signal.raise_signal(signum)
