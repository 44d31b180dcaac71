"""The exchange of a fragment at one step: at once, late, or landed before."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax

from emaopt._conditional import once_if
from emaopt._exchange import Exchange, Fixed, Part, Voices
from emaopt._fragments import Column, subtree
from emaopt._in_flight import Flight, after_landing, chosen, commit, land
from emaopt._jax_internals import traced
from emaopt._reductions import Subtree
from emaopt._states import LocalUpdatesState
from emaopt._tracing import TreeDef
from emaopt._types import PyTree, Scalar


@dataclass
class Order:
    """What `local_round` orders of an update, in place of the flag `exchange`.

    With neither `commit` nor `land` it is a step without an exchange.
    """

    commit: bool = False  # make commits at this step; without a delay, exchange them
    land: bool = False  # take no step, and only land what is in flight
    landed: LocalUpdatesState | None = None  # let workers pull what has landed here

    # Answers of the engine.
    delay: int = 0
    mixes: bool = False  # whether workers keep a part of their own when they pull


class Outcome(NamedTuple):
    """A fragment after one step."""

    part: Part
    flight: Flight | None
    pulls: Scalar | bool  # whether workers pull the center
    valid: jax.Array | None  # flags of the workers that were not left out then

    def own(self, k: int) -> tuple[PyTree, PyTree]:
        """(who goes on from something of its own, the progress), of the leaf at k."""
        return self.valid, None if self.flight is None else self.flight.rows[k]


@dataclass(frozen=True)
class Turn:
    """The exchange of one fragment at one step."""

    exchange: Exchange
    delay: int
    carries: bool  # mix="carry"
    fragment: list[int]  # positions of its leaves
    treedef: TreeDef  # of the parameters
    moving: list[bool]  # which of its leaves have a gradient
    local: Callable[[PyTree, jax.Array], Column] | None  # parameters now; see `late`
    weights: jax.Array | None

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

        # One conditional, with a second one inside: XLA would copy what goes through two
        # of them at every step.
        def act(changing: tuple[Part, Flight], now: PyTree) -> tuple[Part, Flight]:
            part, flight = changing
            due, lands, fixed = now
            new = self._commit(part, flight, fixed)
            # The landing reads the old commits after the new ones are computed, and these
            # are stored after that: else XLA would copy both at every step.
            workers = self.exchange.workers
            old = flight._replace(sums=workers.held(new.valid, flight.sums))
            part = once_if(lands, self._land, part, old)
            stored = workers.held(part.num_left_out, (new.sums, new.progress))
            new = new._replace(sums=stored[0], progress=stored[1])
            return part, after_landing(new, flight, due, lands, self.carries)

        now = due, lands, fixed
        part, flight_after = once_if(lands | due, act, (part, flight), now)
        return Outcome(part, flight_after, lands, flight.valid)

    def ordered(
        self, part: Part, flight: Flight, due: bool, landed: Part | None, fixed: PyTree
    ) -> Outcome:
        """The same without a conditional.

        `landed` is the part after an early landing, which the workers pull at this step.
        """
        new = flight
        if due or (landed is not None and self.carries):
            # Workers that carry their progress over have to know it until now.
            new = self._commit(part, flight, fixed)
        if landed is None:
            return Outcome(part, new, False, flight.valid)
        lands = flight.num_steps > 0
        new = after_landing(new, flight, due, lands, self.carries)
        return Outcome(landed, new, lands, flight.valid)

    def landed(self, part: Part, flight: Flight) -> Part:
        """The part after the commits in flight have been applied, if there are any."""
        return chosen(flight.num_steps > 0, self._land(part, flight), part)

    def _exchange_now(self, part: Part, fixed: PyTree) -> Part:
        *_, since, missed = fixed
        read = functools.partial(self._read, fixed)
        voices = Voices(~missed, self.weights)
        return self.exchange(part, read, since, voices, self._subtree)

    def _commit(self, part: Part, flight: Flight, fixed: PyTree) -> Flight:
        *_, since, missed = fixed
        voices, rows = Voices(~missed, self.weights), self._read(fixed, ~missed)
        return commit(self.exchange, part, flight, rows, since, voices)

    def _land(self, part: Part, flight: Flight) -> Part:
        return land(self.exchange, part, flight, self.moving, self._subtree)

    def _read(self, fixed: PyTree, ready: jax.Array) -> list[Fixed]:
        before, sums, *_ = fixed
        assert self.local is not None  # only a landing does without
        local = self.local(before, ready)
        held = self.exchange.workers.held(ready, sums)
        return [Fixed(local[i], s) for i, s in zip(self.fragment, held, strict=True)]

    @property
    def _subtree(self) -> Subtree:
        return functools.partial(subtree, self.treedef, self.fragment)
