"""Which leaf of a checkpoint goes where in the target, and what has to be made up."""

from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emaopt._nodes import as_state, average_nodes, center_nodes
from emaopt._places import Choice, located_at, shape_of
from emaopt._recursion import AverageState
from emaopt.checkpoint._files import Names, listed, names_of

# The names that Optax's and our wrappers put on the way to an optimizer's own slots.
_WRAPPERS = {
    "averaging",
    "inner_opt_state",
    "inner_state",
    "inner_states",
    "opt_state",
    "outer_state",
}


class Match(NamedTuple):
    """Where each leaf of the target comes from."""

    sources: dict[Names, Names]  # name in the target -> name in the saved state
    seeds: dict[Names, Names | None]  # leaf of a new average -> parameter; None: zero
    kept: set[Names]  # leaves that keep the target's values
    report: list[str]  # what was renamed, seeded, kept and left out, in words


def match(
    function: str,
    path: Any,
    target: Any,
    saved: dict[Names, Any],
    *,
    scope: Names = (),
    keep_missing: bool = False,
    ignore_extra: bool = False,
    params: Choice = None,
) -> Match:
    """Finds every leaf of the target in the saved state, or says which are missing.

    Args:
      function: For messages.
      path: For messages.
      target: The state to fill, not swapped.
      saved: Metadata by name in the saved state.
      scope: Only the leaves whose names begin with this are wanted; a new average's
        parameters may stand outside.
      keep_missing: Whether leaves that are not there may keep the target's values.
      ignore_extra: Whether leaves that the target has no place for may be left out.
    """
    everything = saved
    wanted, saved = _within(scope, names_of(target)), _within(scope, saved)
    sources = {names: names for names in wanted.keys() & saved.keys()}
    report = []
    if missing := wanted.keys() - sources.keys():
        renamed = _renamed(missing, saved.keys() - sources.values(), wanted, saved)
        sources |= renamed
        if renamed:
            moves = sorted({_move(new, old) for new, old in renamed.items()})
            report.append(
                f"renamed {len(renamed)} leaves of the optimizer state: "
                + ", ".join(f"{old} to {new}" for new, old in moves)
            )
    left = wanted.keys() - sources.keys()
    seeds = _seeds(function, target, left, everything, params)
    if seeds:
        report.append(
            f"started the average anew from the parameters: {len(seeds)} leaves, "
            f"{listed(seeds)}, are not in the checkpoint"
        )
    kept = set()
    if keep_missing:
        kept = wanted.keys() - sources.keys() - seeds.keys()
        kept = {n for n in kept if not isinstance(wanted[n], jax.ShapeDtypeStruct)}
        if kept:
            report.append(f"kept the target's values of {listed(kept)}")
    extra = saved.keys() - sources.values()
    dropped = {
        names for names in extra if _belongs_to_dropped_average(names, saved, extra)
    }
    if dropped:
        report.append(f"left out an average, the target has none: {listed(dropped)}")
    if ignore_extra and extra - dropped:
        report.append(f"left out {listed(extra - dropped)}")
        dropped = extra
    _complain(
        function,
        path,
        missing=wanted.keys() - sources.keys() - seeds.keys() - kept,
        extra=extra - dropped,
        shapes=_shapes(sources, wanted, saved),
    )
    return Match(sources, seeds, kept, report)


def check_fit(function: str, path: Any, wanted: dict, saved: dict) -> None:
    """Raises unless names and shapes agree."""
    both = {names: names for names in wanted.keys() & saved.keys()}
    missing, extra = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    _complain(function, path, missing, extra, _shapes(both, wanted, saved))


def _complain(function: str, path: Any, missing: Any, extra: Any, shapes: list) -> None:
    complaints = []
    if missing:
        complaints.append(f"it lacks {listed(missing)}")
    if extra:
        complaints.append(f"it also holds {listed(extra)}")
    if complaints := complaints + shapes:
        raise ValueError(
            f"{function}: {path} does not fit the target: {'; '.join(complaints)}. Give "
            "a target with the names and shapes that were saved."
        )


