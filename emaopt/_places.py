"""Where in a training state the parameters of an average are.

Nothing is guessed. `params=` says where; without it, the parameters are the one tree
outside of the optimizer state that has the average's names and shapes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from emaopt._advice import advised
from emaopt._leaves import kind_of
from emaopt._names import Names, is_below, joined, num_common, split
from emaopt._nodes import (
    field_of,
    fits,
    is_swapped,
    refuse_crossed_swap,
    refuse_unknown_name,
    served_nodes,
)
from emaopt._optimizer_states import (
    Tree,
    is_optimizer_state,
    is_optimizers,
    is_sequence,
    optimizer_root,
)
from emaopt._states import BESIDE
from emaopt._types import Leaf, PyTree

Choice = str | Sequence[str] | None
Ways = str | Sequence[str] | Mapping[str, str] | None


class Place(NamedTuple):
    """Where in a state an average is, and the parameters that it averages."""

    params: Names  # names that lead to the parameters
    average: Names  # names that lead to the state that holds it
    field: str  # the field of that state: "average", or "center" of local updates
    swapped: bool
    pairs: list[tuple[int, int]]  # leaves to exchange, by their position in the tree
    beside: Sequence[tuple[int, int]] = ()  # the same of what else is served


def located(function: str, state: PyTree, name: Choice, params: Ways) -> list[Place]:
    """The averages of these names (or the only one), with the parameters of each."""
    check_choices(function, name, params)
    chosen = _chosen(function, state, name)
    refuse_crossed_swap(function, state, chosen.values())
    tree = Tree(state)
    given = _given(function, params, [*chosen], tree)
    places = [
        _place(function, tree, average, where, several=len(chosen) > 1)
        for average, where in zip(chosen, given, strict=True)
    ]
    if len({place.swapped for place in places}) > 1:
        now = ", ".join("/".join(p.average) for p in places if p.swapped)
        raise ValueError(
            f"{function}: of these averages some stand in the parameters' place, and the "
            f"others do not: {now}. Swap them back first, by their names alone."
        )
    # Averages may share a tree, as those of optax.partition do, but not a leaf of it.
    taken: dict[int, Place] = {}
    for place in places:
        for i, _ in place.pairs:
            if (other := taken.setdefault(i, place)) is not place:
                raise ValueError(
                    f"{function}: the averages at {'/'.join(other.average)} and "
                    f"{'/'.join(place.average)} are both of "
                    f"{'/'.join(tree.leaves[i][0])}; only one can stand in its place. "
                    "Say with name= which."
                )
    return places


def check_choices(function: str, name: object, params: object) -> None:
    """Raises unless the arguments can say which averages, and where their parameters are.

    A tuple of names means several averages; a dict maps averages to their parameters.
    """
    for argument, value in (("name", name), ("params", params)):
        if value is None or isinstance(value, str):
            continue
        parts = value
        if argument == "params" and isinstance(value, Mapping):
            parts = [part for pair in value.items() for part in pair]
        if not isinstance(parts, (list, tuple)) or not all(
            isinstance(part, str) for part in parts
        ):
            raise TypeError(
                f"{function}: {argument} must be a string, a tuple of strings"
                f"{', a dict of them' * (argument == 'params')} or None, got {value!r}."
            )


def placed(state: PyTree, average: Names, params: Names) -> Place:
    """The place of an average, from its names and those of its parameters."""
    tree = Tree(state)
    return _place("emaopt", tree, average, params)


def located_at(
    function: str,
    state: PyTree,
    average: Names,
    params: Ways = None,
    *,
    option: str = "params",
) -> Place:
    """The place of the average at these names; of several `params`, the one that fits.

    Errors name `option` as the argument that says where the parameters are.
    """
    if params is not None and not isinstance(params, (str, Mapping)):
        found = fitting(state, average, map(split, params))
        if len(found) == 1:
            return found[0]
        way = found[0].params if found else split(params[0] if params else None)
        raise ValueError(
            f"{function}: the average at {joined(average)} is of {len(found)} of "
            f"params={tuple(params)}; it must be of one. Say which, as params="
            f"{{{joined(average)!r}: {joined(way)!r}}}."
        )
    tree = Tree(state)
    (given,) = _given(function, params, [average], tree)
    return _place(function, tree, average, given, option=option)


def told_ways(params: Ways, average: Names) -> list[Names]:
    """The names that `params` gives for an average's parameters: none, one or several."""
    if isinstance(params, Mapping):
        told = {split(name): split(way) for name, way in params.items()}
        # The longest name decides: it says more of this average than one further up.
        name = max((n for n in told if is_below(average, n)), key=len, default=None)
        return [] if name is None else [told[name]]
    return [*map(split, [params] if isinstance(params, str) else params or ())]


