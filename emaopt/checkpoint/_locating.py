"""Where in a checkpoint the parameters of an average stand: told, on record, or clear."""

from collections.abc import Iterable
from typing import Any

from emaopt._places import Names, Place, located_at


def ways(at: str | None) -> Names:
    """The names that a user joins with "/"."""
    return tuple(filter(None, (at or "").split("/")))


def located_in(
    function: str,
    tree: Any,
    average: Names,
    *,
    at: Names = (),
    known: Iterable[Names] = (),
    option: str,
) -> Place:
    """The parameters of an average in a checkpoint's tree.

    They are what leads to `at` and fits, or the one of the `known` that does, or the only
    ones that they can be. An error names the option by which the caller is told.
    """
    told = [at[:i] for i in range(len(at), 0, -1)]
    found = [p for way in told if (p := _fitting(function, tree, average, way))][:1]
    if not found:
        tried = sorted(set(filter(None, known)))
        found = [p for way in tried if (p := _fitting(function, tree, average, way))]
    if len(found) == 1:
        return found[0]
    try:
        return located_at(function, tree, average)
    except ValueError as error:
        raise ValueError(str(error).replace("params=", f"{option}=")) from None


def _fitting(function: str, tree: Any, average: Names, way: Names) -> Place | None:
    try:
        return located_at(function, tree, average, "/".join(way))
    except ValueError:
        return None
