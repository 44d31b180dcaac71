"""The command that judges averages of several widths."""

import importlib
import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from emaopt.cli import _options
from emaopt.cli._errors import failing
from emaopt.cli._options import (
    At,
    Clock,
    Every,
    Force,
    Json,
    Recorded,
    Run,
    Start,
)
from emaopt.cli._terminal import progress_bar, report, stop, warn


def sweep(
    directory: Run,
    evaluate: Annotated[
        str,
        typer.Option(
            help="*MODULE:FUNCTION*: a function of yours from the parameters, nested "
            "dicts of arrays, to the loss of each held-out example, a vector.",
            show_default=False,
        ),
    ],
    sigma_rel: Annotated[
        str | None,
        typer.Option(
            help="Widths of power averages to try, as in *0.05,0.1,0.15*.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Another average to try: any profile that *emaopt profile* shows. "
            "Repeat it for each.",
            show_default=False,
            callback=_options.targets,
        ),
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            help="The weights of the newest checkpoint to be better than: *raw*, "
            "*average*, or the name of one."
        ),
    ] = "raw",
    level: Annotated[
        float, typer.Option(help="How often an average that is no better may be chosen.")
    ] = 0.025,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the split into examples that choose and judge.")
    ] = 0,
    plot: Annotated[
        str | None,
        typer.Option(
            help="Draw the loss over the width into this PNG.",
            show_default=False,
            callback=_options.file,
        ),
    ] = None,
    recorded: Recorded = None,
    every: Every = 1,
    start: Start = 0,
    clock: Clock = None,
    at: At = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Try averages of several widths on held-out examples, and judge them.

    Each is synthesized from the snapshots of the run, as *emaopt synthesize* does it,
    and evaluated by your function, on the devices that JAX finds. The best of many looks
    better than it is, so half of the examples choose one, and the other half judge it
    against the baseline. The answer may be none.

        emaopt sweep run --evaluate mymodel:losses --sigma-rel 0.05,0.1,0.15,0.2

    As JSON: *candidates* [{*name*, *loss*, *difference*, *standard_error*,
    *residual*}], *chosen*, its name or null, *selection* {*chosen*, *best*,
    *difference*, *standard_error*, *p_value*, *num_judged*, *detectable*}, *step*, and,
    with a plot, *written*.
    """
    widths = _widths(sigma_rel)
    targets = [*(f"power:{width}" for width in widths), *(target or [])]
    if not targets:
        stop("emaopt sweep: give --sigma-rel or --target.", 2)
    if plot is not None and not widths:
        stop("emaopt sweep: --plot draws the loss over --sigma-rel.", 2)
    with (
        failing("sweep", devices=True),
        progress_bar("evaluating", of_bytes=False) as progress,
    ):
        from emaopt import _output, checkpoint
        from emaopt.cli import _tables

        if plot is not None and not force:
            _output.refuse_existing("sweep", plot)
        found = checkpoint.sweep(
            directory,
            _function(evaluate),
            targets,
            baseline=baseline,
            recorded=_options.decays_of(recorded),
            every=every,
            start=start,
            clock=clock,
            level=level,
            seed=seed,
            at=at,
            progress=progress,
            report=warn,
        )
        if plot is not None:
            from emaopt import plots

            means = found.losses.mean(1)
            axes = plots.width_sweep(
                plots.new_axes(), widths, means[1 : len(widths) + 1], raw=float(means[0])
            )
            plots.save(axes, plot)
    # What tells the averages of the run, another command needs, too.
    words = ["emaopt", "synthesize", str(directory)]
    options = {"every": every if every > 1 else None, "start": start or None}
    options |= {"clock": clock, "at": at}
    told = [("recorded", one) for one in recorded or ()] + [*options.items()]
    for option, value in told:
        words += [f"--{option}", str(value)] * (value is not None)
    document, tables = _tables.swept(found, shlex.join(words), str(directory))
    report(as_json, document, tables, plot)


def _widths(text: str | None) -> list[float]:
    """The widths in text such as "0.05,0.1"."""
    try:
        widths = [float(one) for one in text.split(",")] if text else []
    except ValueError:
        stop(f"emaopt sweep: --sigma-rel takes widths as in 0.05,0.1, got {text!r}.", 2)
    for width in widths:
        _options.width(width)
    return widths


def _function(text: str) -> Callable[[Any], Any]:
    """The function that MODULE:FUNCTION names; modules are also looked for here."""
    module, _, name = text.partition(":")
    if not module or not name:
        stop(f"emaopt sweep: --evaluate takes MODULE:FUNCTION, got {text!r}.", 2)
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        stop(f"emaopt sweep: --evaluate: there is no module {module!r} here.", 2)
    if not callable(function := getattr(found, name, None)):
        stop(f"emaopt sweep: --evaluate: {module} has no function {name!r}.", 2)
    return function
