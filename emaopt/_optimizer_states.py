"""Optimizer states in a training state: told by types, fields and names of keys."""

import re
from collections.abc import Mapping

from emaopt._names import Names, leaves_with_keys, outermost, path_leaves
from emaopt._nodes import (
    as_state,
    average_nodes,
    center_nodes,
    field_of,
    is_average_node,
    is_primal_node,
)
from emaopt._types import PyTree

# A key above an optimizer's state: "opt", "opt_state", "actor_optimizer".
_KEY = re.compile(r"(^|_)opt(im|imizers?)?(_|s?$)")


class Tree:
    """A state, with its leaves by name."""

    def __init__(self, state: PyTree) -> None:
        self.state = state
        self.leaves = leaves_with_keys(state)
        self.position = {names: i for i, (names, _) in enumerate(self.leaves)}
        self.stacked = bool(center_nodes(state))
        self.averages = average_nodes(state) | center_nodes(state)
        self._children: dict[Names, dict[str, PyTree]] = {}  # of nodes, by their names

    def within(self, inside: Names) -> dict[Names, int]:
        """The positions of the leaves below a name, by the rest of their names."""
        length = len(inside)
        return {
            names[length:]: i
            for names, i in self.position.items()
            if names[:length] == inside
        }

    def node(self, names: Names) -> PyTree:
        """The node at these names, or None if there is none."""
        if not names:
            return self.state
        if names[:-1] not in self._children:
            node = self.node(names[:-1])
            # Stops at each child. A node that is a leaf comes back itself, without a way.
            children = path_leaves(node, is_leaf=lambda child: child is not node)
            self._children[names[:-1]] = {way[0]: child for way, child in children if way}
        return self._children[names[:-1]].get(names[-1])


def optimizer_roots(state: PyTree, *, typed: bool) -> list[Names]:
    """The names that lead to the optimizer states in a tree, one for each network.

    `typed` is False where types are lost, as on disk. There a state is found by its key
    or its average, and a list may have been the tuple of a chain.
    """
    tree = Tree(state)

    # A list that has kept its type is no chain: each member is a state of its own.
    def is_list(way: Names) -> bool:
        node = tree.node(way)
        return typed and isinstance(node, list) and all(map(_is_state, node))

    found = {average[: optimizer_root(tree, average)] for average in tree.averages}
    found = {way for way in found if not is_list(way)}
    ways = {names[:i] for names in tree.position for i in range(len(names) + 1)}
    for way in ways:
        node = tree.node(way)
        named = bool(way and _KEY.search(way[-1]))
        if named and is_list(way):
            found |= {(*way, str(i)) for i in range(len(node))}
        elif named or _is_state(node):
            found.add(way)
    return outermost(found)


def optimizer_root(tree: Tree, average: Names, above: int = 0) -> int:
    """How many of the average's names lead to the optimizer state that holds it.

    All of them, if nothing on the way shows an optimizer's state. The first `above` nodes
    on the way are no chains.
    """
    for i in range(len(average)):
        key, node = average[i - 1] if i else "", tree.node(average[:i])
        if "opt_state" in key or is_optimizers(node):
            return i
        if i >= above and _is_chain(node, average[i]):
            return i
    return len(average)


def is_optimizer_state(tree: Tree, average: Names) -> bool:
    """Whether the node that holds the average is by itself a whole optimizer state."""
    is_center = field_of(tree.averages[average]) == "center"
    return is_center or "opt_state" in "".join(average[-1:])


def is_optimizers(node: object) -> bool:
    """Whether a node is a state of Optax or emaopt, by its type or its fields."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node).__module__.split(".")[0] in ("optax", "emaopt")
    if isinstance(node, Mapping):  # `nnx.state`, or a restore without a target
        if set(node) in ({"primal"}, {"primal", "largest"}):  # of `schedule_free`
            return is_primal_node(node["primal"])
        is_averaged = {"inner_state", "averaging"} == set(node)
        return is_averaged or is_primal_node(node) or as_state(node) is not None
    return False


def _is_chain(node: PyTree, towards: str) -> bool:
    """Whether a node is a chain's state: all members are states, or one is an average's.

    `average_params` has no use but in a chain. Local updates are whole optimizers, so a
    tuple of something and their state may be a training state.
    """
    if is_sequence(node) and is_average_node(node[int(towards)]):
        return True
    return _is_state(node)


def is_sequence(node: object) -> bool:
    """Whether a node is a list or a tuple without field names."""
    return isinstance(node, (list, tuple)) and not hasattr(node, "_fields")


def _is_state(node: PyTree) -> bool:
    """Whether a node is a state of an optimizer, or a container of such states only."""
    if is_optimizers(node):
        return True
    if is_sequence(node):
        return all(map(_is_state, node))
    return isinstance(node, dict) and bool(node) and all(map(_is_state, node.values()))
