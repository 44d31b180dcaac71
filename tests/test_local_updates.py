"""Local updates against a simulation of the workers, one by one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from local_oracle import (
    STARTS,
    WORKERS,
    adam,
    gradient,
    gradients,
    sgd,
    simulate,
    stepper,
    train,
)

import emaopt

pytestmark = pytest.mark.quick(1)

INNER = {
    "sgd": (optax.sgd(0.1), sgd(0.1)),
    "momentum": (optax.sgd(0.1, 0.9), sgd(0.1, 0.9)),
    "adam": (optax.adam(0.1), adam(0.1)),
}
OUTER = {
    "sgd": (optax.sgd(0.8), sgd(0.8)),
    "nesterov": (optax.sgd(0.7, 0.9, True), sgd(0.7, 0.9, True)),
    "adam": (optax.adam(0.2), adam(0.2)),
}
PAIRS = [("sgd", "nesterov"), ("momentum", "adam"), ("adam", "sgd")]
COMMITS = {
    "delta": {},
    "mean_delta": {"commit": "mean_delta"},
    "mean_gradient": {"commit": "mean_gradient"},
    "elastic": {"moving_rate": 0.2},
}


def every(period):
    return lambda step, since: step % period == 0


def of_oracle(options):
    options = dict(options)
    rate = options.pop("moving_rate", None)
    return {"rate": rate, "num_workers": WORKERS, **options}


def of_each_leaf(optimizers, labels):
    """One transformation that steps each leaf with the optimizer of its label."""
    return optax.partition({k: tx for k, (tx, _) in optimizers.items()}, labels)


@pytest.mark.parametrize("reduce", ["mean", "sum", "sequential"])
@pytest.mark.parametrize("commit", COMMITS)
def test_workers_and_center_are_the_simulated_ones(commit, reduce):
    # A leaf for each pair of an inner and an outer optimizer.
    options = {**COMMITS[commit], "reduce": reduce}
    names = {f"{inner} {outer}": (inner, outer) for inner, outer in PAIRS}
    with jax.enable_x64(True):
        tx = emaopt.local_updates(
            of_each_leaf(INNER, {name: inner for name, (inner, _) in names.items()}),
            of_each_leaf(OUTER, {name: outer for name, (_, outer) in names.items()}),
            period=3,
            num_workers=WORKERS,
            **options,
        )
        start = dict(zip(names, jnp.asarray(STARTS[:3]), strict=True))
        centers, rows, _ = train(tx, start, 10)
    for (name, (inner, outer)), x in zip(names.items(), STARTS, strict=False):
        optimizers = INNER[inner][1], OUTER[outer][1]
        expected = simulate(x, gradient, 10, *optimizers, every(3), **of_oracle(options))
        for actual, value in zip((centers[name], rows[name]), expected, strict=True):
            np.testing.assert_allclose(actual, value, rtol=1e-10, err_msg=name)


# When they meet

SCHEDULE = {5: 1, 99: 3}  # until which step, local steps between exchanges


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("period", [1, 3, "schedule"])
def test_exchanges_come_with_the_period_and_at_every_step_of_the_warmup(period, warmup):
    def due(step, since):
        now = min(until for until in SCHEDULE if step <= until)
        late = since >= SCHEDULE[now] if period == "schedule" else step % period == 0
        return late or step <= warmup

    with jax.enable_x64(True):
        tx = emaopt.local_updates(
            optax.sgd(0.1, 0.9),
            optax.sgd(0.8),
            period=period if period != "schedule" else lambda n: jnp.where(n <= 5, 1, 3),
            num_workers=WORKERS,
            commit="mean_delta",  # it divides by the steps since the exchange
            warmup_steps=warmup,
        )
        actual = train(tx, jnp.asarray(STARTS[0]), 11)
    expected = simulate(
        STARTS[0],
        gradient,
        11,
        sgd(0.1, 0.9),
        sgd(0.8),
        due,
        commit="mean_delta",
        num_workers=WORKERS,
    )
    for value, right in zip(actual[:2], expected, strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-10)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "period, after",
    [(3, [0, 0, 0, 0, 1, 0, 1, 2]), (lambda step: 3, [0, 0, 0, 0, 1, 2, 0, 1])],
    ids=["number", "schedule"],
)
def test_warmup_may_be_longer_than_the_period(period, after):
    tx = emaopt.local_sgd(optax.sgd(0.1), period=period, num_workers=2, warmup_steps=4)
    params, since = jnp.ones((2, 3)), []
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in after:
        _, state = update(params, state, params)
        since.append(int(state.since_exchange[0]))
    assert since == after


FORCED = [None, True, None, False, False, True, None, None, True, None]  # steps 1 ... 10


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("commit", ["delta", "mean_gradient"])
def test_exchange_forces_one_or_forbids_it(commit, traced):
    def due(step, since):
        forced = FORCED[step - 1]
        return step % 3 == 0 if forced is None else forced

    with jax.enable_x64(True):
        tx = emaopt.local_updates(
            optax.sgd(0.1), optax.sgd(0.8), period=3, num_workers=WORKERS, commit=commit
        )
        kind = jnp.bool_ if traced else bool
        step = stepper(tx, static_argnames=() if traced else "exchange")
        params = emaopt.stack_workers(jnp.asarray(STARTS[0]), WORKERS)
        state, centers, rows = tx.init(params), [], []
        for number, forced in enumerate(FORCED, 1):
            extra = {} if forced is None else {"exchange": kind(forced)}
            params, state = step(params, state, gradients(params, number), **extra)
            centers.append(emaopt.get_center(state))
            rows.append(params)
    expected = simulate(
        STARTS[0],
        gradient,
        len(FORCED),
        sgd(0.1),
        sgd(0.8),
        due,
        commit=commit,
        num_workers=WORKERS,
    )
    for actual, value in zip((centers, rows), expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-10)


@pytest.mark.parametrize("reduce", ["mean", "sequential"])
def test_a_pull_keeps_the_slots_and_the_counters(reduce):
    tx = emaopt.local_updates(
        optax.adam(0.1), optax.sgd(0.8), period=9, num_workers=WORKERS, reduce=reduce
    )
    *_, state = train(tx, jnp.asarray(STARTS[0]), 4)
    params = emaopt.stack_workers(jnp.asarray(STARTS[1]), WORKERS)
    grads = gradients(params, 5)
    _, kept = tx.update(grads, state, params, exchange=False)
    _, pulled = tx.update(grads, state, params, exchange=True)
    chex.assert_trees_all_equal(kept.inner_state, pulled.inner_state)
    assert kept.num_steps == pulled.num_steps == 5
    assert (kept.since_exchange, pulled.since_exchange) == ((5,), (0,))


# Workers that are left out


@pytest.mark.parametrize(
    "commit, reduce",
    [
        *((commit, "mean") for commit in COMMITS),
        *((commit, "sequential") for commit in ("delta", "mean_gradient", "elastic")),
        ("elastic", "sum"),
    ],
)
def test_worker_with_a_bad_step_is_left_out_and_pulls_the_center(commit, reduce):
    # Worker 1 is bad at the first exchange; at the second, nobody is healthy.
    def poisoned(params, step):
        grads = gradients(params, step)
        rows, bad = {2: ([1], jnp.nan), 4: ([0, 1, 2], jnp.inf)}.get(step, ([], 0))
        grads["a"] = grads["a"].at[jnp.array(rows, int), 2].set(bad)
        return grads

    options = {**COMMITS[commit], "reduce": reduce}
    with jax.enable_x64(True):
        tx = emaopt.local_updates(
            optax.sgd(0.1), optax.sgd(0.8), period=2, num_workers=WORKERS, **options
        )
        start = {"a": jnp.asarray(STARTS[0]), "b": jnp.asarray(STARTS[1])}
        centers, rows, state = train(tx, start, 6, poisoned)
    for name, x in zip("ab", STARTS, strict=False):
        expected = simulate(
            x,
            gradient,
            6,
            sgd(0.1),
            sgd(0.8),
            every(2),
            healthy=lambda worker, step: step > 4 or (step == 2 and worker != 1),
            **of_oracle(options),
        )
        np.testing.assert_allclose(centers[name], expected[0], rtol=1e-10)
        np.testing.assert_allclose(rows[name], expected[1], rtol=1e-10)
    assert state.num_left_out == 4


@pytest.mark.parametrize("reduce", ["mean", "sequential"])
def test_worker_whose_sum_of_gradients_overflows_is_left_out(reduce):
    tx = emaopt.local_updates(
        optax.sgd(1e-38),
        optax.sgd(1.0),
        period=2,
        num_workers=2,
        commit="mean_gradient",
        reduce=reduce,
    )
    params = jnp.ones((2, 3))
    state, grads = tx.init(params), jnp.full((2, 3), 0.5).at[1, 0].set(3e38)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert (state.num_left_out, *state.num_missed) == (1, 0, 0)
    np.testing.assert_array_equal(emaopt.get_center(state), np.full(3, 0.5))
    np.testing.assert_array_equal(params, np.full((2, 3), 0.5))


@pytest.mark.parametrize("reduce", ["mean", "sequential"])
def test_left_out_worker_keeps_its_residual(reduce):
    tx = emaopt.local_updates(
        optax.sgd(0.1),
        optax.sgd(1.0),
        period=1,
        num_workers=WORKERS,
        reduce=reduce,
        exchange_dtype=jnp.int8,
        error_feedback=True,
    )
    *_, state = train(tx, jnp.asarray(STARTS[0], jnp.float32), 3)
    params = emaopt.stack_workers(emaopt.get_center(state), WORKERS)
    grads = gradients(params, 4).at[1, 0].set(jnp.nan)
    _, after = stepper(tx)(params, state, grads)
    np.testing.assert_array_equal(after.residual[1], state.residual[1])
    assert jnp.all(jnp.isfinite(after.residual)) and after.num_left_out == 1
