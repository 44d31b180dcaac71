"""What begins anew in a restore, and what is left out: averages and their company."""

from collections.abc import Iterable

from emaopt._names import Names, is_below
from emaopt._nodes import as_state, average_nodes, center_nodes, primal_nodes
from emaopt._places import Ways, located_at
from emaopt._states import AverageState
from emaopt._types import Leaf, PyTree
from emaopt.checkpoint._files import names_of


def seeds(
    function: str,
    target: PyTree,
    missing: set[Names],
    sources: dict[Names, Names],
    told: Ways,
    in_part: bool,
) -> dict[Names, Names | None]:
    """What a new average starts from: its leaves from parameters, its counters from zero.

    An average of which some leaves are missing is damaged or foreign. With `in_part`, the
    averaged leaves that it lacks start from their parameters all the same.
    """
    seeds: dict[Names, Names | None] = {}
    leaves = names_of(target)

    def begin(average: Names, tree: Names, lacking: set[Names]) -> None:
        """Leaves of a tree like an average's parameters begin with these."""
        params = _origin(function, target, average, told)
        for names in lacking:
            if (param := params + names[len(tree) :]) in sources:
                seeds[names] = sources[param]

    for way in primal_nodes(target):
        average, z = (*way, "averaging"), (*way, "base")
        inside = {names for names in leaves if is_below(names, z)}
        lacking = inside & missing
        if lacking and (lacking == inside or in_part):
            begin(average, z, lacking)
        rate = (*way[:-1], "largest")
        if way[-1:] == ("primal",) and lacking == inside and rate in missing:
            seeds[rate] = None
    for average, node in average_nodes(target).items():
        ours = {names for names in missing if is_below(names, average)}
        whole = {average + names for names in names_of(as_state(node))}
        inside = {names for names in ours if names[len(average)] == "average"}
        if not ours or not (ours == whole or (in_part and ours == inside)):
            continue
        begin(average, (*average, "average"), inside)
        seeds |= dict.fromkeys(ours - inside)
    return seeds


def _origin(function: str, target: PyTree, average: Names, told: Ways) -> Names:
    """The names of what a new average starts from: its parameters or its center."""
    # The outer optimizer of local updates has the center for parameters.
    for center in center_nodes(target):
        if (*center, "outer_state") == average[: len(center) + 1]:
            return (*center, "center")
    return located_at(function, target, average, told).params


def counted(leaves: Iterable[Names]) -> list[Names]:
    """The averages whose counters are among the leaves."""
    return sorted(n[:-1] for n in leaves if n[-1] == AverageState._fields[0])


def is_of_dropped_average(
    names: Names, saved: dict[Names, Leaf], extra: set[Names]
) -> bool:
    """Whether a leaf belongs to a saved average of which the target has no part."""
    # A checkpoint keeps no types: an average is told by its counters and `pending`.
    for i in range(len(names)):
        counters = {(*names[:i], field) for field in AverageState._fields[:2]}
        if counters <= extra and (*names[:i], "pending") in saved:
            return names[i] in AverageState._fields
    return False


def is_of_dropped_base(names: Names, saved: dict[Names, Leaf], extra: set[Names]) -> bool:
    """Whether a saved leaf is z of a primal averaging, or `schedule_free`'s beside it.

    Told by names: z has those of the average beside it.
    """
    way = (*names[:-1], "primal")
    if names[-1] == "largest" and (*way, "averaging", "pending") in saved:
        return any(is_below(one, (*way, "base")) for one in extra)  # it goes with z
    for i, name in enumerate(names):
        average = (*names[:i], "averaging")
        if name == "base" and (*average, "pending") in saved:
            return (*average, "average", *names[i + 1 :]) in saved
    return False
