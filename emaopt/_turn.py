"""The exchange of a fragment at one step: at once, late, or landed before."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax

from emaopt._conditional import once_if
from emaopt._eager import others, step
from emaopt._exchange import Exchange, Fixed, Part, Voices
from emaopt._fragments import Column, subtree
from emaopt._in_flight import Flight, after_landing, chosen, commit, land
from emaopt._jax_internals import traced
from emaopt._local_checks import Settings
from emaopt._reductions import Subtree
from emaopt._states import LocalUpdatesState
from emaopt._tracing import TreeDef
from emaopt._types import PyTree, Scalar


@dataclass(eq=False)  # so it has a hash, for wrappers that jit an update
class Order:
    """What functions beside the optimizer order of it, in place of the flag `exchange`.

    With none of `commit`, `land` and `ask` it is a step without an exchange.
    """

    commit: bool = False  # make commits at this step
    land: bool = False  # take no step, and only land what is in flight
    landed: LocalUpdatesState | None = None  # let workers pull what has landed here
    delay: int = 0  # the engine's answer to `land`
    ask: bool = False  # change nothing, and only answer
    answer: Settings | None = None  # the engine itself, to `ask`

    def __bool__(self) -> bool:
        return self.commit  # as wrappers that read the flag understand it


def update_of(
    function: str, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[PyTree, PyTree]]:
    """An optimizer's update, an error unless it takes an order for local updates."""
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        refuse_dropped(function)
    return optimizer.update


def refuse_dropped(function: str) -> NoReturn:
    """Raises for an optimizer that does not pass an order on."""
    raise ValueError(
        f"{function}: a wrapper in this optimizer does not pass extra arguments on to "
        "the local updates, so they cannot be told when to exchange. It must be an "
        "optax.GradientTransformationExtraArgs, whose update takes **extra_args."
    )


class Outcome(NamedTuple):
    """A fragment after one step."""

    part: Part
    flight: Flight | None
    pulls: Scalar | bool  # whether workers pull the center
    valid: jax.Array | None  # flags of the workers that were not left out then

    def keeping(self, k: int) -> tuple[PyTree, PyTree]:
        """(who keeps something of its own, the progress to carry over), of a leaf."""
        return self.valid, None if self.flight is None else self.flight.rows[k]


