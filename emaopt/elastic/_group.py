"""Who takes part in which exchange: the coordinator's decisions, without its sockets."""

from dataclasses import dataclass, field
from typing import TypeAlias

from emaopt.elastic._messages import Address, Message

Outbox: TypeAlias = list[tuple[int, Message]]  # (worker, what it is told)


@dataclass
class Seat:
    """A worker that is connected."""

    address: Address  # where others pull its parts
    founder: bool  # it was there when the group began
    holds: bool = False  # its center is the group's, unless the fingerprints differ
    leaves: list[str] = field(default_factory=list)  # what it exchanges, in words
    offer: Message | None = None  # it waits in an exchange


@dataclass
class Round:
    """A try at an exchange, by the workers that have offered their commits."""

    ident: int
    workers: list[int]
    plan: Message
    fingerprints: dict[int, int] = field(default_factory=dict)  # of those that are done
    is_repaired: bool = False  # the others have pulled the first one's center


class Group:
    """The workers of a run and their exchanges.

    An exchange begins when all have offered that are waited for: at first all founders,
    then those that were in the exchange before. Whoever else has offered takes part as
    well. If one of them goes, it begins anew with the others; when all have everything,
    it has happened. All methods return what the workers are to be told.
    """

    def __init__(self) -> None:
        self.number = 0  # of the last exchange
        self._has_exchanged = False
        self.seats: dict[int, Seat] = {}
        self.begun = False
        self._fingerprint = 0  # of the group's center, once there was an exchange
        self._round: Round | None = None
        self._attempts = 0

    def arrive(self, worker: int, address: Address, number: int) -> None:
        """A worker is connected; `number` is that of the last exchange it knows of."""
        self.seats[worker] = Seat(address, founder=not self.begun)
        if not self._has_exchanged and worker == min(self.seats):
            self.number = number

    def begin(self) -> Outbox:
        """Whoever comes from now on is late."""
        self.begun = True
        return self._next()

    def leave(self, worker: int) -> Outbox:
        """A worker is gone."""
        self.seats.pop(worker, None)
        if self._round is not None and worker in self._round.workers:
            self._round = None
        return self._next()

    def offer(self, worker: int, message: Message) -> Outbox:
        """A worker waits in an exchange with its commit."""
        seat = self.seats[worker]
        seat.leaves = message.pop("leaves", seat.leaves)
        seat.offer = message
        return self._next()

    def done(self, worker: int, message: Message) -> Outbox:
        """A worker has everything, and has moved its center."""
        attempt = self._round
        if attempt is None or message["attempt"] != attempt.ident:
            return []  # a word from before it began anew
        attempt.fingerprints[worker] = message["fingerprint"]
        if len(attempt.fingerprints) < len(attempt.workers):
            return []
        # Centers differ by roundings if the devices do. Then the first holder's is the
        # group's, and the others pull it.
        first = next(w for w in attempt.workers if w in attempt.plan["holders"])
        fingerprint = attempt.fingerprints[first]
        same = [w for w, one in attempt.fingerprints.items() if one == fingerprint]
        if len(same) < len(attempt.workers) and not attempt.is_repaired:
            attempt.is_repaired = True
            attempt.fingerprints = {w: fingerprint for w in same}
            told = {"op": "repair", "attempt": attempt.ident, "sources": same}
            return [(w, told) for w in attempt.workers]
        self._fingerprint = fingerprint
        self.number += 1
        self._has_exchanged = True
        self._round = None
        for w in attempt.workers:
            self.seats[w].offer = None
            self.seats[w].holds = w in same
        told = {"op": "commit"}
        return [(w, told) for w in attempt.workers] + self._next()

    def _next(self) -> Outbox:
        """Begins an exchange, if all that are waited for are there."""
        seats = self.seats
        offering = sorted(w for w, seat in seats.items() if seat.offer is not None)
        awaited = {w for w, seat in seats.items() if self._is_awaited(seat)}
        if self._round or not self.begun or not offering or awaited - set(offering):
            return []
        if not self._has_exchanged:
            # The run begins with the center of its first worker.
            self._fingerprint = _offer(seats[offering[0]])["fingerprint"]
            holders = [w for w in offering if self._has_center(w)]
        else:
            having = [w for w in offering if self._has_center(w)]
            # Who left and came back with the same center may be the last that has it.
            holders = [w for w in having if seats[w].holds] or having
        if not holders:
            error = "no worker is left that has the group's center"
            return self._refuse(offering, error, "ended")
        first = holders[0]
        others = [w for w in offering if _kind(seats[w]) != _kind(seats[first])]
        if others:
            what = _difference(
                first, seats[first].leaves, others[0], seats[others[0]].leaves
            )
            return self._refuse(others, what) + self._next()
        return self._start(offering, holders)

    def _start(self, workers: list[int], holders: list[int]) -> Outbox:
        offers = {w: _offer(self.seats[w]) for w in workers}
        present = [w for w in holders if offers[w]["weight"] > 0]
        counted = [w for w in present if offers[w]["valid"]]
        self._attempts += 1
        plan = {
            "op": "plan",
            "attempt": self._attempts,
            "number": self.number + 1,
            "addresses": {str(w): self.seats[w].address for w in workers},
            "holders": holders,
            "is_first": not self._has_exchanged,
            "weights": {str(w): offers[w]["weight"] for w in counted},
            "left_out": [w for w in present if w not in counted],
        }
        self._round = Round(self._attempts, workers, plan)
        return [(w, plan) for w in workers]

    def _refuse(self, workers: list[int], error: str, op: str = "refused") -> Outbox:
        for w in workers:
            self.seats[w].offer = None
            self.seats[w].holds = self.seats[w].founder = False
        return [(w, {"op": op, "error": error}) for w in workers]

    def _is_awaited(self, seat: Seat) -> bool:
        return seat.holds if self._has_exchanged else seat.founder

    def _has_center(self, worker: int) -> bool:
        return _offer(self.seats[worker])["fingerprint"] == self._fingerprint


def _offer(seat: Seat) -> Message:
    assert seat.offer is not None
    return seat.offer


def _kind(seat: Seat) -> str:
    return _offer(seat)["kind"]


def _difference(first: int, wanted: list[str], worker: int, found: list[str]) -> str:
    """The first line in which what two workers exchange differs."""
    missing = "nothing more"
    length = max(len(wanted), len(found))
    lines = [
        (leaves[k] if k < len(leaves) else missing)
        for leaves in (wanted, found)
        for k in range(length)
    ]
    pairs = zip(lines[:length], lines[length:], strict=True)
    one, other = next(((a, b) for a, b in pairs if a != b), (missing, missing))
    return (
        f"worker {worker} exchanges {other} where worker {first} has {one}: all workers "
        "need the same optimizer and the same parameters"
    )
