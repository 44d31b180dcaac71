"""An Equinox model: which of its leaves are averaged, saved, restored and served.

    python examples/equinox_mlp.py

An Equinox module is one tree of parameters, activation functions and everything else.
`eqx.partition` takes the parameters out; the optimizer, the average and the checkpoint
see only these, and `eqx.combine` puts a model together from any of them.

It prints the held-out loss of the raw model and of the averaged one, and asserts that a
model from the checkpoint has the loss of the averaged one, and that the restored state is
the saved one.
"""

import argparse
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import emaopt
from emaopt import checkpoint, digits

TRAIN, HELD_OUT = digits.load()
TX = optax.chain(optax.adamw(1e-2), emaopt.average_params(0.98, debias=True))


def create(seed):
    return eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(seed))


def loss(model, images, labels):
    logits = jax.vmap(model)(images.reshape(len(images), 64))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def train_step(model, opt_state, images, labels):
    grads = eqx.filter_grad(loss)(model, images, labels)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = TX.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state


@eqx.filter_jit
def evaluate(model):
    return loss(model, jnp.asarray(HELD_OUT.images), HELD_OUT.labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = create(args.seed)
    opt_state = TX.init(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(args.seed)
    for _ in range(args.steps):
        batch = rng.integers(len(TRAIN.labels), size=32)
        model, opt_state = train_step(
            model, opt_state, TRAIN.images[batch], TRAIN.labels[batch]
        )

    params, static = eqx.partition(model, eqx.is_inexact_array)
    averaged = eqx.combine(emaopt.get_average(opt_state, params), static)
    print(f"raw {evaluate(model):.4f}, averaged {evaluate(averaged):.4f}")

    state = {"params": params, "opt_state": opt_state}
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/{args.steps}"
        checkpoint.save(path, state)
        # A server makes a model, and takes the averages in place of its parameters.
        like, static = eqx.partition(create(0), eqx.is_inexact_array)
        served = eqx.combine(checkpoint.load_averaged(path, target=like), static)
        restored = checkpoint.restore(path, jax.eval_shape(lambda: state))

    assert evaluate(served) == evaluate(averaged)
    assert eqx.tree_equal(restored, state)
    print(f"served {evaluate(served):.4f}; the restored state is the saved one")


if __name__ == "__main__":
    main()
