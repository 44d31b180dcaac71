"""The slots of an optimizer state: the trees in it that are like the parameters."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np

from emaopt._checks import check_text
from emaopt._leaves import is_masked
from emaopt._names import Names, key_name, leaves_with_keys, named_leaves
from emaopt._nodes import as_state, average_nodes, center_nodes, fits
from emaopt._tree_checks import check_state
from emaopt._types import Leaf, PyTree

T = TypeVar("T")


def get_slot_names(opt_state: PyTree, params: PyTree) -> list[str]:
    """Returns the names of the slots in an optimizer's state, sorted.

    A slot is a tree in the state that has the parameters' containers, names and shapes:
    "mu" and "nu" of Adam, "trace" of momentum, "average" of `average_params`, "center" of
    local updates. Masked parameters may be missing.

    Args:
      opt_state: The state of any Optax optimizer, however deep its wrappers, or an
        `nnx.Optimizer`.
      params: The parameters; of an NNX model, `nnx.state(model, nnx.Param)`.

    Returns:
      The last part of each slot's name; for slots that share it, their whole names,
      joined with "/".

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


def get_slot(opt_state: PyTree, params: PyTree, name: str) -> PyTree:
    """Reads a slot from an optimizer's state.

    Args:
      opt_state: The state of any Optax optimizer, however deep its wrappers, or an
        `nnx.Optimizer`.
      params: The parameters; of an NNX model, `nnx.state(model, nnx.Param)`.
      name: The slot's name, such as "mu", or a longer end of it, such as "0/mu".

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
    # The whole name comes first, then an end of it, then any key in it.
    wanted = tuple(name.split("/"))
    found = {k: v for k, v in slots.items() if k == wanted}
    found = found or {k: v for k, v in slots.items() if k[-len(wanted) :] == wanted}
    found = found or {k: v for k, v in slots.items() if name in k}
    if len(found) != 1:
        what = "several slots" if found else "no slot"
        there = ", ".join("/".join(keys) for keys in found or slots) or "none"
        raise ValueError(f"get_slot: {what} {name!r} in this state; there are {there}.")
    return _like(params, found.popitem()[1])


def variables(opt_state: PyTree) -> dict[str, Leaf]:
    """Returns all arrays of an optimizer's state by name.

    Args:
      opt_state: The state of any Optax optimizer.

    Returns:
      {name: array}, sorted by name; a name is the keys that lead to the array, joined
      with "/".

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


def marked(opt_state: PyTree, params: PyTree, marks: Sequence[T], default: T) -> PyTree:
    """A tree like the state, with the mark of its parameter at each leaf of a slot.

    Args:
      opt_state: The state of any Optax optimizer.
      params: The parameters.
      marks: The mark of each parameter, in flattening order.
      default: The mark of all other leaves.
    """
    by_position = _positions(params)
    is_slot = _slot_test(opt_state, params)

    def mark(node: PyTree) -> PyTree:
        if not is_slot(node):
            return default
        return jax.tree.map(
            lambda part, at: part if is_masked(part) else marks[at],
            node,
            by_position,
            is_leaf=is_masked,
        )

    return jax.tree.map(mark, opt_state, is_leaf=is_slot)


def _slots(function: str, opt_state: PyTree, params: PyTree) -> dict[Names, PyTree]:
    """All slots by name."""
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


def _bare(tree: PyTree) -> PyTree:
    """The tree with dicts and arrays in place of Flax's states and variables.

    A slot in an `nnx.Optimizer` holds variables of another type than the parameters.
    """
    # Whoever has a variable has imported its module; emaopt does not import Flax.
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree

    def is_flax(node: object) -> bool:
        return isinstance(node, (nnx.State, nnx.Variable))

    def bare(node: PyTree) -> PyTree:
        if isinstance(node, nnx.State):
            return nnx.to_pure_dict(node)
        return jax.tree.leaves(node)[0] if isinstance(node, nnx.Variable) else node

    # Without any, the tree itself is returned: `_like` tells this case by `is`.
    if not any(map(is_flax, jax.tree.leaves(tree, is_leaf=is_flax))):
        return tree
    return jax.tree.map(bare, tree, is_leaf=is_flax)


def _like(params: PyTree, slot: PyTree) -> PyTree:
    """A bare slot in the parameters' own containers, if it has a leaf for each."""
    leaves, wanted = dict(leaves_with_keys(slot)), leaves_with_keys(params)
    if _bare(params) is params or any(names not in leaves for names, _ in wanted):
        return slot
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, [leaves[names] for names, _ in wanted])


def _slot_test(opt_state: PyTree, params: PyTree) -> Callable[[PyTree], bool]:
    """A function that tells whether a node of the state is like the parameters."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    by_position = _positions(params)
    names = [key for keys, _ in leaves_with_keys(params) for key in keys]
    named = bool(names) and not all(name.isdigit() for name in names)
    bare = isinstance(by_position, int)
    # In local updates each worker has its own slots: [W, ...] for a parameter [...].
    stacked = bool(center_nodes(opt_state))
    # The time of an average is no slot, though a parameter may have its name.
    times = [as_state(node).elapsed for node in average_nodes(opt_state).values()]
    times += jax.tree.leaves(times)

    def is_slot(node: PyTree) -> bool:
        if node is not None and any(node is time for time in times):
            return False
        arrays: list[tuple[Leaf, Leaf]] = []

        def collect(part: Leaf, at: Leaf) -> None:
            if not is_masked(part):
                arrays.append((part, at))

        # A part of the node may be one MaskedNode for several parameters: `at` is a tree
        # then, and the part is left out.
        try:
            jax.tree.map(collect, node, by_position, is_leaf=is_masked)
        except (ValueError, TypeError):
            return False
        if not all(isinstance(at, int) and hasattr(x, "shape") for x, at in arrays):
            return False
        # Equal containers are enough if they have names: a slot may hold a part of each
        # parameter, as Adafactor's do, or several copies, as those of L-BFGS. Containers
        # without names also fit a tuple of counters, and a bare array fits any array:
        # these must have axes, or the parameters' shapes.
        return bool(arrays) and all(
            named
            or (not bare and len(x.shape) > 0)
            or (fits(x.shape, shapes[at]) if stacked else x.shape == shapes[at])
            for x, at in arrays
        )

    return is_slot


def _positions(params: PyTree) -> PyTree:
    """The position of each parameter in flattening order, as a tree like them."""
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, range(treedef.num_leaves))
