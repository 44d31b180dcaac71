"""What stands where in a checkpoint: averages, raw parameters, other arrays."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

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
from emaopt.checkpoint import _files, _trees
from emaopt.checkpoint._files import Names, listed, located_in


class Average(NamedTuple):
    """An average, where its own state keeps it and whose parameters it is of."""

    params: Names
    average: Names
    field: str
    served: bool  # whether it stands in the parameters' place, and they in its own
    alone: bool = False  # whether they are not there at all

    @property
    def inside(self) -> Names:
        return (*self.average, self.field)


class Averaged(NamedTuple):
    """Parameters, by name, of which some or all are averages."""

    prefix: Names  # the names that lead to them
    averaged: set[Names]  # which of them are averages
    places: dict[Names, Names]  # where on disk each stands


def way_to(function: str, files: _files.Files, at: str | None) -> Names:
    """The names that `at` says, or an error if nothing stands there; () for None."""
    names, present = split(at), _files.all_leaves(files)
    if not names or any(is_below(n, names) for n in present):
        return names
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
    """The averages of a name, or the only one, of what stands at a place.

    What they leave out is taken raw. Errors name the option that gives the name.
    """
    way, present = way_to(function, files, at), _files.all_leaves(files)
    if name is None and files.marker is None and files.combination:
        prefix = way or tuple(files.combination["params"])
        places = {n[len(prefix) :]: n for n in present if is_below(n, prefix)}
        return Averaged(prefix, set(places), places)
    chosen = _chosen(function, files, name, at, way, option)
    if own := [one for one in chosen if way and is_below(way, one.inside)]:
        (one,) = own  # the place that its state keeps it in
        there = one.params if one.served else one.inside
        cut = len(one.inside)
        places = {n[len(way) :]: there + n[cut:] for n in present if is_below(n, way)}
        return Averaged(way, set(places), places)
    prefix = way or chosen[0].params
    states = [*average_nodes(_files.whole_tree(files))]
    states += center_nodes(_files.whole_tree(files))
    places, averaged = {}, set()
    for names, raw in _files.logical_names(files).items():
        if not is_below(names, prefix) or any(is_below(names, state) for state in states):
            continue
        rest = names[len(prefix) :]
        places[rest] = raw
        for one in chosen:
            below = names[len(one.params) :]
            if not is_below(names, one.params):
                continue
            if one.alone or one.inside + below in present:
                places[rest] = names if one.served else one.inside + below
                averaged.add(rest)
    return Averaged(prefix, averaged, places)


def parameters(function: str, files: _files.Files) -> list[Names]:
    """The ways to the parameters of each average in a checkpoint, or [] without any."""
    if files.marker is not None:
        return sorted({one.params for one in files.marker.served})
    if files.combination:
        return [tuple(files.combination["params"])]
    nodes = served_nodes(_files.whole_tree(files))
    return sorted({_located(function, files, n, ()).params for n in nodes})


def said_of(
    files: _files.Files, prefix: Names, places: Iterable[Names], *, raw: bool = False
) -> tuple[str, tuple[str, ...]]:
    """What stands at places on disk, in words, and the averages among it by name.

    Parameters that an average leaves out are not mentioned beside it. `raw` says that
    without any average they are all parameters.
    """
    everything, present = _everything(files), _files.all_leaves(files)
    averages: dict[Average, None] = {}
    of_others, left = False, []  # the raw ones in the place of averages; the rest
    for n in places:
        if holds := [one for one in everything if _holds(one, n, present)]:
            averages |= dict.fromkeys(holds)
        elif any(one.served and is_below(n, one.inside) for one in everything):
            of_others = True
        elif not any(one.params and is_below(n, one.params) for one in everything):
            left.append(n)
    others = bool(left) and not (raw and not averages)
    if others:  # found out at last, because it is slow
        trees = [_parameters_of(files, one) for one in everything if not one.served]
        others = not all(any(is_below(n, tree) for tree in trees if tree) for n in left)
    if not averages:
        if files.marker is None and files.combination:
            record = files.combination
            return f"a combination of {record['weights']}", ()
        if not others:
            return "the raw parameters", ()
        return f"the arrays at {'/'.join(prefix)}" if prefix else "all arrays", ()
    kind = "center" if all(one.field == "center" for one in averages) else "averages"
    names = tuple("/".join(one.average) or "the state" for one in averages)
    parts = [f"the {kind} of {', '.join(names)}"]
    parts += ["raw parameters"] * of_others + ["other arrays"] * others
    return " and ".join(parts), names


def refuse_averages(function: str, files: _files.Files, at: str, way: Names) -> bool:
    """Whether raw parameters stand in an average's place; raises if averages do."""
    for one in _everything(files):
        if is_below(way, one.inside) and not one.served:
            raise advised(
                ValueError,
                f"{function}: at {at!r}, {files.path} holds the averages of "
                f"{'/'.join(one.average)}, no raw parameters.",
                "Say with at= where the parameters stand.",
                "Say with --at where the parameters stand.",
            )
    return any(one.served and is_below(way, one.inside) for one in _everything(files))


