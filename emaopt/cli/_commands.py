"""How the commands begin and end: options that are wrong, failures, signals, pipes."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from emaopt._advice import said_in_shell
from emaopt._interrupts import send_again
from emaopt.cli._terminal import say, stop, take_any_text, warn

_PIPE = 13  # SIGPIPE, which not all systems have
_GRACE = 5.0  # seconds in which what was begun is taken back, whatever else is sent


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
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except Exception as error:
            if (message_of := getattr(error, "format_message", None)) is None:
                raise
            # A wrong call; one without anything has printed the help.
            code = getattr(error, "exit_code", 2)
            if message := message_of():
                context = getattr(error, "ctx", None)
                say(f"{context.command_path if context else 'emaopt'}: {message}")
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Reads the options; those of the group itself print and exit."""
        with _ending():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        with _ending(ctx):
            return super().invoke(ctx)


@contextlib.contextmanager
def _ending(ctx: Any = None) -> Iterator[None]:
    """Turns signals and an output that takes no more into an exit status."""
    try:
        with _signals():
            yield
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        command = f"emaopt {getattr(ctx, 'invoked_subcommand', None) or ''}".strip()
        stop(f"{command}: stopped by {signal.Signals(number).name}.", 128 + number)
    except (BrokenPipeError, SystemExit) as error:
        # rich exits by itself where a pipe is broken, with 1.
        broken = error if isinstance(error, BrokenPipeError) else error.__context__
        if not isinstance(broken, BrokenPipeError):
            raise
        _drop_output()
        raise typer.Exit(128 + _PIPE) from None
    except OSError as error:
        _drop_output()
        stop(f"emaopt: the output cannot be written: {error.strerror}.", 1)


def _drop_output() -> None:
    """Keeps Python from writing at exit what could not be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Makes of signals that end a process an exception, so that files are removed.

    What is ignored, as under nohup, stays so. Where Python drops an exception, as in a
    callback of its garbage collector, the signal is sent again.
    """
    last = -_GRACE

    def dropped(what: Any) -> None:
        nonlocal last
        if not isinstance(what.exc_value, Stopped):
            return hook(what)
        last = -_GRACE
        send_again(what.exc_value.number)

    def handle(number: int, frame: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= _GRACE:
            last = time.monotonic()
            stopped = Stopped()
            stopped.number = number
            raise stopped

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    before = {}
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


def quiet_cpu() -> None:
    """On the CPU, and without a line from Orbax on every file that it opens."""
    import jax
    from absl import logging as absl_logging

    jax.config.update("jax_platforms", "cpu")
    absl_logging.set_verbosity(absl_logging.FATAL)


class _Warnings(logging.Handler):
    """Prints what the library logs as the warnings that it reports."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


@contextlib.contextmanager
def _warning() -> Iterator[None]:
    logger, handler = logging.getLogger("emaopt"), _Warnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def failing(command: str) -> Iterator[None]:
    """Turns what a user can mend into one line and an exit status."""
    quiet_cpu()
    from emaopt._names import Unknown
    from emaopt._profiles import BadProfile

    try:
        with _warning():
            yield
    except BadProfile as error:
        stop(_as_said_here(command, error), 2)
    except Unknown as error:
        named = {"name": "weights", "path": "plot"}
        option = named.get(error.argument, error.argument)
        stop(_as_said_here(command, error, f"--{option}: "), 2)
    except BrokenPipeError:
        raise
    except ModuleNotFoundError:
        raise  # of an extra: `main` says which
    except MemoryError as error:
        stop(f"emaopt {command}: out of memory: {error}", 1)
    except (ImportError, OSError, TypeError, ValueError) as error:
        stop(_as_said_here(command, error), 1)


def _as_said_here(command: str, error: Exception, option: str = "") -> str:
    """The message with the command in front, in the words of the shell."""
    said = said_in_shell(error)
    first, colon, rest = said.partition(": ")
    said = rest if colon and first.isidentifier() else said
    return f"emaopt {command}: {option}{said}"
