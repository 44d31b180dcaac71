"""Which parameters of a training state an average is of, and their exchange in it."""

from typing import Any, NamedTuple

import jax

from emaopt._names import leaves_with_keys
from emaopt._reading import as_state, average_nodes, exchanged, is_average_node
from emaopt._recursion import SwappedState


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


class Where(NamedTuple):
    """Where in a state an average stands, and the parameters that it is of."""

    params: tuple[str, ...]  # names that lead to the parameters
    average: tuple[str, ...]  # names that lead to the AverageState
    swapped: bool
    pairs: list[tuple[int, int]]  # leaves to exchange, by their position in the tree


def locate(function: str, state: Any, name: str | None) -> Where:
    found = average_nodes(state, name)
    if not found:
        which = "" if name is None else f" under the name {name!r}"
        raise ValueError(
            f"{function}: no average in this state{which}. Train with "
            "emaopt.average_params or emaopt.averaged and pass the parameters and the "
            "optimizer state together, as {'params': params, 'opt_state': opt_state}; a "
            "state without an average is Orbax's own to save and restore."
        )
    if len(found) > 1:
        raise ValueError(
            f"{function}: several averages in this state, at "
            f"{', '.join(map('/'.join, found))}. Say with name= which one goes under the "
            "parameters' names."
        )
    average, node = found.popitem()
    swapped = isinstance(as_state(node), SwappedState)
    leaves = leaves_with_keys(state)
    position = {names: i for i, (names, _) in enumerate(leaves)}
    inside = (*average, "average")
    averaged = {
        names[len(inside) :]: i
        for names, i in position.items()
        if names[: len(inside)] == inside
    }
    if not averaged:
        return Where((), average, swapped, [])
    params = _locate_params(function, leaves, position, average, averaged)
    pairs = [(position[params + names], i) for names, i in averaged.items()]
    return Where(params, average, swapped, pairs)


def _locate_params(
    function: str, leaves: list, position: dict, average: tuple, averaged: dict
) -> tuple[str, ...]:
    """The names that lead to the tree that the average is like.

    Optimizer slots look the same; the parameters are the one nearest to the root, and
    among several there the one called "params".
    """
    first = next(iter(averaged))
    candidates = []
    for names in position:
        prefix = names[: len(names) - len(first)]
        if names[len(prefix) :] != first or prefix[: len(average)] == average:
            continue
        if all(
            (i := position.get(prefix + rest)) is not None
            and shape_of(leaves[i][1]) == shape_of(leaves[j][1])
            for rest, j in averaged.items()
        ):
            candidates.append(prefix)
    if not candidates:
        raise ValueError(
            f"{function}: the state holds the average at {'/'.join(average)}, but no "
            "parameters with its names and shapes. Pass the parameters and the optimizer "
            "state together, as {'params': params, 'opt_state': opt_state}."
        )
    depth = min(map(len, candidates))
    nearest = [prefix for prefix in candidates if len(prefix) == depth]
    named = [prefix for prefix in nearest if prefix[-1:] == ("params",)]
    if len(named or nearest) > 1:
        raise ValueError(
            f"{function}: the average at {'/'.join(average)} could be of any of "
            f"{', '.join(map('/'.join, nearest))}. Save the parameters under the key "
            "'params'."
        )
    return (named or nearest)[0]


def exchange(state: Any, where: Where) -> Any:
    """The state with the pairs exchanged and the average marked as swapped, or back."""
    leaves, treedef = jax.tree.flatten(state)
    for i, j in where.pairs:
        leaves[i], leaves[j] = leaves[j], leaves[i]
    state = jax.tree.unflatten(treedef, leaves)
    marked = [
        exchanged(node, as_state(node).average) if names == where.average else node
        for names, node in leaves_with_keys(state, is_leaf=is_average_node)
    ]
    treedef = jax.tree.structure(state, is_leaf=is_average_node)
    return jax.tree.unflatten(treedef, marked)


def shape_of(leaf: Any) -> Any:
    return getattr(leaf, "shape", None)
