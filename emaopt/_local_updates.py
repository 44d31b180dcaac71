"""Local steps, a commit, an outer step: the engine of every local-update method."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._checks import MAX_COUNT
from emaopt._collectives import of_all
from emaopt._commits import accumulate, start_center
from emaopt._exchange import Exchange, Part
from emaopt._fragments import Column, column_of, fragments_of, leaves_of, subtree, tree_of
from emaopt._in_flight import flights_of, in_flight_of, mixed, none_in_flight
from emaopt._jax_internals import traced
from emaopt._leaves import is_array, is_averaged, replicated_beside
from emaopt._local_checks import (
    CARRY,
    Settings,
    as_period,
    as_rate,
    as_weights,
    check_call,
    check_in_flight,
    keeping_structure,
    keeps_both,
    mixes,
    refuse_branch,
)
from emaopt._rounding import applied, lead
from emaopt._states import (
    LocalUpdatesState,
    refuse_clocks,
    refuse_primal_averaging,
)
from emaopt._tracing import Computed, Selected, Traced, TreeDef
from emaopt._tree_checks import check_arrays, refuse_unlike
from emaopt._turn import Order, Turn
from emaopt._types import PyTree, Scalar
from emaopt._workers import Mapped, Stacked
from emaopt._xla import always


@dataclass(frozen=True)
class Engine(Settings):
    """Steps of `inner` on every worker, and steps of `outer` against their commits."""

    @property
    def workers(self) -> Stacked | Mapped:
        if self.num_workers is None:
            return Mapped(self.axis_name)
        return Stacked(self.num_workers)

    @property
    def exchange(self) -> Exchange:
        return Exchange(
            self.workers,
            self.outer,
            self.commit,
            self.reduce,
            as_rate(self.function, self.moving_rate),
            self.exchange_dtype,
        )

    def init(self, params: PyTree) -> LocalUpdatesState:
        check_arrays(self.function, "params", params, others=True)
        leaves, treedef = jax.tree.flatten(params)
        if self.num_workers is not None:
            self.workers.check(self.function, leaves)
        center = [start_center(self.workers.first(leaf)) for leaf in leaves]
        fragments = fragments_of(self.function, center, self.num_fragments)
        zero = replicated_beside(leaves)
        each = functools.partial(self.workers.zero, params)

        def rows(start: Callable[[jax.Array], jax.Array]) -> PyTree:
            """A tree like the parameters, in the center's dtypes."""
            return jax.tree.map(
                lambda x: start(start_center(x)) if is_averaged(x) else start_center(x),
                params,
            )

        zeros = functools.partial(rows, jnp.zeros_like)
        both = keeps_both(self)
        eager = None
        if self.eager:
            pulled = column_of(treedef, rows(jnp.asarray))
            eager = tuple(
                self.workers.init(self.outer, subtree(treedef, f, [pulled[i] for i in f]))
                for f in fragments
            )
        empty = functools.partial(
            none_in_flight, len(fragments), zero, each, zeros, both, eager
        )
        keeps_pulled = self.exchange.keeps_pulled or self.eager
        still = optax.EmptyState() if mixes(self) else None  # which `local_round` reads
        inner_state = self.workers.init(self.inner, params)
        refuse_primal_averaging(self.function, inner_state)
        outer_state = tuple(
            self.outer.init(subtree(treedef, f, [center[i] for i in f]))
            for f in fragments
        )
        refuse_primal_averaging(self.function, outer_state)
        refuse_clocks(self.function, outer_state)
        return LocalUpdatesState(
            num_steps=zero(jnp.int32),
            num_left_out=zero(jnp.int32),
            num_missed=each(jnp.int32),
            since_exchange=tuple(zero(jnp.int32) for _ in fragments),
            has_missed=tuple(each(jnp.bool_) for _ in fragments),
            inner_state=inner_state,
            outer_state=outer_state,
            accumulated=zeros() if self.commit == "mean_gradient" else None,
            pulled=rows(jnp.asarray) if keeps_pulled else None,
            residual=zeros() if self.error_feedback else None,
            in_flight=empty() if self.delay else still,
            center=jax.tree.unflatten(treedef, center),
        )

    def update(
        self,
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        exchange: bool | Scalar | Order | None = None,
        weights: PyTree = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, LocalUpdatesState]:
        order = exchange if isinstance(exchange, Order) else None
        forced: Any = exchange if order is None else order.commit
        check_call(self.function, state, params, forced)
        if order is not None and order.ask:
            order.answer = self
            return updates, state
        # Below, `forced is not False` would not hold back NumPy's False.
        if isinstance(forced, np.bool_):
            forced = bool(forced)
        leaves, treedef = jax.tree.flatten(params)
        workers = self.workers
        workers.check(self.function, leaves)
        check_in_flight(self, state)
        if order is not None and order.land:
            # Eager workers need what has landed at their commit.
            order.delay = MAX_COUNT if self.eager else self.delay
            moving = [leaf is not None for leaf in column_of(treedef, updates)]
            return updates, self._landed(state, treedef, moving)
        weights = as_weights(self.function, weights, self.num_workers)
        inner = keeping_structure(self.function, self.inner)

        column = functools.partial(column_of, treedef)
        check_arrays(self.function, "updates", updates)
        try:
            gradients = column(updates)
            if self.num_workers is not None:
                workers.check(self.function, [g for g in gradients if is_array(g)])
        except (TypeError, ValueError) as error:
            refuse_unlike(self.function, params, error, updates=updates)
            raise
        num_steps: Any = optax.safe_increment(state.num_steps)
        # Computed here, `num_steps` knows of a conditional around this call. A value that
        # was passed in may come from outside of it.
        if self.axis_name is not None and (forced is not False or self.delay):
            refuse_branch(self.function, num_steps)

        def each_step(
            updates: PyTree, inner_state: PyTree, params: PyTree
        ) -> tuple[Column, PyTree]:
            """A step of every worker, finite or not."""
            steps, inner_state = workers.step(
                self.function,
                inner,
                updates,
                inner_state,
                params,
                extra_args,
                self.per_worker,
            )
            return column(steps), inner_state

        def taken_step(
            before: tuple[PyTree, PyTree, PyTree], taken: jax.Array, ready: jax.Array
        ) -> tuple[Column, PyTree]:
            """The step of the workers that can take it; the others stay as they are."""
            before = _, inner_state, _ = workers.held(ready, before)
            old = jax.tree.leaves(inner_state)
            steps, after = local_step.selecting(
                lambda number, new: workers.choose(taken, new, old[number]), *before
            )
            return workers.or_zeros(taken, steps), after

        def each_local(
            before: tuple[PyTree, PyTree, PyTree], taken: jax.Array, ready: jax.Array
        ) -> list[jax.Array | None]:
            """The parameters after this step, None where they have no gradient."""
            *_, params = before
            steps, _ = taken_step(before, taken, ready)
            return [
                None if gradient is None else applied(own, step)
                for own, gradient, step in zip(
                    column(params), gradients, steps, strict=True
                )
            ]

        # 1. Try the local step, to know whether it can be taken before slots are changed.
        before = updates, state.inner_state, params
        in_trace = traced((before, extra_args))
        local_step = (Selected if in_trace else Computed)(each_step, *before)
        tried, _ = local_step(*before)
        taken = _finite(workers, leaves, gradients, tried)
        # Every exchange reads the parameters after the step twice. Traced here, the step
        # stands in the program once for all of them.
        after = Traced(each_local, before, taken, taken) if in_trace else each_local

        def local(before: PyTree, ready: jax.Array) -> Column:
            return after(before, taken, ready)

        # 2. Exchange the fragments that are due, one after the other.
        fragments = fragments_of(self.function, column(state.center), self.num_fragments)
        parts = self._parts(state, treedef, fragments)
        flights = flights_of(workers, state.in_flight, fragments, column)
        given: Column = [None] * len(fragments)  # what has landed before this step
        if order is not None and order.landed is not None:
            landed = flights_of(workers, order.landed.in_flight, fragments, column)
            rests = [flight.sums for flight in landed]
            landed_parts = self._parts(order.landed, treedef, fragments)
            given = list(zip(landed_parts, rests, strict=True))
        sums, num_left_out = column(state.accumulated), state.num_left_out
        since_exchange, has_missed, outcomes = [], [], []
        for number, fragment in enumerate(fragments):
            since: Any = state.since_exchange[number]
            # `since` does not count this step yet: 0 is the first after an exchange.
            for i in fragment:
                if state.accumulated is not None:
                    gradient = workers.or_zeros(taken, gradients[i])
                    sums[i] = accumulate(sums[i], gradient, since == 0)
            since = optax.safe_increment(since)
            missed = workers.loaded(state.has_missed[number]) | ~taken
            due = self._due(number, num_steps, since) if forced is None else forced
            # A Python value compiles to no conditional; False, to no exchange either.
            due = due if traced(due) else bool(due)
            fixed = before, [sums[i] for i in fragment], since, missed
            part = parts[number]._replace(num_left_out=num_left_out)
            moving = [gradients[i] is not None for i in fragment]
            turn = self._turn(fragment, treedef, moving, local, weights)
            if not self.delay:
                outcome = turn.at_once(part, due, fixed)
            elif order is None:
                outcome = turn.late(part, flights[number], due, fixed)
            else:
                outcome = turn.ordered(
                    part, flights[number], bool(due), given[number], fixed
                )
            outcomes.append(outcome)
            num_left_out = outcome.part.num_left_out
            since_exchange.append(jnp.where(due, 0, since))
            missed = jnp.where(due, False, missed)
            has_missed.append(workers.stored(missed, state.has_missed[number]))

        # 3. Take the local step from the same state, and overwrite the slots in place. It
        # waits for the exchanges, which read the slots and compute `num_left_out` last:
        # without an order between the two, XLA would copy the slots at every step.
        ready = taken & always(num_left_out)
        for outcome in outcomes:
            if outcome.flight is not None:  # whose flags are computed last of a commit
                ready &= always(outcome.flight.valid)
        steps, inner_state = taken_step(before, taken, ready)
        # 4. Where workers pull the center, updates lead to what they go on from.
        changing = leaves_of(treedef, state)
        for fragment, outcome in zip(fragments, outcomes, strict=True):
            for k, i in enumerate(fragment):
                changing[i] = leaf = outcome.part.leaves[k]
                if outcome.pulls is False or gradients[i] is None:
                    continue
                target = leaf.center if leaf.pulled is None else leaf.pulled
                target = of_all(target, leaves[i])
                if mixes(self):
                    now = applied(leaves[i], steps[i])
                    target = mixed(workers, self.mix, target, now, *outcome.keeping(k))
                steps[i] = lead(leaves[i], target, steps[i], outcome.pulls)

        tree = functools.partial(tree_of, treedef)
        num_missed = workers.loaded(state.num_missed)
        num_missed = jnp.where(taken, num_missed, optax.safe_increment(num_missed))
        return jax.tree.unflatten(treedef, steps), LocalUpdatesState(
            num_steps=num_steps,
            num_left_out=num_left_out,
            num_missed=workers.stored(num_missed, state.num_missed),
            since_exchange=tuple(since_exchange),
            has_missed=tuple(has_missed),
            inner_state=inner_state,
            outer_state=tuple(outcome.part.outer_state for outcome in outcomes),
            accumulated=tree(sums, state.accumulated),
            pulled=tree([leaf.pulled for leaf in changing], state.pulled),
            residual=tree([leaf.residual for leaf in changing], state.residual),
            in_flight=in_flight_of(
                workers,
                [outcome.flight for outcome in outcomes],
                state.in_flight,
                fragments,
                treedef,
            ),
            center=tree([leaf.center for leaf in changing], state.center),
        )

    def _parts(
        self, state: LocalUpdatesState, treedef: TreeDef, fragments: list[list[int]]
    ) -> list[Part]:
        """What exchanges change of each fragment."""
        leaves = leaves_of(treedef, state)
        # Asked who was left out, and does not mix; here stand any flags of that shape.
        asks = mixes(self) and not self.delay
        return [
            Part(
                [leaves[i] for i in fragment],
                outer_state,
                state.num_left_out,
                self.workers.loaded(missed) if asks else None,
            )
            for fragment, outer_state, missed in zip(
                fragments, state.outer_state, state.has_missed, strict=True
            )
        ]

    def _landed(
        self, state: LocalUpdatesState, treedef: TreeDef, moving: list[bool]
    ) -> LocalUpdatesState:
        """The state after all that is in flight has landed, before workers pull it."""
        column = functools.partial(column_of, treedef)
        fragments = fragments_of(self.function, column(state.center), self.num_fragments)
        flights = flights_of(self.workers, state.in_flight, fragments, column)
        parts = self._parts(state, treedef, fragments)
        changed = leaves_of(treedef, state)
        num_left_out, outer_state = state.num_left_out, []
        for number, fragment in enumerate(fragments):
            part, flight = parts[number], flights[number]
            turn = self._turn(fragment, treedef, [moving[i] for i in fragment])
            part, rest = turn.landed(part._replace(num_left_out=num_left_out), flight)
            flights[number] = flight._replace(sums=rest)
            num_left_out = part.num_left_out
            outer_state.append(part.outer_state)
            for i, leaf in zip(fragment, part.leaves, strict=True):
                changed[i] = leaf
        pulled, residual, center = (list(c) for c in zip(*changed, strict=True))
        tree = functools.partial(tree_of, treedef)
        return state._replace(
            num_left_out=num_left_out,
            outer_state=tuple(outer_state),
            pulled=tree(pulled, state.pulled),
            residual=tree(residual, state.residual),
            in_flight=in_flight_of(
                self.workers, flights, state.in_flight, fragments, treedef
            ),
            center=tree(center, state.center),
        )

    @property
    def _turn(self) -> Callable[..., Turn]:
        """Of what belongs to one fragment, its turn."""
        own = self.exchange, self.delay, self.mix == CARRY, self.eager, self.function
        return functools.partial(Turn, *own)

    def _due(self, number: int, num_steps: Scalar, since: Scalar) -> Scalar:
        """Whether a fragment is exchanged after this step."""
        if callable(self.period):
            due = since >= as_period(self.function, self.period(num_steps))
        else:  # the fragments take turns
            period = int(self.period)  # NumPy's may be narrow, and wrap below
            offset = number * period // self.num_fragments
            # The inner remainder comes first, as num_steps + offset may exceed int32.
            due = (num_steps % period + offset) % period == 0
            # At MAX_COUNT the counter stops, and turns go by `since` alone.
            due = jnp.where(num_steps < MAX_COUNT, due, since >= period)
        return due | (num_steps <= self.warmup_steps)


def _finite(
    workers: Stacked | Mapped,
    leaves: Column,
    gradients: Column,
    steps: Column,
) -> jax.Array:
    """Flags of the workers whose gradients are finite, and parameters after the step.

    These parameters are finite only if the updates are, so updates need no check.
    """
    groups = []
    for leaf, gradient, step in zip(leaves, gradients, steps, strict=True):
        seen = [gradient] if is_averaged(gradient) else []
        if gradient is not None and is_averaged(leaf) and is_averaged(step):
            seen.append(applied(leaf, step))
        groups += [seen] if seen else []
    return workers.finite(groups, workers.same(True))
