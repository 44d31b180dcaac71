"""The units of an optimizer's state, told by the names of its leaves alone.

On disk a state has lost its types. A unit is the state of one transformation, without the
chains, wrappers and users' names around it. When a chain gains or loses members, or a
wrapper, units keep their fields and change their places.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from emaopt._names import is_below, num_common
from emaopt._nodes import WRAPPERS, as_state, field_of
from emaopt.checkpoint._files import Names

# The field for states of the outer optimizer, which are never those of a worker.
_OUTER = "outer_state"


class Unit(NamedTuple):
    """The state of one transformation, or a wrapper's own."""

    way: Names  # names that lead to it
    kind: frozenset[str]  # the names of its fields
    labels: Names  # the user's names on the way
    short: Names  # the way without wrappers: the user's names, and positions in chains
    leaves: frozenset[Names]  # the names of its leaves below the way


Pair = tuple[Unit, Unit]
Group = tuple[list[Unit], list[Unit]]


def units(
    leaves: Iterable[Names], roots: Iterable[Names], others: Iterable[Names]
) -> list[Unit]:
    """The units below the roots of optimizer states.

    Args:
      leaves: Names of all leaves of a state.
      roots: The names that lead to optimizer states in it.
      others: Names of leaves outside of optimizer states, the parameters among them.
    """
    parameters = _like_parameters(others)
    found = []
    for root in roots:
        tree: dict = {}
        for names in leaves:
            if is_below(names, root):
                _put(tree, names[len(root) :])
        for way, kind, below in _walk(tree, (), parameters):
            named = [n for n in way if n not in WRAPPERS]
            labels = (*root, *(n for n in named if not n.isdigit()))
            short = (*root, *named)
            found.append(Unit(root + way, kind, labels, short, frozenset(below)))
    return found


def _put(tree: dict, names: Names) -> None:
    for name in names:
        tree = tree.setdefault(name, {})
    tree[None] = None  # a leaf


def _is_leaf(tree: dict) -> bool:
    return None in tree


def _walk(
    tree: dict, way: Names, parameters: Callable[[dict], bool]
) -> Iterator[tuple[Names, frozenset[str], list[Names]]]:
    """Finds the units of a tree: the way to each, its fields, and its leaves below."""
    passages = _passages(tree, parameters)
    own = {name: child for name, child in tree.items() if name not in passages}
    if own:
        state = as_state(tree)
        kind = {field_of(state)} if state else set(filter(None, tree))
        yield way, frozenset(kind), list(_leaves(own))
    for name in sorted(passages, key=lambda name: (len(name), name)):
        yield from _walk(tree[name], (*way, name), parameters)


def _passages(tree: dict, parameters: Callable[[dict], bool]) -> set[str]:
    """The names in a node that lead to states of other transformations."""
    if _is_leaf(tree):
        return set()
    if all(name.isdigit() for name in tree):
        return set(tree)  # a chain
    if wrapped := (WRAPPERS | {_OUTER}) & set(tree):
        return wrapped
    averages = {name for name, child in tree.items() if as_state(child)}
    if parameters(tree) or any(map(_is_leaf, tree.values())):
        return averages
    # A node without leaves and without trees like the parameters holds states by name.
    named = averages or not any(map(parameters, tree.values()))
    return set(tree) if named else set()


def _like_parameters(others: Iterable[Names]) -> Callable[[dict], bool]:
    """Tells whether a tree has the names of some other tree's leaves, or of a part."""
    known = set(others)
    ending = defaultdict(list)
    for names in known:
        ending[names[-1:]].append(names)

    def like_parameters(tree: dict) -> bool:
        below = list(_leaves(tree))
        longest = max(below, key=len)
        length = len(longest)
        # A lone leaf has no names: names[-0:] would be all of them.
        return any(
            names[-length:] == longest
            and all(names[:-length] + rest in known for rest in below)
            for names in ending[longest[-1:]] * (length > 0)
        )

    return like_parameters


def _leaves(tree: dict, names: Names = ()) -> Iterator[Names]:
    for name, child in tree.items():
        if name is None:
            yield names
        else:
            yield from _leaves(child, (*names, name))


