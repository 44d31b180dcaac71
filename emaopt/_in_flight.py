"""Commits in flight: made at one step, reduced and applied `delay` steps later.

Meanwhile the workers go on. What of their progress the center lacks is

    c - θ = (the commit in flight, unless the worker pulled after it) + what came since

and a new commit holds the last term only, so that no progress is committed twice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emaopt._collectives import of_all
from emaopt._commits import make_commit
from emaopt._exchange import Exchange, Fixed, Leaf, Part, Voices, Votes
from emaopt._reductions import Reduced, Subtree
from emaopt._states import InFlight
from emaopt._tracing import TreeDef
from emaopt._types import DTypeLike, PyTree, Scalar
from emaopt._workers import Mapped, Stacked


class Flight(NamedTuple):
    """The commits in flight of one fragment: fields of `InFlight`, for that fragment."""

    num_steps: Scalar
    num_present: Scalar
    valid: jax.Array
    pulled: jax.Array
    weights: jax.Array
    sums: list[jax.Array]
    progress: list[jax.Array] | None
    eager: PyTree

    @property
    def rows(self) -> list[jax.Array]:
        """The workers' progress, but for sums of gradients with nothing beside them."""
        return self.sums if self.progress is None else self.progress


def commit(
    exchange: Exchange,
    part: Part,
    flight: Flight,
    fixed: list[Fixed],
    num_steps: Scalar,
    voices: Voices,
) -> Flight:
    """New commits of one fragment, in the place of those in flight.

    Args:
      exchange, part, fixed, num_steps, voices: As in a call of `Exchange`; `fixed` has
        been read.
      flight: The commits in flight.
    """
    of_gradients = exchange.commit == "mean_gradient"
    progress: list[jax.Array] = []
    if not of_gradients or flight.progress is not None:
        unlanded = (flight.num_steps > 0) & ~flight.pulled
        progress = [
            uncommitted(exchange.workers, leaf, f.local, unlanded, row)
            for leaf, f, row in zip(part.leaves, fixed, flight.rows, strict=True)
        ]
    sums = [f.accumulated for f in fixed if f.accumulated is not None]
    sums = sums if of_gradients else progress
    new = flight._replace(
        num_steps=num_steps,
        sums=sums,
        progress=progress if flight.progress is not None else None,
    )
    # They will be in memory, in the state: to check them computes nothing twice. All are
    # checked, so that what waits for the flags waits for all.
    sent = committed(exchange, part, new)
    kept = [sent, progress] if flight.progress is not None else [sent]
    rows = [
        list(of_leaf)
        for f, *of_leaf in zip(fixed, *kept, strict=True)
        if f.local is not None
    ]
    valid = exchange.workers.finite(rows, voices.committing)
    votes = exchange.weighed(valid, voices)
    weights = valid if votes.weights is None else votes.weights
    return new._replace(
        num_present=jnp.asarray(votes.num_present, jnp.int32),
        valid=valid,
        pulled=jnp.zeros_like(valid),
        weights=weights.astype(jnp.float32),
    )


def land(
    exchange: Exchange,
    part: Part,
    flight: Flight,
    moving: list[bool],
    subtree: Subtree,
) -> tuple[Part, Reduced]:
    """The part after the commits in flight have been applied to its center.

    `moving` tells the leaves that are exchanged. Returns what was reduced as well.
    """
    rows = committed(exchange, part, flight)
    commits = {k: row for k, row in enumerate(rows) if moving[k]}
    counted = flight.weights > 0
    votes = Votes(flight.valid, counted, flight.weights, flight.num_present)
    # The workers' parameters are for elastic workers, who have no delay.
    return exchange.move(part, {}, commits, votes, subtree)


def committed(exchange: Exchange, part: Part, flight: Flight) -> list[jax.Array]:
    """The commits in flight, with what the last ones lost in the exchange's dtype."""
    rows = flight.sums
    if exchange.commit != "delta":
        steps = jnp.maximum(flight.num_steps, 1)  # 0: none in flight, to be ignored
        rows = [row / steps.astype(row.dtype) for row in rows]
    return [
        row if leaf.residual is None else row + leaf.residual
        for leaf, row in zip(part.leaves, rows, strict=True)
    ]


def chosen(due: Scalar, after: Part, before: Part) -> Part:
    """The part after an exchange that counts where `due`, else as it was before.

    Not a conditional, which the compiler would not run beside other work.
    """
    return jax.tree.map(lambda new, old: jnp.where(due, new, old), after, before)


def after_landing(
    new: Flight, old: Flight, due: Scalar | bool, lands: Scalar | bool, carries: bool
) -> Flight:
    """The flight after a step at which the old commits may land: the new ones, if due."""
    # Progress that is carried over is not pulled away, but for workers left out.
    pulled = ~old.valid if carries else jnp.full_like(old.valid, True)
    num_steps = jnp.where(due, new.num_steps, 0)
    return new._replace(num_steps=num_steps, pulled=pulled & lands)


