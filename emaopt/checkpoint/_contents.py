"""Where averages, raw parameters and other arrays are in a checkpoint."""

import itertools
from collections.abc import Collection, Iterable
from typing import NamedTuple

import jax

from emaopt._advice import advised
from emaopt._names import Unknown, is_below, num_common, split
from emaopt._nodes import (
    average_nodes,
    center_nodes,
    field_of,
    refuse_unknown_name,
    served_nodes,
)
from emaopt._places import Place
from emaopt._states import AVERAGE
from emaopt._types import PyTree
from emaopt.checkpoint import _files, _trees
from emaopt.checkpoint._files import Names, listed, located_in


class Average(NamedTuple):
    """An average in a checkpoint: its state, and the parameters that it averages."""

    params: Names  # names that lead to the parameters; () if they are not known
    average: Names  # names that lead to its state
    field: str  # the field of that state: "average" or "center"
    served: bool  # whether it is under the parameters' names, and they are in its field
    alone: bool = False  # whether the raw parameters are not there at all

    @property
    def inside(self) -> Names:
        """The names of the state's field: of the average, or, if served, of the raw."""
        return (*self.average, self.field)


class Averaged(NamedTuple):
    """Parameters by name, some or all of them averages."""

    prefix: Names  # the names that lead to them
    averaged: set[Names]  # those that are averages
    places: dict[Names, Names]  # name below the prefix -> name on disk


def way_to(function: str, files: _files.Files, at: str | None) -> Names:
    """The names in `at`, or an error if the checkpoint has nothing there; () for None."""
    names, present = split(at), _files.all_leaves(files)
    for average in files.found:  # in whose place a state of emaopt's stands
        if is_below(names, average):
            names = (*average, AVERAGE.field, *names[len(average) :])
    if not names or any(is_below(n, names) for n in present):
        return names
    # Users are shown a leaf of their own that is called "value" with that name.
    if names[-1] == "value" and names[:-1] in files.values:
        return names[:-1]
    depth = max((num_common(n, names) for n in present), default=0)
    beside = sorted({n[depth] for n in present if is_below(n[:-1], names[:depth])})
    where = f"at {'/'.join(names[:depth])}" if depth else "at the top"
    there = f"stand {', '.join(beside)}" if beside else "stands an array"
    raise Unknown(
        f"{function}: {files.path} has nothing at {at!r}; {where} {there}.", "at"
    )


def averages_at(
    function: str,
    files: _files.Files,
    name: str | None,
    at: str | None,
    *,
    option: str,
) -> Averaged:
    """The averages of a name, or the only one, for the parameters at a place.

    Parameters that an average leaves out (masked) are taken raw. Errors name the `option`
    that gives the name.
    """
    way, present = way_to(function, files, at), _files.all_leaves(files)
    if name is None and files.marker is None and files.combination:
        prefix = way or tuple(files.combination["params"])
        places = {n[len(prefix) :]: n for n in present if is_below(n, prefix)}
        return Averaged(prefix, set(places), places)
    beside = files.marker.beside if files.marker else frozenset()
    # Of a tree that goes with the averages, and has none of its own.
    if way and any(is_below(n, way) for n in beside):
        nodes, served = served_nodes(_files.whole_tree(files), name), _served(files)
        goes = name is None or any(one.average in nodes for one in served)
        if goes and not any(_related(way, one) for one in served):
            places = {n[len(way) :]: n for n in present if is_below(n, way)}
            return Averaged(way, set(places), places)
    chosen = _chosen(function, files, name, at, way, option)
    if own := [one for one in chosen if way and is_below(way, one.inside)]:
        (one,) = own  # the average into whose state `at` leads
        there = one.params if one.served else one.inside
        cut = len(one.inside)
        places = {n[len(way) :]: there + n[cut:] for n in present if is_below(n, way)}
        return Averaged(way, set(places), places)
    # First all parameters, raw, from wherever the swap put them; then, over them, those
    # of which a chosen average has a leaf.
    prefix = way or chosen[0].params
    states = [*average_nodes(_files.whole_tree(files))]
    states += center_nodes(_files.whole_tree(files))
    places, averaged = {}, set()
    for names, raw in _files.logical_names(files).items():
        if not is_below(names, prefix) or any(is_below(names, state) for state in states):
            continue
        rest = names[len(prefix) :]
        with_them = names in beside and any(one.served for one in chosen)
        places[rest] = names if with_them else raw
        for one in chosen:
            below = names[len(one.params) :]
            if not is_below(names, one.params):
                continue
            if one.alone or one.inside + below in present:
                places[rest] = names if one.served else one.inside + below
                averaged.add(rest)
    return Averaged(prefix, averaged, places)


