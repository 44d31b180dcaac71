"""Other names for the leaves of a source: of parameters, and of all that is like them."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from emaopt._names import Names, Unknown, is_below, nested, split
from emaopt._states import AVERAGE
from emaopt.checkpoint import _files
from emaopt.checkpoint._files import listed
from emaopt.checkpoint._renaming import by, refuse_clashes


class Place(NamedTuple):
    """Parameters and an average of them, by the names that lead to each."""

    params: Names
    average: Names | None  # to its state; None without an average


def renamed(
    files: _files.Files,
    there: Sequence[Place],
    here: Sequence[Place],
    targets: Collection[Names],
    rename: Mapping[str, str],
) -> _files.Files:
    """The source with names of the target's.

    A name of parameters is changed in the parameters, in their averages, in trees beside
    them (batch statistics), and in slots, whose names end as those of parameters. Other
    names are those in the whole state.
    """
    inside, whole = _rules(files, there, here, targets, rename)
    trees = [one.params for one in there]
    trees += [(*one.average, AVERAGE.field) for one in there if one.average]
    changed = {
        names[len(one.params) :]: new
        for one in there
        for names in files.saved
        if is_below(names, one.params)
        and (new := by(inside, names[len(one.params) :])) != names[len(one.params) :]
    }

    def name(names: Names) -> Names:
        for tree in trees:
            if is_below(names, tree):
                rest = names[len(tree) :]
                gone = by(whole, rest)
                # Out of the parameters' tree: then an average has no place for it.
                if gone != rest and tree in [one.params for one in there]:
                    return gone
                return tree + by(inside, rest)
        # The state of an average stays where it was found, its counters too.
        if any(one.average and is_below(names, one.average) for one in there):
            return names
        names = by(whole, names)
        for one in there:  # a collection beside the parameters
            above, depth = one.params[:-1], len(one.params)
            rest = names[depth:]
            if depth and names[: depth - 1] == above and by(inside, rest) != rest:
                return names[:depth] + by(inside, rest)
        for i in range(len(names)):  # a slot
            if names[i:] in changed:
                return names[:i] + changed[names[i:]]
        return names

    places = {names: name(names) for names in files.saved}
    refuse_clashes("adopt", files.path, places)
    saved = {new: files.saved[names] for names, new in places.items()}
    return files._replace(
        tree=nested(saved),
        saved=saved,
        checksums={places[n]: entry for n, entry in files.checksums.items()},
        origin={new: files.origin.get(names, names) for names, new in places.items()},
        shown={},
    )


def _rules(
    files: _files.Files,
    there: Sequence[Place],
    here: Sequence[Place],
    targets: Collection[Names],
    rename: Mapping[str, str],
) -> tuple[dict[Names, Names], dict[Names, Names]]:
    """The rules for names below the parameters, and for names in the whole state."""
    rests = [
        n[len(p.params) :] for p in there for n in files.saved if is_below(n, p.params)
    ]
    inside: dict[Names, Names] = {}
    whole: dict[Names, Names] = {}
    for old, new in rename.items():
        way, after = split(old), split(new)
        ways = [way, *(way[len(p.params) :] for p in there if is_below(way, p.params))]
        found = next(
            (one for one in ways if one and any(is_below(n, one) for n in rests)), None
        )
        if found is not None and after:
            # The names of the whole state may lead to parameters: then they are of these.
            below = [after[len(p.params) :] for p in here if is_below(after, p.params)]
            mine = [
                rest
                for rest in (after, *below)
                if any(is_below(n, p.params + rest) for p in here for n in targets)
            ]
            if mine or not any(is_below(n, after) for n in targets):
                inside[found] = mine[0] if mine else after
            else:
                whole[found] = after
        elif after and any(is_below(n, way) for n in files.saved):
            whole[way] = after
        else:
            raise Unknown(
                f"adopt: rename={{{old!r}: {new!r}}}: {files.path} has no parameter of "
                f"that name, or gives it none; there are {listed(rests)}.",
                "rename",
            )
    return inside, whole
