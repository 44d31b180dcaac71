"""Workers that exchange every 25 steps (DiLoCo), and workers that do at every step.

    python examples/diloco.py

Four workers have different digits each. Trained synchronously, they add up gradients at
every step. With DiLoCo each takes steps of its own, and only every 25th sends how far it
has come; an outer optimizer moves the center, from which all go on. The parameters have a
leading axis of workers, which is split over as many devices as divide it: here on one, or
with XLA_FLAGS=--xla_force_host_platform_device_count=4 on four.

It prints the exchanges, the bytes that a worker sends, and the held-out loss of both, and
then that of DiLoCo's center, which a checkpoint serves in the shapes of one worker.

Douillard et al., 2023, https://arxiv.org/abs/2311.08105
"""

import argparse
import math
import tempfile

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt
from emaopt import checkpoint, digits

WORKERS, PERIOD, BATCH = 4, 25, 16
TRAIN, HELD_OUT = digits.load()
EACH = len(TRAIN.labels) // WORKERS
INNER = optax.adamw(5e-3)


def init(key):
    first, second, third = jax.random.split(key, 3)
    he = jax.nn.initializers.he_normal()
    return {
        "in": he(first, (64, 64)),
        "mid": he(second, (64, 64)),
        "out": he(third, (64, 10)),
    }


@jax.jit
def loss(params, images, labels):
    x = jax.nn.relu(images.reshape(len(images), 64) @ params["in"])
    logits = jax.nn.relu(x @ params["mid"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batches(step):
    """For each worker some of its own digits: [WORKERS, BATCH, ...]."""
    chosen = np.random.default_rng(step).integers(EACH, size=(WORKERS, BATCH))
    chosen += EACH * np.arange(WORKERS)[:, None]
    return TRAIN.images[chosen], TRAIN.labels[chosen]


def train_synchronously(params, steps):
    opt_state = INNER.init(params)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, images, labels)
        mean = jax.tree.map(lambda g: g.mean(axis=0), gradients)
        updates, opt_state = INNER.update(mean, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for step in range(steps):
        params, opt_state = train_step(params, opt_state, *batches(step))
    return params


def train_locally(params, steps):
    # The paper's outer learning rate of 0.7 is for runs of many more exchanges.
    outer = optax.sgd(0.3, momentum=0.9, nesterov=True)
    tx = emaopt.diloco(INNER, outer, period=PERIOD, num_workers=WORKERS)
    devices = math.gcd(WORKERS, jax.device_count())
    mesh = jax.make_mesh((devices,), ("workers",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("workers"))
    stacked = jax.device_put(emaopt.stack_workers(params, WORKERS), split)
    opt_state = tx.init(stacked)

    @jax.jit
    def train_step(stacked, opt_state, images, labels):
        gradients = jax.vmap(jax.grad(loss))(stacked, images, labels)
        updates, opt_state = tx.update(gradients, opt_state, stacked)
        return optax.apply_updates(stacked, updates), opt_state

    for step in range(steps):
        batch = jax.device_put(batches(step), split)
        stacked, opt_state = train_step(stacked, opt_state, *batch)
        # With several steps in flight, devices of one CPU may wait for each other.
        jax.block_until_ready(stacked)
    return {"params": stacked, "opt_state": opt_state}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    params = init(jax.random.key(args.seed))
    kilobytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e3

    before = loss(params, *HELD_OUT)
    print(f"before training                              loss {before:.3f}")
    synchronous = loss(train_synchronously(params, args.steps), *HELD_OUT)
    state = train_locally(params, args.steps)
    center = loss(emaopt.get_center(state["opt_state"]), *HELD_OUT)
    for name, exchanges, value in (
        ("synchronous", args.steps, synchronous),
        ("DiLoCo", args.steps // PERIOD, center),
    ):
        sent = f"{exchanges} exchanges, {exchanges * kilobytes:.0f} kB"
        print(f"{name:12}  {sent:30} loss {value:.3f}")

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/{args.steps}"
        checkpoint.save(path, state)
        served = checkpoint.load_averaged(path, target=params)
    served = loss(served, *HELD_OUT)
    np.testing.assert_allclose(served, center, rtol=1e-5)
    print(f"the center, served from a checkpoint         loss {served:.3f}")


if __name__ == "__main__":
    main()
