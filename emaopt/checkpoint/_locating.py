"""Where in a checkpoint the parameters of an average stand: told, on record, or clear."""

from collections.abc import Iterable
from typing import Any

from emaopt._names import Names
from emaopt._places import Place, fitting, has_namesake, located_at


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
    ones that they can be. Those of another average are not taken where its twin's are
    called as this average is. An error names the option by which the caller is told.
    """
    told = (at[:i] for i in range(len(at), 0, -1))
    found = fitting(tree, average, told)[:1]
    found = found or [
        place
        for place in fitting(tree, average, sorted(set(known)))
        if not has_namesake(tree, average, place.params)
    ]
    if len(found) == 1:
        return found[0]
    return located_at(function, tree, average, option=option)
