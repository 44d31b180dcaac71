"""The averages and centers in any tree: what holds one, under which name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from emaopt._names import Names, Unknown, leaves_with_keys
from emaopt._states import AVERAGE, CENTER, KINDS, PrimalAveragingState
from emaopt._types import PyTree

# The fields in which wrappers of Optax and of emaopt keep the states of others.
WRAPPERS = {
    "adv_state",
    "averaging",
    "base_optimizer_state",
    "fast_state",
    "inner_opt_state",
    "inner_state",
    "inner_states",
    "opt_state",
    "primal",
}

_STATES = tuple(one for kind in KINDS for one in (kind.state, kind.swapped))


def average_nodes(tree: PyTree, name: str | None = None) -> dict[Names, PyTree]:
    """All nodes that hold an average, by the names that lead to them.

    With `name`, the node with exactly these keys, joined with "/". If there is none, all
    nodes whose keys begin with these, or hold `name` as one key.
    """
    return _named(_nodes(tree, is_average_node), name)


def center_nodes(tree: PyTree, name: str | None = None) -> dict[Names, PyTree]:
    """All nodes that hold a center; the name "center" is that of all of them."""
    nodes = _nodes(tree, is_center_node)
    return nodes if name == "center" else _named(nodes, name)


def served_nodes(tree: PyTree, name: str | None = None) -> dict[Names, PyTree]:
    """The averages of that name, or the centers if there are none.

    Averages go first: the outer optimizer of local updates may average the center.
    """
    return average_nodes(tree, name) or center_nodes(tree, name)


def swapped_nodes(tree: PyTree) -> dict[Names, PyTree]:
    """The nodes that `swap` has exchanged: they hold the raw parameters."""
    nodes = center_nodes(tree) | average_nodes(tree)
    return {names: node for names, node in nodes.items() if is_swapped(node)}


def primal_nodes(tree: PyTree) -> dict[Names, PyTree]:
    """The states of `primal_averaging`, by the names that lead to them."""
    return _nodes(tree, is_primal_node)


def is_primal_node(node: object) -> bool:
    """Whether a node is the state of a primal averaging, by its type or its fields."""
    if isinstance(node, Mapping):  # fields without leaves may be missing
        fields, there = set(PrimalAveragingState._fields), set(node)
        return {"averaging"} < there <= fields and is_average_node(node["averaging"])
    return isinstance(node, PrimalAveragingState)


def views_of(nodes: Iterable[Names]) -> dict[str, Names]:
    """A short name for each node: what the user calls it, or what kind it is.

    Without the wrappers and positions on the way, which nobody chose; all of the way
    where that leaves two alike.
    """
    nodes, passed = list(nodes), WRAPPERS | {"outer_state"}
    own = [[n for n in way if n not in passed and not n.isdigit()] for way in nodes]
    short = [names[-1] if names else AVERAGE.field for names in own]
    return {
        name if short.count(name) == 1 else "/".join(way): way
        for name, way in zip(short, nodes, strict=True)
    }


def is_average_node(node: object) -> bool:
    return isinstance(as_state(node), (AVERAGE.state, AVERAGE.swapped))


def is_center_node(node: object) -> bool:
    return isinstance(as_state(node), (CENTER.state, CENTER.swapped))


def is_swapped(node: object) -> bool:
    return isinstance(as_state(node), (AVERAGE.swapped, CENTER.swapped))


def as_state(node: object) -> PyTree:
    """The state in a node, or None if there is none.

    The node may be a mapping: `nnx.state`, and a restore without a target, keep only the
    field names of a NamedTuple.
    """
    if isinstance(node, _STATES):
        return node
    if isinstance(node, Mapping):
        for kind in KINDS:
            for state in (kind.state, kind.swapped):
                # Fields that are None may be missing. The first and the mark never are.
                if {state._fields[0], kind.mark} <= set(node) <= set(state._fields):
                    return state(*map(node.get, state._fields))
    return None


def field_of(node: PyTree) -> str:
    """The field of a node that readers are served: "average" or "center"."""
    return as_state(node)._fields[-1]


def counter_of(field: str, swapped: bool) -> str:
    """The first field of a state that holds `field`; its name shows a swapped state."""
    kind = next(kind for kind in KINDS if kind.field == field)
    return (kind.swapped if swapped else kind.state)._fields[0]


def beside_of(node: PyTree) -> PyTree:
    """The raw values of what is served beside an average, by name; None if nothing is."""
    state = as_state(node)
    return state.beside if is_swapped(state) else None


def exchanged(node: PyTree, content: PyTree) -> PyTree:
    """The node with another content: marked as swapped if it was not, else unmarked."""
    state = as_state(node)
    for kind in KINDS:
        if isinstance(state, (kind.state, kind.swapped)):
            other = kind.swapped if isinstance(state, kind.state) else kind.state
            fields = dict.fromkeys(other._fields) | state._asdict()
            fields |= {other._fields[0]: state[0], kind.field: content}
            made = other(**{field: fields[field] for field in other._fields})
            return in_place_of(node, made)
    raise AssertionError(node)


def changed(
    tree: PyTree, names: Names, field: str, change: Callable[[PyTree], PyTree]
) -> PyTree:
    """The tree with the node of an average or a center at these names changed."""
    is_node = is_center_node if field == CENTER.field else is_average_node
    nodes = leaves_with_keys(tree, is_leaf=is_node)
    treedef = jax.tree.structure(tree, is_leaf=is_node)
    made = [change(node) if way == names else node for way, node in nodes]
    return jax.tree.unflatten(treedef, made)


def in_place_of(node: PyTree, state: PyTree) -> PyTree:
    """The state in the kind of container that the node is."""
    if not isinstance(node, Mapping):
        return state
    container: Any = type(node)
    # A None stays where the node has it, so that swapping twice gives the tree back.
    fields = state._asdict().items()
    return container({k: v for k, v in fields if v is not None or k in node})


def replace(tree: PyTree, old: PyTree, new: PyTree) -> PyTree:
    """The tree with one node replaced by another."""
    # By identity: the tree may hold several equal nodes, and arrays have no truth value.
    return jax.tree.map(
        lambda node: new if node is old else node,
        tree,
        is_leaf=lambda node: node is old,
    )


def only_node(
    function: str, nodes: dict[Names, PyTree], what: str, otherwise: str
) -> tuple[Names, PyTree]:
    """The only node, with its names, or an error that says which there are."""
    if not nodes:
        raise ValueError(f"{function}: no {what} in this optimizer state. {otherwise}")
    if len(nodes) > 1:
        where = ", ".join(repr("/".join(names)) for names in nodes)
        raise ValueError(
            f"{function}: several {what}s in this optimizer state, at {where}. Say "
            "which with name=, one of these or a key on its way; optax.named_chain gives "
            "them names."
        )
    ((names, node),) = nodes.items()
    if type(node) is dict and isinstance(as_state(node)[1], (jax.Array, np.ndarray)):
        raise ValueError(
            f"{function}: at {'/'.join(names) or 'the root'} stands a plain dict, as a "
            "restore without a target gives it. Use emaopt.checkpoint.restore(path, "
            "target) to resume training, or emaopt.checkpoint.load_averaged(path) for "
            f"the {what}."
        )
    return names, node


def refuse_unknown_name(function: str, state: PyTree, name: str | None) -> None:
    """Raises if the state holds averages or centers, but none of that name."""
    if name is not None and (nodes := average_nodes(state) | center_nodes(state)):
        there = ", ".join(repr("/".join(names)) for names in nodes)
        raise Unknown(
            f"{function}: no average under the name {name!r}; there are {there}.", "name"
        )


def refuse_crossed_swap(function: str, state: PyTree, nodes: Iterable[PyTree]) -> None:
    """Raises if a node of the state is swapped that is none of the given ones.

    Its average is in the parameters' place, and would go into another node's slot as if
    it were the raw parameters.
    """
    nodes = list(nodes)
    for names, other in swapped_nodes(state).items():
        if not any(other is node for node in nodes):
            raise ValueError(
                f"{function}: the {field_of(other)} at {'/'.join(names)} is swapped: it "
                "stands in the parameters' place. Swap it back first, with "
                f"name={'/'.join(names)!r}."
            )


def fits(content: Sequence[int], param: Sequence[int]) -> bool:
    """Whether two shapes are equal, but for a leading axis of workers in one of them."""
    short, long = sorted((tuple(content), tuple(param)), key=len)
    return short in (long, long[1:])


def _nodes(tree: PyTree, is_node: Callable[[object], bool]) -> dict[Names, PyTree]:
    nodes = leaves_with_keys(tree, is_leaf=is_node)
    return {names: node for names, node in nodes if is_node(node)}


def _named(nodes: dict[Names, PyTree], name: str | None) -> dict[Names, PyTree]:
    if name is None:
        return nodes
    # The whole name first: it may also be the beginning of another's, in nested states.
    exact = {names: node for names, node in nodes.items() if "/".join(names) == name}
    return exact or {
        names: node
        for names, node in nodes.items()
        if name in names or "/".join(names).startswith(f"{name}/")
    }
