"""Options that several commands have, and the checks of their values."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Annotated, TypeVar

import typer

from emaopt._output import is_url

# One path, several, or None.
T = TypeVar("T")


def path(value: T) -> T:
    """Refuses an empty path, as the shell makes of a variable that is not set."""
    if "" in (value if isinstance(value, list) else [value]):
        raise typer.BadParameter("takes a path, got ''.")
    return value


def file(value: str | None) -> str | None:
    """Refuses a directory where a file is to be made."""
    if path(value) is not None and os.path.isdir(value or ""):
        raise typer.BadParameter(f"takes a file to make, {value!r} is a directory.")
    return value


def directory(value: str) -> str:
    """Refuses files and URLs: other programs run in a directory of this machine."""
    if is_url(path(value)):
        raise typer.BadParameter(f"takes a directory of this machine, got {value!r}.")
    if os.path.lexists(value) and not os.path.isdir(value):
        raise typer.BadParameter(f"takes a directory, {value!r} is none.")
    return value


Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Directory of a checkpoint, written by emaopt or by plain Orbax; of a "
        "CheckpointManager, one step's. Also what other programs wrote: see *convert*.",
        show_default=False,
        callback=path,
    ),
]
Run = Annotated[
    str,
    typer.Argument(
        help="A CheckpointManager's directory.", show_default=False, callback=path
    ),
]
Out = Annotated[
    str,
    typer.Option(
        help="Directory to make: an ordinary Orbax checkpoint of the parameters alone, "
        "under their original names. It is there whole or not at all.",
        show_default=False,
        callback=path,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what stands at the output.")
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document, described above, instead of tables."
    ),
]
Which = Annotated[
    str | None,
    typer.Option(
        help="Which weights: *raw* for the raw parameters, *average* for the average "
        "wherever it stands, or the name of one. Else what stands under the parameters' "
        "names: in a checkpoint of emaopt's, the averages.",
        show_default=False,
        autocompletion=lambda: ["raw", "average"],
    ),
]
At = Annotated[
    str | None,
    typer.Option(
        help="Where the parameters stand, as in *model/params*, or a part of them. Else "
        "found: by the average of them, or *params*, or all of a checkpoint without "
        "optimizer state.",
        show_default=False,
    ),
]

Served = Annotated[
    str,
    typer.Option(
        help="Which weights: *served* for the average, wherever it stands, of a "
        "checkpoint that holds any, else the parameters; *raw*, *average*, or the name "
        "of an average.",
        autocompletion=lambda: ["served", "raw", "average"],
    ),
]


def _layouts() -> list[str]:
    """The layouts that `emaopt convert` knows, for the shell to complete."""
    from emaopt.checkpoint._found import LAYOUTS

    return ["auto", *LAYOUTS]


Layout = Annotated[
    str,
    typer.Option(
        help="Whose way of keeping the average it is, such as *kauldron* or "
        "*tf1_swapped*, or the names that lead to the average.",
        autocompletion=lambda: _layouts(),
    ),
]


def _renames(values: list[str] | None) -> list[str] | None:
    """Refuses anything but OLD=NEW."""
    for value in values or []:
        old, is_pair, new = value.partition("=")
        if not (old and is_pair and new):
            raise typer.BadParameter(f"takes OLD=NEW, got {value!r}.")
    return values


Rename = Annotated[
    list[str] | None,
    typer.Option(
        help="OLD=NEW: another name for a parameter, or for what names begin with, "
        "joined with /. Repeat it for each.",
        show_default=False,
        callback=_renames,
    ),
]


def pairs(values: list[str] | None) -> dict[str, str]:
    """The names that `Rename` gives, by the old ones."""
    return dict((old, new) for old, _, new in (v.partition("=") for v in values or []))


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def size(value: str | None) -> str | None:
    """Refuses anything but a size of files, such as 5GB."""
    if value is not None and not bytes_of(value):
        raise typer.BadParameter(f"takes a size such as 5GB, got {value!r}.")
    return value


def bytes_of(value: str | None) -> int | None:
    """A size in bytes; None if it is none."""
    found = _SIZE.fullmatch(value or "")
    if not found:
        return None
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _floating(value: str | None) -> str | None:
    """Refuses a name of no floating dtype."""
    import jax.numpy as jnp

    try:
        if value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating):
            return value
    except TypeError:
        pass  # no dtype at all: refused below, too
    raise typer.BadParameter(f"{value!r} is no floating dtype, such as bfloat16.")


Dtype = Annotated[
    str | None,
    typer.Option(
        help="Cast floating arrays, as in *bfloat16*. Else as saved.",
        show_default=False,
        callback=_floating,
        autocompletion=lambda: ["bfloat16", "float16", "float32", "float64"],
    ),
]


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Refuses the value of an option if it is no profile."""
    from emaopt._profiles import BadProfile

    try:
        yield
    except BadProfile as error:
        raise typer.BadParameter(str(error)) from None


