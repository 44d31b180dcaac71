"""Constraints: parameters are projected after each update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from emaopt._checks import check_callable, check_given
from emaopt._leaves import is_averaged
from emaopt._rounding import applied, lead
from emaopt._tree_checks import refuse_unlike
from emaopt._types import Leaf, PyTree


def constrain(projection: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Projects the parameters after the update.

    θ := projection(θ + u). It returns updates that lead there, so that an average behind
    it in the chain is one of the projected parameters. `optax.apply_updates` rounds: a
    bound may be exceeded in the last bit.

    The updates of parameters narrower than float32 are float32, because in 16 bits some
    bounds cannot be reached. Wrappers that choose between updates of one dtype, such as
    `optax.apply_if_finite`, go around the optimizer alone, and `constrain` behind them.

    Args:
      projection: A function from the parameters to a tree like them, such as those of
        `optax.projections`. To constrain some leaves only, return the others unchanged.

    Returns:
      A transformation without state, to stand behind the optimizer in `optax.chain`.

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

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        check_given("constrain", "projects the parameters", params)
        leaves, treedef = jax.tree.flatten(params)
        # Trees are compared only after a failure: a comparison costs time at each step.
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
        # In float32 at least: a difference that is rounded to 16 bits may miss a bound.
        leads = [
            lead(p, target, _wide(u), True) if is_averaged(p) and u is not None else u
            for p, target, u in zip(
                leaves, projected, treedef.flatten_up_to(updates), strict=True
            )
        ]
        return jax.tree.unflatten(treedef, leads), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _wide(update: Leaf) -> jax.Array:
    """The update, in float32 if it has 16 bits."""
    update = jnp.asarray(update)
    return update.astype(jnp.float32) if update.dtype.itemsize == 2 else update
