"""Which leaf of a checkpoint fills which leaf of the target, and what is made up."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._leaves import is_key, kind_of
from emaopt._names import is_below, joined
from emaopt._nodes import as_state, average_nodes, field_of
from emaopt._optimizer_states import optimizer_roots
from emaopt._places import Ways, shape_of
from emaopt._states import WEIGHT
from emaopt._types import Leaf, Path, PyTree
from emaopt.checkpoint import _begun, _layouts
from emaopt.checkpoint._arrays import DiskArray
from emaopt.checkpoint._files import Names, listed, names_of
from emaopt.checkpoint._renaming import told_by
from emaopt.checkpoint._units import Group, paired, units
from emaopt.checkpoint._worker_rows import fit_workers

Rename = Mapping[str, str] | None
Leaves: TypeAlias = Mapping[Names, Leaf]
Shape: TypeAlias = tuple[int, ...]
T = TypeVar("T")

_ADVICE = "Give a target with the names, shapes and kinds of numbers that were saved."


class Match(NamedTuple):
    """Where each leaf of the target comes from."""

    sources: dict[Names, Names]  # name in the target -> name in the saved state
    seeds: dict[Names, Names | None]  # leaf of a new average -> parameter; None: zero
    rows: set[Names]  # leaves with another number of workers than their sources
    report: list[str]  # what was renamed, seeded, kept and left out, in words


def match(
    function: str,
    path: Path,
    target: PyTree,
    saved: dict[Names, Leaf],
    disk: PyTree,
    *,
    scope: Names = (),
    keep_missing: bool = False,
    ignore_extra: bool = False,
    params: Ways = None,
    known: dict[Names, Names],
    rename: Rename = None,
    told: dict[Names, Names] | None = None,
) -> Match:
    """Finds every leaf of the target in the saved state, or says which are missing.

    Args:
      function, path: The caller's name and the checkpoint, for messages.
      target: The state to fill, not swapped.
      saved: Metadata by name in the saved state.
      disk: The saved state, not swapped, as a tree that describes each leaf.
      scope: Only leaves whose names begin with this are restored.
      keep_missing: Whether leaves that the checkpoint lacks may keep the target's values.
      ignore_extra: Whether leaves that the target has no place for may be left out.
      params: Where the parameters of a new average stand in the target.
      known: {average: its parameters}, names in the saved state, by its record.
      rename: {name in the saved state: the name where its leaves now belong}.
      told: {name of a leaf in the target: its name in the saved state}.
    """
    # All of the state is matched: a new average may start from outside of the scope.
    everything = names_of(target)
    moved = told_by(function, path, {*everything}, {*saved}, rename or {}) | (told or {})
    sources, changed = _sources(
        function, path, target, disk, {*saved}, moved, whole=told is not None
    )
    rows = fit_workers(
        function, target, disk, saved, sources, params, known, ignore_extra
    )
    wanted, there = _within(scope, everything), _within(scope, saved)
    sources = _within(scope, sources)
    report = []
    if renamed := {new: old for new, old in sources.items() if new != old}:
        moves = sorted({_move(new, old) for new, old in renamed.items()})
        report.append(
            f"renamed {len(renamed)} leaves of the state: "
            + ", ".join(f"{old} to {new}" for new, old in moves)
        )
    sources, fresh = _within(scope, rows.sources), rows.fresh & wanted.keys()
    report += rows.report
    left = wanted.keys() - sources.keys() - fresh
    seeds = _begun.seeds(function, target, left, rows.sources, params, keep_missing)
    if seeds:
        ways = average_nodes(target)
        within = any(is_below(names, way) for names in seeds for way in ways)
        what = "the average anew" if within else "what the average has beside it"
        report.append(
            f"started {what} from the parameters: {len(seeds)} leaves, {listed(seeds)}, "
            "are not in the checkpoint"
        )
    kept = left - seeds.keys() if keep_missing else left & rows.kept
    # A leaf that is a shape and a dtype alone has no value that could be kept.
    abstract = {n for n in kept if isinstance(wanted[n], jax.ShapeDtypeStruct)}
    kept -= abstract
    if kept:
        report.append(f"kept the target's values of {listed(kept)}")
    for clock in sorted(kept & _clocks(target)):
        report.append(
            f"the count of an average goes on, but its time, {joined(clock)}, is the "
            "target's: an average whose window grows with time forgets all it has at the "
            "next step. Say what time it is by emaopt.reset_average(opt_state, average, "
            "num_updates=..., elapsed=...)"
        )
    extra = there.keys() - sources.values() - rows.left
    dropped = {
        names for names in extra if _begun.is_of_dropped_average(names, there, extra)
    }
    if dropped:
        why = "the target has none"
        # An average that is left out beside one that begins is perhaps the same, renamed.
        if seeds and (new := _begun.counted(seeds)):
            same = {joined(_begun.counted(dropped)[0]): joined(new[0])}
            why = f"and began another; if they are the same, say rename={same}"
        report.append(f"left out an average, {why}: {listed(dropped)}")
    bases = {n for n in extra - dropped if _begun.is_of_dropped_base(n, there, extra)}
    if bases:
        report.append(
            f"left out the iterates z of a primal averaging: {listed(bases)}; training "
            "goes on from y, the raw parameters"
        )
        dropped |= bases
    if ignore_extra and extra - dropped:
        report.append(f"left out {listed(extra - dropped)}")
        dropped = extra
    _complain(
        function,
        path,
        missing=left - seeds.keys() - kept,
        extra=extra - dropped,
        misfits=_misfits(sources, wanted, saved, rows.rows),
        advice=_advice(
            target,
            disk,
            left - seeds.keys(),
            extra - dropped,
            changed,
            abstract & rows.kept,
        ),
    )
    seeds |= dict.fromkeys(fresh)
    return Match(sources, seeds, rows.rows & wanted.keys(), report)


def check_fit(function: str, path: Path, wanted: Leaves, saved: Leaves) -> None:
    """Raises unless names, shapes and kinds of numbers agree."""
    both = {names: names for names in wanted.keys() & saved.keys()}
    missing, extra = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    _complain(function, path, missing, extra, _misfits(both, wanted, saved, set()))


def _complain(
    function: str,
    path: Path,
    missing: set[Names],
    extra: set[Names],
    misfits: list[str],
    advice: str = "",
) -> None:
    complaints = []
    if missing:
        complaints.append(f"it lacks {listed(missing)}")
    if extra:
        complaints.append(f"it also holds {listed(extra)}")
    if complaints := complaints + misfits:
        raise ValueError(
            f"{function}: {path} does not fit the target: {'; '.join(complaints)}. "
            + (advice or _ADVICE)
        )


def _sources(
    function: str,
    path: Path,
    target: PyTree,
    disk: PyTree,
    saved: set[Names],
    told: Mapping[Names, Names],
    whole: bool,
) -> tuple[dict[Names, Names], list[Names]]:
    """Where each leaf of the target stands: under its name, or where its unit moved.

    Returns the sources, and the ways to states that have other fields on the two sides.
    """
    wanted = names_of(target).keys() - told.keys()
    saved = saved - {*told.values()}
    # Names decide outside of optimizer states, and where both sides have the same.
    sources = {**told, **{names: names for names in wanted & saved}}
    if wanted == saved:
        return sources, []
    roots = _outermost(
        optimizer_roots(target, typed=True), optimizer_roots(disk, typed=False)
    )
    # Inside, a position says little: opt_state/1 may be another member of a chain now.
    # There, whole units are paired.
    inside = {n for n in wanted | saved if any(is_below(n, r) for r in roots)}
    sources = {new: old for new, old in sources.items() if new not in inside - {*told}}
    outside = (names_of(target).keys() | names_of(disk).keys()) - inside
    here, there = units(wanted, roots, outside), units(saved, roots, outside)
    pairs, unclear = paired(here, there)
    if unclear:
        raise ValueError(_unclear(function, path, unclear[0]))
    for unit, other in pairs:
        both = unit.leaves & other.leaves
        # Half of a momentum beside another's count would be neither.
        if whole and both != unit.leaves:
            continue
        sources |= {unit.way + rest: other.way + rest for rest in both}
    # What is left without a pair at one way on both sides has other fields there.
    new, old = ({unit.way for unit in side} for side in (here, there))
    new -= {unit.way for unit, _ in pairs}
    old -= {unit.way for _, unit in pairs}
    return sources, sorted(new & old)


def _outermost(some: list[Names], others: list[Names]) -> list[Names]:
    """The ways of both, but for those of `others` above or below one of `some`."""
    return some + [
        way
        for way in others
        if not any(way[: len(one)] == one[: len(way)] for one in some)
    ]


def _unclear(function: str, path: Path, group: Group) -> str:
    """The message for units that names and places do not tell apart."""
    here, there = ([joined(unit.way) for unit in side] for side in group)
    fields = sorted(group[0][0].kind)
    what = "averages" if fields == ["average"] else f"states of {', '.join(fields)}"
    return (
        f"{function}: {path} holds {what} at {', '.join(there)}, and the target at "
        f"{', '.join(here)}; which is which, their places in chains of different length "
        "do not tell. Say with rename=, as "
        f"rename={{{there[0]!r}: {here[0]!r}}}; states in an optax.named_chain are told "
        "by their names."
    )


def _move(new: Names, old: Names) -> tuple[str, str]:
    """Two names without the end that they share: where something moved to, and from."""
    same = 0
    while same < min(len(new), len(old)) - 1 and new[-1 - same] == old[-1 - same]:
        same += 1
    return joined(new[: len(new) - same]), joined(old[: len(old) - same])


def _within(scope: Names, leaves: dict[Names, T]) -> dict[Names, T]:
    return {names: x for names, x in leaves.items() if is_below(names, scope)}


def _clocks(tree: PyTree) -> set[Names]:
    """The names of the times of all averages."""
    return {
        (*way, "elapsed", clock)
        for way, node in average_nodes(tree).items()
        for clock in as_state(node).elapsed or {}
    }


def _advice(
    target: PyTree,
    disk: PyTree,
    missing: set[Names],
    extra: set[Names],
    changed: list[Names],
    abstract: set[Names],
) -> str:
    """What to do about leaves that do not fit, where a remedy is known."""
    if changed:
        way = joined(changed[0])
        return (
            f"At {way} stands a state of other fields. If it is of the same optimizer, "
            f"say rename={{{way!r}: {way!r}}}."
        )
    if abstract:
        return (
            "The outer optimizer of new local updates begins as in the target: give "
            "arrays, as tx.init makes them, not shapes alone."
        )
    if clocks := {n[-1] for n in (missing | extra) & (_clocks(target) | _clocks(disk))}:
        if WEIGHT in clocks:
            return (
                "Of schedule_free, whose x is weighed by learning rates, and another "
                "average, neither goes on as the other: reset_average starts anew."
            )
        return (
            f"An average counts {', '.join(sorted(clocks))} on one side alone: restore "
            "with the clock= that it was saved with. To go over to another, give "
            "keep_missing=True or ignore_extra=True, and tell the time by "
            "emaopt.reset_average(opt_state, average, num_updates=..., elapsed=...)."
        )
    for average, node in average_nodes(target).items():
        averaged = (*average, field_of(node))
        whole = {names for names in names_of(target) if is_below(names, averaged)}
        # An average that is there in part was saved with a mask of fewer leaves.
        if whole & missing and not whole <= missing:
            return (
                f"The average at {joined(average)} is of fewer leaves there: restore "
                "with the optimizer that saved it, and then call emaopt.change_mask with "
                "the new one."
            )
    if extra and average_nodes(target):
        for found in _layouts.averages_in(names_of(disk)):
            if any(is_below(names, found.average) for names in extra):
                return (
                    "checkpoint.adopt takes over the average that other code has kept at "
                    f"{joined(found.average)} ({found.layout})."
                )
    return ""


def _misfits(
    sources: Mapping[Names, Names], wanted: Leaves, saved: Leaves, rows: set[Names]
) -> list[str]:
    """What differs in shape or kind, in words; `rows` may have another first axis."""
    said = []
    for new, old in sorted(sources.items()):
        here, there, name = wanted[new], saved[old], joined(new)
        shapes = _shape(here), shape_of(there)
        if new in rows and None not in shapes:
            shapes = _without_rows(*shapes)
        if None not in shapes and shapes[0] != shapes[1]:
            said.append(
                f"{name} has shape {tuple(shape_of(there))} there and "
                f"{tuple(shape_of(here))} in the target"
            )
        # On disk only text is without a shape.
        elif isinstance(here, str) != (shapes[1] is None) or not _keeps_kind(here, there):
            said.append(f"{name} is {_kind(there)} there and {_kind(here)} in the target")
    return said


def _kind(leaf: Leaf) -> str:
    if shape_of(leaf) is None:
        return "text"
    if isinstance(leaf, DiskArray) and not leaf.whole:
        return "a typed key"
    return str(getattr(leaf, "dtype", type(leaf).__name__))


def _shape(leaf: Leaf) -> Any:
    """The shape on disk of a leaf of the target; of a key, that of its integers."""
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    shape = shape_of(leaf)
    return None if shape is None else tuple(shape)


def _without_rows(here: Shape, there: Shape) -> tuple[Shape, Shape]:
    """Two shapes without the axis of workers, which one of them or both have."""
    if len(here) == len(there):
        return here[1:], there[1:]
    return (here[1:], there) if len(here) > len(there) else (here, there[1:])


def _keeps_kind(here: Leaf, there: Leaf) -> bool:
    """Whether a leaf on disk can be read as the target's kind, and no integer is cut."""
    kinds = kind_of(here), kind_of(there)
    if None in kinds:
        return True
    if is_key(here) or is_key(there):
        return not (isinstance(there, DiskArray) and there.whole)
    if kinds[0] != kinds[1]:
        return False
    # Floats are cast either way; a lone number's range is checked when it is read.
    arrays = hasattr(here, "dtype") and isinstance(there, DiskArray)
    if kinds[0] != "integer" or not arrays:
        return True
    # Without jax_enable_x64 a jax.Array of int64 is one of int32; NumPy keeps all bits.
    held = here.dtype
    if not isinstance(here, (np.ndarray, np.generic)):
        held = jax.dtypes.canonicalize_dtype(held)
    wide, narrow = jnp.iinfo(held), jnp.iinfo(there.dtype)
    return wide.min <= narrow.min and narrow.max <= wide.max
