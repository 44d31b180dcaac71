"""Averages against a decay of the learning rate, for a small language model.

A causal transformer learns Python's own help texts (`pydoc_data`), byte by byte: each
paragraph once, the last tenth for validation. All ways to train take the same number of
steps of AdamW (β₂ 0.95, weight decay 0.1), with the gradients clipped to a global norm of
1 and a warmup of 5% of the run:

  cosine         the baseline: the rate falls to 0, and the raw weights are served
  EMA            a constant rate; served is a power average of relative width --ema-width
  schedule-free  a constant rate, β₁ 0 (`emaopt.schedule_free`)
  GPA-cosine     the baseline's rates; generalized primal averaging (`emaopt.gpa`)
  GPA-constant   the same at a constant rate
  WSM            a constant rate; served is the average that stands in for a decay of
                 1-sqrt over the last 20% of the run (`emaopt.annealing_decay`)

Each has the learning rate that is best at the end for one seed that is not reported, by
the served weights: out of `RATES`, the same for all, and out of more by factors of 2
while the best is the least or the greatest. A seed draws the first weights and the
batches, and the differences from the baseline are paired.

Losses are in nats per byte of the validation text, mean ± standard error over the seeds.
"steps" is the part of the run until the served weights are as good as the baseline's at
its end, on a fixed part of that text and measured every --every steps. WSM's average is
meant for the end of the run and stands in for nothing before: only the end counts for it.
The raw weights of schedule-free and GPA are where they take the gradient. Another version
of Python has other texts: losses compare within one run only.

    python benchmarks/language_model.py --json curves.json    # 25 minutes on 2 cores
    python benchmarks/language_model.py --quick
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from timing import error, table
from transformer import init_params, load, loss

import emaopt

RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
MOST_RATES = 12  # that are tried for a method
TUNING_SEED = 1000
BASELINE = "cosine"
WARMUP = 0.05  # of the run
CLIP = 1.0
WEIGHT_DECAY = 0.1
B2 = 0.95


class Size(NamedTuple):
    """Of the model and of a run."""

    steps: int
    every: int  # steps between measurements
    layers: int = 2
    width: int = 64
    heads: int = 2
    context: int = 64  # bytes
    batch: int = 16
    measured: int = 128  # windows of the validation text in a measurement


QUICK = Size(20, 5, layers=1, width=16, context=16, batch=4, measured=8)


# The ways to train


Schedule = Callable[[Any, int], Callable[[Any], Any]]
Maker = Callable[[Any, int], optax.GradientTransformation]


class Method(NamedTuple):
    make: Maker  # of the learning rate and the number of steps
    averages: bool = True  # an average is served, else the raw weights
    anytime: bool = True  # the average has its meaning before the end, too


def constant(rate: Any, steps: int) -> Callable[[Any], Any]:
    warmup = math.ceil(WARMUP * steps)
    return lambda count: rate * jnp.minimum(1.0, (count + 1) / warmup)


def cosine(rate: Any, steps: int) -> Callable[[Any], Any]:
    warmup, warm = math.ceil(WARMUP * steps), constant(rate, steps)

    def falling(count: Any) -> Any:
        x = jnp.clip((count - warmup) / (steps - warmup), 0.0, 1.0)
        return warm(count) * (1 + jnp.cos(math.pi * x)) / 2

    return falling


def adamw(rates: Any, b1: float = 0.9) -> optax.GradientTransformation:
    return optax.adamw(rates, b1=b1, b2=B2, weight_decay=WEIGHT_DECAY)


def methods(ema_width: float, gpa_decay: float) -> dict[str, Method]:
    """The baseline first."""

    def ema(rate: Any, steps: int) -> optax.GradientTransformation:
        power = emaopt.power_decay(sigma_rel=ema_width)
        return emaopt.averaged(adamw(constant(rate, steps)), power)

    def schedule_free(rate: Any, steps: int) -> optax.GradientTransformation:
        rates = constant(rate, steps)
        return emaopt.schedule_free(adamw(rates, b1=0.0), rates)

    def gpa(schedule: Schedule) -> Maker:
        return lambda rate, steps: emaopt.gpa(
            adamw(schedule(rate, steps)), gpa_decay, interpolation=0.7
        )

    def wsm(rate: Any, steps: int) -> optax.GradientTransformation:
        annealing = emaopt.annealing_decay("1-sqrt", steps, fraction=0.2)
        return emaopt.averaged(adamw(constant(rate, steps)), annealing)

    return {
        BASELINE: Method(lambda *how: adamw(cosine(*how)), averages=False),
        "EMA": Method(ema),
        "schedule-free": Method(schedule_free),
        "GPA-cosine": Method(gpa(cosine)),
        "GPA-constant": Method(gpa(constant)),
        "WSM": Method(wsm, anytime=False),
    }


# Training


class Start(NamedTuple):
    """Of a run."""

    params: Any
    batches: np.ndarray  # int32 [steps, batch], where the windows begin


def start(seed: int, size: Size) -> Start:
    text, random = load(size.context), np.random.default_rng(seed)
    params = init_params(
        random,
        text.vocabulary,
        layers=size.layers,
        width=size.width,
        context=size.context,
    )
    shape, last = (size.steps, size.batch), len(text.training) - size.context
    return Start(params, random.integers(0, last, shape, np.int32))


class Run(NamedTuple):
    """Losses, in nats per byte."""

    served: Any  # float32 [marks], of a part of the validation text
    training: Any  # float32 [marks], mean of the batches since the last mark
    final: Any  # of the served weights at the end, all of the validation text
    final_raw: Any


@functools.partial(jax.jit, static_argnames=("method", "size"))
def train(start: Start, rate: Any, *, method: Method, size: Size) -> Run:
    text, ahead = load(size.context), np.arange(size.context + 1)
    clip = optax.clip_by_global_norm(CLIP)
    tx = optax.chain(clip, method.make(rate, size.steps))

    def step(carry: Any, starts: Any) -> Any:
        params, state = carry
        windows = jnp.asarray(text.training)[starts[:, None] + ahead]
        value, grads = jax.value_and_grad(loss)(params, windows, size.heads)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def served(carry: Any) -> Any:
        params, state = carry
        return emaopt.get_average(state, params) if method.averages else params

    def measure(params: Any, windows: np.ndarray) -> Any:
        whole = windows[: len(windows) // size.batch * size.batch]
        rows = whole.reshape(-1, size.batch, size.context + 1)
        return lax.map(lambda row: loss(params, row, size.heads), rows).mean()

    some = text.validation[:: len(text.validation) // size.measured][: size.measured]

    def stretch(carry: Any, batches: Any) -> Any:
        carry, values = lax.scan(step, carry, batches)
        return carry, (measure(served(carry), some), values.mean())

    carry = start.params, tx.init(start.params)
    batches = start.batches.reshape(-1, size.every, size.batch)
    carry, (curve, training) = lax.scan(stretch, carry, batches)
    both = jax.tree.map(lambda *pair: jnp.stack(pair), served(carry), carry[0])
    final, final_raw = lax.map(lambda one: measure(one, text.validation), both)
    return Run(curve, training, final, final_raw)


def tune(score: Callable[[float], float]) -> dict[float, float]:
    """The scores of `RATES`, and of more until the least one is not at an edge."""
    scores = {rate: score(rate) for rate in RATES}
    while len(scores) < MOST_RATES:
        best = min(sorted(scores), key=scores.__getitem__)
        if min(scores) < best < max(scores):
            break
        more = best / 2 if best == min(scores) else best * 2
        scores[more] = score(more)
    return scores


class Found(NamedTuple):
    """Of a method."""

    tuning: dict[float, float]  # rate -> loss
    rate: float
    runs: Run  # leaves [seeds, ...]


def find(name: str, method: Method, size: Size, seeds: int) -> Found:
    def run(rate: float, seed: int) -> Run:
        begin = time.perf_counter()
        found = jax.tree.map(
            np.asarray, train(start(seed, size), rate, method=method, size=size)
        )
        seconds = time.perf_counter() - begin
        text = f"{name}, rate {rate:g}, seed {seed}: {found.final:.4f}, {seconds:.1f} s"
        print(text, file=sys.stderr, flush=True)
        return found

    def score(rate: float) -> float:
        final = float(run(rate, TUNING_SEED).final)
        return final if math.isfinite(final) else math.inf

    tuning = tune(score)
    rate = min(tuning, key=tuning.__getitem__)
    runs = [run(rate, seed) for seed in range(seeds)]
    return Found(tuning, rate, jax.tree.map(lambda *rows: np.stack(rows), *runs))


# What is found


def reached(curve: np.ndarray, target: float, anytime: bool) -> float:
    """The part of the run after which a curve is at the target first; infinite if never.

    Straight between measurements.
    """
    if not anytime:
        return 1.0 if curve[-1] <= target else math.inf
    good = np.flatnonzero(curve <= target)
    if not len(good):
        return math.inf
    at = int(good[0])
    back = (target - curve[at]) / (curve[at - 1] - curve[at]) if at else 0.0
    return float((at + 1 - back) / len(curve))


def parts(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "never"
    how_many = "" if finite == values else f" ({len(finite)} of {len(values)} seeds)"
    return error(finite, ".2f") + how_many


def row(name: str, method: Method, found: Found, baseline: Found) -> list[str]:
    runs, base = found.runs, baseline.runs
    pairs = zip(runs.served, base.served[:, -1], strict=True)
    return [
        *(name, f"{found.rate:g}", error(runs.final, ".4f")),
        "" if found is baseline else error(runs.final - base.final, "+.4f"),
        error(runs.final_raw, ".4f"),
        parts([reached(curve, target, method.anytime) for curve, target in pairs]),
    ]


def tables(chosen: dict[str, Method], found: dict[str, Found]) -> Iterator[str]:
    rates = sorted({rate for one in found.values() for rate in one.tuning})

    def tried(tuning: dict[float, float]) -> list[str]:
        return [f"{tuning[rate]:.4f}" if rate in tuning else "" for rate in rates]

    yield f"Loss of the served weights by learning rate, seed {TUNING_SEED}\n"
    rows = ([name, *tried(one.tuning)] for name, one in found.items())
    yield from table(["method", *(f"{rate:g}" for rate in rates)], rows)
    yield "\nEach at its best rate\n"
    header = ["method", "rate", "loss", "difference", "loss of raw weights", "steps"]
    base = found[BASELINE]
    rows = (row(name, chosen[name], one, base) for name, one in found.items())
    yield from table(header, rows)


def as_json(args: argparse.Namespace, size: Size, found: dict[str, Found]) -> str:
    """All losses and curves; the served ones at `marks`."""

    def of(one: Found) -> dict[str, Any]:
        arrays = {key: array.tolist() for key, array in one.runs._asdict().items()}
        return {"rate": one.rate, "tuning": sorted(one.tuning.items())} | arrays

    content = {
        "size": size._asdict(),
        "ema_width": args.ema_width,
        "gpa_decay": args.gpa_decay,
        "marks": list(range(size.every, size.steps + 1, size.every)),
        "methods": {name: of(one) for name, one in found.items()},
    }
    return json.dumps(content)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of a run (1500)")
    parser.add_argument("--every", type=int, default=25, help="(25)")
    parser.add_argument("--seeds", type=int, default=5, help="that are reported (5)")
    parser.add_argument("--ema-width", type=float, default=0.1, help="σ_rel (0.1)")
    parser.add_argument("--gpa-decay", type=float, default=0.9967, help="(0.9967)")
    names = list(methods(0.1, 0.9967))[1:]
    parser.add_argument(
        "--methods", nargs="*", choices=names, default=names, help="beside the baseline"
    )
    parser.add_argument("--quick", action="store_true", help="two tiny runs of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for all curves")
    args = parser.parse_args(arguments)
    for name in ("steps", "every", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.steps % args.every:
        parser.error("--steps must be a multiple of --every")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    size = QUICK if args.quick else Size(args.steps, args.every)
    seeds = 2 if args.quick else args.seeds
    print(f"{size.steps} steps, {seeds} seeds\n", flush=True)
    known = methods(args.ema_width, args.gpa_decay)
    chosen = {name: known[name] for name in (BASELINE, *args.methods)}
    found = {name: find(name, how, size, seeds) for name, how in chosen.items()}
    if args.json:
        args.json.write_text(as_json(args, size, found))
    for line in tables(chosen, found):
        print(line, flush=True)


if __name__ == "__main__":
    main()
