"""A linen network with BatchNorm, from training to the weights that are served.

    python examples/linen_batchnorm.py

BatchNorm's running statistics belong to the weights that they were gathered with. The
average of the weights needs statistics of its own: they are recomputed for each
checkpoint, and stand in it beside the average. Any reader of Orbax finds both, and gets
the loss that was measured in training; training resumes from the raw weights and their
own statistics.

It prints the held-out loss of the raw weights and of the average at each checkpoint, then
that of the best checkpoint as it is read with emaopt and by Orbax alone.
"""

import argparse
import tempfile
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

import emaopt
from emaopt import batch_stats, checkpoint, digits


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class State(TrainState):
    batch_stats: Any


TRAIN, HELD_OUT = digits.load()
NETWORK = Network()


def forward(params, stats, images):
    """A pass in training mode: the logits, and the statistics after it."""
    variables = {"params": params, "batch_stats": stats}
    return NETWORK.apply(variables, images, train=True, mutable=["batch_stats"])


@jax.jit
def train_step(state, images, labels):
    def loss(params):
        logits, new = forward(params, state.batch_stats, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"]

    grads, stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats)


@jax.jit
def evaluate(params, stats):
    logits = NETWORK.apply(
        {"params": params, "batch_stats": stats}, HELD_OUT.images, train=False
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, HELD_OUT.labels).mean()


def statistics(state):
    """What is served with the average: statistics recomputed for it."""
    average = emaopt.get_average(state, state.params)
    batches = np.split(TRAIN.images[:1280], 40)  # as large as those of training
    stats = batch_stats.recalibrate(forward, average, batches, state.batch_stats)
    return {"batch_stats": stats}


def train(directory, steps, seed):
    variables = NETWORK.init(jax.random.key(seed), TRAIN.images[:1], train=True)
    average = emaopt.average_params(0.95, debias=True)
    state = State.create(
        apply_fn=NETWORK.apply, tx=optax.chain(optax.adam(2e-2), average), **variables
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["average/loss"], best_mode="min"
    )
    registry = checkpoint.handler_registry(served=statistics)
    rng = np.random.default_rng(seed)
    with ocp.CheckpointManager(
        directory, options=options, handler_registry=registry
    ) as manager:
        for step in range(1, steps + 1):
            batch = rng.integers(len(TRAIN.labels), size=32)
            state = train_step(state, TRAIN.images[batch], TRAIN.labels[batch])
            if step % (steps // 4) == 0:
                of_average = statistics(state)["batch_stats"]
                stats = {"raw": state.batch_stats, "average": of_average}
                metrics = {
                    f"{view}/loss": float(evaluate(params, stats[view]))
                    for view, params in emaopt.views(state, state.params).items()
                }
                args = ocp.args.StandardSave(state)
                manager.save(step, args=args, metrics=metrics)
                print(f"step {step}:", *(f"{k} {v:.4f}" for k, v in metrics.items()))
        newest = manager.latest_step()
        restored = manager.restore(newest, args=ocp.args.StandardRestore(state))
    # A run that goes on has the raw weights, and the statistics that belong to them.
    assert evaluate(restored.params, restored.batch_stats) == metrics["raw/loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        train(directory, args.steps, args.seed)

        best = checkpoint.best(directory, "loss")
        assert best.view == "average", "the raw weights were better: train longer"
        stats = checkpoint.load_averaged(best.path, at="batch_stats")
        loaded = float(evaluate(best.load(), stats))

        with ocp.CheckpointManager(directory) as manager:  # a server: Orbax and no more
            served = manager.restore(best.step, args=ocp.args.StandardRestore())
        orbax = float(evaluate(served["params"], served["batch_stats"]))
    print(f"best: step {best.step}, {best.view}, measured {best.value:.4f}")
    assert best.value == loaded == orbax
    print(f"loaded {loaded:.4f}, by Orbax alone {orbax:.4f}: the same loss everywhere")


if __name__ == "__main__":
    main()