@dataclass(frozen=True)
class Turn:
    """The exchange of one fragment at one step."""

    exchange: Exchange
    delay: int
    carries: bool  # mix="carry"
    eager: bool
    function: str  # named in errors
    fragment: list[int]  # positions of its leaves
    treedef: TreeDef  # of the parameters
    moving: list[bool]  # which of its leaves have a gradient
    local: Callable[[PyTree, jax.Array], Column] | None = None  # parameters now
    weights: jax.Array | None = None

    def at_once(self, part: Part, due: Scalar | bool, fixed: PyTree) -> Outcome:
        """Exchanges the commits of this step, if it is due.

        `fixed` is what an exchange only reads: (for `local`, Σ gradients, local steps
        since the last commit, flags of the workers that missed one of them).
        """
        if traced(due):
            part = once_if(due, self._exchange_now, part, fixed)
        elif due:
            part = self._exchange_now(part, fixed)
        return Outcome(part, None, due, part.valid)

    def late(
        self, part: Part, flight: Flight, due: Scalar | bool, fixed: PyTree
    ) -> Outcome:
        """Makes commits if it is due, and lands those in flight if it is time for it.

        They land after `delay` steps, but not after the next ones have been made. At a
        step with both, the new ones are made first.
        """
        *_, since, _ = fixed
        lands = (flight.num_steps > 0) & ((since >= self.delay) | due)
        if self.eager:  # it needs the last round's mean when it makes the new commit
            lands &= due

        # One conditional, with a second one inside: XLA would copy what goes through two
        # of them at every step.
        def act(changing: tuple[Part, Flight], now: PyTree) -> tuple[Part, Flight]:
            part, flight = changing
            due, lands, fixed = now
            # Also where none is due: workers that carry their progress over need it.
            new = self._commit(part, flight, fixed)
            # The landing reads the old commits after the new ones are computed, and these
            # are stored after that: else XLA would copy both at every step.
            workers = self.exchange.workers
            old = flight._replace(sums=workers.held(new.valid, flight.sums))
            part, rest = once_if(lands, self._land, (part, old.sums), old)
            if self.eager:
                rest = [jnp.where(lands, row, 0) for row in rest]
            part, new = self._eager(part, new, rest)
            stored = workers.held(part.num_left_out, (new.sums, new.progress))
            new = new._replace(sums=stored[0], progress=stored[1])
            return part, self._after_landing(new, flight, due, lands)

        now = due, lands, fixed
        part, flight_after = once_if(lands | due, act, (part, flight), now)
        return Outcome(part, flight_after, due if self.eager else lands, flight.valid)

    def ordered(
        self,
        part: Part,
        flight: Flight,
        due: bool,
        landed: tuple[Part, list[jax.Array]] | None,
        fixed: PyTree,
    ) -> Outcome:
        """The same without a conditional.

        `landed` is what `landed` returned, which the workers pull at this step.
        """
        if landed is None:
            if due:
                # Nothing is in flight, unless a wrapper has skipped the update that
                # pulls: then the new commits hold what these do.
                empty = flight._replace(num_steps=jnp.zeros_like(flight.num_steps))
                flight_after = self._commit(part, empty, fixed)
                return Outcome(part, flight_after, False, flight.valid)
            return Outcome(part, flight, False, flight.valid)
        new = flight
        if due or self.carries:  # progress that is carried over has to be known until now
            new = self._commit(part, flight, fixed)
        part, rest = landed
        if due:
            part, new = self._eager(part, new, rest)
        lands = flight.num_steps > 0
        new = self._after_landing(new, flight, due, lands)
        return Outcome(part, new, due if self.eager else lands, flight.valid)

    def landed(self, part: Part, flight: Flight) -> tuple[Part, list[jax.Array]]:
        """(the part after the commits in flight were applied, if any, the others')."""
        there = flight.num_steps > 0
        after, rest = self._land((part, flight.sums), flight)
        if self.eager:
            rest = [jnp.where(there, row, 0) for row in rest]
        return chosen(there, after, part), rest

    def _after_landing(
        self, new: Flight, old: Flight, due: Scalar | bool, lands: Scalar | bool
    ) -> Flight:
        lands = True if self.eager else lands  # each pulls its own center at its commit
        return after_landing(new, old, due, lands, self.carries)

    def _eager(
        self, part: Part, new: Flight, rest: list[jax.Array]
    ) -> tuple[Part, Flight]:
        if not self.eager:
            return part, new
        part, state = step(
            self.function, self.exchange, part, new, rest, self.moving, self._subtree
        )
        return part, new._replace(eager=state)

    def _exchange_now(self, part: Part, fixed: PyTree) -> Part:
        *_, since, missed = fixed
        read = functools.partial(self._read, fixed)
        voices = Voices(~missed, self.weights)
        return self.exchange(part, read, since, voices, self._subtree)

    def _commit(self, part: Part, flight: Flight, fixed: PyTree) -> Flight:
        *_, since, missed = fixed
        voices, rows = Voices(~missed, self.weights), self._read(fixed, ~missed)
        return commit(self.exchange, part, flight, rows, since, voices)

    def _land(
        self, changing: tuple[Part, list[jax.Array]], flight: Flight
    ) -> tuple[Part, list[jax.Array]]:
        part, rows = changing
        part, reduced = land(self.exchange, part, flight, self.moving, self._subtree)
        return part, others(self.exchange, flight, reduced) if self.eager else rows

    def _read(self, fixed: PyTree, ready: jax.Array) -> list[Fixed]:
        before, sums, *_ = fixed
        assert self.local is not None  # only a landing does without
        local = self.local(before, ready)
        held = self.exchange.workers.held(ready, sums)
        return [Fixed(local[i], s) for i, s in zip(self.fragment, held, strict=True)]

    @property
    def _subtree(self) -> Subtree:
        return functools.partial(subtree, self.treedef, self.fragment)
