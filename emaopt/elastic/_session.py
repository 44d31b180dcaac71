"""One worker's side of the exchanges: what it is told, and what it does then."""

import functools
import logging
import time
from typing import Protocol

from emaopt.elastic._attempt import Attempt, Plan
from emaopt.elastic._coordinator import Coordinator
from emaopt.elastic._layout import Arena, Row
from emaopt.elastic._link import Link, Lost
from emaopt.elastic._messages import Address, Message, listening
from emaopt.elastic._transfer import REPAIR, Peer, Server, whole

_logger = logging.getLogger("emaopt.elastic")
_PATIENCE = 300.0  # seconds within which worker 0 has to be there, as in jax.distributed


class Hand(Protocol):
    """What a worker brings to an exchange, and makes of it."""

    offer: Message  # weight, valid, fingerprint and kind
    leaves: list[str]  # what is exchanged, in words
    commit: Row
    scales: Row  # the factors that decode it, by leaf; no arrays for floats
    sums: Row  # where the sums will be

    def center(self, joins: bool) -> Row:
        """What all share before the exchange, or where it will be if it joins."""
        ...

    def move(self, plan: Plan) -> int:
        """Moves the center by the sums; returns its fingerprint."""
        ...

    def moved(self, differs: bool) -> Row:
        """What all share after the exchange, or where it will be if it differs."""
        ...

    def repair(self) -> int:
        """Takes the others' center, which has been written; returns its fingerprint."""
        ...


class Session:
    """Belongs to the group as long as the coordinator lives."""

    def __init__(
        self,
        address: Address,
        num_workers: int,
        worker: int,
        timeout: float,
        number: int,
    ):
        self.worker: int = worker
        self.num_workers: int = num_workers
        self._address = address
        self._hello = {
            "worker": worker,
            "num_workers": num_workers,
            "heartbeat_timeout_seconds": timeout,
            "number": number,
        }
        self._timeout = timeout
        self._coordinator: Coordinator | None = None
        self._link: Link | None = None
        self._arena = Arena()
        self._kind = ""  # of what this connection has said is exchanged
        self._server = Server(address[0], timeout)
        try:
            if worker == 0:
                listener = listening(*address)
                self._coordinator = Coordinator(listener, num_workers, timeout)
            self._link = self._connected("elastic.connect", _PATIENCE)
        except BaseException:
            self.end()
            raise
        self._server.group = self._link.group

    @property
    def is_open(self) -> bool:
        return self._server.is_open

    def exchange(self, hand: Hand) -> Plan:
        """Waits for the others, until the exchange has happened for all that live.

        Raises:
          ValueError: If the coordinator refuses what the worker brings.
          ConnectionError: If the coordinator is gone.
        """
        attempt: Attempt | None = None
        link = self._offered(hand)
        try:
            while True:
                event = link.next()
                if isinstance(sender := event.get("attempt"), Attempt):
                    if sender is not attempt:
                        continue  # it has been given up
                match event["op"]:
                    case "plan":
                        if attempt is not None:
                            attempt.cancel()
                            _logger.warning("an exchange begins anew with the others")
                        attempt = self._attempt(Plan.of(event), hand, link)
                    case "complete":
                        plan = event["attempt"].plan
                        self._tell_done(link, plan, hand.move(plan))
                    case "repair":
                        assert attempt is not None  # a plan has come before
                        self._repair(attempt, hand, event["sources"])
                    case "repaired":
                        self._tell_done(link, event["attempt"].plan, hand.repair())
                    case "commit":
                        assert attempt is not None
                        return attempt.plan
                    case "unreachable":
                        link.send({"op": "unreachable", "worker": event["worker"]})
                    case "failed":
                        raise event["error"]
                    case "refused":
                        raise ValueError(f"Workers.exchange: {event['error']}.")
                    case "ended":
                        raise ConnectionError(
                            f"Workers.exchange: {event['error']}: the run has ended."
                        )
                    case "expelled":
                        _logger.warning("this worker was left out: %s", event["error"])
                    case "lost":
                        if attempt is not None:
                            attempt.cancel()
                        attempt, link = None, self._offered(hand)
        finally:
            if attempt is not None:
                attempt.cancel()
            self._server.withdraw()

    def drop(self) -> None:
        """Lets the others go on without it; it joins again at its next exchange."""
        if self._link is not None:
            self._link.close()

    def close(self) -> None:
        """Leaves; worker 0 waits until no other worker is there."""
        if self._link is not None:
            self._link.close()
        if self._coordinator is not None:
            self._coordinator.wait()
        self.end()

    def end(self) -> None:
        """Leaves at once. Without worker 0 the run ends for all."""
        if self._link is not None:
            self._link.close()
        if self._coordinator is not None:
            self._coordinator.stop()
        self._server.close()

    def _offered(self, hand: Hand) -> Link:
        """Offers a commit, on a new connection if the old one has ended."""
        link = self._link
        if link is None or link.is_lost:
            link = self._link = self._connected("Workers.exchange", self._timeout)
            self._kind = ""
            if link.group != self._server.group:
                link.close()
                raise self._gone("Workers.exchange", "it has been started anew")
        kind = hand.offer["kind"]
        leaves = {} if self._kind == kind else {"leaves": hand.leaves}
        self._kind = kind
        link.send({"op": "offer", **hand.offer, **leaves})
        return link

    def _tell_done(self, link: Link, plan: Plan, fingerprint: int) -> None:
        done = {"op": "done", "attempt": plan.attempt}
        link.send({**done, "fingerprint": fingerprint})

    def _repair(self, attempt: Attempt, hand: Hand, sources: list[int]) -> None:
        """Lets others pull the center after the exchange, or pulls it from them."""
        if self.worker in sources:
            row = hand.moved(differs=False)
            self._server.add(attempt.plan.attempt, REPAIR, whole(row))
        else:
            attempt.repair(hand.moved(differs=True), sources)

    def _attempt(self, plan: Plan, hand: Hand, link: Link) -> Attempt:
        joins = self.worker in plan.joined
        if joins and plan.is_first:
            _logger.warning(
                "worker %d begins with another center than worker %d, and joins without "
                "a commit: was it restored from another checkpoint, or moved by an "
                "update without exchange=False?",
                self.worker,
                plan.holders[0],
            )
        connect = functools.partial(Peer, group=link.group, timeout=self._timeout)
        return Attempt(
            plan=plan,
            worker=self.worker,
            server=self._server,
            commit=hand.commit,
            scales=hand.scales,
            sums=hand.sums,
            center=hand.center(joins) if plan.joined else Row([]),
            arena=self._arena,
            connect=connect,
            patience=2 * self._timeout,  # a lost machine is noticed before
            report=link.events.put,
        )

    def _connected(self, function: str, patience: float) -> Link:
        until = time.monotonic() + patience
        while True:
            try:
                port, seconds = self._server.port, self._timeout
                return Link(self._address, self._hello, port, seconds)
            except Lost as error:
                if time.monotonic() > until:
                    raise self._gone(function, str(error)) from None
            except ValueError as error:
                raise ValueError(f"{function}: {error}.") from None
            time.sleep(min(0.1, self._timeout / 10))

    def _gone(self, function: str, why: str) -> ConnectionError:
        host, port = self._address
        return ConnectionError(
            f"{function}: worker 0, which keeps the group together, is not at "
            f"{host}:{port} ({why}). Without it a run ends for all workers: start all of "
            "them again, from the last checkpoint."
        )