def _renamed(missing: Any, spare: Any, wanted: dict, saved: dict) -> dict[Names, Names]:
    """Pairs slots whose way through chains and wrappers has changed.

    Adding a member to a chain moves `opt_state/mu/...` to `opt_state/0/mu/...`. Without
    positions and wrappers the names agree; where several do (two counters), they pair in
    order if there are as many.
    """
    pairs: dict[Names, Names] = {}
    # A named_chain puts a name of the user's before the slot: dropped in a second try.
    for short_here, short_there in (
        (_slot, _slot),
        (_slot_below, _slot),
        (_slot, _slot_below),
    ):
        here, there = defaultdict(list), defaultdict(list)
        for names in sorted(missing - pairs.keys()):
            here[short_here(names)].append(names)
        for names in sorted(spare - set(pairs.values())):
            there[short_there(names)].append(names)
        for slot, news in here.items():
            olds = there[slot]
            if slot and len(olds) == len(news):
                both = list(zip(news, olds, strict=True))
                if all(_same_shape(wanted[new], saved[old]) for new, old in both):
                    pairs |= dict(both)
    return pairs


def _slot(names: Names) -> Names:
    """The name from the slot's own field on, without what leads there."""
    for i, name in enumerate(names):
        if not (name.isdigit() or name in _WRAPPERS):
            return names[i:]
    return ()


def _slot_below(names: Names) -> Names:
    """The same, with the first name of the user's left out too."""
    slot = _slot(names)
    return _slot(slot[1:])


def _move(new: Names, old: Names) -> tuple[str, str]:
    """The part of two names that differs, up to the slot's field."""
    length = min(len(_slot(new)), len(_slot(old))) - 1
    return "/".join(new[: len(new) - length]), "/".join(old[: len(old) - length])


def _within(scope: Names, leaves: dict[Names, Any]) -> dict[Names, Any]:
    return {names: x for names, x in leaves.items() if names[: len(scope)] == scope}


def _seeds(
    function: str, target: Any, missing: Any, saved: dict, told: Choice
) -> dict[Names, Names | None]:
    """What a new average starts from: its parameters, its counters from zero."""
    seeds: dict[Names, Names | None] = {}
    for average, node in average_nodes(target).items():
        ours = {names for names in missing if names[: len(average)] == average}
        whole = {average + names for names in names_of(as_state(node))}
        if not ours or ours != whole:
            continue  # a part of it is there: a damaged or a foreign one
        params = _origin(function, target, average, told)
        for names in ours:
            rest = names[len(average) :]
            if rest[0] != "average":
                seeds[names] = None
            elif (source := params + rest[1:]) in saved:
                seeds[names] = source
    return seeds


def _origin(function: str, target: Any, average: Names, told: Choice) -> Names:
    """The names of what a new average starts from: its parameters or its center."""
    for center in center_nodes(target):
        if (*center, "outer_state") == average[: len(center) + 1]:
            return (*center, "center")
    return located_at(function, target, average, told).params


def _belongs_to_dropped_average(names: Names, saved: dict, extra: Any) -> bool:
    """Whether a leaf is of an average of which the target has no part at all."""
    for i in range(len(names)):
        counters = {(*names[:i], field) for field in AverageState._fields[:2]}
        if counters <= extra and (*names[:i], "pending") in saved:
            return names[i] in AverageState._fields
    return False


def _shapes(sources: dict, wanted: dict, saved: dict) -> list[str]:
    return [
        f"{'/'.join(new)} has shape {tuple(shape_of(saved[old]))} there and "
        f"{tuple(shape_of(wanted[new]))} in the target"
        for new, old in sorted(sources.items())
        if not _same_shape(wanted[new], saved[old])
    ]


def _same_shape(here: Any, there: Any) -> bool:
    """Whether a leaf on disk is what the target wants; of a key, the integers in it."""
    if jnp.issubdtype(getattr(here, "dtype", jnp.float32), jax.dtypes.prng_key):
        here = jax.eval_shape(jax.random.key_data, here)
    return shape_of(here) is None or tuple(shape_of(here)) == tuple(shape_of(there))