def parameters(function: str, files: _files.Files) -> list[Names]:
    """The names that lead to the parameters of each average, or [] without averages."""
    if files.marker is not None:
        return sorted({one.params for one in files.marker.served})
    if files.combination:
        return [tuple(files.combination["params"])]
    nodes = served_nodes(_files.whole_tree(files))
    return sorted({_located(function, files, n, ()).params for n in nodes})


def default_way(names: Iterable[Names]) -> Names:
    """Where parameters stand that no average tells: at "params", or in no tree."""
    return ("params",) if any(n[:1] == ("params",) for n in names) else ()


def averages(function: str, files: _files.Files) -> list[Average]:
    """All averages of parameters in a checkpoint, with the parameters of each."""
    found = [one for one in _everything(files) if one.field == AVERAGE.field]
    return [
        one
        if one.served
        else one._replace(params=_located(function, files, one.average, ()).params)
        for one in found
    ]


def said_of(
    files: _files.Files, prefix: Names, places: Iterable[Names], *, raw: bool = False
) -> tuple[str, tuple[str, ...]]:
    """The weights at places on disk, in words, and the averages among them by name.

    Parameters that an average leaves out are not mentioned beside it. With `raw`, arrays
    are called parameters where there is no average.
    """
    everything, present = _everything(files), _files.all_leaves(files)
    averages: dict[Average, None] = {}
    # Raw ones in a served average's state; what is served beside it; all the others.
    of_others, with_them, left = False, False, []
    for n in places:
        if holds := [one for one in everything if _holds(one, n, present)]:
            averages |= dict.fromkeys(holds)
        elif any(one.served and is_below(n, one.inside) for one in everything):
            of_others = True
        elif files.marker and is_below(n, files.marker.raw_beside):
            of_others = True
        elif files.marker and n in files.marker.beside:
            with_them = True
        elif not any(one.params and is_below(n, one.params) for one in everything):
            left.append(n)
    others = bool(left) and not (raw and not averages)
    if others:  # found out last, because it is slow
        trees = [_parameters_of(files, one) for one in everything if not one.served]
        others = not all(any(is_below(n, tree) for tree in trees if tree) for n in left)
    if not averages:
        if files.marker is None and files.combination:
            record = files.combination
            if record.get("converted"):
                return record["weights"], ()
            return f"a combination of {record['weights']}", ()
        if with_them and not others and not of_others:
            return "what is served beside the averages", ()
        if not others:
            return "the raw parameters", ()
        return f"the arrays at {'/'.join(prefix)}" if prefix else "all arrays", ()
    kind = "center" if all(one.field == "center" for one in averages) else "averages"
    names = tuple("/".join(one.average) or "the state" for one in averages)
    parts = [f"the {kind} of {', '.join(names)}"]
    parts += ["raw parameters"] * of_others + ["other arrays"] * others
    return " and ".join(parts), names


def refuse_averages(function: str, files: _files.Files, at: str, way: Names) -> bool:
    """Whether raw parameters are at a place in an average's state.

    Raises if the average itself is there: who asks for raw weights must not get it.
    """
    for one in _everything(files):
        if is_below(way, one.inside) and not one.served:
            raise advised(
                ValueError,
                f"{function}: at {at!r}, {files.path} holds the averages of "
                f"{'/'.join(one.average)}, no raw parameters.",
                "Say with at= where the parameters stand.",
                "Say with --at where the parameters stand.",
            )
    raw = [one.inside for one in _everything(files) if one.served]
    raw += [files.marker.raw_beside] if files.marker else []
    return any(is_below(way, inside) for inside in raw)


def _everything(files: _files.Files) -> list[Average]:
    """All averages in a checkpoint; of those not served, `params` is left empty."""
    found, tree = _served(files), _files.whole_tree(files)
    ours = {one.average for one in found}
    return found + [
        Average((), names, field_of(node), False)
        for names, node in (center_nodes(tree) | average_nodes(tree)).items()
        if names not in ours
    ]


def _parameters_of(files: _files.Files, one: Average) -> Names:
    """The names that lead to an average's parameters, or () if several trees fit."""
    try:
        return _located("emaopt", files, one.average, ()).params
    except ValueError:
        return ()


def _holds(one: Average, n: Names, present: Collection[Names]) -> bool:
    """Whether the leaf at a name is one of the average."""
    if not one.served:
        return is_below(n, one.inside)
    # A parameter without a raw twin in the average's state was masked: it is raw itself.
    there = one.alone or one.inside + n[len(one.params) :] in present
    return is_below(n, one.params) and there


def _served(files: _files.Files) -> list[Average]:
    """The averages that are served, by the record."""
    served, alone = files.marker.served if files.marker else (), files.without_raw
    return [Average(s.params, s.average, s.field, True, s in alone) for s in served]


