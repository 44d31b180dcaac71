"""Questions to any optimizer state: which average it holds, and how to serve it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._names import leaves_with_keys
from emaopt._recursion import AverageState, SwappedState, is_averaged


def get_average(opt_state: Any, params: Any = None, *, name: str | None = None) -> Any:
    """Reads the average out of any optimizer state.

    Args:
      opt_state: A state that holds one `AverageState`, however deep: inside of
        `optax.chain`, `named_chain`, `masked`, `partition`, `MultiSteps`,
        `apply_if_finite`, `inject_hyperparams`, a Flax TrainState or an
        `nnx.Optimizer`.
      params: The parameters, or None. With them, the result has their containers and
        dtypes, and the leaves that are not averaged are taken from them.
      name: Which average, if there are several: a key on the way to it, such as its name
        in `optax.named_chain`.

    Returns:
      The average: a tree like the parameters; without `params`, in the accumulator's
      dtypes. Leaves may be the state's own arrays: copy before donating the state.

    Raises:
      ValueError: If there is no average, several, a swapped one, or one that leaves out
        parameters while `params` is None.

    Example:
      >>> import emaopt
      >>> tx = optax.chain(optax.sgd(1.0), emaopt.average_params(0.5))
      >>> params = {"w": jnp.zeros(2)}
      >>> _, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> print(get_average(state)["w"])
      [-0.5 -0.5]
    """
    average = find_average("get_average", opt_state, name).average
    if params is None:
        nodes = jax.tree.leaves(average, is_leaf=_is_masked)
        if masked := sum(map(_is_masked, nodes)):
            raise ValueError(
                f"get_average: {masked} of {len(nodes)} leaves are not averaged: call "
                "get_average(opt_state, params) to take them from the parameters."
            )
        return average
    averages, _ = _paired("get_average", average, params)

    def read(keys, leaf):
        value = averages.get(keys, leaf)
        return value.astype(jnp.asarray(leaf).dtype) if is_averaged(value) else value

    return _map_with_keys(read, params)


def swap(params: Any, opt_state: Any, *, name: str | None = None) -> tuple[Any, Any]:
    """Exchanges the parameters and their average.

    Afterwards the parameters are the average, in its dtypes, and the state holds the raw
    parameters. Swapping again restores both bit for bit: arrays change places, nothing is
    computed. A swapped state refuses to train.

    Args:
      params: The parameters.
      opt_state: A state that holds one average of them, as for `get_average`.
      name: Which average, if there are several.

    Returns:
      (params, opt_state). Parameters that are not averaged stay where they are.

    Raises:
      ValueError: If there is no average or several, or it is of other parameters.

    Example:
      >>> import emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5, zero_init=True)
      >>> params = jnp.ones(2)
      >>> served, kept = swap(params, tx.init(params))
      >>> print(served, swap(served, kept)[0])
      [0. 0.] [1. 1.]
    """
    node = find_node("swap", opt_state, name)
    refuse_crossed_swap("swap", opt_state, node)
    state = as_state(node)
    averages, raw = _paired("swap", state.average, params)
    swapped = _map_with_keys(lambda keys, leaf: averages.get(keys, leaf), params)
    kept = _map_with_keys(lambda keys, leaf: raw[keys], state.average)
    return swapped, _replace(opt_state, node, exchanged(node, kept))


def reset_average(opt_state: Any, params: Any, *, name: str | None = None) -> Any:
    """Starts the average anew: it becomes a copy of `params`, its counters 0.

    For adopting an average in a run that had none, or after a change of the task.

    Args:
      opt_state: A state that holds one average, as for `get_average`.
      params: The parameters to start from.
      name: Which average, if there are several.

    Returns:
      The state with the average replaced, in the accumulator's dtypes; a de-biased
      average forgets `params` as it would forget the initial parameters.

    Raises:
      ValueError: If there is no average, several, a swapped one, or it is of other
        parameters.

    Example:
      >>> import emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> state = reset_average(tx.init(jnp.zeros(2)), jnp.ones(2))
      >>> print(get_average(state))
      [1. 1.]
    """
    node = find_node("reset_average", opt_state, name)
    state = find_average("reset_average", node, None)
    _, raw = _paired("reset_average", state.average, params)

    def restart(keys, leaf):
        new = raw[keys]
        return jnp.array(new, dtype=leaf.dtype) if hasattr(leaf, "dtype") else new

    fresh = AverageState(
        *jax.tree.map(jnp.zeros_like, state[:-1]),
        average=_map_with_keys(restart, state.average),
    )
    return _replace(opt_state, node, in_place_of(node, fresh))


def average_distance(
    opt_state: Any, params: Any, *, name: str | None = None
) -> jax.Array:
    """Returns how far the parameters are from their average: ‖θ - a‖ / ‖θ‖.

    Args:
      opt_state: A state that holds one average, as for `get_average`.
      params: The parameters θ.
      name: Which average, if there are several.

    Returns:
      Scalar of the accumulator's dtype, at least float32, over all averaged leaves
      together; 0 if there are none. May be called under jit.

    Raises:
      ValueError: As for `get_average`.

    Example:
      >>> import emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5, zero_init=True)
      >>> params = jnp.ones(2)
      >>> print(average_distance(tx.init(params), params))
      1.0
    """
    state = find_average("average_distance", opt_state, name)
    averages, raw = _paired("average_distance", state.average, params)
    theta, difference = {}, {}
    for keys, average in averages.items():
        if is_averaged(average):
            dtype = average.dtype if average.dtype.itemsize >= 4 else jnp.float32
            theta[keys] = jnp.asarray(raw[keys], dtype)
            difference[keys] = theta[keys] - average.astype(dtype)
    norm = optax.tree.norm(theta)
    return jnp.where(norm > 0, optax.tree.norm(difference) / norm, 0.0)


def find_average(function: str, opt_state: Any, name: str | None) -> AverageState:
    """The one `AverageState` in a state, or an error that says what is there instead."""
    state = as_state(find_node(function, opt_state, name))
    if not isinstance(state, AverageState):
        raise ValueError(
            f"{function}: this state is swapped: the parameters are the average. Call "
            "emaopt.swap(params, opt_state) to swap back first."
        )
    return state


def find_node(function: str, opt_state: Any, name: str | None) -> Any:
    """The one node of a state that holds an average, swapped or not."""
    found = average_nodes(opt_state, name)
    if not found:
        refuse_unknown_name(function, opt_state, name)
        raise ValueError(
            f"{function}: no average in this optimizer state. Put "
            "emaopt.average_params(decay) last in optax.chain, or wrap the optimizer in "
            "emaopt.averaged(optimizer, decay), before init."
        )
    if len(found) > 1:
        where = ", ".join(repr("/".join(names)) for names in found)
        raise ValueError(
            f"{function}: several averages in this optimizer state, at {where}. Say "
            "which with name=, one of these or a key on its way; optax.named_chain gives "
            "them names."
        )
    names, node = found.popitem()
    if type(node) is dict and isinstance(node["pending"], (jax.Array, np.ndarray)):
        raise ValueError(
            f"{function}: at {'/'.join(names) or 'the root'} stands a plain dict, as a "
            "restore without a target gives it. Use emaopt.checkpoint.restore(path, "
            "target) to resume training, or emaopt.checkpoint.load_averaged(path) for "
            "the average."
        )
    return node


def average_nodes(tree: Any, name: str | None = None) -> dict[tuple[str, ...], Any]:
    """All nodes that hold an average, by name.

    With `name`, the one that it is the whole name of, or those with it on their way.
    """
    nodes = {
        names: node
        for names, node in leaves_with_keys(tree, is_leaf=is_average_node)
        if is_average_node(node)
    }
    if name is None:
        return nodes
    exact = {names: node for names, node in nodes.items() if "/".join(names) == name}
    return exact or {names: node for names, node in nodes.items() if name in names}


def refuse_unknown_name(function: str, state: Any, name: str | None) -> None:
    """Raises if the state holds averages, but none of the name."""
    if name is not None and (nodes := average_nodes(state)):
        there = ", ".join(repr("/".join(names)) for names in nodes)
        raise ValueError(
            f"{function}: no average under the name {name!r}; there are {there}."
        )


def refuse_crossed_swap(function: str, state: Any, node: Any) -> None:
    """Raises if another average of the state is swapped than the given one.

    The parameters would go from one average's slot to the other's, and be lost.
    """
    for names, other in average_nodes(state).items():
        if other is not node and isinstance(as_state(other), SwappedState):
            raise ValueError(
                f"{function}: the average at {'/'.join(names)} is swapped: it stands in "
                f"the parameters' place. Swap it back first, with name={names[-1]!r}."
            )


def is_average_node(node: Any) -> bool:
    return as_state(node) is not None


def as_state(node: Any) -> Any:
    """The state in a node, or None if there is none.

    The node may be a mapping: `nnx.state`, and a restore without a target, keep of a
    NamedTuple the names of its fields alone.
    """
    if isinstance(node, (AverageState, SwappedState)):
        return node
    if isinstance(node, Mapping):
        for kind in (AverageState, SwappedState):
            if {kind._fields[0], "pending"} <= set(node) <= set(kind._fields):
                return kind(*map(node.get, kind._fields))
    return None


def exchanged(node: Any, average: Any) -> Any:
    """The node with another average in it, marked as swapped if it was not, and back."""
    state = as_state(node)
    kind = SwappedState if isinstance(state, AverageState) else AverageState
    return in_place_of(node, kind(*state[:-1], average=average))


def in_place_of(node: Any, state: Any) -> Any:
    """The state in the kind of container that the node is."""
    if not isinstance(node, Mapping):
        return state
    container: Any = type(node)
    return container({k: v for k, v in state._asdict().items() if v is not None})


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _replace(opt_state: Any, old: Any, new: Any) -> Any:
    return jax.tree.map(
        lambda node: new if node is old else node,
        opt_state,
        is_leaf=lambda node: node is old,
    )


def _paired(function: str, average: Any, params: Any) -> tuple[dict, dict]:
    """The leaves of the average and of the parameters by name, checked to belong."""
    averages, raw = dict(leaves_with_keys(average)), dict(leaves_with_keys(params))
    if missing := averages.keys() - raw.keys():
        raise ValueError(_other_params(function, missing))
    for names, leaf in averages.items():
        if np.shape(leaf) != np.shape(raw[names]):
            raise ValueError(
                f"{function}: {'/'.join(names) or 'the leaf'} has shape "
                f"{np.shape(raw[names])}, its average {np.shape(leaf)}."
            )
    return averages, raw


def _map_with_keys(f: Any, tree: Any) -> Any:
    leaves = [f(keys, leaf) for keys, leaf in leaves_with_keys(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _other_params(function: str, missing: Any) -> str:
    names = ", ".join(sorted("/".join(keys) for keys in missing))
    return (
        f"{function}: the average is of other parameters than the ones given: it holds "
        f"{names}, which they lack."
    )
