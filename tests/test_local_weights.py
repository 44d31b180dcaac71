"""What each worker's commit counts, and counters that are full."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import in_form

import emaopt

pytestmark = pytest.mark.quick(1)

WORKERS, STEPS = 4, 6
GRADS = np.random.default_rng(0).normal(size=(STEPS, WORKERS, 5))
INNER, OUTER = optax.sgd(0.1), optax.sgd(0.5)
CASES = {
    "mean": {},
    "sum": {"reduce": "sum"},
    "in turns": {"reduce": "sequential"},
    "mean_gradient": {"commit": "mean_gradient"},
    "elastic": {"moving_rate": 0.2, "reduce": "sum"},
    "elastic, in turns": {"moving_rate": 0.2, "reduce": "sequential"},
    "int8": {"exchange_dtype": jnp.int8, "error_feedback": True},
    "bfloat16": {"exchange_dtype": jnp.bfloat16, "error_feedback": True},
    "fragments": {"num_fragments": 2},
}
FORMS = ["stacked", "vmap", "shard_map"]


def split(x):
    return {"a": x[..., :3], "b": x[..., 3:]}


@functools.cache
def program(case, form, weighted=True, num_workers=WORKERS):
    named = {"axis_name": "w"} if form != "stacked" else {"num_workers": num_workers}
    tx = emaopt.local_updates(INNER, OUTER, period=2, **CASES[case], **named)
    params = split(jnp.ones((num_workers, 5)))

    def step(params, state, grads, weights):
        extra = {"weights": weights} if weighted else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    step, state = in_form(form, tx, step, params, num_inputs=2)
    step = jax.jit(step)

    def run(weights, grads):
        carry, rows = (params, state), []
        for one in grads:
            weights = jnp.asarray(weights, jnp.float32)
            carry = step(*carry, split(jnp.asarray(one, jnp.float32)), weights)
            rows.append(np.concatenate([carry[0]["a"], carry[0]["b"]], -1))
        return np.stack(rows), carry[1]

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_equal_weights_are_none(case, form):
    plain, _ = program(case, form, weighted=False)(np.ones(WORKERS), GRADS)
    rows, _ = program(case, form)(np.full(WORKERS, 7.0), GRADS)
    np.testing.assert_allclose(rows, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_worker_of_weight_zero_is_absent_and_not_counted(case, form):
    rows, state = program(case, form)(np.array([3.0, 3.0, 0.0, 3.0]), GRADS)
    others = [0, 1, 3]
    expected, _ = program(case, "stacked", False, 3)(np.ones(3), GRADS[:, others])
    tolerance = 2e-2 if case in ("int8", "bfloat16") else 1e-5
    np.testing.assert_allclose(rows[:, others], expected, rtol=tolerance, atol=tolerance)
    assert np.ravel(state.num_left_out)[0] == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_weighted_mean_is_that_of_the_commits(form):
    weights = np.array([1.0, 2.0, 3.0, 10.0])
    rows, _ = program("mean", form)(weights, GRADS[:2])
    mean = np.average(0.1 * GRADS[:2].sum(0), axis=0, weights=weights)
    np.testing.assert_allclose(rows[-1], np.tile(1 - 0.5 * mean, (4, 1)), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["sum", "in turns"])
def test_a_weighted_sum_is_of_weights_whose_mean_is_one(case, form):
    weights = np.array([1.0, 2.0, 3.0, 10.0])
    rows, state = program(case, form)(weights, GRADS[:2])
    commits = 0.1 * GRADS[:2].sum(0) * (weights / weights.mean())[:, None]
    center = emaopt.get_center(state)
    center = np.concatenate([center["a"], center["b"]], -1)
    center = center if form == "stacked" else center[0]
    np.testing.assert_allclose(center, 1 - 0.5 * commits.sum(0), rtol=1e-5)
    if case == "in turns":
        expected = 1 - 0.5 * np.cumsum(commits, 0)
        np.testing.assert_allclose(rows[-1], expected, rtol=1e-5)


@pytest.mark.parametrize("weighted", [0, 1, 2, 3])
def test_a_bad_worker_takes_its_weight_with_it(weighted):
    weights, grads = np.array([1.0, 2.0, 3.0, 10.0]), GRADS[:2].copy()
    grads[0, weighted] = np.nan
    rows, state = program("mean", "stacked")(weights, grads)
    others = [w for w in range(WORKERS) if w != weighted]
    commits = 0.1 * GRADS[:2, others].sum(0)
    mean = np.average(commits, axis=0, weights=weights[others])
    np.testing.assert_allclose(rows[-1], np.tile(1 - 0.5 * mean, (4, 1)), rtol=1e-5)
    assert state.num_left_out == 1


@pytest.mark.parametrize("weights", [[0.0] * 4, [np.nan] * 4, [np.inf] * 4, [-1.0] * 4])
@pytest.mark.parametrize("case", ["mean", "in turns", "int8"])
def test_without_any_worker_the_center_stays(case, weights):
    rows, state = program(case, "stacked")(np.array(weights), GRADS[:2])
    np.testing.assert_array_equal(rows[-1], 1)
    assert state.num_left_out == 0


FEEDBACK = emaopt.local_sgd(
    optax.sgd(1.0),
    period=1,
    num_workers=2,
    exchange_dtype=jnp.bfloat16,
    error_feedback=True,
)


def test_error_feedback_keeps_what_a_weighted_commit_lost():
    params, grads = (
        jnp.zeros((2, 64)),
        jnp.asarray(np.random.default_rng(0).uniform(size=(2, 64)), jnp.float32),
    )
    weights = jnp.array([1.0, 3.0])
    _, state = FEEDBACK.update(grads, FEEDBACK.init(params), params, weights=weights)
    share = np.array([[0.5], [1.5]])
    sent = np.float64((grads * share).astype(jnp.bfloat16)) / share
    np.testing.assert_allclose(state.residual, np.float64(grads) - sent, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("reduce", ["mean", "sequential"])
def test_an_absent_worker_keeps_its_residual_and_comes_back(reduce, dtype):
    tx = emaopt.local_updates(
        optax.sgd(1.0),
        optax.sgd(1.0),
        period=1,
        num_workers=WORKERS,
        reduce=reduce,
        exchange_dtype=dtype,
        error_feedback=True,
    )
    params, grads = jnp.zeros((WORKERS, 5)), jnp.asarray(GRADS, jnp.float32)
    state, residuals = tx.init(params), []
    for number, weight in enumerate([1.0, 0.0, 1.0]):
        weights = jnp.ones(WORKERS).at[1].set(weight)
        _, state = jax.jit(tx.update)(grads[number], state, params, weights=weights)
        residuals.append(state.residual)
    np.testing.assert_array_equal(residuals[1][1], residuals[0][1])
    assert np.any(residuals[1][0] != residuals[0][0])
    assert np.any(residuals[2][1] != residuals[1][1])
    assert np.all(np.isfinite(residuals[2])) and state.num_left_out == 0


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", ["absent", "bad"])
def test_turn_of_a_worker_that_is_left_out_leaves_the_outer_slots(case):
    def after_two_steps(grads, weights=None):
        tx = emaopt.local_updates(
            INNER,
            optax.sgd(0.5, momentum=0.9),
            period=1,
            num_workers=len(grads),
            reduce="sequential",
        )
        params = jnp.ones(grads.shape)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(grads, state, params, weights=weights)
            params = optax.apply_updates(params, updates)
        return state.center, state.outer_state

    grads = jnp.asarray(GRADS[0], jnp.float32)
    expected = after_two_steps(grads[jnp.array([0, 2, 3])])
    if case == "absent":
        actual = after_two_steps(grads, jnp.array([1.0, 0.0, 1.0, 1.0]))
    else:
        actual = after_two_steps(grads.at[1, 0].set(jnp.nan))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.quick(3)
@pytest.mark.parametrize("reduce", ["mean", "sum", "sequential"])
def test_an_elastic_workers_own_move_is_not_weighted(reduce):
    tx = emaopt.local_updates(
        INNER,
        optax.sgd(0.0),  # the center stays where it is
        period=1,
        num_workers=WORKERS,
        moving_rate=0.2,
        reduce=reduce,
    )
    params, grads = jnp.ones((WORKERS, 5)), jnp.asarray(GRADS[0], jnp.float32)
    weights = jnp.array([1.0, 2.0, 0.0, 10.0])
    updates, _ = tx.update(grads, tx.init(params), params, weights=weights)
    np.testing.assert_allclose(updates, -0.08 * grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "weights, error, message",
    [
        (
            jnp.ones(3),
            ValueError,
            r"local_sgd: weights must be 4 numbers, got shape \(3,\)",
        ),
        (1.0, ValueError, r"local_sgd: weights must be 4 numbers, got shape \(\)"),
        ("abcd", TypeError, "local_sgd: weights must be 4 numbers, got 'abcd'"),
        ([True] * 4, TypeError, "local_sgd: weights must be 4 numbers, got .True"),
        *(
            ([1, 2, 3, bad], ValueError, "local_sgd: weights must be 0 or from 1e-30 to")
            for bad in (-1, np.nan, np.inf, 3e38, 1e-40)
        ),
        ([1, 2, 3, 2**70], TypeError, "local_sgd: weights must be 4 numbers"),
    ],
)
@pytest.mark.quick(1000)
@pytest.mark.parametrize("jitted", [True, False])
def test_weights_that_are_none(weights, error, message, jitted):
    tx = emaopt.local_sgd(INNER, period=2, num_workers=WORKERS)
    params = jnp.ones((WORKERS, 5))
    update = functools.partial(tx.update, weights=weights)
    with pytest.raises(error, match=f"^{message}"):
        (jax.jit(update) if jitted else update)(params, tx.init(params), params)


@pytest.mark.parametrize(
    "weights, total",
    [
        (jnp.array([1.0, 3.0]), 2.5),
        (np.array([2**40, 3 * 2**40]), 2.5),
        ([2**40, 2**40], 2.0),
        ([1e30, 1e30], 2.0),
        ([1e-30, 1e-30], 2.0),
        ([1e30, 1e-30], 1.0),
    ],
)
@pytest.mark.parametrize("jitted", [True, False])
def test_weights_may_be_constants_of_any_size(weights, total, jitted):
    tx = emaopt.local_sgd(optax.sgd(1.0), period=1, num_workers=2)
    params, grads = jnp.zeros((2, 3)), jnp.array([[1.0] * 3, [3.0] * 3])
    update = functools.partial(tx.update, weights=weights)
    _, state = (jax.jit(update) if jitted else update)(grads, tx.init(params), params)
    np.testing.assert_allclose(emaopt.get_center(state), np.full(3, -total), rtol=1e-6)


@pytest.mark.parametrize("weights", [[1e10, 1e-30], [1.0, 0.0]])
def test_no_share_of_the_commits_is_too_small_for_error_feedback(weights):
    params, grads = jnp.zeros((2, 3)), jnp.full((2, 3), 1.001)
    with jax.debug_nans(True):
        _, state = FEEDBACK.update(grads, FEEDBACK.init(params), params, weights=weights)
        _, state = FEEDBACK.update(grads, state, params, weights=[1.0, 1.0])
    assert state.num_left_out == 0
    assert np.isfinite(state.residual).all()


# Counters


FULL = 2**31 - 1


@pytest.mark.parametrize("num_fragments", [1, 3])
@pytest.mark.parametrize("jitted", [True, False])
def test_exchanges_go_on_when_the_counter_of_steps_is_full(num_fragments, jitted):
    tx = emaopt.local_sgd(INNER, period=3, num_workers=2, num_fragments=num_fragments)
    params = {n: jnp.ones((2, 2)) for n in "abc"}
    grads, state = params, tx.init(params)._replace(num_steps=jnp.int32(FULL - 8))
    update, moved = jax.jit(tx.update) if jitted else tx.update, []
    for _ in range(20):
        before = emaopt.get_center(state)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        now = emaopt.get_center(state)
        moved.append([bool(np.any(now[n] != before[n])) for n in "abc"])
    times = np.array(moved)
    for leaf in range(3):  # every third step, before, at and after the end
        gaps = np.diff(np.flatnonzero(times[:, leaf]))
        assert set(gaps) == {3}
    if num_fragments == 3:  # and still in turns
        np.testing.assert_array_equal(times.sum(1)[2:], 1)


def test_full_counters_of_what_was_left_out_stay_full():
    tx = emaopt.local_sgd(INNER, period=1, num_workers=2)
    params = jnp.ones((2, 3))
    state = tx.init(params)
    state = state._replace(
        num_left_out=jnp.int32(FULL), num_missed=jnp.full(2, FULL, jnp.int32)
    )
    _, after = tx.update(jnp.full((2, 3), jnp.nan), state, params)
    chex.assert_trees_all_equal(after.num_left_out, state.num_left_out)
    chex.assert_trees_all_equal(after.num_missed, state.num_missed)
