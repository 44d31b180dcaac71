"""BatchNorm's statistics for averaged weights: keep, average or recompute them?

A small network with BatchNorm learns handwritten digits at the demo's constant learning
rate. Averages (EMA) of its weights are scored on digits that training never saw, with
one of three policies for the statistics:

  keep       the newest running statistics, gathered with the raw weights
  average    the average of the running statistics, with the decay of the weights
  recompute  `emaopt.batch_stats.recalibrate` over one pass of the training images

for two momenta of BatchNorm and two decays of the average. Neither the network nor any
setting was tuned for one of the three.

    python benchmarks/batch_stats.py
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from scipy import stats

import emaopt
from emaopt import digits
from emaopt.batch_stats import recalibrate
from emaopt.demo import BATCH, LEARNING_RATE, WEIGHT_DECAY

MOMENTA = (0.9, 0.99)  # of BatchNorm
DECAYS = (0.99, 0.998)  # of the averages: windows of 100 and 500 steps
MARKS = 5  # measurements in the last quarter of each run


class Network(nnx.Module):
    """`digits.Network` with BatchNorm after each convolution.

    With momentum 0 a forward pass leaves the statistics of its batch. Training uses no
    others, so one run serves the running statistics of every momentum.
    """

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.0, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.0, rngs=rngs)
        self.linear = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(images)))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.linear(x.reshape(len(x), -1))


@functools.cache
def graph() -> Any:
    """The network without its parameters and statistics."""
    return nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))[0]


def merge(params: Any, statistics: Any) -> Network:
    return nnx.merge(graph(), params, statistics, copy=True)


def forward(params: Any, statistics: Any, images: Any) -> tuple[jax.Array, Any]:
    """One pass in training mode: the logits, and the statistics after it."""
    model = merge(params, statistics)
    model.train()
    logits = model(images)
    return logits, nnx.state(model, nnx.BatchStat)


def optimizer(learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """AdamW, and one average of the parameters for each decay, under its name."""
    return optax.named_chain(
        ("adamw", optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY)),
        *((str(d), emaopt.average_params(d, debias=True)) for d in DECAYS),
    )


def averager(decay: float) -> emaopt.Averager:
    return emaopt.average_tree(decay, debias=True)


def start(seed: int) -> dict[str, Any]:
    """The training state before the first step."""
    _, params, statistics = nnx.split(Network(nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
    averages = {d: averager(d).init(statistics) for d in DECAYS}
    return {
        "params": params,
        "opt_state": optimizer(LEARNING_RATE).init(params),
        "newest": dict.fromkeys(MOMENTA, statistics),
        "averages": dict.fromkeys(MOMENTA, averages),
        "step": jnp.zeros((), jnp.int32),
    }


@functools.partial(jax.jit, static_argnames="learning_rate")
def advance(
    state: dict, stop: int, key: Any, images: Any, labels: Any, *, learning_rate: float
) -> dict:
    """Trains up to step `stop`; the loop's bounds are traced, so it compiles once."""
    tx = optimizer(learning_rate)

    def loss(params, statistics, images, labels):
        logits, of_batch = forward(params, statistics, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), of_batch

    def step(number, state):
        draw = jax.random.fold_in(key, number)
        chosen = jax.random.randint(draw, (BATCH,), 0, len(labels))
        params, newest, averages = state["params"], state["newest"], state["averages"]
        grads, of_batch = jax.grad(loss, has_aux=True)(
            params, newest[MOMENTA[0]], images[chosen], labels[chosen]
        )
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        newest = {
            m: optax.incremental_update(of_batch, newest[m], 1 - m) for m in MOMENTA
        }
        return {
            "params": optax.apply_updates(params, updates),
            "opt_state": opt_state,
            "newest": newest,
            "averages": {
                m: {d: averager(d).update(newest[m], averages[m][d]) for d in DECAYS}
                for m in MOMENTA
            },
            "step": number + 1,
        }

    return lax.fori_loop(state["step"], stop, step, state)


@jax.jit
def evaluate(params: Any, statistics: Any, images: Any, labels: Any) -> jax.Array:
    """Scores the network that uses these statistics: loss in nats, accuracy in %."""
    model = merge(params, statistics)
    model.eval()
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = logits.argmax(axis=-1) == labels
    return jnp.stack([losses.mean(), 100 * correct.mean()])