def uncommitted(
    workers: Stacked | Mapped,
    leaf: Leaf,
    local: jax.Array | None,
    unlanded: jax.Array,
    in_flight: jax.Array,
) -> jax.Array:
    """The progress that is neither in the center nor in flight, as rows c - θ.

    `unlanded`: flags of the workers whose distance from the center holds `in_flight`.
    """
    if local is None:  # no gradient, no progress
        return jnp.zeros_like(in_flight)
    start = of_all(leaf.center if leaf.pulled is None else leaf.pulled, local)
    delta = make_commit("delta", start, local, None, jnp.int32(1))
    return delta - workers.choose(unlanded, in_flight, jnp.zeros_like(in_flight))


def mixed(
    workers: Stacked | Mapped,
    mix: float | str,
    pulled: jax.Array,
    local: jax.Array,
    valid: jax.Array,
    progress: PyTree,
) -> jax.Array:
    """What workers that pull a center go on from.

    A worker that was left out pulls the center whole: its own parameters may be the
    reason.

    Args:
      workers: The form of the workers.
      mix: The share of their own parameters that they keep, or `CARRY`.
      pulled: The center, in a shape that broadcasts against `local`.
      local: The workers' parameters.
      valid: Flags of the workers that were not left out.
      progress: c - θ of what came since the commit that lands; read for `CARRY`.
    """
    if isinstance(mix, str):
        own = pulled - progress
    else:
        own = mix * local.astype(pulled.dtype) + (1 - mix) * pulled
    return workers.choose(valid, own, jnp.broadcast_to(pulled, own.shape))


def none_in_flight(
    num_fragments: int,
    zero: Callable[[DTypeLike], jax.Array],
    each: Callable[[DTypeLike], jax.Array],
    zeros: Callable[[], PyTree],
    both: bool,
    eager: tuple[PyTree, ...] | None,
) -> InFlight:
    """The field of a new state.

    Args:
      num_fragments: F.
      zero: A scalar zero of a dtype.
      each: One for each worker.
      zeros: Returns a new tree like the parameters, in the center's dtypes.
      both: Whether the workers' progress is kept beside sums of gradients.
      eager: Each worker's outer state for each fragment, or None.
    """

    def tuple_of(make: Callable[[DTypeLike], jax.Array], dtype: DTypeLike) -> tuple:
        return tuple(make(dtype) for _ in range(num_fragments))

    return InFlight(
        num_steps=tuple_of(zero, jnp.int32),
        num_present=tuple_of(zero, jnp.int32),
        valid=tuple_of(each, jnp.bool_),
        pulled=tuple_of(each, jnp.bool_),
        weights=tuple_of(each, jnp.float32),
        sums=zeros(),
        progress=zeros() if both else None,
        eager=eager,
    )


def flights_of(
    workers: Stacked | Mapped,
    in_flight: PyTree,
    fragments: list[list[int]],
    column: Callable[[PyTree], list],
) -> list[Flight]:
    """The commits in flight of each fragment; `column` gives a tree's leaves in order."""
    if not isinstance(in_flight, InFlight):
        return []
    sums, progress = column(in_flight.sums), column(in_flight.progress)
    both = in_flight.progress is not None
    return [
        Flight(
            num_steps=in_flight.num_steps[number],
            num_present=in_flight.num_present[number],
            valid=workers.loaded(in_flight.valid[number]),
            pulled=workers.loaded(in_flight.pulled[number]),
            weights=workers.loaded(in_flight.weights[number]),
            sums=[sums[i] for i in fragment],
            progress=[progress[i] for i in fragment] if both else None,
            eager=None if in_flight.eager is None else in_flight.eager[number],
        )
        for number, fragment in enumerate(fragments)
    ]


def in_flight_of(
    workers: Stacked | Mapped,
    flights: list[Flight],
    old: PyTree,
    fragments: list[list[int]],
    treedef: TreeDef,
) -> PyTree:
    """The field of the state, from the commits in flight of each fragment."""
    if not isinstance(old, InFlight):
        return old

    def tree(field: str) -> PyTree:
        if (before := getattr(old, field)) is None:
            return None
        leaves = treedef.flatten_up_to(before)
        for flight, fragment in zip(flights, fragments, strict=True):
            for i, leaf in zip(fragment, getattr(flight, field), strict=True):
                leaves[i] = leaf
        return jax.tree.unflatten(treedef, leaves)

    def own(field: str) -> tuple[jax.Array, ...]:
        pairs = zip(flights, getattr(old, field), strict=True)
        return tuple(workers.stored(getattr(f, field), like) for f, like in pairs)

    return InFlight(
        num_steps=tuple(flight.num_steps for flight in flights),
        num_present=tuple(flight.num_present for flight in flights),
        valid=own("valid"),
        pulled=own("pulled"),
        weights=own("weights"),
        sums=tree("sums"),
        progress=tree("progress"),
        eager=None if old.eager is None else tuple(f.eager for f in flights),
    )
