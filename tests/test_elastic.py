"""Exchanges of elastic workers are those of the stacked form."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from elastic_runs import together

import emaopt
from emaopt.elastic._programs import fingerprint

WORKERS, PERIOD, ROUNDS = 3, 2, 3
START = {"w": np.linspace(-1, 1, 7, dtype=np.float32), "b": np.float32(0.5)}


def gradient(worker, params):
    """Of another problem on each worker, of one scale."""
    return jax.tree.map(lambda x: x - (1 + worker) * jnp.ones_like(x) / 4, params)


def stacked(make, params, weights=None, rounds=ROUNDS, nan=None):
    """Centers and parameters of the stacked form, after each exchange."""
    tx = make(num_workers=WORKERS)
    rows = emaopt.stack_workers(params, WORKERS)
    state = tx.init(rows)

    @functools.partial(jax.jit, static_argnums=3)
    def step(rows, state, bad, exchange):
        grads = jax.vmap(gradient)(jnp.arange(WORKERS), rows)
        grads = jax.tree.map(
            lambda g: jnp.where(bad.reshape(-1, *(1,) * (g.ndim - 1)), jnp.nan, g), grads
        )
        given = {} if weights is None else {"weights": jnp.array(weights)}
        updates, state = tx.update(grads, state, rows, exchange=exchange, **given)
        return optax.apply_updates(rows, updates), state

    found = []
    for number in range(rounds):
        for k in range(PERIOD):
            bad = jnp.arange(WORKERS) == (
                nan[1] if (number, k) == (nan or [0])[0] else -1
            )
            rows, state = step(rows, state, bad, k == PERIOD - 1)
        found.append((emaopt.get_center(state), rows))
    return found, state


def elastic(make, params, weights=None, rounds=ROUNDS, nan=None, place=None):
    """[(centers and parameters after each exchange, state, log)] of each worker."""
    tx = make()

    @jax.jit
    def step(params, state, worker, bad):
        grads = gradient(worker, params)
        grads = jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads)
        updates, state = tx.update(grads, state, params, exchange=False)
        return optax.apply_updates(params, updates), state

    def body(workers):
        own = params if place is None else place(workers.worker, params)
        state, found = tx.init(own), []
        weight = 1.0 if weights is None else weights[workers.worker]
        for number in range(rounds):
            for k in range(PERIOD):
                bad = nan is not None and nan == ((number, k), workers.worker)
                own, state = step(own, state, workers.worker, bad)
            own, state, *_ = workers.exchange(tx, own, state, weight=weight)
            found.append((emaopt.get_center(state), own))
        return found, state, workers.log

    return together(body, WORKERS)


def widened(tree):
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def center_node(state):
    return next(
        s
        for s in jax.tree.leaves(
            state, is_leaf=lambda s: isinstance(s, emaopt.LocalUpdatesState)
        )
        if isinstance(s, emaopt.LocalUpdatesState)
    )


def check(make, params=START, tolerance=1e-6, exact=True, **options):
    params = jax.tree.map(jnp.asarray, params)
    (wanted, last), found = (
        stacked(make, params, **options),
        elastic(make, params, **options),
    )
    for worker, (centers, state, log) in enumerate(found):
        for number in range(ROUNDS):
            center, rows = wanted[number]
            got, own = centers[number]
            chex.assert_trees_all_close(got, center, rtol=tolerance, atol=tolerance)
            row = jax.tree.map(lambda x, w=worker: x[w], rows)
            chex.assert_trees_all_close(
                *map(widened, (own, row)), rtol=tolerance, atol=tolerance
            )
            chex.assert_trees_all_equal_dtypes(own, params)
        mine, first = center_node(state), center_node(found[0][1])
        if exact:
            chex.assert_trees_all_equal(mine.center, first.center)
            chex.assert_trees_all_equal(mine.outer_state, first.outer_state)
        assert mine.num_left_out == center_node(last).num_left_out
        assert [record.number for record in log] == [1, 2, 3]
        assert log == found[0][2]
    return found


def method(function, *args, **options):
    return functools.partial(function, *args, period=PERIOD, **options)


adam, sgd = optax.adam(0.1), optax.sgd(0.1)
METHODS = {
    "diloco": method(emaopt.diloco, adam),
    "local_sgd": method(emaopt.local_sgd, sgd),
    "agn": functools.partial(emaopt.agn, sgd, communication_period=PERIOD),
    "agn of gradients": method(
        emaopt.local_updates, sgd, optax.adam(0.1), commit="mean_gradient"
    ),
    "easgd": method(emaopt.easgd, sgd),
    "easgd with a rate": method(emaopt.easgd, sgd, moving_rate=0.2),
    "block momentum": method(emaopt.block_momentum, sgd),
    "block momentum of .5": method(emaopt.block_momentum, sgd, block_momentum=0.5),
    "sum": method(emaopt.local_updates, sgd, optax.sgd(0.3), reduce="sum"),
    "mean_delta": method(emaopt.local_updates, sgd, optax.adam(0.1), commit="mean_delta"),
    "mask": method(
        emaopt.local_updates,
        sgd,
        optax.adamw(0.1, weight_decay=0.1, mask=emaopt.by_name("w")),
    ),
    "fragments": method(emaopt.diloco, sgd, num_fragments=2),
    "mix": method(emaopt.local_sgd, sgd, mix=0.25),
    "an average of the center": method(
        emaopt.diloco,
        sgd,
        outer=optax.chain(optax.sgd(0.7, 0.9), emaopt.average_params(0.5)),
    ),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", METHODS)
def test_methods_are_those_of_the_stacked_form(name):
    check(METHODS[name])


@pytest.mark.quick(2)
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "int8", "int16"]
)
def test_commits_travel_in_the_exchange_dtype(dtype, feedback):
    make = method(emaopt.diloco, sgd, exchange_dtype=dtype, error_feedback=feedback)
    # Sums are computed in float32, and rounded once.
    width = {"bfloat16": 2e-2, "float16": 2e-3, "float8_e4m3fn": 0.2}.get(dtype, 1e-5)
    check(make, tolerance=width)


@pytest.mark.parametrize("weights", [(1.0, 2.0, 5.0), (0.0, 1.0, 3.0), (0.0, 0.0, 0.0)])
def test_weights(weights):
    found = check(METHODS["diloco"], weights=weights)
    expected = {w: x for w, x in enumerate(weights) if x}
    assert all(record.weights == expected for record in found[0][2])


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["diloco", "easgd", "agn of gradients", "fragments"])
def test_a_worker_with_a_nan_is_left_out(name):
    found = check(METHODS[name], nan=((1, 0), 2))
    lefts = [record.left_out for record in found[0][2]]
    assert lefts == [(), (2,), ()]


class Params(NamedTuple):
    w: object
    b: object


TREES = {
    "bfloat16": {"w": jnp.linspace(-1, 1, 9, dtype=jnp.bfloat16)},
    "float16 beside float32": {"w": jnp.ones(3, jnp.float16), "b": jnp.ones((2, 2))},
    "complex": {"w": jnp.array([1 + 2j, -1j], jnp.complex64)},
    "NamedTuple": Params(jnp.ones((2, 3)), jnp.float32(1)),
    "one array": jnp.ones(5),
    "a scalar": jnp.float32(2),
    "a leaf of size 0": {"w": jnp.zeros((0, 3)), "b": jnp.ones(2)},
    "fewer elements than workers": {"w": jnp.ones(2)},
    "nothing": {},
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("tree", TREES)
def test_trees(tree):
    tolerance = 2e-2 if "16" in tree else 1e-6
    check(METHODS["local_sgd"], params=TREES[tree], tolerance=tolerance)


def test_replay_gives_the_same_centers():
    commits = {}
    tx = METHODS["diloco"](exchange_dtype="int8")
    params = jax.tree.map(jnp.asarray, START)

    def body(workers):
        own, state, centers = params, tx.init(params), []
        for number in range(1, 5):
            steps = 0 if (number, workers.worker) == (3, 1) else 2
            for _ in range(steps):
                grads = gradient(workers.worker, own)
                if (number, workers.worker) == (2, 0):
                    grads = jax.tree.map(lambda g: g * jnp.nan, grads)
                updates, state = tx.update(grads, state, own, exchange=False)
                own = optax.apply_updates(own, updates)
            key = number, workers.worker
            commits[key] = emaopt.elastic.pseudo_gradient(tx, own, state)
            weight = 1.0 + workers.worker
            own, state, *_ = workers.exchange(tx, own, state, weight=weight)
            centers.append(emaopt.get_center(state))
        return centers, workers.log

    (centers, log), *_ = together(body, WORKERS)
    assert [sorted(record.weights) for record in log] == [
        [0, 1, 2],
        [1, 2],
        [0, 2],
        [0, 1, 2],
    ]
    again = emaopt.elastic.replay(
        tx, params, tx.init(params), log, lambda number, worker: commits[number, worker]
    )
    chex.assert_trees_all_equal(again, centers)


def test_fingerprints_tell_trees_apart():
    chance = np.random.default_rng(0)
    tree = {"w": np.full((256, 256), 0.1, np.float32), "b": np.ones(4, np.float32)}
    others = [
        {"w": np.full((256, 256), 0.7, np.float32), "b": tree["b"]},
        {"w": tree["w"], "b": np.array([-1, -1, 1, 1], np.float32)},
        {"w": tree["w"], "b": np.array([1, 1, 1, 0], np.float32)},
        {"w": -tree["w"], "b": tree["b"]},
        {"w": tree["w"].T + 1e-8, "b": tree["b"]},
    ]
    for _ in range(50):  # one bit of one element
        bits = tree["w"].copy().view(np.uint32)
        bits[tuple(chance.integers(0, 256, 2))] ^= 1 << chance.integers(0, 32)
        others.append({"w": bits.view(np.float32), "b": tree["b"]})
    ramp = np.arange(6, dtype=np.float32)
    others += [
        {"w": ramp},
        {"w": ramp[::-1].copy()},
        {"w": ramp.astype(ml_dtypes.bfloat16)},
    ]
    others += [{"w": np.zeros(0)}, {"w": jax.random.key(0)}, {"w": jax.random.key(1)}]
    others += [{"w": np.array([True, False])}, {"w": np.array([1j, 0], np.complex64)}]
    found = [int(fingerprint(one)) for one in (tree, *others)]
    assert len(set(found)) == len(found)
    assert found[0] == int(fingerprint(jax.tree.map(jnp.copy, tree)))


def test_workers_with_other_centers_join_the_first_one(caplog):
    tx = METHODS["diloco"]()

    def body(workers):
        params = {"w": jnp.full((256, 256), 0.1 + 0.6 * workers.worker)}
        state = tx.init(params)
        updates, state = tx.update(params, state, params, exchange=False)
        params = optax.apply_updates(params, updates)
        found = workers.exchange(tx, params, state)
        return found.joined, found.params, emaopt.get_center(found.opt_state)

    first, second = together(body, 2)
    assert first[0] == second[0] == (1,)
    assert "worker 1 begins with another center than worker 0" in caplog.text
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("last", [True, False])
def test_integers_beside_a_leaf_that_has_none(last):
    params = {"a": jnp.linspace(-1, 1, 5), "b": jnp.array([1 + 2j, -1j], jnp.complex64)}
    if last:
        params = {"a": params["b"], "b": params["a"]}
    check(method(emaopt.diloco, sgd, exchange_dtype="int8"), params, tolerance=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_elastic_averaging_in_an_exchange_dtype(dtype):
    make = method(emaopt.easgd, sgd, moving_rate=0.2, exchange_dtype=dtype)
    check(make, tolerance=0.1 if "8" in dtype[:6] else 5e-3)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 3.0), (2.0, 2.0, 2.0)])
def test_error_feedback_keeps_what_did_not_count(weights):
    make = method(emaopt.diloco, sgd, exchange_dtype="int8", error_feedback=True)
    params = jax.tree.map(jnp.asarray, START)
    _, wanted = stacked(make, params, weights=weights)
    for worker, (_, state, _) in enumerate(elastic(make, params, weights=weights)):
        row = jax.tree.map(lambda x, w=worker: x[w], wanted.residual)
        chex.assert_trees_all_close(
            center_node(state).residual, row, rtol=1e-3, atol=1e-6
        )
