"""Training states of noise for `faults.py`, made from a number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import emaopt

Trial = tuple[str, str]  # what happened: "right", "clear error" or what is wrong; details
TIMEOUT = 60  # s, for one trial
TX = emaopt.averaged(optax.adam(1e-2), 0.9, zero_init=True)


def state_of(number: int, size: int = 64) -> dict[str, Any]:
    """A training state of noise, with leaves of several kinds."""
    rng = np.random.default_rng(number)

    def noise(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)

    params = {
        "dense": {"kernel": jnp.zeros((size, size)), "bias": jnp.zeros(size)},
        "half": jnp.zeros((size, size), jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
    }
    state = {"params": params, "opt_state": TX.init(params)}
    return jax.tree.map(noise, state) | {"step": np.int64(number), "key": jnp.arange(2)}


def bits(tree: Any) -> list[tuple[str, str, bytes]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path), str(np.asarray(x).dtype), np.asarray(x).tobytes())
        for path, x in leaves
    ]
