"""How the commands fail, warn and show progress."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import typer
from rich.console import Console

_WORDS = {  # of the library -> of the command line
    "pass force=True to replace it": "--force replaces it",
    "Say with weights= which": "Say with --weights which",
    "Say with at=": "Say with --at",
    "Say with name= which.": "Say with --weights which.",
    "say with at= if": "say with --at if",
    ", as at=": ", as --at ",
    "Say with name= (of handler_registry, if a CheckpointManager saves) which one goes "
    "under the parameters' names.": "Say with --weights NAME which one.",
    "recorded={name: decay}, on the command line ": "",
    "Give steps (on the command line, --steps)": "Give them with --steps",
    "Load them with orbax.checkpoint.StandardCheckpointer.": "Leave out --weights.",
}


def quiet_cpu() -> None:
    """On the CPU, and without a line from Orbax on every file that it opens."""
    import jax
    from absl import logging

    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.FATAL)


@contextlib.contextmanager
def failing(command: str) -> Iterator[None]:
    """Turns what a user can mend into one line and an exit status."""
    quiet_cpu()
    from emaopt._profiles import BadProfile

    try:
        yield
    except BadProfile as error:
        stop(_as_said_here(command, error), 2)
    except (OSError, TypeError, ValueError) as error:
        stop(_as_said_here(command, error), 1)


def _as_said_here(command: str, error: Exception) -> str:
    """The message with the command in front, in the words of the command line."""
    said = str(error)
    for theirs, ours in _WORDS.items():
        said = said.replace(theirs, ours)
    first, colon, rest = said.partition(": ")
    return f"emaopt {command}: {rest if colon and first.isidentifier() else said}"


@contextlib.contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int], Any]]:
    """A bar on stderr, if that is a terminal; it takes bytes done and in all."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def integers(command: str, text: str) -> list[int]:
    """The numbers of "100,200"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        stop(f"emaopt {command}: --steps takes numbers as in 100,200, got {text!r}.", 2)


def show(renderables: Iterable[Any]) -> None:
    """Prints tables and sentences; into a pipe, names are not folded."""
    width = None if sys.stdout.isatty() else 10_000
    console = Console(soft_wrap=True, highlight=False, width=width)
    for renderable in renderables:
        console.print(renderable)


def written(path: str | pathlib.Path) -> None:
    """Says what a command has made."""
    Console(soft_wrap=True, highlight=False).print(f"Written: {path}", markup=False)


def warn(message: str) -> None:
    """Prints a warning to stderr."""
    _to_stderr(f"warning: {message}")


def stop(message: str, code: int) -> NoReturn:
    """Prints one line to stderr and exits."""
    _to_stderr(message)
    raise typer.Exit(code)


def _to_stderr(message: str) -> None:
    line = " ".join(message.split())
    Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)
