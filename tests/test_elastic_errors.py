"""What `emaopt.elastic` refuses."""

import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from elastic_runs import SECONDS, free_address, together

import emaopt
from emaopt.elastic import connect

PARAMS = {"w": jnp.ones(3)}


def exchanged(tx, params=PARAMS, state=None, **options):
    """What `exchange` of the only worker returns."""
    state = tx.init(params) if state is None else state
    (found,) = together(lambda workers: workers.exchange(tx, params, state, **options), 1)
    return found


@pytest.mark.parametrize(
    "address", ["host", "host:", ":1", "host:port", "host:0", 7, None]
)
def test_addresses(address):
    with pytest.raises(
        ValueError, match="connect: coordinator_address must be 'host:port"
    ):
        connect(address, num_workers=1, worker=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_workers": 0, "worker": 0}, "num_workers must be at least 1, got 0"),
        (
            {"num_workers": 2, "worker": 2},
            "worker must be less than num_workers=2, got 2",
        ),
        ({"num_workers": 2, "worker": -1}, "worker must be at least 0, got -1"),
        (
            {"num_workers": 2, "worker": 0, "heartbeat_timeout_seconds": 0},
            "heartbeat_timeout_seconds must be greater than 0, got 0",
        ),
    ],
)
def test_numbers(options, message):
    with pytest.raises(ValueError, match=f"elastic.connect: {message}"):
        connect(free_address(), **options)


local_sgd = emaopt.local_sgd
OPTIMIZERS = {
    "stacked": (local_sgd(optax.sgd(1.0), period=2, num_workers=3), "num_workers=, for"),
    "mapped": (local_sgd(optax.sgd(1.0), period=2, axis_name="i"), "axis_name=, for"),
    "delay": (local_sgd(optax.sgd(1.0), period=2, delay=1), "use delay=0"),
    "sequential": (
        emaopt.local_updates(
            optax.sgd(1.0), optax.sgd(1.0), period=2, reduce="sequential"
        ),
        "use reduce='mean' or 'sum'",
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind):
    tx, message = OPTIMIZERS[kind]
    params = emaopt.stack_workers(PARAMS, 3) if kind == "stacked" else PARAMS
    state = tx.init(params)
    if kind == "stacked":  # parameters of one worker, too, are none of this state
        with pytest.raises(ValueError, match=r"Workers\.exchange"):
            exchanged(tx, PARAMS, state)
    with pytest.raises(ValueError, match=rf"Workers\.exchange: .*{message}"):
        exchanged(tx, params, state)


def test_an_optimizer_without_local_updates():
    with pytest.raises(ValueError, match=r"exchange: no center .* emaopt\.diloco"):
        exchanged(optax.adam(1.0))
    with pytest.raises(TypeError, match=r"exchange: optimizer must be an optax"):
        exchanged(None, state=local_sgd(optax.sgd(1.0), period=2).init(PARAMS))


def test_a_wrapper_that_drops_arguments():
    inner = local_sgd(optax.sgd(1.0), period=2)
    tx = optax.GradientTransformation(inner.init, lambda g, s, p: inner.update(g, s, p))
    with pytest.raises(ValueError, match="does not pass extra arguments on"):
        exchanged(tx)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "1"])
def test_weights(weight):
    kind = TypeError if isinstance(weight, str) else ValueError
    with pytest.raises(kind, match=r"Workers\.exchange: weight must be"):
        exchanged(local_sgd(optax.sgd(1.0), period=2), weight=weight)


def test_other_parameters_than_the_states():
    tx = local_sgd(optax.sgd(1.0), period=2)
    with pytest.raises(ValueError, match=r"Workers\.exchange: w has shape \(4,\)"):
        exchanged(tx, {"w": jnp.ones(4)}, tx.init(PARAMS))


def test_a_center_that_moved_between_exchanges():
    tx = local_sgd(optax.sgd(1.0), period=1)

    def body(workers):
        params, state, *_ = workers.exchange(tx, PARAMS, tx.init(PARAMS))
        updates, state = tx.update(PARAMS, state, params)  # without exchange=False
        params = optax.apply_updates(params, updates)
        with pytest.raises(ValueError, match="pass exchange=False to every"):
            workers.exchange(tx, params, state)
        return True

    assert together(body, 1) == [True]


def test_closed_workers():
    tx = local_sgd(optax.sgd(1.0), period=1)
    with connect(free_address(), num_workers=1, worker=0) as workers:
        pass
    with pytest.raises(ValueError, match="these workers have been closed"):
        workers.exchange(tx, PARAMS, tx.init(PARAMS))
    workers.close()  # again, does nothing


def test_the_port_of_worker_0_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError):
            connect(address, num_workers=1, worker=0)


def test_who_differs_is_refused_and_the_others_go_on():
    def body(workers):
        number = 4 if workers.worker == 1 else 3
        tx = local_sgd(optax.sgd(1.0), period=1)
        params = {"w": jnp.ones(number)}
        if workers.worker == 1:
            with pytest.raises(ValueError, match="worker 1 exchanges w of params") as e:
                workers.exchange(tx, params, tx.init(params))
            assert "float32(4,)" in str(e.value) and "float32(3,)" in str(e.value)
            # It may mend that, and join.
            params = {"w": jnp.zeros(3)}
        state, live = tx.init(params), ()
        while live != (0, 1):
            params, state, _, live, joined = workers.exchange(tx, params, state)
        return params, joined

    for params, joined in together(body, 2):
        assert joined == (1,)
        np.testing.assert_array_equal(params["w"], np.ones(3))


def test_two_processes_with_one_number():
    address = free_address()

    def body(workers):
        if workers.worker == 1:
            start = time.monotonic()
            with pytest.raises(ValueError, match="worker 1 is there already"):
                connect(
                    address, num_workers=2, worker=1, heartbeat_timeout_seconds=SECONDS
                )
            assert time.monotonic() - start < 4 * SECONDS
        return True

    assert together(body, 2, address=address) == [True, True]


def test_another_number_of_workers():
    address = free_address()

    def body(workers):
        with pytest.raises(ValueError, match=r"num_workers=3, worker 0 with 2"):
            connect(address, num_workers=3, worker=1)
        return True

    assert together(body, 2, address=address, workers=[0], seconds=0.5) == [True]


def test_strangers_at_the_ports():
    address = free_address()
    host, port = address.split(":")
    tx = local_sgd(optax.sgd(1.0), period=1)

    def body(workers):
        for number in (int(port), workers._session._server.port):
            for said in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"{}\n", b""):
                with socket.create_connection((host, number), timeout=5) as stranger:
                    stranger.sendall(said)
        return workers.exchange(tx, PARAMS, tx.init(PARAMS)).number

    assert together(body, 1, address=address) == [1]


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr("emaopt.elastic._session._PATIENCE", 0.3)
    address = free_address()
    with pytest.raises(ConnectionError, match=f"worker 0, which .* is not at {address}"):
        connect(address, num_workers=2, worker=1)


def test_jax_distributed(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match=r"Leave jax\.distributed\.initialize out"):
        connect(free_address(), num_workers=1, worker=0)


def test_records_with_a_gap():
    tx = local_sgd(optax.sgd(1.0), period=1)
    log = [emaopt.elastic.Record(n, (0,), (), (), {0: 1.0}) for n in (1, 3)]
    with pytest.raises(ValueError, match="exchange 3 follows 1"):
        emaopt.elastic.replay(tx, PARAMS, tx.init(PARAMS), log, lambda n, w: PARAMS)
