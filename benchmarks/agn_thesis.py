"""Asynchronous workers on digits: which claims of the AGN thesis hold here?

n workers train a small network on handwritten digits, each at its own speed, around a
parameter server that keeps the center (`emaopt.simulate_async`). After every λ steps of
its own a worker pushes. The methods differ in what the push does:

  AGN       adds the mean of the λ updates to the center (Hermans' thesis)
  DOWNPOUR  adds their sum: DOWNPOUR with accumulation
  DynSGD    adds their sum over 1 + τ, the pushes of others since the worker's pull
  EASGD     moves worker and center towards each other by α = 0.9/(λ n), which is
            TensorFlow's default
  AEASGD    the same by α = 0.5, the default of dist-keras, which the thesis ran
  sync      is data parallel Adam: a step with the mean gradient of n workers

As in the thesis, the workers' optimizer is Adam without decay of its learning rate, and
the number of batches is fixed and shared by the workers: more workers do not see more
data, and synchronous Adam takes steps/n steps. The center is scored `MARKS` times in the
last quarter of each run, because some centers oscillate; the mean counts.

What is fair is not obvious, so there are two tables. In the first every method uses
Adam's default learning rate: nothing is tuned. In the second every case, that is every
method with every n and λ, has the learning rate of the grid `RATES` that is best on
validation digits, with another seed than those that are reported. Training, validation
and held-out digits are disjoint. A seed draws the initial parameters, the batches and
the order in which the workers take their steps.

Then follow the claims. The thesis trained a network of 4.8 million parameters on MNIST
with 18,750 batches of 128; its figures are single runs.

    python benchmarks/agn_thesis.py

References:
  Hermans, 2017, On scalable deep learning and parallelizing gradient descent, chapter
  Accumulated gradient normalization, https://github.com/JoeriHermans/master-thesis
"""

import argparse
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from emaopt import digits, simulate_async

METHODS = ("AGN", "DOWNPOUR", "DynSGD", "EASGD", "AEASGD", "sync")
SIZES = (10, 20, 40)  # n and λ
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DEFAULT_RATE = 1e-3  # of Adam
BATCH = 16
HIDDEN = 64  # one hidden layer: 4,810 parameters
MARKS = 5  # measurements in the last quarter of each run
VALIDATION = 297  # of the 1,297 training digits

# (n, λ): (AGN's, AEASGD's accuracy in %), in training and in validation, of the thesis.
THESIS_TRAIN = {
    (10, 10): (100.00, 99.22),
    (10, 20): (99.38, 98.91),
    (10, 40): (98.75, 97.66),
    (20, 10): (99.26, 97.90),
    (20, 20): (99.38, 97.78),
    (20, 40): (98.44, 97.66),
    (40, 10): (94.17, 96.57),
    (40, 20): (99.24, 96.65),
    (40, 40): (97.88, 96.65),
}
THESIS_VALIDATION = {
    (10, 10): (98.43, 98.64),
    (10, 20): (98.61, 98.67),
    (10, 40): (98.43, 98.58),
    (20, 10): (98.36, 98.52),
    (20, 20): (98.47, 98.39),
    (20, 40): (98.34, 98.28),
    (40, 10): (95.55, 97.99),
    (40, 20): (98.40, 97.83),
    (40, 40): (98.18, 97.45),
}


class Part(NamedTuple):
    """Some of the digits."""

    images: jax.Array  # [size, 64] float32
    labels: jax.Array  # [size] int32


class Case(NamedTuple):
    """What is trained."""

    method: str
    num_workers: int  # n
    period: int  # λ; 0 for sync


class Score(NamedTuple):
    """Of a run, the mean over its marks: losses in nats, accuracies in %."""

    train: float  # accuracy
    validation: float  # accuracy
    held_out: float  # accuracy
    loss: float  # held-out
    first_loss: float  # held-out, before training

    @property
    def diverged(self) -> bool:
        return not self.loss <= self.first_loss


Runs = dict[Case, list[Score]]


@functools.cache
def load() -> tuple[Part, Part, Part]:
    """Training, validation and held-out digits."""
    train, held_out = (
        Part(jnp.asarray(x.reshape(len(x), -1)), jnp.asarray(y)) for x, y in digits.load()
    )
    return (
        Part(*(x[:-VALIDATION] for x in train)),
        Part(*(x[-VALIDATION:] for x in train)),
        held_out,
    )


