"""Whether emaopt's record agrees with the tree on disk, where swapped states say so."""

from collections.abc import Collection

import jax
from etils import epath

from emaopt._beside import names_beside
from emaopt._names import Names, is_below, leaves_with_keys
from emaopt._nodes import average_nodes, center_nodes, field_of, is_swapped
from emaopt._types import PyTree
from emaopt.checkpoint._record import KEY, Marker, Served


def agreed(
    function: str,
    path: epath.Path,
    marker: Marker,
    tree: PyTree,
    saved: Collection[Names],
    items: Collection[Names],
) -> Marker:
    """Returns the record, without the empty arrays of missing items; or raises.

    The state of an average may be missing together with its whole item: somebody kept the
    parameters alone.
    """

    def is_here(names: Names) -> bool:
        return () in items or names[:1] in items

    nodes = average_nodes(tree) | center_nodes(tree)
    swapped = [names for names, node in nodes.items() if is_swapped(node)]
    says = f"{function}: by its record in custom_metadata[{KEY!r}], {path} has"
    # A wrong record would exchange raw parameters and averages in silence, so each of its
    # statements is held against the fields by which a state tells that it was swapped.
    for served in marker.served:
        name = _joined(served.average)
        if served.average in nodes and served.average not in swapped:
            raise ValueError(
                f"{says} its averages under the parameters' names, but {name} was saved "
                "in its own place: the record went with a state that "
                "emaopt.checkpoint.swap_state had not swapped. Its parameters are raw."
            )
        if served.average in swapped:
            if (field := field_of(nodes[served.average])) != served.field:
                raise ValueError(
                    f"{says} the {served.field} of {name} under the parameters' names, "
                    f"but that state holds the {field}; {_OTHER_TREE}"
                )
        elif is_here(served.average):
            there = ", ".join(map(_joined, swapped))
            has = f"it has one at {there}" if swapped else "nothing is swapped there"
            raise ValueError(
                f"{says} a swapped average at {name}, but {has}; {_OTHER_TREE}"
            )
        if not is_here(served.params):
            raise ValueError(
                f"{says} the averages of {name} in the item {served.params[0]}, which is "
                f"not there. Or it never was: {_OTHER_TREE}"
            )
        if missing := _missing(served, saved):
            raise ValueError(
                f"{says} the averages of {name} at {_joined(served.params)}, but there "
                f"is no {_joined(missing)}; {_OTHER_TREE}"
            )
    # The other way round: what the tree says is swapped must be on record.
    ours = [served.average for served in marker.served]
    if others := [_joined(names) for names in swapped if names not in ours]:
        raise ValueError(
            f"{says} the averages of {', '.join(map(_joined, ours))} under the "
            f"parameters' names, but swapped are {', '.join(others)}, too; {_OTHER_TREE}"
        )
    first, raw = marker.served[0], marker.raw_beside
    beside = {n for n in marker.beside if (*raw, *n) not in marker.empty}
    if first.average in nodes and {*names_beside(tree, first.average)} != beside:
        raise ValueError(
            f"{says} other values than {_joined(first.average)} of what is served beside "
            f"the averages; {_OTHER_TREE}"
        )
    lost = [n for n in marker.beside if is_here(n) and n not in {*saved, *marker.empty}]
    if lost:
        raise ValueError(
            f"{says} {_joined(min(lost))} served beside the averages, but there is none; "
            f"{_OTHER_TREE}"
        )
    empty = {names: leaf for names, leaf in marker.empty.items() if is_here(names)}
    free = holes(tree) if empty else set()
    if odd := [_joined(names) for names in empty if names not in free]:
        raise ValueError(
            f"{says} an array of size 0 at {odd[0]}, where none is; {_OTHER_TREE}"
        )
    return marker._replace(empty=empty)


_OTHER_TREE = (
    "the record is of another tree than the one that was saved: give to "
    "emaopt.checkpoint.metadata the whole that is saved, with the names of its items, "
    "such as metadata({'state': state})."
)


def _joined(names: Names) -> str:
    return "/".join(names) or "the top"


def _missing(served: Served, saved: Collection[Names]) -> Names | None:
    """A parameter that is not on disk though the state holds its raw value, or None."""
    cut = len(served.inside)
    ways = (served.params + n[cut:] for n in saved if is_below(n, served.inside))
    return next((way for way in ways if way not in saved), None)


def holes(tree: PyTree) -> set[Names]:
    """The names at which a tree has None, as Orbax has for an array of size 0."""
    # None is no leaf to JAX; a leaf in its place gets a name.
    nothing = object()  # named as the array would be
    filled = jax.tree.map(
        lambda leaf: nothing if leaf is None else leaf,
        tree,
        is_leaf=lambda leaf: leaf is None,
    )
    return {names for names, leaf in leaves_with_keys(filled) if leaf is nothing}
