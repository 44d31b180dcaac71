"""How a command ends as a process: exit statuses, signals, broken pipes."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from emaopt._interrupts import send_again
from emaopt.cli._terminal import say, stop, take_any_text

_PIPE = 13  # SIGPIPE, which the signal module lacks on some systems
_GRACE = 5.0  # seconds to remove unfinished files, in which further signals are ignored


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end."""

    number: int = signal.SIGINT


class Commands(TyperGroup):
    """The commands, each of which ends with at most one line on stderr."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Runs a command, and exits with its status."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        take_any_text()
        # Standalone, Typer would print errors itself, in a box of several lines.
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except Exception as error:
            # A wrong call, known by its method, because Typer may have classes of its own
            # in place of Click's. A call without any argument has printed the help.
            if (message_of := getattr(error, "format_message", None)) is None:
                raise
            code = getattr(error, "exit_code", 2)
            if message := message_of():
                context = getattr(error, "ctx", None)
                say(f"{context.command_path if context else 'emaopt'}: {message}")
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Reads the options of the group; --version and --help print and exit here."""
        with _ending():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        with _ending(ctx):
            return super().invoke(ctx)


@contextlib.contextmanager
def _ending(ctx: object = None) -> Iterator[None]:
    """Turns signals, and an output that cannot be written, into an exit status."""
    try:
        with _signals():
            yield
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        command = f"emaopt {getattr(ctx, 'invoked_subcommand', None) or ''}".strip()
        stop(f"{command}: stopped by {signal.Signals(number).name}.", 128 + number)
    except (BrokenPipeError, SystemExit) as error:
        # Rich ends a broken pipe with SystemExit(1); the pipe's error is its context.
        broken = error if isinstance(error, BrokenPipeError) else error.__context__
        if not isinstance(broken, BrokenPipeError):
            raise
        _drop_output()
        raise typer.Exit(128 + _PIPE) from None
    except OSError as error:
        _drop_output()
        stop(f"emaopt: the output cannot be written: {error.strerror}.", 1)


def _drop_output() -> None:
    """Points stdout to the null device."""
    # At exit Python flushes its buffer, which would fail again, with Python's message.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turns signals that end a process into an exception, so that files are removed.

    Signals that are ignored, as under nohup, stay ignored. If Python drops the exception,
    as in a callback of its garbage collector, the signal is sent again.
    """
    last = -_GRACE

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        nonlocal last
        if not isinstance(what.exc_value, Stopped):
            return hook(what)
        # The signal that is sent again comes within the grace of this one.
        last = -_GRACE
        send_again(what.exc_value.number)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last
        # A second signal would interrupt the removal of files that the first one began.
        if time.monotonic() - last >= _GRACE:
            last = time.monotonic()
            stopped = Stopped()
            stopped.number = number
            raise stopped

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    before = {}
    # Only the main thread may set handlers. Handlers of an embedding program are kept.
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            taken = signal.SIG_DFL, signal.default_int_handler
            if number and signal.getsignal(number) in taken:
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