def decays(values: list[str]) -> list[str]:
    """Refuses strings that name no profile of a whole run."""
    from emaopt._profiles import weights_of

    # One step is enough to tell: the number of steps does not decide it.
    with _refusing():
        for value in values:
            weights_of(value, 1)
    return values


def profile(value: str | None) -> str | None:
    """Refuses a string that names no profile; an annealing needs no fraction here."""
    from emaopt._profiles import SHAPES

    if value is not None and value not in SHAPES:
        decays([value])
    return value


def target(value: str | None) -> str | None:
    """Refuses a string that names no profile of a whole run."""
    return decays([value])[0] if value is not None else None


def targets(value: list[str] | None) -> list[str] | None:
    """Refuses strings that name no profiles of a whole run."""
    return decays(value) if value else value


def width(value: float | None) -> float | None:
    """Refuses a number that is no width of a power average."""
    target(None if value is None else f"power:{value}")
    return value


def mode(value: str) -> str:
    """Refuses anything but "min" and "max"."""
    if value not in ("min", "max"):
        raise typer.BadParameter(f"takes min or max, got {value!r}.")
    return value


def steps(value: str | None) -> str | None:
    """Refuses anything but whole numbers with commas, as in "100,200"."""
    if value is not None and not all(one.strip().isdecimal() for one in value.split(",")):
        raise typer.BadParameter(f"takes numbers as in 100,200, got {value!r}.")
    return value


Steps = Annotated[
    str | None,
    typer.Option(
        help="The step of each checkpoint, as in 100,200,300. Else the numbers in which "
        "their names end.",
        show_default=False,
        callback=steps,
    ),
]


def recorded(values: list[str] | None) -> list[str] | None:
    """Refuses anything but NAME=DECAY."""
    from emaopt._profiles import decay_of

    for value in values or []:
        # From the right: a name may hold "=", a decay does not.
        name, _, decay = value.rpartition("=")
        if not name or not decay:
            raise typer.BadParameter(f"takes NAME=DECAY, got {value!r}.")
        with _refusing():
            decay_of(decay)
    return values


Recorded = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=DECAY of a recorded average whose name does not say its decay, as "
        "in *short=power:0.05*. Repeat it for each; no others are used then.",
        show_default=False,
        callback=recorded,
    ),
]
Every = Annotated[int, typer.Option(min=1, help="`every` of the recorded averages.")]
Start = Annotated[int, typer.Option(min=0, help="`start` of the recorded averages.")]
Clock = Annotated[
    str | None,
    typer.Option(
        help="What the decay of the target counts: *tokens*, as a recorded average does, "
        "or *steps*.",
        show_default=False,
    ),
]


def decays_of(values: list[str] | None) -> dict[str, str]:
    """The decays that `Recorded` gives, by the averages' names."""
    return {name: decay for name, _, decay in (v.rpartition("=") for v in values or [])}


def version(value: bool) -> None:
    """Prints the versions, and exits."""
    if not value:
        return
    import platform
    from importlib import metadata

    others = ("jax", "optax", "orbax-checkpoint")
    beneath = [f"{name} {metadata.version(name)}" for name in others]
    typer.echo(f"emaopt {metadata.version('emaopt')}")
    typer.echo(", ".join([*beneath, f"Python {platform.python_version()}"]))
    raise typer.Exit()


PROFILES = ["uniform", "linear", "cosine", "1-sqrt", "ema:0.999", "half-life:500"]
PROFILES += ["power:0.1", "polynomial:3", "warmup:0.999"]
