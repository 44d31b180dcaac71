"""The command line: parse, call, print. No arithmetic."""

import pathlib
from typing import Annotated, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def root() -> None:
    """Averages of the weights, for JAX and Optax."""


@app.command()
def demo(
    steps: Annotated[
        int, typer.Option(help="Optimizer steps of each training run; at least 20.")
    ] = 2000,
    seeds: Annotated[
        int,
        typer.Option(
            help="Training runs. From two on, the demo can tell what the average does "
            "from what chance does."
        ),
    ] = 3,
    out: Annotated[
        pathlib.Path,
        typer.Option(
            help="Directory for checkpoint/, serve.py and curves.png. Made if missing; "
            "an earlier demo's files are replaced, others are left alone."
        ),
    ] = pathlib.Path("emaopt-demo"),
    seed: Annotated[
        int, typer.Option(help="Seed of the first run; the others count up from it.")
    ] = 0,
) -> None:
    """Train on handwritten digits, serve the average, resume bit for bit.

    A small network learns at a constant learning rate while emaopt averages its weights.
    You see whether the average classifies unseen digits better than the last weights do.
    Then a process that cannot import emaopt restores the checkpoint and must serve
    exactly that average, and a resumed run must end exactly as the uninterrupted one.
    """
    for option, value, low in (
        ("steps", steps, 20),
        ("seeds", seeds, 1),
        ("seed", seed, 0),
    ):
        if value < low:
            _stop(f"emaopt demo: --{option} must be at least {low}, got {value}.", 2)

    import jax
    from absl import logging

    import emaopt.demo  # after the checks: it loads Flax, Orbax and scikit-learn

    jax.config.update("jax_platforms", "cpu")  # as the server; the network is small
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file that it opens
    try:
        emaopt.demo.run(steps=steps, seeds=seeds, seed=seed, out=out, console=Console())
    except (emaopt.demo.CheckFailed, OSError) as error:
        _stop(f"emaopt demo: {error}", 1)


def _stop(message: str, code: int) -> NoReturn:
    """Prints one line to stderr and exits."""
    line = " ".join(message.split())
    Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)
    raise typer.Exit(code)