def fitting(state: PyTree, average: Names, ways: Iterable[Names]) -> list[Place]:
    """The places for those of the ways that can lead to the average's parameters."""
    tree = Tree(state)
    averaged = tree.within((*average, field_of(tree.averages[average])))
    return [
        _place("emaopt", tree, average, way)
        for way in ways
        if way and _misfit(tree, averaged, way) is None
    ]


def has_namesake(state: PyTree, average: Names, way: Names) -> bool:
    """Whether another tree that fits shares a name with the average that `way` lacks."""
    tree = Tree(state)
    averaged = tree.within((*average, field_of(tree.averages[average])))
    root = optimizer_root(tree, average)
    return any(
        ({*average} & {*other}) - {*way}
        for other in _alike(tree, average, averaged)
        if not _is_slot(tree, other, average, root)
    )


def _chosen(function: str, state: PyTree, name: Choice) -> dict[Names, PyTree]:
    """The nodes of these names, one for each name."""
    names: list[str | None] = [name] if name is None or isinstance(name, str) else [*name]
    if not names:
        raise ValueError(f"{function}: name=() names no average.")
    chosen: dict[Names, PyTree] = {}
    for one in names:
        found = served_nodes(state, one)
        if not found:
            refuse_unknown_name(function, state, one)
            raise ValueError(
                f"{function}: no average in this state. Train with "
                "emaopt.average_params or emaopt.averaged and pass the parameters and "
                "the optimizer state together, as {'params': params, 'opt_state': "
                "opt_state}; a state that may have none: optional=True."
            )
        if len(found) > 1:
            under = f" under the name {one!r}" if one else ""
            all_names = tuple(map("/".join, found))
            raise ValueError(
                f"{function}: several averages in this state{under}, at "
                f"{', '.join(all_names)}. Say with name= (of handler_registry, if a "
                "CheckpointManager saves) which one goes under the parameters' names."
                f" If they are of different parameters, all may: name={all_names}."
            )
        if found.keys() <= chosen.keys():
            raise ValueError(f"{function}: name={name!r} names one average twice.")
        chosen |= found
    return chosen


def _given(
    function: str, params: Ways, averages: list[Names], tree: Tree
) -> list[Names | None]:
    """Where `params` says that the parameters of each average are, or None."""
    if params is None or isinstance(params, str):
        return [None if params is None else split(params)] * len(averages)
    if isinstance(params, Mapping):
        for name in map(split, params):
            if not any(is_below(average, name) for average in tree.averages):
                raise ValueError(
                    f"{function}: params={dict(params)}: {joined(name)!r} leads to no "
                    f"average; there are {_listed([*tree.averages])}."
                )
        told = [told_ways(params, average) for average in averages]
        return [ways[0] if ways else None for ways in told]
    if len(params) != len(averages):
        raise ValueError(
            f"{function}: params={tuple(params)} says of {len(params)} trees where they "
            f"stand, for {len(averages)} averages: give one for all, or one for each "
            "name."
        )
    return [split(way) for way in params]


def _place(
    function: str,
    tree: Tree,
    average: Names,
    given: Names | None,
    *,
    several: bool = False,
    option: str = "params",
) -> Place:
    """The place of an average: with parameters at `given`, or in the tree that fits."""
    node = tree.averages[average]
    swapped, field = is_swapped(node), field_of(node)
    averaged = tree.within((*average, field))
    # What is served beside the average goes back with it.
    raw = tree.within((*average, BESIDE)) if swapped else {}
    beside = [(tree.position[n], j) for n, j in raw.items() if n in tree.position]
    # An average whose leaves are all masked fits every tree, and exchanges nothing.
    if not averaged:
        return Place(given or (), average, field, swapped, [], beside)
    if given is None:
        params = _only_tree(function, tree, average, averaged, several, option)
    elif not given:
        raise ValueError(
            f"{function}: params='' is the whole state. Put the parameters under a key "
            "of their own, as {'params': params, 'opt_state': opt_state}."
        )
    elif misfit := _misfit(tree, averaged, given):
        raise ValueError(
            f"{function}: params={'/'.join(given)!r}, but the average at "
            f"{'/'.join(average) or 'the root'} is not of that: {misfit}."
        )
    else:
        params = given
    pairs = [(tree.position[params + rest], j) for rest, j in averaged.items()]
    return Place(params, average, field, swapped, pairs, beside)