def _chosen(
    function: str,
    files: _files.Files,
    name: str | None,
    at: str | None,
    way: Names,
    option: str,
) -> list[Average]:
    """The averages that a name and a place choose: one, or several served of one tree.

    Without a name, served averages go before others.
    """
    tree, present = _files.whole_tree(files), _files.all_leaves(files)
    nodes, ours = served_nodes(tree, name), _served(files)
    served = [s for s in ours if name is None or s.average in nodes]
    # An average of no leaf at all (masked everywhere) does not make the choice unclear.
    full = [s for s in served if any(is_below(n, s.inside) for n in present)]
    served = full or [s._replace(params=s.params or way) for s in served]
    served = [s for s in served if s.params]
    others = [n for n in nodes if n not in {s.average for s in ours}]
    if not served and not nodes:
        refuse_unknown_name(function, tree, name)
        raise advised(
            ValueError,
            f"{function}: {files.path} holds no average: its parameters are raw.",
            "Load them with orbax.checkpoint.StandardCheckpointer.",
            "Leave out --weights.",
        )
    if not served and not others:
        raise advised(
            ValueError,
            f"{function}: {files.path} holds an average of no parameters: they are all "
            "masked.",
            "Say with at= where they stand.",
            "Say with --at where they stand.",
        )
    if way:
        return _chosen_at(function, files, name, at, way, served, others, option)
    if len({s.params for s in served}) > 1:
        there = ", ".join(
            f"{'/'.join(s.average)} of {'/'.join(s.params)}" for s in served
        )
        what = f"{function}: {files.path} serves several averages: {there}."
        raise _several(what, option)
    if served and (name is None or not others):
        return served
    if len(nodes) > 1:
        under = f" under the name {name!r}" if name else ""
        there = ", ".join(map("/".join, nodes))
        what = f"{function}: several averages in {files.path}{under}: {there}."
        raise _several(what, option)
    (names,) = others
    params = _located(function, files, names, ()).params
    return [Average(params, names, field_of(nodes[names]), False)]


def _chosen_at(
    function: str,
    files: _files.Files,
    name: str | None,
    at: str | None,
    way: Names,
    served: list[Average],
    others: list[Names],
    option: str,
) -> list[Average]:
    """The averages whose parameters are at a place, above it or below it."""
    found = ours = [s for s in served if _related(way, s)]
    nodes = served_nodes(_files.whole_tree(files), name)
    errors = []
    for names in others:
        one = Average((), names, field_of(nodes[names]), False)
        if is_below(way, one.inside):
            return [one]
        try:
            one = one._replace(params=_located(function, files, names, way).params)
        except ValueError as error:
            errors.append(error)
        else:
            # Without a name, the served one of two averages of the same parameters.
            beside = name is None and any(_overlap(one, s) for s in ours)
            found = found + [one] * (_related(way, one) and not beside)
    # If a served average has the place, those whose parameters are unclear do no harm.
    if errors and not any(is_below(way, one.params) for one in ours):
        raise errors[0]
    if not found:
        there = listed([s.average for s in served] + others)
        raise Unknown(
            f"{function}: {files.path} holds no average of what stands at {at!r}, and "
            "nothing was given to `served=`, when it was saved, to go with one there; it "
            f"holds the averages of {there}.",
            "at",
        )
    # Two served averages of one tree have no leaf in common; others may.
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if _overlap(a, b)]
    if not all(a.served and b.served for a, b in pairs):
        which = ", ".join("/".join(one.average) for one in found)
        raise _several(
            f"{function}: {files.path} holds several averages of what stands at {at!r}: "
            f"{which}.",
            option,
        )
    return found


def _several(what: str, option: str) -> ValueError:
    """The error for a choice between several averages that nothing decides."""
    advice = f"Say with {option}= which."
    return advised(ValueError, what, advice, "Say with --weights NAME which one.")


def _related(way: Names, one: Average) -> bool:
    """Whether a place is at, above or below an average's parameters, or in its state."""
    near = is_below(way, one.params) or is_below(one.params, way)
    return near or is_below(way, one.inside)


def _overlap(a: Average, b: Average) -> bool:
    """Whether the parameters of one average contain those of the other."""
    return is_below(a.params, b.params) or is_below(b.params, a.params)


def _located(function: str, files: _files.Files, average: Names, way: Names) -> Place:
    """The parameters of an average that is not served, found as if none were served."""
    served = files.marker.served if files.marker else ()
    known = [one.params for one in served]
    # Other code's layout may tell where the parameters are.
    told = files.found[average].params if average in files.found else None
    tree, at = _logical(files), told or way or ()
    return located_in(function, tree, average, at=at, known=known, option="at")


def _logical(files: _files.Files) -> PyTree:
    """The saved training state, not swapped, as a tree of `_trees.as_array` leaves."""
    physical = jax.tree.map(_trees.as_array, _files.whole_tree(files))
    return _trees.raw_by(physical, files.marker)
