"""Two networks that are trained against each other, each with an average, in one file.

    python examples/gan.py

The generator of a GAN runs around its goal: where its weights are at the last step is a
matter of chance, and their average is better. Each network has its own optimizer and its
own average; one checkpoint serves both, each under its own name, and either can be loaded
alone.

The data are points near a ring of 8. It prints, as training goes on, how far the points
of the generator and of its average are from the data (the energy distance, 0 for the same
distribution), and then that of the generator that the checkpoint serves.

Yazıcı et al., 2019, https://arxiv.org/abs/1806.04498 (averages of generators)
Mescheder et al., 2018, https://arxiv.org/abs/1801.04406 (the penalty, R1)
"""

import argparse
import functools
import tempfile

import jax
import jax.numpy as jnp
import optax

import emaopt
from emaopt import checkpoint

NETWORKS = {"generator": (8, 64, 64, 2), "discriminator": (2, 64, 64, 1)}
TX = optax.chain(
    optax.adam(1e-3, b1=0.0, b2=0.99), emaopt.average_params(emaopt.half_life_decay(300))
)


def init(key, sizes):
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"w": he(k, (n, m)), "b": jnp.zeros(m)} for k, n, m in shapes]


def network(params, x):
    for layer in params[:-1]:
        x = jax.nn.leaky_relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def data(key, number):
    where, noise = jax.random.split(key)
    angle = jax.random.randint(where, (number,), 0, 8) * jnp.pi / 4
    points = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return points + 0.05 * jax.random.normal(noise, (number, 2))


def points_of(generator, key, number):
    return network(generator, jax.random.normal(key, (number, 8)))


def losses(params, key):
    """What each network wants to be small, for the logit of a point being real."""
    real_key, made_key = jax.random.split(key)
    real = data(real_key, 128)
    made = points_of(params["generator"], made_key, 128)

    def logit(x):
        return network(params["discriminator"], x)

    # Without the penalty the two of them end on one point of the ring.
    slope = jax.grad(lambda x: logit(x).sum())(real)
    penalty = (slope**2).sum(axis=1).mean()
    wrong = jax.nn.softplus(-logit(real)).mean() + jax.nn.softplus(logit(made)).mean()
    return {
        "generator": jax.nn.softplus(-logit(made)).mean(),
        "discriminator": wrong + 0.1 * penalty,
    }


@functools.partial(jax.jit, static_argnames="steps")
def train(params, opt_state, key, steps):
    def step(carry, key):
        params, opt_state = dict(carry[0]), dict(carry[1])
        for name in ("discriminator", "generator"):
            others = params

            def loss(own, name=name, others=others):
                return losses(others | {name: own}, key)[name]

            grads = jax.grad(loss)(params[name])
            updates, new = TX.update(grads, opt_state[name], params[name])
            opt_state = opt_state | {name: new}
            params = params | {name: optax.apply_updates(params[name], updates)}
        return (params, opt_state), None

    return jax.lax.scan(step, (params, opt_state), jax.random.split(key, steps))[0]


@jax.jit
def distance(generator):
    """2 E|x - y| - E|x - x'| - E|y - y'| of data x and made points y."""
    keys = jax.random.split(jax.random.key(1000), 2)
    x, y = data(keys[0], 2000), points_of(generator, keys[1], 2000)

    def mean(a, b):
        square = ((a[:, None] - b) ** 2).sum(axis=-1)
        return jnp.sqrt(square).mean()

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    key = jax.random.key(args.seed)
    params = {name: init(key, sizes) for name, sizes in NETWORKS.items()}
    opt_state = {name: TX.init(params[name]) for name in NETWORKS}
    for number in range(1, 7):
        some = jax.random.fold_in(key, number)
        params, opt_state = train(params, opt_state, some, args.steps // 6)
        average = emaopt.get_average(opt_state["generator"])
        raw, averaged = distance(params["generator"]), distance(average)
        step = number * (args.steps // 6)
        print(f"step {step:5}: distance {raw:.4f}, of the average {averaged:.4f}")

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/{args.steps}"
        checkpoint.save(
            path,
            {"params": params, "opt_state": opt_state},
            name=("generator", "discriminator"),
            params=("params/generator", "params/discriminator"),
        )
        generator = checkpoint.load_averaged(path, name="generator")
        both = checkpoint.load_averaged(path, at="params")
    served = distance(generator)
    assert served == distance(both["generator"]) == averaged
    print(f"the generator, served from the checkpoint of both: distance {served:.4f}")


if __name__ == "__main__":
    main()