def measure(state: dict, batches: Any, score: Callable[[Any, Any], Any]) -> dict:
    """Scores the raw weights and each average with the statistics of each policy.

    Returns:
      {(momentum, weights, policy): (loss, accuracy)}.
    """
    trees = {"raw": state["params"]}
    for d in DECAYS:
        average = emaopt.get_average(state["opt_state"], state["params"], name=str(d))
        trees[f"EMA {d}"] = average
    any_statistics = state["newest"][MOMENTA[0]]
    recomputed = {
        name: recalibrate(lambda *a: forward(*a)[1], params, batches, any_statistics)
        for name, params in trees.items()
    }
    found = {}
    for m in MOMENTA:
        averages = {f"EMA {d}": kept.average for d, kept in state["averages"][m].items()}
        for name, params in trees.items():
            found[m, name, "keep"] = score(params, state["newest"][m])
            if name in averages:
                found[m, name, "average"] = score(params, averages[name])
            found[m, name, "recompute"] = score(params, recomputed[name])
    return found


def run(seed: int, marks: np.ndarray, learning_rate: float) -> dict:
    """Trains once; returns what `measure` does, as the mean over the marks."""
    train, held_out = (jax.device_put(tuple(part)) for part in digits.load())
    order = np.random.default_rng(seed).permutation(len(train[1]))
    number = len(order) // BATCH
    batches = [train[0][order[i * BATCH :][:BATCH]] for i in range(number)]
    state, found = start(seed), []
    for mark in marks:
        state = advance(
            state, int(mark), jax.random.key(seed), *train, learning_rate=learning_rate
        )
        found.append(measure(state, batches, lambda p, s: evaluate(p, s, *held_out)))
    return {
        case: np.mean([np.array(f[case]) for f in found], axis=0) for case in found[0]
    }


def table(runs: list[dict]) -> Iterator[str]:
    """One line for each case; the differences to "keep" are paired by seed."""
    yield (
        f"{'weights':9}  {'statistics':10}  {'loss (nats)':>15}  {'accuracy (%)':>13}  "
        f"{'loss - keep':>17}  {'p':>6}  {'acc. - keep':>14}  {'p':>6}"
    )
    for momentum in MOMENTA:
        yield f"\nBatchNorm momentum {momentum}"
        for m, name, policy in runs[0]:
            if m != momentum:
                continue
            scores = np.array([run[m, name, policy] for run in runs])
            kept = np.array([run[m, name, "keep"] for run in runs])
            losses = spread(scores[:, 0], ".4f"), spread((scores - kept)[:, 0], "+.4f")
            correct = spread(scores[:, 1], ".2f"), spread((scores - kept)[:, 1], "+.2f")
            line = f"{name:9}  {policy:10}  {losses[0]:>15}  {correct[0]:>13}"
            if policy != "keep":
                p = [chance(*pair) for pair in zip(scores.T, kept.T, strict=True)]
                line += f"  {losses[1]:>17}  {p[0]:>6}  {correct[1]:>14}  {p[1]:>6}"
            yield line


def spread(values: np.ndarray, form: str) -> str:
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form.removeprefix('+')}}"


def chance(a: np.ndarray, b: np.ndarray) -> str:
    """The two-sided p value of a paired t-test."""
    p: Any = stats.ttest_rel(a, b).pvalue
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of each run (2000)")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (0)")
    parser.add_argument(
        "--learning-rate", type=float, default=LEARNING_RATE, help=f"({LEARNING_RATE})"
    )
    args = parser.parse_args()
    if args.steps < 4 * MARKS or args.seeds < 2:
        parser.error(f"--steps must be at least {4 * MARKS}, --seeds at least 2")
    marks = np.linspace(0.75 * args.steps, args.steps, MARKS + 1).round().astype(int)[1:]
    runs = [
        run(seed, marks, args.learning_rate)
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    print(
        f"{digits.HELD_OUT} held-out digits; {args.steps:,} steps of {BATCH} images at "
        f"learning rate {args.learning_rate};\nmean of {MARKS} measurements at steps "
        f"{marks[0]:,} to {marks[-1]:,}; mean ± sd over {args.seeds} seeds;\n"
        "p: Student's paired t-test over the seeds, two-sided\n"
    )
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
