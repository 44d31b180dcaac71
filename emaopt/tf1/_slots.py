"""The slots of any optimizer state: the trees in it that are like the parameters."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from emaopt._checks import check_state, check_text
from emaopt._leaves import is_masked
from emaopt._names import key_name, leaves_with_keys, named_leaves
from emaopt._nodes import center_nodes, fits


def get_slot_names(opt_state: Any, params: Any) -> list[str]:
    """Returns the names of the slots in an optimizer's state, sorted.

    A slot is a tree in the state that has the parameters' containers, names and shapes:
    "mu" and "nu" of Adam, "trace" of momentum, "average" of `average_params`, "center" of
    local updates. Masked parameters may be missing.

    Args:
      opt_state: The state of any Optax optimizer, however deep its wrappers, or an
        `nnx.Optimizer`.
      params: The parameters; of an NNX model, `nnx.state(model, nnx.Param)`.

    Returns:
      The last part of each slot's name, and the whole names, joined with "/", of those
      that share theirs with others.

    Raises:
      ValueError: If there are no parameters.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.zeros(2)}
      >>> get_slot_names(optax.adam(1e-3).init(params), params)
      ['mu', 'nu']
    """
    check_state("get_slot_names", "opt_state", opt_state)
    slots = _slots("get_slot_names", opt_state, params)
    short = [keys[-1] for keys in slots]
    return sorted(
        keys[-1] if short.count(keys[-1]) == 1 else "/".join(keys) for keys in slots
    )


def get_slot(opt_state: Any, params: Any, name: str) -> Any:
    """Reads a slot out of an optimizer's state.

    Args:
      opt_state: The state of any Optax optimizer, however deep its wrappers, or an
        `nnx.Optimizer`.
      params: The parameters; of an NNX model, `nnx.state(model, nnx.Param)`.
      name: The slot's name, such as "mu", or more of it, such as "0/mu".

    Returns:
      A tree like the parameters. Leaves may be the state's own arrays: copy before
      donating the state.

    Raises:
      ValueError: If there is no such slot, or several; the message lists them.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.zeros(2)}
      >>> state = optax.sgd(1.0, momentum=0.9).init(params)
      >>> print(get_slot(state, params, "trace"))
      {'w': Array([0., 0.], dtype=float32)}
    """
    check_state("get_slot", "opt_state", opt_state)
    check_text("get_slot", "name", name)
    slots = _slots("get_slot", opt_state, params)
    wanted = tuple(name.split("/"))
    found = {k: v for k, v in slots.items() if k == wanted}
    found = found or {k: v for k, v in slots.items() if k[-len(wanted) :] == wanted}
    found = found or {k: v for k, v in slots.items() if name in k}
    if len(found) != 1:
        what = "several slots" if found else "no slot"
        there = ", ".join("/".join(keys) for keys in found or slots) or "none"
        raise ValueError(f"get_slot: {what} {name!r} in this state; there are {there}.")
    return _like(params, found.popitem()[1])


def variables(opt_state: Any) -> dict[str, Any]:
    """Returns all arrays of an optimizer's state by name.

    Args:
      opt_state: The state of any Optax optimizer.

    Returns:
      {name: array}, sorted by name; names are the keys on the way, joined with "/".

    Raises:
      ValueError: If two arrays have one name, because a key has a "/" in it.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> list(variables(optax.adam(1e-3).init({"w": jnp.zeros(2)})))
      ['0/count', '0/mu/w', '0/nu/w']
    """
    check_state("variables", "opt_state", opt_state)
    named = [("/".join(keys), leaf) for keys, leaf in named_leaves(opt_state)]
    counts = Counter(name for name, _ in named)
    if twice := sorted(name for name in counts if counts[name] > 1):
        raise ValueError(
            f'variables: several arrays are called {", ".join(twice)}; keys with a "/" '
            "in them make names that are not their own."
        )
    return dict(sorted(named, key=lambda pair: pair[0]))


def marked(opt_state: Any, params: Any, marks: list[Any], default: Any) -> Any:
    """A tree like the state: each leaf of a slot replaced by its parameter's mark.

    Args:
      opt_state: The state of any Optax optimizer.
      params: The parameters.
      marks: What marks each parameter, in flattening order.
      default: What takes the place of all other leaves.
    """
    by_position = _positions(params)
    is_slot = _slot_test(opt_state, params)

    def mark(node):
        if not is_slot(node):
            return default
        return jax.tree.map(
            lambda part, at: part if is_masked(part) else marks[at],
            node,
            by_position,
            is_leaf=is_masked,
        )

    return jax.tree.map(mark, opt_state, is_leaf=is_slot)


def _slots(function: str, opt_state: Any, params: Any) -> dict[tuple[str, ...], Any]:
    if not jax.tree.leaves(params):
        raise ValueError(f"{function}: there are no parameters.")
    opt_state, params = _bare(opt_state), _bare(params)
    is_slot = _slot_test(opt_state, params)
    found = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_slot)[0]
    return {
        tuple(key_name(key) for key in path): node
        for path, node in found
        if path and is_slot(node)
    }


def _bare(tree: Any) -> Any:
    """The tree with arrays in dicts where Flax has variables in states.

    A slot in an `nnx.Optimizer` holds other variables than the parameters' own.
    """
    nnx = sys.modules.get("flax.nnx")  # who has a variable has imported it
    if nnx is None:
        return tree

    def is_flax(node):
        return isinstance(node, (nnx.State, nnx.Variable))

    def bare(node):
        if isinstance(node, nnx.State):
            return nnx.to_pure_dict(node)
        return jax.tree.leaves(node)[0] if isinstance(node, nnx.Variable) else node

    if not any(map(is_flax, jax.tree.leaves(tree, is_leaf=is_flax))):
        return tree
    return jax.tree.map(bare, tree, is_leaf=is_flax)


def _like(params: Any, slot: Any) -> Any:
    """A bare slot with the parameters' own containers, if it lacks none of them."""
    leaves, wanted = dict(leaves_with_keys(slot)), leaves_with_keys(params)
    if _bare(params) is params or any(names not in leaves for names, _ in wanted):
        return slot
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, [leaves[names] for names, _ in wanted])


def _slot_test(opt_state: Any, params: Any) -> Callable[[Any], bool]:
    """Tells whether a node of the state is like the parameters."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    by_position = _positions(params)
    names = [key for keys, _ in leaves_with_keys(params) for key in keys]
    named = bool(names) and not all(name.isdigit() for name in names)
    bare = isinstance(by_position, int)
    stacked = bool(center_nodes(opt_state))

    def is_slot(node):
        arrays: list[tuple[Any, Any]] = []

        def collect(part, at):
            if not is_masked(part):
                arrays.append((part, at))

        try:  # masks may be a prefix of the parameters
            jax.tree.map(collect, node, by_position, is_leaf=is_masked)
        except (ValueError, TypeError):
            return False
        if not all(isinstance(at, int) and hasattr(x, "shape") for x, at in arrays):
            return False
        # Containers tell enough, but for a bare array: a slot may have a part of each
        # parameter, or several. Positions alone would fit a tuple of counters too.
        return bool(arrays) and all(
            named
            or (not bare and len(x.shape) > 0)
            or (fits(x.shape, shapes[at]) if stacked else x.shape == shapes[at])
            for x, at in arrays
        )

    return is_slot


def _positions(params: Any) -> Any:
    """A tree like the parameters of their positions in flattening order."""
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, range(treedef.num_leaves))
