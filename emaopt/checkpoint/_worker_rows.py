"""Local updates restored with another number of workers, without any, or as the first.

The center (slow weights) carries over: new workers start from it, as after an exchange,
and a run without workers takes it for its parameters. Each worker's own slots go to the
worker of the same number; if there are more workers than before, the slots are dealt out
again from the first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._names import is_below, joined
from emaopt._nodes import as_state, center_nodes
from emaopt._places import Place, Ways, located_at, shape_of, told_ways
from emaopt._types import Leaf, PyTree
from emaopt.checkpoint._arrays import index_of
from emaopt.checkpoint._files import Names, located_in, names_of

# New workers start as after an exchange, which leaves these fields at zero.
_SINCE_EXCHANGE = (
    "since_exchange",
    "has_missed",
    "accumulated",
    "residual",
    "in_flight",
)
_COUNTS = ("num_steps", "num_left_out", "num_missed")
_OWN = ("inner_state", "num_missed")  # row w goes to worker w


class Rows(NamedTuple):
    """What changes in a state with the number of its workers."""

    sources: dict[Names, Names]  # name in the target -> name in the saved state
    rows: set[Names]  # leaves of the target with other rows than their sources
    fresh: set[Names]  # leaves of the target that start at zero
    kept: set[Names]  # leaves that the saved state lacks: as in the target
    left: set[Names]  # leaves of the saved state without a place in the target
    report: list[str]


class _Local(NamedTuple):
    """Local updates in a state."""

    way: Names
    params: Names
    workers: int | None  # None: no axis of them

    @property
    def center(self) -> Names:
        return (*self.way, "center")


def fit_workers(
    function: str,
    target: PyTree,
    disk: PyTree,
    saved: dict[Names, Leaf],
    sources: dict[Names, Names],
    params: Ways,
    known: dict[Names, Names],
    ignore_extra: bool,
) -> Rows:
    """Finds the sources of a target's leaves in a state with other workers.

    `params` says where parameters stand in the target, `known` where in the saved state.
    """
    rows = Rows(dict(sources), set(), set(), set(), set(), [])

    def here(way: Names) -> Place:
        if params is not None:
            return located_at(function, target, way, params)
        # Untold, they are looked for where the record has them in the saved state.
        at = known.get(way, ())
        return located_in(function, target, way, at=at, option="params")

    def there(way: Names) -> Place:
        at, told = known.get(way, ()), told_ways(params, way)
        return located_in(function, disk, way, at=at, known=told, option="params")

    ours, theirs = _locals(target, here), _locals(disk, there)
    wanted = names_of(target)
    for local in ours:
        centers = [n for n in wanted if is_below(n, local.center)]
        if not centers:
            continue
        # Any leaf of the center that was saved will do: its first one may be new.
        source = next((sources[n] for n in centers if n in sources), ())
        old = next((one for one in theirs if is_below(source, one.center)), None)
        theirs = [one for one in theirs if one is not old]
        if old is None or old.workers != local.workers:
            _start_workers(rows, local, old, wanted, saved)
    # The target goes on with none of these.
    for old in theirs:
        _end_workers(rows, old, wanted, saved, ignore_extra)
    return rows


def _locals(state: PyTree, located: Callable[[Names], Place]) -> list[_Local]:
    """The local updates in a state; the parameters' first axis tells the workers."""
    found = []
    for way, node in center_nodes(state).items():
        below = names_of(as_state(node).center)
        if not below:
            continue
        place = located(way)
        leaves = names_of(state)
        rest, center = next(iter(below.items()))
        # Stacked parameters have one axis more than their center.
        shape: Any = shape_of(leaves[place.params + rest]) or ()
        stacked = len(shape) > len(shape_of(center) or ())
        found.append(_Local(way, place.params, shape[0] if stacked else None))
    return found


def _start_workers(
    rows: Rows,
    local: _Local,
    old: _Local | None,
    wanted: dict[Names, Leaf],
    saved: dict[Names, Leaf],
) -> None:
    """Starts all workers from the center, or from the parameters of a run without any."""
    for names in wanted:
        if is_below(names, local.center):
            rest = names[len(local.center) :]
            param = local.params + rest
            source = rows.sources.get(param if old is None else names)
            if source is None:
                continue
            # The workers' parameters, and what each has pulled, are copies of the center.
            for leaf in (param, (*local.way, "pulled", *rest)):
                if leaf in wanted:
                    rows.sources[leaf] = source
                    rows.rows.add(leaf)
            rows.sources[names] = source
        elif is_below(names, local.way):
            field = names[len(local.way)]
            if field in _SINCE_EXCHANGE or (field in _COUNTS and old is None):
                rows.sources.pop(names, None)
                rows.fresh.add(names)
            elif field in _OWN:
                rows.rows.add(names)
            elif field == "outer_state" and names not in rows.sources:
                rows.kept.add(names)
    if old is None:
        rows.report.append(
            f"started {local.workers or 'the'} workers from the parameters, at "
            f"{joined(local.way)}"
        )
        return
    rows.left.update(_all_of(old, saved))
    late = any(is_below(names, (*old.way, "in_flight")) for names in saved)
    dropped = "; commits in flight were dropped, which synchronize lands before a save"
    rows.report.append(
        f"started {local.workers} workers from the center of {old.workers}, at "
        f"{joined(local.way)}; their optimizers' own slots are those of the workers of "
        f"the same numbers{dropped if late else ''}"
    )


def _end_workers(
    rows: Rows,
    old: _Local,
    wanted: dict[Names, Leaf],
    saved: dict[Names, Leaf],
    ignore_extra: bool,
) -> None:
    """Gives a run without workers the center, and the first worker's slots.

    A target of the parameters alone, in the workers' shapes, gets those of the workers.
    """
    # Only a target that takes slots over, or must take everything, is a run that goes on.
    inner = (*old.way, "inner_state")
    goes_on = not ignore_extra or any(is_below(s, inner) for s in rows.sources.values())
    ended = False
    for names, source in list(rows.sources.items()):
        center = old.center + source[len(old.params) :]
        if is_below(source, old.params) and center in saved:
            if goes_on or len(shape_of(wanted[names])) < len(saved[source].shape):
                rows.sources[names] = center
                ended = True
        elif is_below(source, inner):
            rows.rows.add(names)
    if ended:
        rows.left.update(_all_of(old, saved))
        rows.report.append(
            f"took the center at {joined(old.way)} for the parameters, and the first "
            "worker's slots"
        )


def _all_of(old: _Local, saved: dict[Names, Leaf]) -> list[Names]:
    """The leaves of local updates and of their workers."""
    return [n for n in saved if is_below(n, old.params) or is_below(n, old.way)]


def refit(value: jax.Array, like: Leaf) -> jax.Array:
    """An array with the rows of another number of workers, as `index_of` has them."""
    shape = tuple(np.shape(like))
    part = tuple((0, n) for n in shape)
    value = jnp.broadcast_to(value[index_of(part, shape, np.shape(value))], shape)
    sharding = getattr(like, "sharding", None)
    return value if sharding is None else jax.device_put(value, sharding)
