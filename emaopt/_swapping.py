"""The exchange of parameters and their averages in a training state."""

from typing import Any

import jax

from emaopt._checks import check_flag
from emaopt._names import leaves_with_keys
from emaopt._nodes import (
    as_state,
    exchanged,
    is_average_node,
    is_center_node,
    served_nodes,
)
from emaopt._places import Choice, Place, Ways, check_choices, located


def swap_state(
    state: Any, *, name: Choice = None, params: Ways = None, optional: bool = False
) -> Any:
    """Exchanges the parameters and their average inside of a training state.

    Of a whole state, to be written; `emaopt.swap` takes its parts, to evaluate.

    What `save` does before it writes, for any other way of writing: the tree keeps its
    containers, and swapping twice gives the state back bit for bit. Also for trees of
    `jax.ShapeDtypeStruct` or shardings, to make the target of a restore: what was written
    swapped is restored into a swapped target, and then swapped back.

        flax.training.checkpoints.save_checkpoint(directory, swap_state(state), step)
        state = emaopt.checkpoint.restore(f"{directory}/checkpoint_{step}", state)
        # or by the other way's own restore, which must not be given the state itself:
        state = swap_state(restore_checkpoint(directory, swap_state(state), step))

    What to watch: most readers refuse to fill a state with a swapped one, because the
    first field of the average's has another name, such as "swapped_at". Some fill what a
    checkpoint lacks from the target without a word, as Flax's `restore_checkpoint` and
    Orbax's transforms do: the average would go on as the parameters. Restore such files
    with `emaopt.checkpoint.restore`, which takes the state as it is.

    Args:
      state: A training state, as for `save`.
      name, params: Which averages, and where their parameters stand, as for `save`.
      optional: Return a state that holds no average as it is, in place of an error.

    Returns:
      The state with the averages under the parameters' names and the raw parameters in a
      `SwappedState`; from a swapped state, the original.

    Raises:
      ValueError: As for `save`.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt, jax.numpy as jnp, optax
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5, zero_init=True)
      >>> state = swap_state({"params": jnp.ones(2), "opt_state": tx.init(jnp.ones(2))})
      >>> print(state["params"], state["opt_state"].averaging.average)
      [0. 0.] [1. 1.]
    """
    check_flag("swap_state", "optional", optional)
    check_choices("swap_state", name, params)
    if optional and not served_nodes(state):
        return state
    return exchange(state, located("swap_state", state, name, params))


def exchange(state: Any, places: list[Place]) -> Any:
    """The state with all pairs exchanged and the averages marked as swapped, or back."""
    leaves, treedef = jax.tree.flatten(state)
    for place in places:
        for i, j in place.pairs:
            leaves[i], leaves[j] = leaves[j], leaves[i]
    state = jax.tree.unflatten(treedef, leaves)
    for place in places:
        is_node = is_center_node if place.field == "center" else is_average_node
        marked = [
            exchanged(node, as_state(node)[-1]) if names == place.average else node
            for names, node in leaves_with_keys(state, is_leaf=is_node)
        ]
        treedef = jax.tree.structure(state, is_leaf=is_node)
        state = jax.tree.unflatten(treedef, marked)
    return state