def init_params(key: Any) -> dict[str, jax.Array]:
    first, second = jax.random.split(key)
    scale1, scale2 = math.sqrt(2 / 64), math.sqrt(1 / HIDDEN)
    return {
        "w1": scale1 * jax.random.normal(first, (64, HIDDEN)),
        "b1": jnp.zeros(HIDDEN),
        "w2": scale2 * jax.random.normal(second, (HIDDEN, 10)),
        "b2": jnp.zeros(10),
    }


def apply(params: Any, images: Any) -> jax.Array:
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params: Any, images: Any, labels: Any) -> jax.Array:
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def moving_rate(case: Case) -> float | None:
    """α of EASGD."""
    default = 0.9 / max(case.period * case.num_workers, 1)
    return {"EASGD": default, "AEASGD": 0.5}.get(case.method)


def order(num_workers: int, steps: int, seed: int) -> np.ndarray:
    """Who takes the next step, [steps]: round robin, at speeds that vary.

    A worker is up to 25 % slower or faster than the mean for good, and each of its steps
    by another 20 % (one standard deviation).
    """
    random = np.random.default_rng(seed)
    each = 2 * -(-steps // num_workers)  # more than the fastest will take
    pace = random.uniform(0.75, 1.25, (num_workers, 1))
    durations = pace * random.lognormal(0, 0.2, (num_workers, each))
    ends = np.cumsum(durations, axis=1)
    return (np.argsort(ends, axis=None)[:steps] // each).astype(np.int32)


def at_marks(trace: Any) -> Any:
    """Some entries of arrays [T, ...] in their last quarter: [MARKS, ...].

    One slice after the other: XLA then never builds the array that they are taken from.
    """
    last = len(jax.tree.leaves(trace)[0]) - 1
    marks = np.linspace(0.75 * last, last, MARKS + 1).round().astype(int)[1:]
    return jax.tree.map(lambda x: jnp.stack([x[mark] for mark in marks]), trace)


@functools.partial(jax.jit, static_argnames=("method", "period", "moving_rate"))
def train(
    params: Any,
    rate: Any,
    batches: Any,
    schedule: Any,
    *,
    method: str,
    period: int,
    moving_rate: float | None,
) -> Any:
    """The center at the marks. batches: [steps, BATCH] indices of training digits."""
    part, _, _ = load()

    def gradient(params, worker, event):
        del worker
        chosen = batches[event]
        return jax.grad(loss)(params, part.images[chosen], part.labels[chosen])

    trace = simulate_async(
        optax.adam(rate),
        optax.sgd(1.0) if moving_rate is None else None,
        params,
        gradient,
        schedule,
        period=period,
        commit="mean_delta" if method == "AGN" else "delta",
        num_workers=max(SIZES),  # one program for every n; who never steps costs nothing
        moving_rate=moving_rate,
        staleness=(lambda tau: 1 / (1 + tau)) if method == "DynSGD" else None,
        keep_local=False,
    )
    return at_marks(trace.center)


@functools.partial(jax.jit, static_argnames="num_workers")
def train_together(params: Any, rate: Any, batches: Any, num_workers: int) -> Any:
    """The parameters at the marks of steps/n steps of data parallel Adam."""
    part, _, _ = load()
    optimizer = optax.adam(rate)

    def step(carry, chosen):
        params, state = carry
        grads = jax.grad(loss)(params, part.images[chosen], part.labels[chosen])
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    rounds = len(batches) // num_workers
    chosen = batches[: rounds * num_workers].reshape(rounds, num_workers * BATCH)
    return at_marks(lax.scan(step, (params, optimizer.init(params)), chosen)[1])


@jax.jit
def evaluate(start: Any, centers: Any) -> tuple:
    """The fields of a `Score`, of the parameters at the start and at the marks."""

    def measure(params):
        correct = [apply(params, x.images).argmax(axis=-1) == x.labels for x in load()]
        return [100 * c.mean() for c in correct], loss(params, *load()[2])

    accuracies, last_loss = jax.tree.map(jnp.mean, jax.vmap(measure)(centers))
    return *accuracies, last_loss, measure(start)[1]


def run(case: Case, rate: float, steps: int, seed: int) -> Score:
    size = len(load()[0].labels)
    batches = np.random.default_rng(seed).integers(0, size, (steps, BATCH), np.int32)
    params = init_params(jax.random.key(seed))
    if case.method == "sync":
        centers = train_together(params, rate, batches, case.num_workers)
    else:
        schedule = order(case.num_workers, steps, seed)
        centers = train(
            params,
            rate,
            batches,
            schedule,
            method=case.method,
            period=case.period,
            moving_rate=moving_rate(case),
        )
    return Score(*map(float, evaluate(params, centers)))


def cases(method: str, sizes: tuple[int, ...]) -> list[Case]:
    periods = (0,) if method == "sync" else sizes
    return [Case(method, n, period) for n in sizes for period in periods]


def mean(runs: list[Score], field: str) -> float:
    return float(np.mean([getattr(score, field) for score in runs]))


def tune(
    steps: int, seed: int, rates: tuple[float, ...], sizes: tuple[int, ...]
) -> dict[Case, float]:
    """Each case's learning rate; prints the mean accuracy of each method by rate."""
    chosen = {}
    print("Validation accuracy (%), mean over n and λ, by learning rate")
    print(f"{'':8}" + "".join(f"{rate:>8g}" for rate in rates))
    for method in METHODS:
        scores = {
            case: [run(case, rate, steps, seed).validation for rate in rates]
            for case in cases(method, sizes)
        }
        means = np.mean(list(scores.values()), axis=0)
        print(f"{method:8}" + "".join(f"{score:8.2f}" for score in means))
        chosen |= {case: rates[int(np.argmax(row))] for case, row in scores.items()}
    return chosen


def table(runs: Runs, rates: dict[Case, float]) -> Iterator[str]:
    """One line for each case."""
    yield (
        f"{'n':>2} {'λ':>3}  {'method':8} {'rate':>6}  {'held-out accuracy (%)':>23}  "
        f"{'loss':>9}  {'training accuracy (%)':>23}  diverged"
    )
    for n in sorted({case.num_workers for case in runs}):
        for case in (case for case in runs if case.num_workers == n):
            scores = runs[case]
            columns = [spread([getattr(s, f) for s in scores]) for f in Score._fields[:3]]
            diverged = sum(score.diverged for score in scores)
            yield (
                f"{n:2} {case.period or '':>3}  {case.method:8} "
                f"{rates[case]:6g}  {columns[2]:>23}  "
                f"{mean(scores, 'loss'):9.3g}  {columns[0]:>23}  "
                f"{f'{diverged} of {len(scores)}' if diverged else ''}"
            )
        yield ""


def spread(values: list[float]) -> str:
    return f"{np.mean(values):6.2f} [{min(values):6.2f}, {max(values):6.2f}]"


def claims(runs: Runs, sizes: tuple[int, ...]) -> Iterator[str]:
    """The thesis' claims that can be tested here, and what came out."""
    first, last = sizes[0], sizes[-1]
    settings = [(n, period) for n in sizes for period in sizes]

    def score(method, n, period, field="held_out"):
        return mean(runs[Case(method, n, period)], field)

    def row(method, n, field="held_out"):
        return ", ".join(f"{score(method, n, period, field):.4g}" for period in sizes)

    def diverged(method, *settings):
        scores = [score for setting in settings for score in runs[Case(method, *setting)]]
        return f"{sum(score.diverged for score in scores)} of {len(scores)} runs diverged"

    def wins(pairs):
        return f"{sum(a > b for a, b in pairs)} of {len(pairs)}"

    def verdict(holds):
        return "holds here" if holds else "does not hold here"

    few = [(first, period) for period in sizes]
    yield f"(a) With n = {first} DOWNPOUR fails, the more the larger λ is; AGN converges."
    for method in ("AGN", "DOWNPOUR"):
        yield (
            f"    λ = {sizes}: {method} {row(method, first)} %, "
            f"loss {row(method, first, 'loss')}; {diverged(method, *few)}"
        )

    def apart(period):  # the seeds' ranges do not overlap
        theirs, ours = (
            [score.held_out for score in runs[Case(method, first, period)]]
            for method in ("DOWNPOUR", "AGN")
        )
        return max(theirs) < min(ours)

    clear = tuple(period for period in sizes if apart(period))
    falls = score("DOWNPOUR", first, last) < score("DOWNPOUR", first, first)
    yield (
        f"    DOWNPOUR's best seed is below AGN's worst with λ in {clear}\n"
        f"    -> worse than AGN with λ = {last}: {verdict(last in clear)}; worse than "
        f"with λ = {first}: {verdict(falls)}\n"
    )

    yield (
        "(b) AGN is better than AEASGD in most settings (n, λ). Thesis: in validation\n"
        f"    in 28 of 49, {wins([THESIS_VALIDATION[s] for s in settings])} of these; in "
        f"training in 42 of 49, {wins([THESIS_TRAIN[s] for s in settings])} of these."
    )
    for rival in ("AEASGD", "EASGD"):
        for field, name in (("held_out", "held-out"), ("train", "training")):
            pairs = [(score("AGN", *s, field), score(rival, *s, field)) for s in settings]
            most = 2 * sum(a > b for a, b in pairs) > len(pairs)
            yield (
                f"    {name} accuracy, over {rival}: in {wins(pairs)} -> {verdict(most)}"
            )
    yield ""

    many = (last, first)
    thesis = ", ".join(f"{THESIS_VALIDATION[last, period][0]:.2f}" for period in sizes)
    less = score("AGN", *many) < score("AGN", last, last)
    behind = score("AGN", *many) < score("AEASGD", *many)
    yield (
        "(c) AGN's weak spot is many workers with a small λ. Thesis: accuracy in\n"
        f"    validation with n = {last}, λ = {sizes}: {thesis} %; AEASGD's with "
        f"λ = {first}: {THESIS_VALIDATION[many][1]:.2f} %.\n"
        f"    here: {row('AGN', last)} %; with λ = {first}: AEASGD's "
        f"{score('AEASGD', *many):.4g} %, EASGD's {score('EASGD', *many):.4g} %\n"
        f"    -> AGN is worse there than with λ = {last}: {verdict(less)}; AEASGD is "
        f"better there: {verdict(behind)}\n"
    )

    small = [(n, first) for n in sizes]
    accuracies = ", ".join(f"{score('DynSGD', *s):.4g}" for s in small)
    any_diverged = any(s.diverged for n in small for s in runs[Case("DynSGD", *n)])
    yield (
        f"(d) DynSGD diverges with λ = {first}.\n"
        f"    n = {sizes}: {accuracies} %; {diverged('DynSGD', *small)}\n"
        f"    -> {verdict(any_diverged)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=12_000, help="of all workers (12000)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (0)")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: 400 steps, one seed, one rate"
    )
    args = parser.parse_args()
    steps, rates, sizes = args.steps, RATES, SIZES
    seeds = range(args.seed, args.seed + args.seeds)
    if args.quick:
        steps, seeds, rates, sizes = (
            400,
            seeds[:1],
            (DEFAULT_RATE,),
            (SIZES[0], SIZES[-1]),
        )
    train_part, validation, held_out = load()
    print(
        f"{len(train_part.labels):,} training, {len(validation.labels)} validation and "
        f"{len(held_out.labels)} held-out digits; {steps:,} batches of {BATCH},\nshared "
        f"by n workers, each with Adam; mean [least, most] over {len(seeds)} seeds;\n"
        "diverged: held-out loss above that of the initial parameters, or not finite\n"
    )
    every = [case for method in METHODS for case in cases(method, sizes)]
    policies = {
        "Adam's default learning rate": dict.fromkeys(every, DEFAULT_RATE),
        "each case's own learning rate": tune(steps, seeds[-1] + 1, rates, sizes),
    }
    known: dict[tuple[Case, float], list[Score]] = {}
    for policy, chosen in policies.items():
        for item in chosen.items():
            if item not in known:
                known[item] = [run(*item, steps, seed) for seed in seeds]
        runs = {case: known[case, rate] for case, rate in chosen.items()}
        print(f"\n== With {policy}\n")
        print("\n".join(table(runs, chosen)))
        print("\n".join(claims(runs, sizes)))


if __name__ == "__main__":
    main()
