"""One try at an exchange: each worker adds up one part, and pulls the others'."""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np

from emaopt.elastic._layout import Arena, Row, add_up, kinds_of, part_bounds
from emaopt.elastic._messages import Address, Message
from emaopt.elastic._transfer import (
    CENTER,
    CHUNK,
    COMMIT,
    REPAIR,
    SCALES,
    SUM,
    Gone,
    Peer,
    Server,
    Source,
    whole,
)

SUMMED = "exchange %d is summed after %.6f s, with %d bytes pulled"  # debug

_logger = logging.getLogger("emaopt.elastic")
_STEP = CHUNK // 4  # elements that are added up at a time


@dataclass(frozen=True)
class Plan:
    """Who takes part in an attempt, as the coordinator tells it to all."""

    attempt: int
    number: int  # of the exchange
    addresses: dict[int, Address]  # of all workers that live, in order
    holders: list[int]  # those that have the group's center; the others join
    is_first: bool  # whether it is the first exchange since the run has been started
    weights: dict[int, float]  # of the commits that count, in order
    left_out: list[int]

    @classmethod
    def of(cls, message: Message) -> "Plan":
        def by_worker(name: str) -> dict:
            return {int(worker): value for worker, value in message[name].items()}

        return cls(
            attempt=message["attempt"],
            number=message["number"],
            addresses={w: (a[0], a[1]) for w, a in by_worker("addresses").items()},
            holders=message["holders"],
            is_first=message["is_first"],
            weights=by_worker("weights"),
            left_out=message["left_out"],
        )

    @property
    def live(self) -> tuple[int, ...]:
        return tuple(self.addresses)

    @property
    def joined(self) -> tuple[int, ...]:
        return tuple(w for w in self.live if w not in self.holders)


def shares_of(weights: dict[int, float]) -> list[float] | None:
    """The weights with a mean of 1; None if all are alike."""
    values = np.array(list(weights.values()), np.float32)
    if len(set(values.tolist())) < 2:
        return None
    mean = np.sum(values, dtype=np.float32) / np.float32(values.size)
    # Not 0, as 1e-30 / 1e30 would be.
    return np.maximum(values / mean, np.finfo(np.float32).tiny).tolist()


