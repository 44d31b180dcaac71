"""The seams of elastic training: links, attempts and turns without their neighbours."""

import contextlib
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from elastic_runs import free_address, together

import emaopt
from emaopt.elastic import _coordinator, _link, _session
from emaopt.elastic._attempt import Attempt, Plan
from emaopt.elastic._layout import Arena, Row
from emaopt.elastic._messages import PROTOCOL, listening, packed, parsed
from emaopt.elastic._transfer import Peer, Server
from emaopt.elastic._workers import _Hand

PARAMS = {"w": jnp.ones(3)}


def stepped(tx, params, state):
    updates, state = tx.update(params, state, params, exchange=False)
    return optax.apply_updates(params, updates), state


def test_who_joins_several_holders_needs_no_repair(monkeypatch):
    monkeypatch.setattr(_session.Session, "_repair", None)
    tx = emaopt.diloco(optax.sgd(0.1), period=1)

    def body(workers):
        params = {"w": jnp.arange(1000.0) * (1 + (workers.worker == 2))}
        params, state = stepped(tx, params, tx.init(params))
        found = workers.exchange(tx, params, state)
        return found.joined, emaopt.get_center(found.opt_state), found.opt_state.num_steps

    first, *others = together(body, 3)
    assert first[0] == (2,) and first[2] == 1
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)


def test_a_cancelled_attempt_has_ended():
    servers = [Server("127.0.0.1", 2.0) for _ in range(2)]
    for server in servers:
        server.group = "00" * 8
    plan = Plan(
        1,
        1,
        {w: ("127.0.0.1", s.port) for w, s in enumerate(servers)},
        [0, 1],
        False,
        {0: 1.0, 1: 1.0},
        [],
    )
    told, row = [], Row([np.zeros(10, np.float32)])
    attempt = Attempt(
        plan,
        0,
        servers[0],
        row,
        Row([]),
        Row([np.zeros(10, np.float32)]),
        Row([]),
        Arena(),
        lambda address: Peer(address, "00" * 8, 2.0),
        4.0,
        told.append,
    )
    time.sleep(0.2)  # it waits for worker 1, which has no such attempt
    attempt.cancel()
    assert not any(t.is_alive() for t in attempt._threads) and not told
    for server in servers:
        server.close()


def test_what_an_attempt_before_says_is_not_heard(monkeypatch):
    whole, before = _session.Session._attempt, {}

    def attempt(session, *given):
        worker = session._hello["worker"]
        if worker in before:
            error = {"op": "failed", "error": RuntimeError("late")}
            given[-1].events.put({**error, "attempt": before[worker]})
        before[worker] = whole(session, *given)
        return before[worker]

    monkeypatch.setattr(_session.Session, "_attempt", attempt)
    tx = emaopt.local_sgd(optax.sgd(0.1), period=1)

    def body(workers):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(2):
            params, state, number, *_ = workers.exchange(tx, params, state)
        return number

    assert together(body, 2) == [2, 2]


def test_nothing_is_offered_after_an_exchange():
    tx = emaopt.local_sgd(optax.sgd(0.1), period=1)

    def body(workers):
        workers.exchange(tx, PARAMS, tx.init(PARAMS))
        return workers._session._server._offers.sources

    assert together(body, 2) == [{}, {}]


def test_replay_of_a_rate_that_depends_on_who_lives():
    tx = emaopt.easgd(optax.sgd(0.1), period=1)
    commits = {}

    def body(workers):
        params, state = stepped(tx, PARAMS, tx.init(PARAMS))
        commits[workers.worker] = emaopt.elastic.pseudo_gradient(tx, params, state)
        weight = float(workers.worker > 0)
        found = workers.exchange(tx, params, state, weight=weight)
        return emaopt.get_center(found.opt_state), workers.log

    (center, log), *_ = together(body, 3)
    (again,) = emaopt.elastic.replay(
        tx, PARAMS, tx.init(PARAMS), log, lambda number, worker: commits[worker]
    )
    jax.tree.map(np.testing.assert_array_equal, again, center)


def test_who_pulls_the_center_pulls_the_repaired_one(monkeypatch):
    whole = _Hand.move

    def move(hand, plan):
        whole(hand, plan)
        if hand._worker == 1:  # it rounds differently
            hand._new = jax.tree.map(lambda x: x, hand._new)._replace(
                center={"w": hand._new.center["w"] + 1e-3},
                pulled={"w": hand._new.pulled["w"] + 1e-3},
            )
        return hand._fingerprint()

    monkeypatch.setattr(_Hand, "move", move)
    tx = emaopt.easgd(optax.sgd(0.1), period=1, moving_rate=0.2)

    def body(workers):
        params, state = stepped(tx, PARAMS, tx.init(PARAMS))
        if workers.worker == 1:
            params = {"w": params["w"] * jnp.nan}
        found = workers.exchange(tx, params, state)
        return found.params, emaopt.get_center(found.opt_state)

    (_, center), (own, other) = together(body, 2)
    np.testing.assert_array_equal(other["w"], center["w"])
    np.testing.assert_array_equal(own["w"], center["w"])


