"""The main job, end to end, on real data: train, compare, serve the average, resume.

A small network learns handwritten digits at a constant learning rate, from small batches:
its parameters never settle. The demo measures whether their average is the better model,
lets a process without emaopt serve the average, and resumes the training bit for bit.
"""

import contextlib
import functools
import json
import math
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy import stats

import emaopt
from emaopt import checkpoint, digits
from emaopt._interrupts import undisturbed
from emaopt._output import (
    clear,
    making_parents,
    naming,
    own_name,
    writing,
)
from emaopt._types import Json, PyTree

__all__ = ["CheckFailed", "run"]

# Picked from about twenty settings for a large, steady gain from the average on seeds 100
# to 108: a regime that suits averages, not a typical one. Seeds below 100 had no say.
# With eight seeds, p was at most 0.002 in 20 disjoint sets of them (100 to 259), with jax
# 0.10 and 0.12 each; with three seeds it was above 0.05 in every fourth set.
BATCH = 32  # images
LEARNING_RATE = 0.02  # constant, and high: a schedule would do some of the averaging
WEIGHT_DECAY = 0.1
DECAY = 0.995  # the largest: the average's window grows to 200 steps
POINTS = 40  # of each curve
FILES = ("checkpoint", "serve.py", "curves.png")
NEXT = "https://emaopt.github.io/emaopt/getting-started/"  # the page to read

State: TypeAlias = dict[str, Any]  # {"params": ..., "opt_state": ..., "step": ...}
Score: TypeAlias = tuple[float, float]  # loss in nats, accuracy


class CheckFailed(Exception):
    """What the demo promises did not happen; the message says what did."""


def run(
    *, steps: int, seeds: int, seed: int, out: pathlib.Path, console: Console
) -> Json:
    """Trains, compares, serves and resumes, and prints the results.

    The files are made in a directory of their own and moved into `out` at the end. They
    are moved if a check fails as well, so that they can be examined.

    What to watch: the server computes on the CPU. Its numbers are exactly those of this
    process only if this process computes on the CPU as well; `emaopt demo` does.

    Args:
      steps: Optimizer steps of each run, 20 or more.
      seeds: How many runs, 1 or more.
      seed: The first run's seed; the others count up from it.
      out: Directory for checkpoint/, serve.py and curves.png; other files in it stay.
      console: Where to print.

    Returns:
      The results, as `emaopt demo --json` prints them.

    Raises:
      CheckFailed: If the served or the resumed numbers are not exactly the trained ones,
        or if `out` holds files of these names that no demo wrote.
      OSError: If `out` cannot be written to.
    """
    import emaopt.plots  # noqa: F401  # a missing package shows now, not after training

    out = out.absolute()
    prepare(out)
    with staged(out) as stage:
        return _run(steps, seeds, seed, stage, out, console)


def _run(
    steps: int,
    seeds: int,
    seed: int,
    stage: pathlib.Path,
    out: pathlib.Path,
    console: Console,
) -> Json:
    """`run`, with the files in `stage`, whose place will be `out`."""
    marks = np.unique(np.linspace(0, steps, POINTS + 1).round().astype(int))[1:]
    half = len(marks) // 2
    data = digits.load()
    scores, finals = [], []
    with _progress(console) as progress:
        task = progress.add_task("training", total=steps * (seeds + 1) - marks[half - 1])
        tick = functools.partial(progress.advance, task)
        for run_seed in range(seed, seed + seeds):
            # Each run stops halfway and goes on. The first one is saved there.
            state, before = train(start(run_seed), run_seed, marks[:half], data, tick)
            if run_seed == seed:
                checkpoint.save(stage / "checkpoint", state)
            state, after = train(state, run_seed, marks[half:], data, tick)
            scores.append(before + after)
            finals.append(state)
        # The rest of the first run once more, from the checkpoint.
        resumed = restore(stage / "checkpoint")
        resumed, _ = train(resumed, seed, marks[half:], data, tick)
    arrays = len(jax.tree.leaves(resumed))
    different = differences(finals[0], resumed)
    raw, averaged = np.moveaxis(np.array(scores), 2, 0)  # [seeds, marks, 2]
    plot(marks, raw[..., 0], averaged[..., 0], stage / "curves.png")

    late = marks > 0.75 * steps
    raw, averaged = raw[:, late].mean(axis=1), averaged[:, late].mean(axis=1)
    console.print(comparison(raw, averaged, marks[late]))
    console.print(verdict(raw[:, 0], averaged[:, 0]), style="bold")
    then = f"step {marks[half - 1]:,}"
    served = scores[0][half - 1][1]
    # Checks come after the table, which is printed even if one of them fails.
    console.print(f"\n[bold]Serve.[/] {serve(stage, served, then)}")
    if different:
        raise CheckFailed(
            f"resuming from {then} gave other arrays than training without a stop: "
            f"{len(different)} of {arrays} differ, {', '.join(different[:5])}."
        )
    console.print(
        f"\n[bold]Resume.[/] Training was restored from the same checkpoint and went on "
        f"to step {steps:,}: all {arrays} arrays (parameters, optimizer state, average) "
        "are bit for bit those of the run without a stop."
    )
    console.print(f"\nIn {escape(str(out))}:", soft_wrap=True, highlight=False)
    console.print(
        "  curves.png   held-out loss, raw and averaged\n"
        f"  checkpoint/  the training state at {then}\n"
        "  serve.py     the server; there, with this Python: python serve.py checkpoint",
        highlight=False,
    )
    console.print(f"\nNext: {NEXT}", soft_wrap=True, highlight=False)
    found: dict[str, Any] = {"steps": steps, "seeds": [*range(seed, seed + seeds)]}
    for column, name in enumerate(("loss", "accuracy")):
        pair = raw[:, column].tolist(), averaged[:, column].tolist()
        found[name] = dict(zip(("raw", "average"), pair, strict=True))
    step = int(marks[half - 1])
    return found | {"served": {"loss": served[0], "accuracy": served[1], "step": step}}


