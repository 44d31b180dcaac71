"""Which parameters of a training state an average is of, and their exchange in it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from emaopt._names import leaves_with_keys
from emaopt._nodes import (
    as_state,
    average_nodes,
    center_nodes,
    exchanged,
    field_of,
    fits,
    is_average_node,
    is_center_node,
    is_swapped,
    refuse_crossed_swap,
    refuse_unknown_name,
    served_nodes,
)


def swap_state(state: Any, *, name: str | None = None) -> Any:
    """Exchanges the parameters and their average inside of a training state.

    What `save` does before it writes, for any other way of writing: the tree keeps its
    containers, and swapping twice gives the state back bit for bit. Also for trees of
    `jax.ShapeDtypeStruct` or shardings, to make the target of a restore.

    Args:
      state: A training state, as for `save`.
      name: Which average, if the state holds several.

    Returns:
      The state with the averages under the parameters' names and the raw parameters in a
      `SwappedState`; from a swapped state, the original.

    Raises:
      ValueError: As for `save`.

    Example:
      >>> import emaopt, jax.numpy as jnp, optax
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5, zero_init=True)
      >>> state = swap_state({"params": jnp.ones(2), "opt_state": tx.init(jnp.ones(2))})
      >>> print(state["params"], state["opt_state"].averaging.average)
      [0. 0.] [1. 1.]
    """
    return exchange(state, locate("swap_state", state, name))


Names = tuple[str, ...]


class Where(NamedTuple):
    """Where in a state an average stands, and the parameters that it is of."""

    params: Names  # names that lead to the parameters
    average: Names  # names that lead to the state that holds it
    field: str  # the field of that state: "average", or "center" of local updates
    swapped: bool
    pairs: list[tuple[int, int]]  # leaves to exchange, by their position in the tree


def locate(function: str, state: Any, name: str | None, at: Names | None = None) -> Where:
    found = served_nodes(state, name)
    if at is not None:
        found = {at: (average_nodes(state) | center_nodes(state))[at]}
    if not found:
        refuse_unknown_name(function, state, name)
        raise ValueError(
            f"{function}: no average in this state. Train with "
            "emaopt.average_params or emaopt.averaged and pass the parameters and the "
            "optimizer state together, as {'params': params, 'opt_state': opt_state}; a "
            "state without an average is Orbax's own to save and restore."
        )
    if len(found) > 1:
        raise ValueError(
            f"{function}: several averages in this state, at "
            f"{', '.join(map('/'.join, found))}. Say with name= (of handler_registry, if "
            "a CheckpointManager saves) which one goes under the parameters' names."
        )
    average, node = found.popitem()
    refuse_crossed_swap(function, state, node)
    swapped, field = is_swapped(node), field_of(node)
    leaves = leaves_with_keys(state)
    position = {names: i for i, (names, _) in enumerate(leaves)}
    inside = (*average, field)
    stacked = bool(center_nodes(state))
    averaged = {
        names[len(inside) :]: i
        for names, i in position.items()
        if names[: len(inside)] == inside
    }
    if not averaged:
        return Where((), average, field, swapped, [])
    prefixes = _alike(leaves, position, average, averaged, stacked)
    params = _choose(function, state, average, prefixes)
    pairs = [(position[params + names], i) for names, i in averaged.items()]
    return Where(params, average, field, swapped, pairs)


def _alike(
    leaves: list, position: dict, average: Names, averaged: dict, stacked: bool
) -> list[Names]:
    """The names that lead to other trees with the average's names and shapes."""
    first = next(iter(averaged))
    prefixes = []
    for names in position:
        prefix = names[: len(names) - len(first)]
        if names[len(prefix) :] != first:
            continue
        if prefix == average[: len(prefix)] or prefix[: len(average)] == average:
            continue  # the average itself, or what holds it
        if all(
            (i := position.get(prefix + rest)) is not None
            and _fit(leaves[j][1], leaves[i][1], stacked)
            for rest, j in averaged.items()
        ):
            prefixes.append(prefix)
    return prefixes


def _choose(function: str, state: Any, average: Names, alike: list[Names]) -> Names:
    """The parameters among the trees that look like the average.

    Not the slots of an optimizer: they stand below the key "opt_state" that the average
    does, or in a NamedTuple, as Optax's states are. Of the rest, the one that branches
    off last on the way to the average; it and no other if one is called "params".
    """
    found = [p for p in alike if not _is_slot(state, p, average)]
    where = "/".join(average) or "the root"
    if not found:
        raise ValueError(
            f"{function}: the state holds the average at {where}, but no parameters with "
            "its names and shapes. Pass the parameters and the optimizer state together, "
            "as {'params': params, 'opt_state': opt_state}."
        )
    closest = max(_common(p, average) for p in found)
    best = [p for p in found if _common(p, average) == closest]
    named = [p for p in found if p[-1] == "params"]
    choice = [p for p in best if p in named] or (best if not named else [])
    typed = not isinstance(_node(state, average), Mapping) or "opt_state" in average
    if len(choice) != 1 or (len(found) > 1 and not named and not typed):
        raise ValueError(
            f"{function}: the average at {where} could be of any of "
            f"{', '.join(map('/'.join, found))}. Keep the parameters under the key "
            "'params', beside the optimizer state."
        )
    return choice[0]


def _is_slot(state: Any, prefix: Names, average: Names) -> bool:
    common = _common(prefix, average)
    if "opt_state" in average and common > average.index("opt_state"):
        return True
    nodes = (_node(state, prefix[:i]) for i in range(common + 1, len(prefix) + 1))
    return any(isinstance(node, tuple) and hasattr(node, "_fields") for node in nodes)


def _common(a: Names, b: Names) -> int:
    """How many names two ways have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def _node(tree: Any, names: Names) -> Any:
    """What stands at a name, None where the containers cannot be walked."""
    for name in names:
        if isinstance(tree, Mapping):
            tree = {str(key): child for key, child in tree.items()}.get(name)
        elif isinstance(tree, (list, tuple)) and name.isdigit():
            tree = tree[int(name)]
        else:
            tree = getattr(tree, name, None)
    return tree


def exchange(state: Any, where: Where) -> Any:
    """The state with the pairs exchanged and the average marked as swapped, or back."""
    is_node = is_center_node if where.field == "center" else is_average_node
    leaves, treedef = jax.tree.flatten(state)
    for i, j in where.pairs:
        leaves[i], leaves[j] = leaves[j], leaves[i]
    state = jax.tree.unflatten(treedef, leaves)
    marked = [
        exchanged(node, as_state(node)[-1]) if names == where.average else node
        for names, node in leaves_with_keys(state, is_leaf=is_node)
    ]
    treedef = jax.tree.structure(state, is_leaf=is_node)
    return jax.tree.unflatten(treedef, marked)


def _fit(content: Any, param: Any, stacked: bool) -> bool:
    shapes = shape_of(content), shape_of(param)
    if stacked and None not in shapes:
        return fits(*shapes)
    return shapes[0] == shapes[1]


def shape_of(leaf: Any) -> Any:
    """The shape of an array or number; None for what has none, such as a sharding."""
    if isinstance(leaf, (bool, int, float, complex)):
        return ()
    return getattr(leaf, "shape", None)