def _everything(files: _files.Files) -> list[Average]:
    """All averages in a checkpoint, without the parameters of those not served."""
    found, tree = _served(files), _files.whole_tree(files)
    ours = {one.average for one in found}
    return found + [
        Average((), names, field_of(node), False)
        for names, node in (center_nodes(tree) | average_nodes(tree)).items()
        if names not in ours
    ]


def _parameters_of(files: _files.Files, one: Average) -> Names:
    try:
        return _located("emaopt", files, one.average, ()).params
    except ValueError:
        return ()  # not clear


def _holds(one: Average, n: Names, present: Any) -> bool:
    """Whether what stands at a name is of the average."""
    if not one.served:
        return is_below(n, one.inside)
    there = one.alone or one.inside + n[len(one.params) :] in present
    return is_below(n, one.params) and there


def _served(files: _files.Files) -> list[Average]:
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
    """The averages that are meant: one, or several that are served of one tree.

    Without a name, those that are served go before those that are not.
    """
    tree, present = _files.whole_tree(files), _files.all_leaves(files)
    nodes, ours = served_nodes(tree, name), _served(files)
    served = [s for s in ours if name is None or s.average in nodes]
    # One that is masked everywhere decides nothing where there are others.
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
    """Those of what stands at a place."""
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
        else:  # of the same parameters the one that is served is meant, if none is named
            beside = name is None and any(_overlap(one, s) for s in ours)
            found = found + [one] * (_related(way, one) and not beside)
    if errors and not any(is_below(way, one.params) for one in ours):
        raise errors[0]
    if not found:
        there = listed([s.average for s in served] + others)
        raise Unknown(
            f"{function}: {files.path} holds no average of what stands at {at!r}; it "
            f"holds the averages of {there}.",
            "at",
        )
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
    """The error that several averages can be meant."""
    advice = f"Say with {option}= which."
    return advised(ValueError, what, advice, "Say with --weights which.")


def _related(way: Names, one: Average) -> bool:
    """Whether a place is above, in or below an average's parameters, or in its own."""
    near = is_below(way, one.params) or is_below(one.params, way)
    return near or is_below(way, one.inside)


def _overlap(a: Average, b: Average) -> bool:
    return is_below(a.params, b.params) or is_below(b.params, a.params)


def _located(function: str, files: _files.Files, average: Names, way: Names) -> Any:
    """The parameters of one that is not served, as if none were."""
    served = files.marker.served if files.marker else ()
    known = [one.params for one in served]
    tree = _logical(files)
    return located_in(function, tree, average, at=way, known=known, option="at")


def _logical(files: _files.Files) -> Any:
    physical = jax.tree.map(_trees.as_array, _files.whole_tree(files))
    return _trees.raw_by(physical, files.marker)