def prepare(out: pathlib.Path) -> None:
    """Refuses to replace files that no demo wrote."""
    # serve.py is a copy of digits.py: its first line shows that a demo wrote it.
    source = pathlib.Path(digits.__file__)
    server = out / "serve.py"
    title = source.read_text(encoding="utf-8").splitlines()[0]
    ours = server.is_file() and server.read_text(errors="replace").startswith(title)
    if not ours and (taken := [name for name in FILES if (out / name).exists()]):
        raise CheckFailed(
            f"{out} holds {' and '.join(taken)}, not written by this demo: choose "
            "another --out."
        )


@contextlib.contextmanager
def staged(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory with serve.py in it, whose files are moved to `out` at the end."""
    with making_parents(out / "serve.py"):
        stage = pathlib.Path(own_name(str(out / "demo")))
        try:
            stage.mkdir()
            failed = None
            try:
                with naming(out):
                    with writing(stage / "serve.py") as file:
                        file.write(pathlib.Path(digits.__file__).read_bytes())
                    yield stage
            # Kept until the files are in their places, for the user to examine.
            except CheckFailed as error:
                failed = error
            with undisturbed():
                for name in FILES:
                    if (stage / name).exists():
                        # A directory cannot be replaced by a rename unless it is empty.
                        if (out / name).is_dir():
                            shutil.rmtree(out / name)
                        (stage / name).replace(out / name)
        finally:
            clear(epath.Path(stage))
    if failed is not None:
        raise failed


def optimizer() -> optax.GradientTransformationExtraArgs:
    """AdamW, and the average of the parameters that it makes."""
    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return emaopt.averaged(adamw, emaopt.warmup_decay(DECAY))


def start(seed: int) -> State:
    """The training state before the first step."""
    params = digits.init_params(seed)
    opt_state = optimizer().init(params)
    return {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}


# Called in a loop of Python's: in one of XLA's, convolutions on a CPU take three times as
# long.
@functools.partial(jax.jit, donate_argnums=0)
def advance(state: State, key: jax.Array, images: jax.Array, labels: jax.Array) -> State:
    """Trains for one step."""
    # A batch depends on key and step alone: a resumed run draws the same ones.
    draw = jax.random.fold_in(key, state["step"])
    chosen = jax.random.randint(draw, (BATCH,), 0, len(labels))
    params, opt_state = state["params"], state["opt_state"]
    grads = jax.grad(digits.loss)(params, images[chosen], labels[chosen])
    updates, opt_state = optimizer().update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}


def train(
    state: State,
    seed: int,
    marks: np.ndarray,
    data: tuple[digits.Digits, digits.Digits],
    tick: Callable[[int], None],
) -> tuple[State, list[list[Score]]]:
    """Trains to the last mark, and scores the parameters and their average at each one.

    Returns:
      (state, scores): for each mark ((loss, accuracy) raw, (loss, accuracy) averaged).
    """
    images, labels = jax.device_put(tuple(data[0]))
    key, scores = jax.random.key(seed), []
    for mark in marks:
        # Read before the call, which donates the state.
        done = int(state["step"])
        for _ in range(done, int(mark)):
            state = advance(state, key, images, labels)
        params, average = state["params"], emaopt.get_average(state["opt_state"])
        scores.append([digits.evaluate(tree, data[1]) for tree in (params, average)])
        tick(int(mark) - done)
    return state, scores


def restore(path: pathlib.Path) -> State:
    """Restores the training state, with raw parameters and average in their places."""
    return checkpoint.restore(path, jax.eval_shape(lambda: start(0)))


def differences(a: PyTree, b: PyTree) -> list[str]:
    """The names of the leaves whose dtype, shape or bits differ."""

    # Bytes, not values: NaN equals itself then, and -0 differs from 0.
    def bits(leaf: jax.Array) -> tuple[np.dtype, tuple[int, ...], bytes]:
        array = np.asarray(leaf)
        return array.dtype, array.shape, array.tobytes()

    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
        )
        if bits(x) != bits(y)
    ]


def serve(out: pathlib.Path, expected: tuple[float, float], then: str) -> str:
    """Runs OUT/serve.py on the checkpoint; its answer must be exactly `expected`."""
    command = [sys.executable, str(out / "serve.py"), str(out / "checkpoint")]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = (process.stderr.strip() or "no message").splitlines()[-1]
        raise CheckFailed(f"the server could not read the checkpoint: {reason}")
    answer = json.loads(process.stdout.splitlines()[-1])
    loss, accuracy = expected
    here = {"accuracy": accuracy, "loss": loss, "emaopt_importable": False}
    if answer != here:
        raise CheckFailed(f"the server says {answer}, the training process {here}.")
    return (
        f"A new process that cannot import emaopt restored the checkpoint of {then} with "
        f"plain Orbax. It gets accuracy {accuracy!r} and loss {loss!r}: exactly those of "
        "the average in the training process."
    )


def comparison(raw: np.ndarray, averaged: np.ndarray, late: np.ndarray) -> Table:
    """A table of the scores [seeds, 2], means over the `late` steps, and differences.

    They are means over the last quarter of the run, because the score of the raw
    parameters depends on the very step at which a run stops.
    """
    many = len(raw) > 1
    over = f"mean ± sd over {len(raw)} seeds" if many else "1 seed"
    when = f"mean of {len(late)} measurements, steps {late[0]:,} to {late[-1]:,}"
    table = Table(title=f"{digits.HELD_OUT} held-out digits; {when}; {over}")
    table.add_column("")
    for heading in ("raw parameters", "average", "average - raw"):
        table.add_column(heading, justify="right")

    def cell(values: np.ndarray, form: str) -> str:
        spread = f" ± {values.std(ddof=1):{form}}" if many else ""
        return f"{values.mean():{form}}{spread}"

    rows = [("loss (nats)", 0, 1, ".4f"), ("accuracy (%)", 1, 100, ".2f")]
    for label, column, unit, form in rows:
        before, after = raw[:, column] * unit, averaged[:, column] * unit
        difference = cell(after - before, f"+{form}").replace("± +", "± ")
        table.add_row(label, cell(before, form), cell(after, form), difference)
    return table


def verdict(raw: np.ndarray, averaged: np.ndarray) -> str:
    """Says whether the average helped, from held-out losses [seeds].

    It did if chance would give as large a paired difference in fewer than 5% of demos
    (Student's t-test, two-sided).
    """
    gain = np.asarray(raw) - np.asarray(averaged)
    mean, n = float(gain.mean()), len(gain)
    size = f"{abs(mean):.4f} {'lower' if mean > 0 else 'higher'}"
    if n == 1:
        return (
            f"In this one run the average's loss is {size} than the raw parameters'; one "
            "seed shows nothing about the spread between runs."
        )
    # Without any spread t is infinite, or 0/0 if there is no difference either.
    error = float(gain.std(ddof=1)) / math.sqrt(n)
    chance = (
        2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    )
    if chance >= 0.05:
        opening = f"The average does not help by more than {n} seeds can show"
    elif mean > 0:
        opening = "The average helps"
    else:
        opening = "The average does not help, it harms"
    return (
        f"{opening}: its loss is {size} than the raw parameters', with a standard error "
        f"of {error:.4f} over {n} seeds (p = {chance:.2g})."
    )


def plot(
    steps: np.ndarray, raw: np.ndarray, averaged: np.ndarray, path: pathlib.Path
) -> None:
    """Draws the held-out losses [seeds, points]: mean and range over the seeds."""
    from emaopt import plots

    axes = plots.curves(plots.new_axes(), steps, raw, averaged)
    over = f"mean and range over {len(raw)} seeds" if len(raw) > 1 else "one seed"
    axes.set_title(f"Handwritten digits at a constant learning rate: {over}", fontsize=11)
    axes.set_xlabel(f"training step (batches of {BATCH} images)")
    axes.set_ylabel("held-out loss (nats)")
    plots.save(axes, path)


def _progress(console: Console) -> Progress:
    """A progress bar, on a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    quiet = not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=quiet)
