"""The command line: parse, call, print. No arithmetic."""

import pathlib
from typing import Annotated

import typer
from rich.console import Console

from emaopt.cli import _conversions, _options, _sweeping
from emaopt.cli._errors import failing
from emaopt.cli._options import (
    At,
    Checkpoint,
    Clock,
    Dtype,
    Every,
    Force,
    Json,
    Out,
    Recorded,
    Run,
    Start,
    Which,
)
from emaopt.cli._process import Commands
from emaopt.cli._terminal import progress_bar, report, stop, warn

__all__ = ["app"]

# Commands import what they need when they run: --help loads no Orbax, and only the demo
# needs its extras.
app: typer.Typer = typer.Typer(
    name="emaopt",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_options.version,
            is_eager=True,
            help="Print the versions of emaopt and of what it stands on.",
        ),
    ] = False,
) -> None:
    """Averages of the weights, for JAX and Optax.

    The commands work on checkpoints of Orbax's, with or without averages of emaopt's in
    them, and on those of other programs, which *convert* tells.

    Exit status: 0 done; 1 failed; 2 a wrong call; 128 and more stopped by a signal. After
    a failure no part of an output is left; if only the report could not be printed, the
    output is complete. The last line on stderr says why.
    """


@app.command()
def demo(
    steps: Annotated[
        int, typer.Option(min=20, help="Optimizer steps of each training run.")
    ] = 2000,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Training runs. From two on, the demo can tell what the average does "
            "from what chance does.",
        ),
    ] = 8,
    out: Annotated[
        str,
        typer.Option(
            help="Directory of this machine for checkpoint/, serve.py and curves.png. "
            "Made if missing; an earlier demo's files are replaced, others are left "
            "alone.",
            callback=_options.directory,
        ),
    ] = "emaopt-demo",
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of the first run; the others count up from it."),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Train on handwritten digits, serve the average, resume bit for bit.

    A small network learns at a constant learning rate while emaopt averages its weights.
    You see whether the average classifies unseen digits better than the last weights do.
    Then a process that cannot import emaopt restores the checkpoint and must serve
    exactly that average, and a resumed run must end in exactly the state of the
    uninterrupted one.

    As JSON: *steps*, *seeds*, *loss* and *accuracy*, each {*raw*, *average*} with a
    number for each seed, *served* {*loss*, *accuracy*, *step*}, *written*.
    """
    with failing("demo"):
        import emaopt.demo  # on the CPU, as the server; the network is small

        try:
            console = Console(quiet=as_json)
            found = emaopt.demo.run(
                steps=steps,
                seeds=seeds,
                seed=seed,
                out=pathlib.Path(out),
                console=console,
            )
        except emaopt.demo.CheckFailed as error:
            stop(f"emaopt demo: {error}", 1)
    if as_json:
        report(True, found, written=out)


@app.command()
def inspect(path: Checkpoint, at: At = None, as_json: Json = False) -> None:
    """Show what a checkpoint holds, without reading its arrays; of a run, its metrics.

    Of a checkpoint it shows names, dtypes, shapes and sizes; which weights a reader finds
    under the parameters' names; and every average (EMA), with its number of updates and,
    if its name is that of its decay (*power:0.1*), a summary of its weights.

    As JSON: *path*, *parameters*, *served*, *beside*, *leaves* [{*name*, *dtype*,
    *shape*, *nbytes*}], *averages* [{*name*, *num_updates*, *served*, *summary*, *clock*,
    *elapsed*}], *record*, *nbytes_on_disk*: the fields of emaopt.checkpoint.describe. Of
    a run: *path* and *steps* {*step*: {*metric*: *value*}}.
    """
    with failing("inspect"):
        from emaopt import checkpoint
        from emaopt.checkpoint import _best
        from emaopt.cli import _tables

        if _best.is_run(path):
            kept = checkpoint.metrics(path)
            made = {"path": path, "steps": _tables.document(kept)}
            report(as_json, made, _tables.metrics(path, kept))
            return
        found = checkpoint.describe(path, at=at)
    report(as_json, _tables.document(found), _tables.description(found))


@app.command()
def average(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints of one run, or directories of its CheckpointManager: all "
            "steps in them.",
            show_default=False,
            callback=_options.path,
        ),
    ],
    out: Out,
    profile: Annotated[
        str,
        typer.Option(
            help="*uniform* | *linear*, *cosine*, *1-sqrt*, alone or with a fraction "
            "(*cosine:0.2*) | *ema:0.999*, *half-life:500*, *power:0.1* (σ_rel), "
            "*polynomial:3*, *warmup:0.999*.",
            callback=_options.profile,
            autocompletion=lambda: _options.PROFILES,
        ),
    ] = "uniform",
    steps: _options.Steps = None,
    weights: Which = None,
    at: At = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Average checkpoints, instead of letting the learning rate decay.

    **uniform** weighs the checkpoints alike (LAWA, PMA). **linear**, **cosine** and
    **1-sqrt** weigh them as if the learning rate had fallen to 0 in that shape (WSM):
    over the last fraction of the run, for *cosine:0.2* its last fifth, or over the span
    of the checkpoints. The other profiles are averages of all steps, which the
    checkpoints approximate. The weights are printed. The uniform mean of raw weights:

        emaopt average run/800 run/900 run/1000 --weights raw --out mean

    Memory holds a few arrays at a time, not a model.

    As JSON: *record* {*profile*, *weights*, *checkpoints*, *coefficients*, ...}, as
    inspect shows it, and *written*.
    """
    with failing("average"), progress_bar("averaging") as progress:
        from emaopt import checkpoint
        from emaopt.cli import _tables

        checkpoint.average(
            paths,
            out,
            profile=profile,
            steps=None if steps is None else [int(one) for one in steps.split(",")],
            weights=weights,
            at=at,
            dtype=dtype,
            force=force,
            progress=progress,
            report=warn,
        )
        record = checkpoint.describe(out).record
    report(as_json, {"record": record}, _tables.combination(record), out)


