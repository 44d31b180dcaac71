"""An NNX model with Dropout: its average evaluated, and a run that is cut and resumed.

    python examples/nnx_dropout.py

`nnx.Optimizer` keeps the average in its state. The average is merged with the rest of the
model, the stream of Dropout's random numbers among it, and evaluated in eval mode. In the
middle of the run everything is saved; a second model and optimizer, made from another
seed, restore it and train on. Dropout goes on where it was, so both end with the same
bits.

It prints the held-out loss of the raw weights and of the average, at the checkpoint and
at the end.
"""

import argparse
import tempfile

import jax
import numpy as np
import optax
from flax import nnx

import emaopt
from emaopt import checkpoint, digits

TRAIN, HELD_OUT = digits.load()


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.hidden(images.reshape(len(images), 64)))
        return self.last(self.dropout(x))


def loss(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    optimizer.update(model, nnx.grad(loss)(model, images, labels))


@nnx.jit
def held_out_loss(model):
    return loss(model, HELD_OUT.images, HELD_OUT.labels)


def create(seed):
    model = Network(nnx.Rngs(seed))
    tx = optax.chain(optax.adamw(1e-2), emaopt.average_params(0.98, debias=True))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def train(model, optimizer, steps):
    model.train()
    for step in steps:
        batch = np.random.default_rng(step).integers(len(TRAIN.labels), size=32)
        train_step(model, optimizer, TRAIN.images[batch], TRAIN.labels[batch])


def evaluate(step, model, optimizer):
    """Prints the held-out losses of the raw weights and of their average."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    for view, weights in emaopt.views(optimizer, params).items():
        served = nnx.merge(graph, weights, rest, copy=True)
        served.eval()
        print(f"step {step}, {view}: held-out loss {held_out_loss(served):.4f}")


def state_of(model, optimizer):
    return {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}


def bits(state):
    """Every array of a state as bytes."""

    def numbers(x):  # of a key of random numbers, too
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    return [numbers(x).tobytes() for x in jax.tree.leaves(state)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    middle = args.steps // 2

    model, optimizer = create(seed=0)
    train(model, optimizer, range(middle))
    evaluate(middle, model, optimizer)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save(f"{directory}/{middle}", state_of(model, optimizer))
        train(model, optimizer, range(middle, args.steps))
        evaluate(args.steps, model, optimizer)

        again, its_optimizer = create(seed=1)
        state = checkpoint.restore(
            f"{directory}/{middle}", state_of(again, its_optimizer)
        )
    nnx.update(again, state["model"])
    nnx.update(its_optimizer, state["optimizer"])
    train(again, its_optimizer, range(middle, args.steps))

    one, other = bits(state_of(model, optimizer)), bits(state_of(again, its_optimizer))
    assert one == other
    print(f"resumed: all {len(one)} arrays are the same, bit for bit")


if __name__ == "__main__":
    main()
