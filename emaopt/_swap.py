"""The exchange of parameters and their averages: in parts, or in a whole state."""

import jax

from emaopt._beside import Served, check_served, put, served_values
from emaopt._checks import check_flag, check_text
from emaopt._leaves import opened
from emaopt._names import is_below, joined, leaves_with_keys
from emaopt._nodes import (
    as_state,
    beside_of,
    center_nodes,
    changed,
    exchanged,
    field_of,
    is_swapped,
    only_node,
    refuse_crossed_swap,
    refuse_unknown_name,
    served_nodes,
)
from emaopt._places import Choice, Place, Ways, check_choices, located
from emaopt._reading import NO_AVERAGE, paired
from emaopt._types import PyTree


def swap(
    params: PyTree, opt_state: PyTree, *, name: str | None = None
) -> tuple[PyTree, PyTree]:
    """Exchanges the parameters and their average (EMA, Polyak average).

    Afterwards the parameters are the average, in its dtypes, and the state holds the raw
    parameters. Swapping again restores both bit for bit: arrays change places, nothing is
    computed. A swapped state refuses to train. For evaluating in the middle of training;
    `checkpoint.swap_state` is for states that are written to a file.

    Args:
      params: The parameters.
      opt_state: A state that holds one average of them, as for `get_average`.
      name: Which average, if there are several.

    Returns:
      (params, opt_state). Parameters that are not averaged stay where they are.

    Raises:
      ValueError: If there is no average or several, or it is of other parameters.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt, jax.numpy as jnp, optax
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5, zero_init=True)
      >>> params = jnp.ones(2)
      >>> served, kept = swap(params, tx.init(params))
      >>> print(served, swap(served, kept)[0])
      [0. 0.] [1. 1.]
    """
    check_text("swap", "name", name, optional=True)
    nodes = served_nodes(opt_state, name)
    if not nodes:
        refuse_unknown_name("swap", opt_state, name)
    names, node = only_node("swap", nodes, "average", NO_AVERAGE)
    refuse_crossed_swap("swap", opt_state, [node])
    content = as_state(node)[-1]
    if jax.tree.leaves(beside_of(node)):
        raise ValueError(
            f"swap: the average at {joined(names)} has raw values beside it of what else "
            "is served, which go back in the whole state: use checkpoint.swap_state."
        )
    paired("swap", content, params, bool(center_nodes(opt_state)))
    # Positions in (params, opt_state), by the names that the leaves have in each part: in
    # the pair, names of a lone "value" would be others.
    index = {keys: i for i, (keys, _) in enumerate(leaves_with_keys(params))}
    field = (*names, field_of(node))
    numbered = enumerate(leaves_with_keys(opt_state), start=len(index))
    inside = [j for j, (keys, _) in numbered if is_below(keys, field)]
    wanted = [index[keys] for keys, _ in leaves_with_keys(content)]
    pairs = [*zip(wanted, inside, strict=True)]
    place = Place(("0",), ("1", *names), field[-1], is_swapped(node), pairs)
    return exchange((params, opt_state), [place])


def swap_state(
    state: PyTree,
    *,
    name: Choice = None,
    params: Ways = None,
    optional: bool = False,
    served: Served = None,
) -> PyTree:
    """Exchanges the parameters and their average inside of a training state.

    Takes a whole state, for writing it; `emaopt.swap` takes its parts, for evaluating.

    `save` does this before it writes; call it for any other way of writing. The tree
    keeps its containers, and swapping twice gives the state back bit for bit. Trees of
    `jax.ShapeDtypeStruct` or shardings can be swapped to make the target of a restore: a
    state that was written swapped is restored into a swapped target, then swapped back.

        flax.training.checkpoints.save_checkpoint(directory, swap_state(state), step)
        state = emaopt.checkpoint.restore(f"{directory}/checkpoint_{step}", state)
        # or by that library's own restore, whose target must be swapped, not the state:
        state = swap_state(restore_checkpoint(directory, swap_state(state), step))

    What to watch: most readers refuse to fill a state from a swapped one, because the
    first field of a `SwappedState` has a name of its own, "swapped_at". Some, such as
    Flax's `restore_checkpoint` and Orbax's transforms, silently keep the target's
    values for what a checkpoint lacks, and drop what the target has no place for: the
    average would go on as the parameters, or with a target that was swapped without the
    same `served=`, what was served as the state's own. Restore such files with
    `emaopt.checkpoint.restore`, which takes the state as it is.

    Args:
      state: A training state, as for `save`.
      name, params: Which averages, and where their parameters are, as for `save`.
      optional: Return a state that holds no average as it is, in place of an error.
      served: What else is served, as for `save`, of a state that is not swapped.

    Returns:
      The state with the averages under the parameters' names and the raw parameters in a
      `SwappedState`; from a swapped state, the original, without what else was served. An
      NNX module with pytree=False, which is one leaf to JAX, comes as its `nnx.state`.

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
    check_served("swap_state", served)
    state, served = opened(state), opened(served)
    if optional and not served_nodes(state):
        return state
    places = located("swap_state", state, name, params)
    values = served_values("swap_state", state, places, served)
    if values and places[0].swapped:
        raise ValueError(
            "swap_state: this state is swapped, and goes back to its own values; served= "
            "is for the way there."
        )
    return put(exchange(state, places), places[0], values)


def exchange(state: PyTree, places: list[Place]) -> PyTree:
    """The state with all pairs exchanged and the averages marked as swapped, or back."""
    # First the leaves, by their positions: the marks below change the structure.
    leaves, treedef = jax.tree.flatten(state)
    for place in places:
        for i, j in (*place.pairs, *place.beside):
            leaves[i], leaves[j] = leaves[j], leaves[i]
    state = jax.tree.unflatten(treedef, leaves)
    for place in places:
        state = changed(
            state,
            place.average,
            place.field,
            lambda node: exchanged(node, as_state(node)[-1]),
        )
    return state
