"""One worker's side of the exchanges: what it is told, and what it does then."""

import functools
import logging
from typing import Protocol

from emaopt.elastic._attempt import Attempt, Plan
from emaopt.elastic._coordinator import Coordinator
from emaopt.elastic._layout import Arena, Row
from emaopt.elastic._link import Link, Lost
from emaopt.elastic._messages import Address, Message, listening
from emaopt.elastic._transfer import REPAIR, Peer, Server, Source

_logger = logging.getLogger("emaopt.elastic")
_PATIENCE = 300.0  # seconds within which worker 0 has to be there, as in jax.distributed


class Turn(Protocol):
    """What a worker brings to an exchange, and makes of it."""

    offer: Message  # weight, valid, fingerprint, scales and kind
    leaves: list[str]  # what is exchanged, in words
    commit: Row
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
        self._address = address
        self._hello = {"worker": worker, "num_workers": num_workers, "number": number}
        self._timeout = timeout
        self._coordinator: Coordinator | None = None
        self._link: Link | None = None
        self._arena = Arena()
        self._is_known = False  # whether this connection has said what is exchanged
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

    def exchange(self, turn: Turn) -> Plan:
        """Waits for the others, until the exchange has happened for all that live.

        Raises:
          ValueError: If the coordinator refuses what the worker brings.
          ConnectionError: If the coordinator is gone.
        """
        attempt: Attempt | None = None
        link = self._offered(turn)
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
                        attempt = self._attempt(Plan.of(event), turn, link)
                    case "complete":
                        plan = event["attempt"].plan
                        self._tell_done(link, plan, turn.move(plan))
                    case "repair":
                        assert attempt is not None  # a plan has come before
                        self._repair(attempt, turn, event["sources"])
                    case "repaired":
                        self._tell_done(link, event["attempt"].plan, turn.repair())
                    case "commit":
                        assert attempt is not None
                        return attempt.plan
                    case "unreachable":
                        link.send({"op": "unreachable", "worker": event["worker"]})
                    case "failed":
                        raise event["error"]
                    case "refused":
                        raise ValueError(f"Workers.exchange: {event['error']}.")
                    case "expelled":
                        _logger.warning("this worker was left out: %s", event["error"])
                    case "lost":
                        if attempt is not None:
                            attempt.cancel()
                        attempt, link = None, self._offered(turn)
        except BaseException:
            link.close()  # else others would wait; at its next exchange it joins again
            raise
        finally:
            if attempt is not None:
                attempt.cancel()
            self._server.withdraw()

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

    def _offered(self, turn: Turn) -> Link:
        """Offers a commit, on a new connection if the old one has ended."""
        link = self._link
        if link is None or link.is_lost:
            link = self._link = self._connected("Workers.exchange", self._timeout)
            self._is_known = False
            if link.group != self._server.group:
                link.close()
                raise self._gone("Workers.exchange", "it has been started anew")
        leaves = {} if self._is_known else {"leaves": turn.leaves}
        self._is_known = True
        link.send({"op": "offer", **turn.offer, **leaves})
        return link

    def _tell_done(self, link: Link, plan: Plan, fingerprint: int) -> None:
        done = {"op": "done", "attempt": plan.attempt}
        link.send({**done, "fingerprint": fingerprint})

    def _repair(self, attempt: Attempt, turn: Turn, sources: list[int]) -> None:
        """Lets others pull the center after the exchange, or pulls it from them."""
        if self._hello["worker"] in sources:
            row = turn.moved(differs=False)
            source = Source(row, row.byte(row.size))
            self._server.add(attempt.plan.attempt, REPAIR, source)
            return
        _logger.info(
            "this worker's devices round differently than others': it pulls their center"
        )
        attempt.repair(turn.moved(differs=True), sources)

    def _attempt(self, plan: Plan, turn: Turn, link: Link) -> Attempt:
        worker = self._hello["worker"]
        joins = worker in plan.joined
        connect = functools.partial(Peer, group=link.group, timeout=self._timeout)
        return Attempt(
            plan=plan,
            worker=worker,
            server=self._server,
            commit=turn.commit,
            sums=turn.sums,
            center=turn.center(joins) if plan.joined else Row([]),
            arena=self._arena,
            connect=connect,
            patience=self._timeout,
            report=link.events.put,
        )

    def _connected(self, function: str, patience: float) -> Link:
        try:
            return Link(
                self._address, self._hello, self._server.port, self._timeout, patience
            )
        except Lost as error:
            raise self._gone(function, str(error)) from None
        except ValueError as error:
            raise ValueError(f"{function}: {error}.") from None

    def _gone(self, function: str, why: str) -> ConnectionError:
        host, port = self._address
        return ConnectionError(
            f"{function}: worker 0, which keeps the group together, is not at "
            f"{host}:{port} ({why}). Without it a run ends for all workers: start all of "
            "them again, from the last checkpoint."
        )
