"""Faults at awkward moments, of workers in threads of one process."""

import errno
import threading
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from elastic_runs import SECONDS, free_address, together

import emaopt
from emaopt.elastic import _coordinator, _link, _session, connect
from emaopt.elastic._settings import programs_for

PARAMS = {"w": jnp.ones(3)}


def local_sgd():
    return emaopt.local_sgd(optax.sgd(0.1), period=1)


def stepped(tx, params, state):
    updates, state = tx.update(params, state, params, exchange=False)
    return optax.apply_updates(params, updates), state


def threads():
    return {t for t in threading.enumerate() if t.name.startswith("emaopt")}


def test_nothing_is_left_running():
    before = threads()
    tx = local_sgd()
    together(lambda w: w.exchange(tx, PARAMS, tx.init(PARAMS)), 3)
    until = time.monotonic() + 5
    while threads() - before and time.monotonic() < until:
        time.sleep(0.01)
    assert not threads() - before


@pytest.mark.parametrize("fault", ["weight", "interrupt", "center"])
def test_who_fails_outside_of_the_exchange_is_not_waited_for(fault, monkeypatch):
    tx, failed, went_on = local_sgd(), threading.Event(), threading.Event()

    def body(workers):
        params, state = stepped(tx, PARAMS, tx.init(PARAMS))
        params, state, *_ = workers.exchange(tx, params, state)
        params, state = stepped(tx, params, state)
        if workers.worker == 1:
            with pytest.raises((ValueError, KeyboardInterrupt)):
                if fault == "weight":
                    workers.exchange(tx, params, state, weight=-1.0)
                elif fault == "center":
                    _, moved = tx.update(params, state, params)
                    workers.exchange(tx, params, moved)
                else:
                    interrupted(workers, tx, params, state)
            failed.set()
            assert went_on.wait(20)  # else it may come back before the others go on
        else:
            assert fault == "interrupt" or failed.wait(20)
            params, state, _, live, _ = workers.exchange(tx, params, state)
            if fault != "interrupt":  # then the exchange had happened
                assert live == (0,)
            went_on.set()
        live = ()
        while live != (0, 1):  # it joins again
            params, state = stepped(tx, params, state)
            params, state, _, live, joined = workers.exchange(tx, params, state)
        assert joined == (1,)
        return params

    def interrupted(workers, *given):
        from emaopt.elastic._workers import _Hand

        whole = _Hand.result

        def result(hand):
            if hand._worker == 1 and not failed.is_set():
                raise KeyboardInterrupt
            return whole(hand)

        monkeypatch.setattr(_Hand, "result", result)
        workers.exchange(*given)

    first, second = together(body, 2)
    np.testing.assert_array_equal(first["w"], second["w"])


def test_a_link_that_is_cut_in_an_exchange_makes_the_worker_join(monkeypatch):
    tx, cut = local_sgd(), []
    whole = _session.Session._attempt

    def attempt(session, plan, hand, link):
        found = whole(session, plan, hand, link)
        joins = plan.joined and 1 in plan.holders
        if session._hello["worker"] == 1 and joins and not cut:
            cut.append(plan.number)
            link.close()  # as a holder; it comes back as one that joins
        return found

    monkeypatch.setattr(_session.Session, "_attempt", attempt)
    address, late = free_address(), threading.Event()

    def body(workers):
        params, state, live = PARAMS, tx.init(PARAMS), ()
        for _ in range(2):
            params, state = stepped(tx, params, state)
            params, state, *_ = workers.exchange(tx, params, state)
        late.set()
        while live != (0, 1, 2) or workers.log[-1].joined:
            params, state = stepped(tx, params, state)
            params, state, _, live, _ = workers.exchange(tx, params, state)
        return params

    def third():
        late.wait(20)
        return together(body, 3, address=address, workers=[2])

    found = []
    thread = threading.Thread(target=lambda: found.extend(third()))
    thread.start()
    found += together(body, 3, address=address, workers=[0, 1])
    thread.join(20)
    assert cut and len(found) == 3
    for params in found[1:]:
        np.testing.assert_array_equal(params["w"], found[0]["w"])