@app.command()
def synthesize(
    directory: Run,
    out: Out,
    sigma_rel: Annotated[
        float | None,
        typer.Option(
            help="The width of the power average to make, below 0.2887.",
            show_default=False,
            callback=_options.width,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "--profile",
            help="Another average to make: any profile that *emaopt profile* shows.",
            show_default=False,
            callback=_options.target,
            autocompletion=lambda: _options.PROFILES,
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="At which step, best a snapshot's. Else at the newest one's.",
            show_default=False,
        ),
    ] = None,
    recorded: Recorded = None,
    every: Every = 1,
    start: Start = 0,
    clock: Clock = None,
    at: At = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an average after training that was not recorded during it.

    It takes the snapshots of a run that recorded averages of known decay, best two power
    averages, finds the combination of them that is nearest to the average you ask for,
    and writes it. In the training script:

        optax.named_chain(
            ("adam", optax.adam(1e-3)),
            ("power:0.05", emaopt.average_params(emaopt.power_decay(sigma_rel=0.05))),
            ("power:0.1", emaopt.average_params(emaopt.power_decay(sigma_rel=0.1))),
        )

    and checkpoints of the training state at some steps, saved in any way. Afterwards:

        emaopt synthesize run --sigma-rel 0.15 --out wide

    It prints the relative L2 error of the profile, and the factor by which rounding
    errors of the snapshots are amplified.

    As JSON: *record* {*target*, *step*, *checkpoints*, *averages*, *coefficients*,
    *residual*, *noise_gain*, ...}, as inspect shows it, and *written*.
    """
    if (sigma_rel is None) == (target is None):
        stop("emaopt synthesize: give one of --sigma-rel and --target.", 2)
    with failing("synthesize"), progress_bar("synthesizing") as progress:
        from emaopt import checkpoint
        from emaopt.cli import _tables

        checkpoint.synthesize(
            directory,
            out,
            target=target or f"power:{sigma_rel}",
            step=step,
            recorded=_options.decays_of(recorded),
            every=every,
            start=start,
            clock=clock,
            at=at,
            dtype=dtype,
            force=force,
            progress=progress,
            report=warn,
        )
        record = checkpoint.describe(out).record
    report(as_json, {"record": record}, _tables.combination(record), out)


app.command()(_sweeping.sweep)
app.command()(_conversions.convert)
app.command()(_conversions.export)


@app.command()
def profile(
    decays: Annotated[
        list[str],
        typer.Argument(
            metavar="DECAY...",
            help="*0.999* or *ema:0.999*, *warmup:0.999*, *uniform*, *polynomial:3*, "
            "*power:0.1* (σ_rel), *half-life:500*; *linear:0.2*, *cosine:0.2*, "
            "*1-sqrt:0.2* for decays of the learning rate.",
            show_default=False,
            callback=_options.decays,
            autocompletion=lambda: _options.PROFILES,
        ),
    ],
    steps: Annotated[int, typer.Option(min=1, help="Length of the run.")] = 10_000,
    plot: Annotated[
        str | None,
        typer.Option(
            help="Draw the weights into this PNG.",
            show_default=False,
            callback=_options.file,
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show which iterates an average is made of.

    It shows mean age and half-life in steps, the effective number of iterates 1/Σw², and
    the weight of the initial parameters: in *0.9999* it is still a third after 10,000
    steps.

        emaopt profile 0.9999 warmup:0.9999 power:0.1 --steps 10000 --plot weights.png

    As JSON: *steps*, *averages* [{*name*, *summary* {*mean_age*, *effective_iterates*,
    *initial_weight*, *half_life*}}] and, with a plot, *written*.
    """
    with failing("profile"):
        from emaopt import _output, _profiles
        from emaopt.cli import _tables

        if plot is not None and not force:
            _output.refuse_existing("profile", plot)
        found = {spec: _profiles.summary_of(spec, steps) for spec in decays}
        if plot is not None:
            from emaopt import plots

            drawn = {spec: _profiles.curve_of(spec, steps) for spec in decays}
            plots.save(plots.weight_curves(plots.new_axes(), drawn), plot)
    document = {"steps": steps, "averages": _tables.named(found)}
    report(as_json, document, [_tables.summaries(found, steps)], plot)
