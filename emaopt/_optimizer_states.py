"""Optimizer states in a training state: told by types, fields and names of keys."""

import re
from collections.abc import Mapping
from typing import Any

from emaopt._names import Names, leaves_with_keys, path_leaves
from emaopt._nodes import (
    as_state,
    average_nodes,
    center_nodes,
    field_of,
    is_average_node,
)

# A key above an optimizer's state: "opt", "opt_state", "actor_optimizer".
_KEY = re.compile(r"(^|_)opt(im|imizers?)?(_|s?$)")


class Tree:
    """A state, with its leaves by name."""

    def __init__(self, state: Any):
        self.state = state
        self.leaves = leaves_with_keys(state)
        self.position = {names: i for i, (names, _) in enumerate(self.leaves)}
        self.stacked = bool(center_nodes(state))
        self.averages = average_nodes(state) | center_nodes(state)
        self._children: dict[Names, dict[str, Any]] = {}  # of nodes, by their names

    def within(self, inside: Names) -> dict[Names, int]:
        """The positions of the leaves below a name, by the rest of their names."""
        length = len(inside)
        return {
            names[length:]: i
            for names, i in self.position.items()
            if names[:length] == inside
        }

    def node(self, names: Names) -> Any:
        """What stands at a name, None where nothing does."""
        if not names:
            return self.state
        if names[:-1] not in self._children:
            node = self.node(names[:-1])
            children = path_leaves(node, is_leaf=lambda child: child is not node)
            self._children[names[:-1]] = {way[0]: child for way, child in children if way}
        return self._children[names[:-1]].get(names[-1])


def optimizer_roots(state: Any, *, typed: bool) -> list[Names]:
    """The names that lead to the optimizer states in a tree, to each network's own.

    Where types are lost, as on disk, a state is found by its key or its average, and what
    is a list may have been a chain's tuple.
    """
    tree = Tree(state)

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
    outermost = [w for w in found if not any(w[:i] in found for i in range(len(w)))]
    return sorted(outermost)


def optimizer_root(tree: Tree, average: Names) -> int:
    """How many names lead to the optimizer state that holds the average.

    All of them, if nothing on the way shows that it belongs to an optimizer.
    """
    for i in range(len(average)):
        key, node = average[i - 1] if i else "", tree.node(average[:i])
        if "opt_state" in key or is_optimizers(node) or _is_chain(node, average[i]):
            return i
    return len(average)


def is_optimizer_state(tree: Tree, average: Names) -> bool:
    """Whether what holds the average is by itself all of an optimizer's state."""
    is_center = field_of(tree.averages[average]) == "center"
    return is_center or "opt_state" in "".join(average[-1:])


def is_optimizers(node: Any) -> bool:
    """Whether a node is a state of Optax's or ours, by its type or its fields."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node).__module__.split(".")[0] in ("optax", "emaopt")
    if isinstance(node, Mapping):  # `nnx.state`, or a restore without a target
        return {"inner_state", "averaging"} == set(node) or as_state(node) is not None
    return False


def _is_chain(node: Any, towards: str) -> bool:
    """Whether a node is the state of a chain: of states only, or a tuple of an average's.

    `average_params` has no use but as a member of a chain. Local updates have: a tuple of
    something and their state is a training state.
    """
    if is_sequence(node) and is_average_node(node[int(towards)]):
        return True
    return _is_state(node)


def is_sequence(node: Any) -> bool:
    return isinstance(node, (list, tuple)) and not hasattr(node, "_fields")


def _is_state(node: Any) -> bool:
    if is_optimizers(node):
        return True
    if is_sequence(node):
        return all(map(_is_state, node))
    return isinstance(node, dict) and bool(node) and all(map(_is_state, node.values()))