def _only_tree(
    function: str,
    tree: Tree,
    average: Names,
    averaged: dict[Names, int],
    several: bool,
    option: str,
) -> Names:
    """The one tree that the average can be of.

    It is outside of the optimizer state. Of several, it is the one called "params" right
    beside the way to the optimizer state, if no other branches off further along the way.
    """
    alike = _alike(tree, average, averaged)
    root = optimizer_root(tree, average)
    outside = [p for p in alike if not _is_slot(tree, p, average, root)]
    if len(outside) > 1:
        near = max(num_common(p, average) for p in outside)
        beside = [p for p in outside if p == (*average[:near], "params")]
        outside = beside or outside
    elif outside and outside[0][-1:] != ("params",):
        # The only one may still be a slot, where nothing shows the optimizer state.
        told = root < len(average) or is_optimizer_state(tree, average)
        if not (told and _is_shown(tree, outside[0], average)):
            outside = []
    if len(outside) == 1:
        return outside[0]
    where = "/".join(average) or "the root"
    if outside:
        first = repr(joined(outside[0]))
        raise advised(
            ValueError,
            f"{function}: the average at {where} could be of any of {_listed(outside)}.",
            f"Say with {option}= which, as {option}={first}."
            + f" Of several averages: params={{{where!r}: {first}}}." * several,
            f"Say with --{option} which, as --{option} {first}.",
        )
    what = (
        f"{function}: the state holds the average at {where}, but no parameters with its "
        "names and shapes. Pass the parameters and the optimizer state together, as "
        "{'params': params, 'opt_state': opt_state}."
    )
    if not alike:
        raise ValueError(what)
    first = repr(joined(alike[0]))
    raise advised(
        ValueError,
        f"{what} What has them is taken for the optimizer's own: {_listed(alike)};",
        f"say with {option}= if it is not, as {option}={first}.",
        f"say with --{option} if it is not, as --{option} {first}.",
    )


def _is_shown(tree: Tree, params: Names, average: Names) -> bool:
    """Whether a tree is a member of the tuple that holds the optimizer state, if any.

    Deeper in the tuple it may be a slot: ({"mu": momentum}, AveragedState) is the state
    of a chain, and (params, AveragedState) a training state.
    """
    common = num_common(params, average)
    return len(params) == common + 1 or not is_sequence(tree.node(params[:common]))


def _alike(tree: Tree, average: Names, averaged: dict[Names, int]) -> list[Names]:
    """The names that lead to trees with the average's names and shapes.

    If some of them have the average's own containers, these alone.
    """
    # Each leaf that is named like the first averaged one shows a tree to look at.
    first = next(iter(averaged))
    found = []
    for names in tree.position:
        params = names[: len(names) - len(first)]
        if names[len(params) :] != first:
            continue
        if any(params[: len(a)] == a for a in tree.averages):
            continue  # inside of an average's state
        if params == average[: len(params)]:
            continue  # contains the average
        if _misfit(tree, averaged, params) is None:
            found.append(params)
    own = _containers(tree, (*average, field_of(tree.averages[average])), averaged)
    same = [p for p in found if _containers(tree, p, averaged) == own]
    return same or found


def _misfit(tree: Tree, averaged: dict[Names, int], params: Names) -> str | None:
    """Why a tree cannot be the one that is averaged, in words; None if it can."""
    for rest, j in averaged.items():
        i = tree.position.get(params + rest)
        name = "/".join(params + rest) or "the root"
        if i is None:
            return f"there is no {name}"
        content, param = tree.leaves[j][1], tree.leaves[i][1]
        shapes = shape_of(content), shape_of(param)
        # A sharding has no shape. It fits another one, as in the target of a restore.
        alike = shapes[0] == shapes[1]
        if tree.stacked and None not in shapes:
            alike = fits(*shapes)
        if not alike:
            return f"{name} has shape {shapes[1]}, its average {shapes[0]}"
        if kind_of(content) != kind_of(param):
            return f"{name} is {kind_of(param)}, its average {kind_of(content)}"
    return None


def _containers(tree: Tree, inside: Names, averaged: dict[Names, int]) -> list[Any]:
    """The types of the containers above the averaged leaves; mappings are one type."""
    ways = sorted({rest[:i] for rest in averaged for i in range(len(rest))})
    nodes = [tree.node(inside + way) for way in ways]
    return [Mapping if isinstance(node, Mapping) else type(node) for node in nodes]


def _is_slot(tree: Tree, params: Names, average: Names, root: int) -> bool:
    """Whether a tree belongs to this or another optimizer's state."""
    common = num_common(params, average)
    if common >= root:
        return True
    # Below where the ways part, another optimizer's state shows by its type or its key,
    # or as a chain with one such member.
    for i in range(common, len(params)):
        node = tree.node(params[:i])
        if i > common and (is_optimizers(node) or "opt_state" in params[i - 1]):
            return True
        if i > common and is_sequence(node) and any(map(is_optimizers, node)):
            return True
    return "opt_state" in params[-1] if len(params) > common else False


def _listed(ways: list[Names]) -> str:
    return ", ".join(map(joined, ways))


def shape_of(leaf: Leaf) -> Any:
    """The shape of an array or number; None for a leaf without one, as a sharding."""
    if isinstance(leaf, (bool, int, float, complex)):
        return ()
    return getattr(leaf, "shape", None)
