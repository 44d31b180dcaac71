"""What reaches the terminal: text that it can show, warnings, progress."""

import codecs
import contextlib
import json
import pathlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

_NAMES = 16  # letters of a name that a line of a table shows at least
_FOR = {"×": "x", "±": "+/-", "²": "^2", "√": "sqrt", "…": "...", "—": "-", "–": "-"}


def _in_words(error: UnicodeError) -> tuple[str, int]:
    """What stands for letters of ours that a terminal lacks: "theta" for "θ"."""
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
    return letter.encode("unicode_escape").decode()


def take_any_text() -> None:
    """Lets the output take letters that it cannot show, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="emaopt.words")


def in_letters(text: str) -> str:
    """Our own words in the letters that the output has, so that tables are straight."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "emaopt.words").decode(encoding)


def shown(name: Any) -> str:
    """A name or message of others' as it may be printed, with nothing lost.

    What would steer the terminal (escape codes, line ends) or what it has no letters for
    is written as Python would in a string.
    """
    text = str(name)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = "".join(one if one.isprintable() else _escaped(one) for one in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


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


def report(
    as_json: bool,
    document: dict[str, Any],
    renderables: Iterable[Any] = (),
    written: str | pathlib.Path | None = None,
) -> None:
    """Prints what a command has found and made: a document, or tables and sentences.

    Into a pipe, names are not folded.
    """
    if as_json:
        made = {} if written is None else {"written": str(written)}
        typer.echo(json.dumps(document | made, indent=2))
        return
    width = None if sys.stdout and sys.stdout.isatty() else 10_000
    console = Console(soft_wrap=True, highlight=False, width=width)
    for renderable in renderables:
        room, console.width = console.width, _room(console, renderable)
        console.print(renderable)
        console.width = room
    if written is not None:
        console.print(f"Written: {shown(written)}", markup=False)


def _room(console: Console, renderable: Any) -> int:
    """The terminal's width, or what a table needs to show all of its numbers.

    Names are folded, in the first column, but not to less than a few letters a line.
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
    """Prints one line to stderr, if there is one."""
    line = shown(message.strip())
    with contextlib.suppress(OSError):
        Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)