def test_who_differs_is_told_again_on_a_new_connection():
    def body(workers):
        tx = emaopt.local_sgd(optax.sgd(1.0), period=1)
        params, said = {"w": jnp.ones(4 if workers.worker == 1 else 3)}, []
        if workers.worker == 1:
            for _ in range(2):  # an error ends the connection
                with pytest.raises(ValueError) as error:
                    workers.exchange(tx, params, tx.init(params))
                said.append(str(error.value))
            params = {"w": jnp.ones(3)}
        state, live = tx.init(params), ()
        while live != (0, 1):
            params, state, _, live, _ = workers.exchange(tx, params, state)
        return said

    _, (first, second) = together(body, 2)
    assert first == second and "w of params: float32(4,)" in first


def silent_coordinator(timeout):
    """(a link to one that says no more than its greeting, what keeps it open)."""
    silent, kept = socket.create_server(("127.0.0.1", 0)), []

    def welcome():
        kept.append(silent.accept()[0])
        kept[0].sendall(packed({"op": "welcome", "group": "00" * 8, "number": 0}))

    thread = threading.Thread(target=welcome)
    thread.start()
    link = _link.Link(silent.getsockname(), {"worker": 1}, 1, timeout)
    thread.join()
    return link, [silent, *kept]


def test_a_silent_coordinator_is_noticed():
    link, kept = silent_coordinator(0.4)
    try:
        assert link.events.get(timeout=5)["op"] == "lost"
    finally:
        link.close()
        for one in kept:
            one.close()


def test_a_link_that_cannot_send_is_lost():
    link, kept = silent_coordinator(60.0)
    whole = link._socket

    class Broken:
        def __getattr__(self, name):
            return getattr(whole, name)

        def sendall(self, data):
            raise OSError("a part of it is sent")

    link._socket = Broken()
    try:
        link.send({"op": "offer"})
        assert link.is_lost and link.events.get(timeout=5)["op"] == "lost"
    finally:
        link._socket = whole
        link.close()
        for one in kept:
            one.close()


def test_a_coordinator_that_stood_still_leaves_nobody_out():
    port = int(free_address().rpartition(":")[2])
    coordinator = _coordinator.Coordinator(listening("127.0.0.1", port), 1, 0.8)
    with (
        socket.create_server(("127.0.0.1", 0)) as own,
        socket.create_connection(("127.0.0.1", port)) as worker,
    ):
        hello = {
            "op": "hello",
            "protocol": PROTOCOL,
            "worker": 0,
            "num_workers": 1,
            "heartbeat_timeout_seconds": 0.8,
            "number": 0,
            "address": list(own.getsockname()),
        }
        worker.sendall(packed(hello))
        lines = worker.makefile("rb")
        assert parsed(lines.readline())["op"] == "welcome"
        coordinator._loop.call_soon_threadsafe(time.sleep, 1.2)
        time.sleep(1.3)
        worker.sendall(packed({"op": "beat"}))
        assert parsed(lines.readline())["op"] == "beat"
        lines.close()
    coordinator.stop()


def test_who_was_left_out_says_nothing_more():
    port = int(free_address().rpartition(":")[2])
    coordinator = _coordinator.Coordinator(listening("127.0.0.1", port), 3, 5.0)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(coordinator.stop)
        links, lines = [], []
        for worker in range(3):
            link = socket.create_connection(("127.0.0.1", port), timeout=5)
            links.append(stack.enter_context(link))
            hello = {
                "op": "hello",
                "protocol": PROTOCOL,
                "worker": worker,
                "num_workers": 3,
                "heartbeat_timeout_seconds": 5.0,
                "number": 0,
                "address": list(own.getsockname()),
            }
            link.sendall(packed(hello))
            lines.append(stack.enter_context(link.makefile("rb")))
        assert [parsed(one.readline())["op"] for one in lines] == ["welcome"] * 3
        # The first word of worker 1 costs it its place; the second comes too late.
        words = [{"op": "unreachable", "worker": other} for other in (0, 2)]
        links[1].sendall(b"".join(map(packed, words)))
        assert parsed(lines[1].readline())["op"] == "refused"
        links[2].sendall(packed({"op": "beat"}))
        assert parsed(lines[2].readline())["op"] == "beat"