def paired(here: list[Unit], there: list[Unit]) -> tuple[list[Pair], list[Group]]:
    """Finds which unit is which: by its kind, the user's names, and where it stands.

    Returns:
      The pairs, and groups of units that could be each other's. A unit without a like on
      the other side is in neither.
    """
    groups = defaultdict(lambda: ([], []))
    for side, found in enumerate((here, there)):
        for unit in found:
            groups[unit.kind][side].append(unit)
    pairs, unclear = [], []
    for ours, theirs in groups.values():
        for alike in _related(ours, theirs):
            for some, others in _by_labels(*alike):
                found = _in_place(some, others)
                if found is None:
                    unclear.append((some, others))
                else:
                    pairs += found
    return pairs, unclear


def _related(ours: list[Unit], theirs: list[Unit]) -> list[Group]:
    """Groups of units that could be each other's by the user's names.

    The names are the same, or one side lacks some of them: a named_chain in the place of
    a chain adds a name to the way.
    """
    groups = []
    ours, theirs = list(ours), list(theirs)
    # Each group is a connected component: it grows on either side until nothing joins.
    while ours:
        some, others = [ours.pop()], []
        grown = True
        while grown:
            more = [u for u in theirs if any(_could_be(u, s) for s in some)]
            theirs = [u for u in theirs if u not in more]
            others += more
            rivals = [u for u in ours if any(_could_be(u, s) for s in others)]
            ours = [u for u in ours if u not in rivals]
            some += rivals
            grown = bool(more or rivals)
        if others:
            groups.append((some, others))
    return groups


def _could_be(a: Unit, b: Unit) -> bool:
    """Whether two units may be one: slots of inner and outer optimizers may not."""
    is_average = a.kind == {"average"}
    sides = {_OUTER in a.labels, _OUTER in b.labels}
    return _nested(a.labels, b.labels) and (is_average or len(sides) == 1)


def _by_labels(ours: list[Unit], theirs: list[Unit]) -> list[Group]:
    """The units of each name, if both sides have the same names; else all of them."""
    if {unit.labels for unit in ours} != {unit.labels for unit in theirs}:
        return [(ours, theirs)]
    return [
        ([u for u in ours if u.labels == name], [u for u in theirs if u.labels == name])
        for name in sorted({unit.labels for unit in ours})
    ]


def _in_place(ours: list[Unit], theirs: list[Unit]) -> list[Pair] | None:
    """Pairs units of one kind, or None if their places do not tell which is which."""
    if len(ours) != len(theirs):
        return None
    ours, theirs = (sorted(side, key=lambda unit: unit.short) for side in (ours, theirs))
    pairs = list(zip(ours, theirs, strict=True))
    if len(pairs) == 1 or _below_common(ours) == _below_common(theirs):
        return pairs  # where they were, or moved together
    # A chain around all units, or around each, makes their ways longer. It is accepted if
    # all ways got, or lost, the same names, and only the pairing in order is possible.
    grown = {(_more(one, other), _more(other, one)) for one, other in pairs}
    if len(grown) > 1:
        return None
    edges = {
        i: {j for j, other in enumerate(theirs) if _nested(one.short, other.short)}
        for i, one in enumerate(ours)
    }
    # Forced pairs are taken off one by one; the pairing is the only one if none is left.
    while edges:
        i = next((i for i, ends in edges.items() if len(ends) == 1), None)
        if i is None or edges.pop(i) != {i}:
            return None
        for ends in edges.values():
            ends.discard(i)
    return pairs


def _more(a: Unit, b: Unit) -> frozenset[tuple[str, int]]:
    """The names on the way to `a` that the way to `b` lacks, and how many of each."""
    return frozenset((Counter(a.short) - Counter(b.short)).items())


def _below_common(group: list[Unit]) -> list[Names]:
    """The ways to units, without the names at their beginning that all have in common."""
    first, *_, last = sorted(unit.short for unit in group)
    common = num_common(first, last)
    return [unit.short[common:] for unit in group]


def _nested(a: Names, b: Names) -> bool:
    """Whether one of two ways holds all names of the other, in their order."""
    short, long = sorted((a, b), key=len)
    rest = iter(long)
    return all(name in rest for name in short)
