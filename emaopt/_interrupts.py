"""Signals that end a process: kept back until a few lines are done, then raised."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_SOON = 0.02  # seconds


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps back signals that would raise an exception, until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    came = []
    # Only a handler in Python raises an exception; without one, signals act as before.
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for name in ("SIGINT", "SIGTERM", "SIGHUP")
        if (number := getattr(signal, name, None)) and callable(signal.getsignal(number))
    }
    try:
        yield
    finally:
        # The handlers are put back first: the signal is raised again for its own.
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def send_again(number: int) -> None:
    """Sends this process a signal once more, if Python has dropped its exception.

    Python does so when a signal comes in a callback of its garbage collector.
    """
    # A little later: by then Python has left the callback.
    again = threading.Timer(_SOON, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
