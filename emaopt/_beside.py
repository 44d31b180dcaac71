"""What is served with an average though it is none, such as BatchNorm's statistics.

It stands in its own place, as the average does in that of the parameters. The raw values
are in the field `beside` of the average's state, under the names that they have in the
training state: <average>/beside/batch_stats/mean. So the tree itself says where they go.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from emaopt._checks import check_mapping
from emaopt._leaves import kind_of
from emaopt._names import (
    Names,
    is_below,
    joined,
    leaves_with_keys,
    nested,
    num_common,
    split,
)
from emaopt._nodes import (
    as_state,
    average_nodes,
    beside_of,
    center_nodes,
    changed,
    in_place_of,
)
from emaopt._optimizer_states import Tree, optimizer_root
from emaopt._places import Place, shape_of
from emaopt._states import BESIDE
from emaopt._types import Leaf, PyTree

Served = Mapping[str, PyTree] | None


def check_served(function: str, served: Any) -> None:
    """Raises unless an argument can say what else is served."""
    check_mapping(function, "served", served, optional=True)
    for key in served or ():
        if not isinstance(key, str) or not split(key):
            raise ValueError(
                f"{function}: served has the key {key!r}; its keys say where in the "
                "state the values are served, as in {'batch_stats': statistics}."
            )


def served_values(
    function: str, state: PyTree, places: Sequence[Place], served: Served
) -> dict[Names, Leaf]:
    """The values of `served` by their names in the state, or an error.

    Args:
      state: The training state, swapped or not.
      places: Where its averages are.
      served: {keys joined with "/": a tree}; names below a key are those of the state, of
        all its leaves there or some.
    """
    values: dict[Names, Leaf] = {}
    if not served:
        return values
    tree = Tree(state)
    for place in places:
        if beside_of(tree.averages[place.average]):
            raise ValueError(
                f"{function}: the state is swapped, and serves other values beside the "
                f"average at {joined(place.average)} already. Swap it back first."
            )
    taken = {i for place in places for i, _ in place.pairs}
    roots = {names: _root(tree, names, places) for names in tree.averages}

    def in_optimizer(names: Names) -> bool:
        return any(num_common(names, n) >= root for n, root in roots.items())

    for key, given in served.items():
        way = split(key)
        for names, value in leaves_below(way, given, tree.position):
            where = f"{function}: served[{key!r}]: {joined(names)}"
            if names not in tree.position:
                others = [n for n in tree.position if not in_optimizer(n)]
                raise ValueError(
                    f"{where} is not in the state{_there(others, way, names)}"
                )
            if names in values:
                raise ValueError(f"{where} is given under another key, too.")
            if in_optimizer(names):
                raise ValueError(
                    f"{where} belongs to the optimizer's state, which no reader is "
                    "served."
                )
            if tree.position[names] in taken:
                raise ValueError(f"{where} is averaged: its average is served there.")
            own = tree.leaves[tree.position[names]][1]
            # A center's statistics may do without the axis of workers.
            here, there = shape_of(value), shape_of(own)
            alike = here == there or (
                tree.stacked and None not in (here, there) and here == there[1:]
            )
            if not alike or kind_of(value) != kind_of(own):
                raise ValueError(
                    f"{where} is {kind_of(value)} of shape {here}, in the state "
                    f"{kind_of(own)} of shape {there}."
                )
            values[names] = value
    return values


def leaves_below(
    way: Names, tree: PyTree, present: Container[Names]
) -> Iterator[tuple[Names, Leaf]]:
    """The leaves of a tree that stands at `way`, by their names among those present.

    A leaf that is alone under "value" goes without that name. What is given may be alone
    where the leaf that is present is not, and the other way round.
    """
    for rest, leaf in leaves_with_keys({"": tree}):
        yield as_present(way + rest[1:], present), leaf


def as_present(names: Names, present: Container[Names]) -> Names:
    """The names by which a leaf is present: with or without a last "value"."""
    others = [names, (*names, "value")] + [names[:-1]] * (names[-1:] == ("value",))
    return next((n for n in others if n in present), names)


def whole_trees(chosen: Iterable[Names], present: Iterable[Names]) -> set[Names]:
    """The names of the trees, as large as can be, of whose leaves all are chosen."""

    def ways(names: Names) -> list[Names]:
        return [names[:i] for i in range(1, len(names) + 1)]

    chosen = [*chosen]
    there = Counter(way for names in present for way in ways(names))
    ours = Counter(way for names in chosen for way in ways(names))
    return {next(w for w in ways(names) if ours[w] == there[w]) for names in chosen}


def put(state: PyTree, place: Place, values: Mapping[Names, Leaf]) -> PyTree:
    """A swapped state that serves the values; its own stand beside the average."""
    if not values:
        return state
    leaves, treedef = leaves_with_keys(state), jax.tree.structure(state)
    # A "value" without a sibling would pass for a Flax variable, and lose its name.
    raw = {(*names[:-1], ""): None for names in values if names[-1] == "value"}
    raw |= {names: leaf for names, leaf in leaves if names in values}
    state = jax.tree.unflatten(treedef, [values.get(n, leaf) for n, leaf in leaves])

    def with_raw(node: PyTree) -> PyTree:
        return in_place_of(node, as_state(node)._replace(**{BESIDE: nested(raw)}))

    return changed(state, place.average, place.field, with_raw)


def names_beside(state: PyTree, average: Names) -> list[Names]:
    """The names of the leaves that are served beside an average."""
    node = (average_nodes(state) | center_nodes(state)).get(average)
    inside = leaves_with_keys({"": None if node is None else beside_of(node)})
    return [names[1:] for names, _ in inside]


def _root(tree: Tree, average: Names, places: Iterable[Place]) -> int:
    """How many of an average's names lead to the optimizer state that holds it."""
    # A tuple of the parameters and an average's state is no chain.
    apart = (num_common(place.params, average) + 1 for place in places if place.params)
    return optimizer_root(tree, average, above=max(apart, default=0))


def _there(present: Sequence[Names], way: Names, names: Names) -> str:
    """What may have been meant by a key, of a leaf that is not present, in words."""
    rest = names[len(way) :]
    # Where a leaf of that name stands below another key, or the key below others.
    alike = {n[: len(n) - len(rest)] for n in present if n[len(n) - len(rest) :] == rest}
    alike = alike if rest else {n for n in present if n[-len(way) :] == way}
    if alike:
        return f"; did you mean {' or '.join(sorted(map(joined, alike)))}?"
    depth = max((num_common(n, way) for n in present), default=0)
    near = {"/".join(n[: depth + 1]) for n in present if is_below(n, way[:depth])}
    return f"; there are {', '.join(sorted(near))}." if near else "."
