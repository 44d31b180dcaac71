"""Constraints: parameters are projected after each update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emaopt._checks import check_callable, refuse_unlike
from emaopt._leaves import is_averaged
from emaopt._rounding import applied, lead


def constrain(projection: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Projects the parameters after the update.

    θ := projection(θ + u), through updates that lead there, so that an average behind it
    in the chain is of the projected parameters. Up to the rounding of
    `optax.apply_updates`: a bound may be passed by the last bit.

    Updates of parameters narrower than float32 are float32: in 16 bits some bounds cannot
    be reached. Wrappers that choose between updates of one dtype, as
    `optax.apply_if_finite`, take the optimizer alone, with this behind them.

    Args:
      projection: A function of the parameters that returns a tree like them, such as
        those of `optax.projections`. To constrain some leaves, return the others as they
        are.

    Returns:
      A transformation without state; behind the optimizer in `optax.chain`.

    Raises:
      TypeError: If `projection` is not a function.
      ValueError: From `update`, without parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.chain(optax.sgd(3.0), constrain(lambda p: jnp.clip(p, 0.0, 1.0)))
      >>> params = jnp.array([0.5, 0.5])
      >>> updates, _ = tx.update(jnp.array([5.0, -5.0]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [0. 1.]
    """
    check_callable("constrain", "projection", projection, 1)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "constrain projects the parameters, but update was called without them: "
                "call tx.update(grads, state, params)."
            )
        leaves, treedef = jax.tree.flatten(params)
        try:
            moved = applied(params, updates)
        except (TypeError, ValueError, AttributeError) as error:
            refuse_unlike("constrain", params, error, updates=updates)
            raise
        projected = projection(moved)
        try:
            projected = treedef.flatten_up_to(projected)
        except (TypeError, ValueError) as error:
            refuse_unlike("constrain", params, error, projection=projected)
            raise
        # In float32 at least: a bound is to be met, and 16 bits may miss it.
        leads = [
            lead(p, target, _wide(u), True) if is_averaged(p) and u is not None else u
            for p, target, u in zip(
                leaves, projected, treedef.flatten_up_to(updates), strict=True
            )
        ]
        return jax.tree.unflatten(treedef, leads), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _wide(update: Any) -> jax.Array:
    update = jnp.asarray(update)
    return update.astype(jnp.float32) if update.dtype.itemsize == 2 else update
