"""Output to the terminal: text that it can show, warnings, progress."""

import codecs
import contextlib
import json
import pathlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from emaopt._types import Json

_NAMES = 16  # letters; a column of names is folded to this width, and no further
_FOR = {"×": "x", "±": "+/-", "²": "^2", "√": "sqrt", "…": "...", "—": "-", "–": "-"}


def _in_words(error: UnicodeError) -> tuple[str, int]:
    """Replaces letters of our own texts that a terminal lacks: "θ" by "theta"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    said = ""
    for letter in error.object[error.start : error.end]:
        name = unicodedata.name(letter, "")
        if letter in _FOR:
            said += _FOR[letter]
        elif name.startswith("GREEK SMALL LETTER "):
            said += name.split()[-1].lower()
        elif name.startswith("GREEK CAPITAL LETTER "):
            said += name.split()[-1].capitalize()
        else:
            said += _escaped(letter)
    return said, error.end


codecs.register_error("emaopt.words", _in_words)


def _escaped(letter: str) -> str:
    """A letter as Python's repr writes it in ASCII."""
    return letter.encode("unicode_escape").decode()


def take_any_text() -> None:
    """Lets the output take letters that it cannot show, instead of an error."""
    # A stream is None where the process has none; a test's may be no TextIOWrapper.
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="emaopt.words")


def in_letters(text: str) -> str:
    """A text of our own in the letters that the output has."""
    # Replaced before a table measures the text: "theta" is wider than "θ", and replaced
    # on the way out it would push the lines of the table out of place.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "emaopt.words").decode(encoding)


def shown(name: object) -> str:
    """A text from outside in printable form, with nothing lost.

    Characters that control the terminal (escape codes, line ends), and letters that it
    lacks, are written as escapes of a Python string.
    """
    text = str(name)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = "".join(one if one.isprintable() else _escaped(one) for one in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def progress_bar(
    doing: str, *, of_bytes: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; it takes (done, in all), bytes or not."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if of_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def report(
    as_json: bool,
    document: Json,
    renderables: Iterable[RenderableType] = (),
    written: str | pathlib.Path | None = None,
) -> None:
    """Prints the results of a command: a JSON document, or tables and sentences.

    In a pipe names are not folded, so that programs find them whole.
    """
    if as_json:
        made = {} if written is None else {"written": str(written)}
        typer.echo(json.dumps(document | made, indent=2))
        return
    width = None if sys.stdout and sys.stdout.isatty() else 10_000
    console = Console(soft_wrap=True, highlight=False, width=width)
    # A table is given more room than the terminal has if its numbers need it.
    for renderable in renderables:
        room, console.width = console.width, _room(console, renderable)
        console.print(renderable)
        console.width = room
    if written is not None:
        console.print(f"Written: {shown(written)}", markup=False)


def _room(console: Console, renderable: RenderableType) -> int:
    """The terminal's width, or the width that a table needs to show all of its numbers.

    The names in its first column are folded, but not to less than `_NAMES` letters.
    """
    if not isinstance(renderable, Table):
        return console.width
    options = console.options.update(width=10_000)
    names = Text.from_markup("\n".join(map(str, renderable.columns[0].cells)))
    to_fold = console.measure(names, options=options).maximum - _NAMES
    needed = console.measure(renderable, options=options).maximum
    return max(console.width, needed - max(to_fold, 0))


def warn(message: str) -> None:
    """Prints a warning to stderr."""
    say(f"warning: {message}")


def stop(message: str, code: int) -> NoReturn:
    """Prints one line to stderr and exits."""
    say(message)
    raise typer.Exit(code)


def say(message: str) -> None:
    """Prints one line to stderr, if there is a stderr."""
    line = shown(message.strip())
    # If stderr is closed or full, there is nowhere to report it.
    with contextlib.suppress(OSError):
        Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)
