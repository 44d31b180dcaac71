"""Short runs of optimizers whose gradient is taken near an average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

SGD = optax.sgd(0.1)
ADAM = optax.adam(0.05)
PARAMS = {"w": jnp.linspace(-1, 1, 16).reshape(8, 2), "b": jnp.ones(8)}
OPTIONS = {
    "plain": {},
    "every": {"every": 3},
    "start and debias": {"start": 2, "debias": True},
    "skip_nonfinite": {"skip_nonfinite": True},
    "bfloat16": {"accumulator_dtype": jnp.bfloat16, "stochastic_rounding": True},
    "clock": {"clock": "tokens"},
}


def gradients(params):
    return jax.tree.map(lambda p: (0.5 * p + 0.1).astype(p.dtype), params)


def run(tx, params=PARAMS, steps=9, state=None, compiled=True, **extra):
    state = tx.init(params) if state is None else state

    def step(params, state):
        updates, state = tx.update(gradients(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if compiled else step
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
