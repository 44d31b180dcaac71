"""Signals that end a process: kept until what is begun is done, and none lost."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_SOON = 0.02  # seconds


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps signals that would raise an exception until a few renames are done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where none are handled
        return
    came = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for name in ("SIGINT", "SIGTERM", "SIGHUP")
        if (number := getattr(signal, name, None)) and callable(signal.getsignal(number))
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def send_again(number: int) -> None:
    """Sends this process a signal soon, whose exception Python has dropped.

    As it does in a callback of its garbage collector.
    """
    again = threading.Timer(_SOON, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
