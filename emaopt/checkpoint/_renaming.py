"""Names of parameters that a user gives others."""

from collections.abc import Mapping, Sequence

from emaopt._names import Names, Unknown, is_below, joined, split
from emaopt.checkpoint._files import listed


def renamed(
    function: str,
    path: object,
    prefix: Names,
    names: Sequence[Names],
    rename: Mapping[str, str],
) -> dict[Names, Names]:
    """The new name of each parameter of a tree.

    Args:
      function, path: For messages.
      prefix: The names that lead to the tree, which the old names may begin with.
      names: The names of the parameters below it.
      rename: {a name, or what names begin with: what stands in its place}, joined with
        "/". Of several that fit, the longest decides.
    """
    rules: dict[Names, Names] = {}
    for old, new in rename.items():
        way = split(old)
        found = next(
            (
                one
                for one in (way, way[len(prefix) :] if is_below(way, prefix) else way)
                if any(is_below(name, one) for name in names)
            ),
            None,
        )
        if found is None:
            raise Unknown(
                f"{function}: rename={{{old!r}: {new!r}}}: {path} has no parameter "
                f"of that name at {joined(prefix)}; there are {listed(names)}.",
                "rename",
            )
        if not split(new):
            raise Unknown(
                f"{function}: rename={{{old!r}: {new!r}}} gives no name.", "rename"
            )
        rules[found] = split(new)
    places = {name: by(rules, name) for name in names}
    refuse_clashes(function, path, places)
    return places


def by(rules: Mapping[Names, Names], names: Names) -> Names:
    """The names by the rule that says most of them, the longest."""
    way = max((way for way in rules if is_below(names, way)), key=len, default=None)
    return names if way is None else rules[way] + names[len(way) :]


def refuse_clashes(function: str, path: object, places: Mapping[Names, Names]) -> None:
    """Raises if two leaves get one name, or one a name below another's."""
    taken: dict[Names, Names] = {}
    for name, place in places.items():
        if (other := taken.setdefault(place, name)) != name:
            raise Unknown(
                f"{function}: rename= gives {joined(other)} and {joined(name)} of {path} "
                f"the one name {joined(place)}.",
                "rename",
            )
    for place, name in taken.items():
        above = next(
            (place[:i] for i in range(1, len(place)) if place[:i] in taken), None
        )
        if above is not None:
            raise Unknown(
                f"{function}: rename= puts {joined(name)} of {path} at {joined(place)}, "
                f"below the array {joined(above)}.",
                "rename",
            )


def told_by(
    function: str,
    path: object,
    wanted: set[Names],
    saved: set[Names],
    rename: Mapping[str, str],
) -> dict[Names, Names]:
    """The sources that `rename` gives, by name in the target."""
    told: dict[Names, Names] = {}
    for old, new in rename.items():
        before, after = split(old), split(new)
        moved = {
            after + names[len(before) :]: names
            for names in saved
            if is_below(names, before)
        }
        moved = {name: names for name, names in moved.items() if name in wanted}
        if not moved or told.keys() & moved.keys():
            raise ValueError(
                f"{function}: rename={{{old!r}: {new!r}}}: {path} holds nothing at "
                f"{old!r} that the target has at {new!r}, or another name is also moved "
                "there."
            )
        told |= moved
    return told
