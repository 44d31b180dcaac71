"""A diffusion model whose averaging is chosen when the run is over.

    python examples/diffusion_posthoc.py

How long the average should be is known only afterwards, and one run records only a few.
This one records two power averages, σ_rel 0.05 and 0.1, and keeps a checkpoint every so
often. `checkpoint.sweep` then makes averages of other widths from these, evaluates each,
and says whether one is better than the raw weights by more than chance.
`checkpoint.synthesize` writes the best one as a checkpoint, which Orbax reads.

The model removes noise of a random size from points of a spiral. It prints the held-out
loss over the width of the average, and how far each profile is from the one wanted.
"""

import argparse
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import emaopt
from emaopt import checkpoint

WIDTHS = (0.04, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2)
TX = optax.named_chain(  # the names tell what the averages are
    ("adam", optax.adam(1e-2)),
    ("power:0.05", emaopt.average_params(emaopt.power_decay(sigma_rel=0.05))),
    ("power:0.1", emaopt.average_params(emaopt.power_decay(sigma_rel=0.1))),
)


def init(key):
    he = jax.nn.initializers.he_normal()
    sizes = (17, 64, 64, 2)
    keys = jax.random.split(key, 3)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"w": he(k, (n, m)), "b": jnp.zeros(m)} for k, n, m in shapes]


def denoise(params, noisy, sigma):
    """The points of which `noisy` are, [n, 2], for noise of the sizes `sigma`, [n, 1]."""
    waves = (noisy[:, :, None] * 2.0 ** jnp.arange(4)).reshape(len(noisy), 8)
    x = jnp.concatenate([jnp.sin(waves), jnp.cos(waves), jnp.log(sigma)], axis=1)
    for layer in params[:-1]:
        x = jax.nn.silu(x @ layer["w"] + layer["b"])
    return noisy + sigma * (x @ params[-1]["w"] + params[-1]["b"])


def draw(key, number):
    """Points of a spiral, their noisy forms and the sizes of the noise."""
    along, size, noise = jax.random.split(key, 3)
    angle = 3 * jnp.pi * jnp.sqrt(jax.random.uniform(along, (number, 1)))
    points = angle / 8 * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
    sigma = jnp.exp(jax.random.uniform(size, (number, 1), minval=-4.0, maxval=0.0))
    return points, points + sigma * jax.random.normal(noise, points.shape), sigma


def losses(params, points, noisy, sigma):
    """The squared error of each point, in units of its noise."""
    error = (denoise(params, noisy, sigma) - points) / sigma
    return (error**2).mean(axis=1)


@jax.jit
def advance(params, opt_state, keys):
    def step(carry, key):
        params, opt_state = carry
        batch = draw(key, 8)
        grads = jax.grad(lambda params: losses(params, *batch).mean())(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), keys)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6400)
    parser.add_argument("--saves", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    params_key, steps_key, held_out_key = jax.random.split(jax.random.key(args.seed), 3)

    params = init(params_key)
    opt_state = TX.init(params)
    keys = jax.random.split(steps_key, (args.saves, args.steps // args.saves))
    held_out = draw(held_out_key, 20_000)
    evaluate = jax.jit(lambda params: losses(params, *held_out))
    with tempfile.TemporaryDirectory() as directory:
        run, out = f"{directory}/run", f"{directory}/best"
        registry = checkpoint.handler_registry(name="power:0.1")
        with ocp.CheckpointManager(run, handler_registry=registry) as manager:
            for number, some in enumerate(keys, 1):
                params, opt_state = advance(params, opt_state, some)
                state = {"params": params, "opt_state": opt_state}
                step = number * len(some)
                manager.save(step, args=ocp.args.StandardSave(state))

        names = [f"power:{width}" for width in WIDTHS]
        swept = checkpoint.sweep(run, evaluate, names, target=params)
        print("average      held-out loss   error of the profile")
        rows = zip(swept.candidates, swept.losses, swept.residuals, strict=True)
        for name, row, error in rows:
            far = "" if error is None else f"{error:18.2%}"
            print(f"{name:12} {row.mean():13.4f}   {far}".rstrip())
        if swept.chosen is None:
            print("none is better than the raw weights by more than chance")
            return

        checkpoint.synthesize(run, out, target=swept.chosen)
        with ocp.StandardCheckpointer() as orbax:
            loss = evaluate(orbax.restore(out)["params"]).mean()
        measured = swept.losses[swept.candidates.index(swept.chosen)].mean()
        np.testing.assert_allclose(loss, measured, rtol=1e-5)
        print(f"better by more than chance: {swept.chosen}, by Orbax alone {loss:.4f}")


if __name__ == "__main__":
    main()