def test_two_that_come_at_once_with_one_number(monkeypatch):
    address, reached = free_address(), _coordinator._reach
    calls = []

    async def slowly(host, port):
        calls.append(port)
        if len(calls) > 1:  # worker 1, twice
            await _coordinator.asyncio.sleep(0.3)
        await reached(host, port)

    monkeypatch.setattr(_coordinator, "_reach", slowly)
    tx, refused = local_sgd(), threading.Event()

    def body(workers):
        assert refused.wait(20)
        return workers.exchange(tx, PARAMS, tx.init(PARAMS)).live

    def come():
        try:
            found.extend(together(body, 2, address=address, workers=[1]))
        except ValueError as error:
            found.append(str(error))
            refused.set()

    found = []
    both = [threading.Thread(target=come) for _ in range(2)]
    for thread in both:
        thread.start()
    assert together(body, 2, address=address, workers=[0]) == [(0, 1)]
    for thread in both:
        thread.join(30)
    assert "worker 1 is there already" in found[0] and found[1:] == [(0, 1)]


def test_an_interrupted_connect_leaves_nothing_behind(monkeypatch):
    address, whole = free_address(), _link.Link.next

    def interrupted(link):
        whole(link)
        raise KeyboardInterrupt

    before = threads()
    monkeypatch.setattr(_link.Link, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        connect(address, num_workers=1, worker=0)
    monkeypatch.setattr(_link.Link, "next", whole)
    until = time.monotonic() + 5
    while threads() - before and time.monotonic() < until:
        time.sleep(0.01)
    assert not threads() - before
    with connect(address, num_workers=1, worker=0):
        pass


def test_a_server_out_of_files_goes_on():
    tx, failing = local_sgd(), []

    def body(workers):
        params, state = stepped(tx, PARAMS, tx.init(PARAMS))
        if workers.worker == 0:
            listener = workers._session._server._listener

            class Failing:
                left = 2

                def __getattr__(self, name):
                    return getattr(listener, name)

                def accept(self):
                    if self.left:
                        self.left -= 1
                        raise OSError(errno.EMFILE, "too many open files")
                    return listener.accept()

            failing.append(Failing())
            workers._session._server._listener = failing[0]
        found = [workers.exchange(tx, params, state)]
        for _ in range(3):
            params, state = stepped(tx, *found[-1][:2])
            found.append(workers.exchange(tx, params, state))
        return [one.live for one in found]

    for lives in together(body, 3, seconds=4):
        assert lives == [(0, 1, 2)] * 4
    assert not failing[0].left


def test_two_that_do_not_reach_each_other(monkeypatch):
    attempt = _session.Session._attempt

    def broken(session, plan, hand, link):
        if session._hello["worker"] == 1 and 2 in plan.addresses:
            plan.addresses[2] = ("127.0.0.1", 9)  # where nobody listens
        return attempt(session, plan, hand, link)

    monkeypatch.setattr(_session.Session, "_attempt", broken)
    tx = local_sgd()

    def body(workers):
        try:
            return workers.exchange(tx, PARAMS, tx.init(PARAMS)).live
        except ValueError as error:
            return str(error)

    first, second, third = together(body, 3, seconds=1.5)
    assert first == second == (0, 1)
    assert "workers 1 and 2 do not reach each other" in third


def test_timeouts_have_to_be_the_same():
    address = free_address()

    def body(workers):
        with pytest.raises(ValueError, match=r"heartbeat_timeout_seconds=1.0, worker 0"):
            connect(address, num_workers=2, worker=1, heartbeat_timeout_seconds=1)
        return True

    assert together(body, 2, address=address, workers=[0], seconds=SECONDS) == [True]


def test_a_late_worker_after_the_end():
    address, tx = free_address(), local_sgd()
    ended = threading.Event()

    def body(workers):
        found = workers.exchange(tx, *stepped(tx, PARAMS, tx.init(PARAMS)))
        if workers.worker == 0:
            late.start()
            joined.wait(20)
        return found.number

    def come():
        with connect(
            address, num_workers=2, worker=1, heartbeat_timeout_seconds=SECONDS
        ) as workers:
            joined.set()
            time.sleep(0.5)  # worker 0 has nothing more to do
            with pytest.raises(ConnectionError, match="the run has ended"):
                workers.exchange(tx, PARAMS, tx.init(PARAMS))
        ended.set()

    joined, late = threading.Event(), threading.Thread(target=come)
    assert together(body, 2, address=address, workers=[0]) == [1]
    late.join(20)
    assert ended.is_set()


def test_programs_are_compiled_once():
    tx = local_sgd()
    params, state = stepped(tx, PARAMS, tx.init(PARAMS))
    for _ in range(3):
        emaopt.elastic.pseudo_gradient(tx, params, state)
    programs = programs_for("f", tx, params, state)
    assert programs is programs_for("f", tx, params, state)
    assert programs.commit._cache_size() == 1