class Attempt:
    """Runs in threads of its own, and tells `report` how it has ended.

    That is {"op": "complete"} or {"op": "unreachable", "worker": ...} or, what is a fault
    of this program, {"op": "failed", "error": ...}, each with this attempt.
    """

    def __init__(
        self,
        plan: Plan,
        worker: int,
        server: Server,
        commit: Row,
        scales: Row,
        sums: Row,
        center: Row,
        arena: Arena,
        connect: Callable[[Address], Peer],
        patience: float,
        report: Callable[[Message], None],
    ):
        """Begins.

        Args:
          plan: The coordinator's.
          worker: This one.
          server: Where the others pull its parts.
          commit: What this worker hands in.
          scales: [leaves] float32, the factors that decode integers of it, or no arrays.
          sums: Where the sums are written.
          center: The group's values; where they are written, if this worker joins.
          arena: Where the commits are written that this worker adds up.
          connect: Connects to another worker's server.
          patience: Seconds to wait for the coordinator's word if a worker cannot be
            reached.
          report: Takes one message.
        """
        self.plan, self._worker, self._server = plan, worker, server
        self._commit, self._sums, self._center = commit, sums, center
        self._scales = {worker: scales}
        self._connect, self._report = connect, report
        self._patience = patience
        # All of this changes under the lock of `server.changed`.
        self._peers: list[Peer] = []
        self._is_cancelled = False
        self._num_bytes = 0  # that have been pulled
        self._began = time.perf_counter()

        bounds = part_bounds(commit.size, len(plan.live))
        parts = dict(zip(plan.live, itertools.pairwise(bounds), strict=True))
        self._parts: dict[int, tuple[int, int]] = parts  # in elements
        start, stop = parts[worker]
        self._sum = Source(sums, ready=sums.byte(start))
        sources = {COMMIT: whole(commit), SCALES: whole(scales), SUM: self._sum}
        if worker in plan.holders and plan.joined:
            sources[CENTER] = whole(center)
        server.offer(plan.attempt, sources)
        # Where the others' commits of this worker's part are written.
        senders = [w for w in plan.weights if w != worker]
        part = kinds_of(commit, start, stop)
        self._rows = dict(zip(senders, arena.rows(*[part] * len(senders)), strict=True))
        self._written = dict.fromkeys(self._rows, 0)  # bytes
        self._threads: list[threading.Thread] = []
        self._num_left = 0
        others = [w for w in plan.live if w != worker]
        pulls = [partial(self._pull, w, partial(self._pull_parts, w)) for w in others]
        self._begin([self._add, *pulls], "complete")

    def repair(self, center: Row, sources: list[int]) -> None:
        """Pulls the center after the exchange; {"op": "repaired"} tells its end."""

        def pull(worker: int, peer: Peer) -> None:
            self._pull_share(peer, REPAIR, center, sources.index(worker), len(sources))

        pulls = [partial(self._pull, w, partial(pull, w)) for w in sources]
        self._begin(pulls, "repaired")

    def _begin(self, tasks: list[Callable[[], None]], end: str) -> None:
        """Runs the tasks at the same time, and reports when all have ended well."""
        self._num_left = len(tasks)
        threads = [
            threading.Thread(target=self._guarded, args=(task, end), name="emaopt-part")
            for task in tasks
        ]
        self._threads += threads
        for thread in threads:
            thread.daemon = True
            thread.start()

    def cancel(self) -> None:
        """Ends the attempt; it reports nothing from now on."""
        with self._server.changed:
            self._is_cancelled = True
            self._server.changed.notify_all()
            peers = list(self._peers)
        for peer in peers:
            peer.close()
        for thread in self._threads:
            thread.join()

    def _guarded(self, task: Callable[[], None], end: str) -> None:
        try:
            task()
        except Gone:
            pass  # the other side knows already that it begins anew
        except Exception as error:  # else nobody would learn of it
            self._tell({"op": "failed", "error": error})
        else:
            with self._server.changed:
                self._num_left -= 1
                is_last = not self._num_left
            if is_last:
                seconds = time.perf_counter() - self._began
                _logger.debug(SUMMED, self.plan.number, seconds, self._num_bytes)
                self._tell({"op": end})

    def _tell(self, message: Message) -> None:
        with self._server.changed:
            if not self._is_cancelled:
                self._report({**message, "attempt": self})

    def _pull(self, worker: int, pull: Callable[[Peer], None]) -> None:
        """Pulls from one worker, or reports that it cannot be reached."""
        try:
            peer = self._connect(self.plan.addresses[worker])
            with self._server.changed:
                self._peers.append(peer)
                if self._is_cancelled:
                    peer.close()
            with contextlib.closing(peer):
                pull(peer)
            with self._server.changed:
                self._num_bytes += peer.num_bytes
        except Gone:
            raise
        except OSError:
            # Most likely it has died, and the coordinator will say so before long.
            with self._server.changed:
                told = self._server.changed.wait_for(
                    lambda: self._is_cancelled, timeout=self._patience
                )
            if not told:
                self._tell({"op": "unreachable", "worker": worker})
            raise Gone from None

    def _pull_parts(self, worker: int, peer: Peer) -> None:
        plan, attempt = self.plan, self.plan.attempt
        if worker in self._rows:
            own = self._scales[self._worker]
            scales = Row([np.empty_like(row) for row in own.arrays])
            peer.pull(attempt, SCALES, scales, 0, scales.byte(scales.size))
            self._scales[worker] = scales  # read when the first of the commit is there
            start, stop = map(self._commit.byte, self._parts[self._worker])
            row, written = self._rows[worker], partial(self._write, worker)
            peer.pull(attempt, COMMIT, row, start, stop, start, written)
        start, stop = map(self._sums.byte, self._parts[worker])
        peer.pull(attempt, SUM, self._sums, start, stop)
        if self._worker in plan.joined and worker in plan.holders:
            number = plan.holders.index(worker)
            self._pull_share(peer, CENTER, self._center, number, len(plan.holders))

    def _pull_share(
        self, peer: Peer, what: int, row: Row, number: int, num_shares: int
    ) -> None:
        """Pulls one of several shares of a row that all sources have."""
        bounds = part_bounds(row.size, num_shares)
        start, stop = map(row.byte, bounds[number : number + 2])
        peer.pull(self.plan.attempt, what, row, start, stop)

    def _write(self, worker: int, nbytes: int) -> None:
        with self._server.changed:
            self._written[worker] = nbytes
            self._server.changed.notify_all()

    def _add(self) -> None:
        """Adds up this worker's part, as far as all commits of it are there."""
        plan, shares = self.plan, shares_of(self.plan.weights)
        first, last = self._parts[self._worker]
        start = first
        while start < last:
            stop = min(start + _STEP, last)

            def there(number: int = stop - first) -> bool:
                rows = self._rows.items()
                return all(self._written[w] >= row.byte(number) for w, row in rows)

            with self._server.changed:
                self._server.changed.wait_for(lambda: self._is_cancelled or there())
            if self._is_cancelled:
                return
            own = self._commit.segments(start, stop)
            pieces = {
                w: [
                    row.arrays[k][i] for k, i in row.segments(start - first, stop - first)
                ]
                for w, row in self._rows.items()
            }
            for number, (leaf, inside) in enumerate(own):
                rows = [
                    pieces[w][number]
                    if w in pieces
                    else self._commit.arrays[leaf][inside]
                    for w in plan.weights
                ]
                scales = None
                if jnp.issubdtype(self._commit.arrays[leaf].dtype, jnp.integer):
                    factors = (self._scales[w].arrays[0] for w in plan.weights)
                    scales = [float(row[leaf]) for row in factors]
                add_up(self._sums.arrays[leaf][inside], rows, shares, scales)
            with self._server.changed:
                self._sum.ready = self._sums.byte(stop)
                self._server.changed.notify_all()
            start = stop
