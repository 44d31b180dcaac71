"""Workers that meet a NaN or inf: they stay where they were, are left out, and return."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import in_form

import emaopt

pytestmark = pytest.mark.quick(1)

WORKERS, PERIOD, ROUNDS = 3, 3, 3
STEPS = PERIOD * ROUNDS
START = {"a": np.random.default_rng(0).normal(size=(3, 2)), "b": np.ones(4)}
GRADS = jax.tree.map(
    lambda x: np.random.default_rng(1).normal(size=(STEPS, WORKERS, *x.shape)), START
)
ADAM = optax.adam(0.05)
METHODS = {
    "local_sgd": lambda **o: emaopt.local_sgd(ADAM, **o),
    "diloco": lambda **o: emaopt.diloco(ADAM, **o),
    "agn": lambda period, **o: emaopt.agn(optax.sgd(0.1, 0.9), period, **o),
    "agn, paper": lambda period, **o: emaopt.agn(ADAM, period, variant="paper", **o),
    "easgd": lambda **o: emaopt.easgd(ADAM, moving_rate=0.2, **o),
    "easgd, in turns": lambda **o: emaopt.easgd(
        ADAM, moving_rate=0.3, reduce="sequential", **o
    ),
    "block_momentum": lambda **o: emaopt.block_momentum(ADAM, block_momentum=0.5, **o),
    "in turns": lambda **o: emaopt.local_updates(
        ADAM, optax.sgd(0.5), reduce="sequential", **o
    ),
    "int8": lambda **o: emaopt.local_sgd(
        ADAM, exchange_dtype=jnp.int8, error_feedback=True, **o
    ),
    "bfloat16": lambda **o: emaopt.local_sgd(
        ADAM, exchange_dtype=jnp.bfloat16, error_feedback=True, **o
    ),
    "fragments": lambda **o: emaopt.diloco(ADAM, num_fragments=2, **o),
}
FORMS = ("stacked", "vmap", "shard_map", "shard_map, unchecked")


def grads_of(dtype, workers):
    return jax.tree.map(lambda x: jnp.asarray(x[:, workers], dtype), GRADS)


@functools.cache
def program(method, form, dtype, num_workers):
    """Of gradients [steps, W, ...]: the rows and centers of each step, the last state."""
    named = {"axis_name": "w"} if form != "stacked" else {"num_workers": num_workers}
    tx = METHODS[method](period=PERIOD, **named)
    start = jax.tree.map(lambda x: jnp.asarray(x, dtype), START)
    params = emaopt.stack_workers(start, num_workers)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step, state = in_form(form, tx, step, params)

    @jax.jit
    def run(grads):
        def one(carry, grads):
            carry = step(*carry, grads)
            return carry, (carry[0], emaopt.get_center(carry[1]))

        (_, last), (rows, centers) = jax.lax.scan(one, (params, state), grads)
        return rows, centers, last

    return run


def poisoned(grads, worker, steps, value, leaf):
    """The gradients, one number of which is `value` for a worker at some steps."""
    for step in steps:
        place = (step, worker, *(0,) * (grads[leaf].ndim - 2))
        grads = grads | {leaf: grads[leaf].at[place].set(value)}
    return grads


def assert_finite(*trees):
    for leaf in jax.tree.leaves(trees):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert jnp.all(jnp.isfinite(leaf))


def one_center(centers, form):
    """[steps, ...], from what a mapped form has for each worker."""
    return centers if form == "stacked" else jax.tree.map(lambda c: c[:, 0], centers)


COMBINATIONS = [
    (method, form, dtype)
    for method, form, dtype in itertools.product(
        METHODS, FORMS, (jnp.float32, jnp.bfloat16)
    )
    # All methods in both forms, and each form of the mapped one with some of them.
    if form in ("stacked", "vmap") or method in ("diloco", "easgd, in turns", "int8")
]


@pytest.mark.slow
@pytest.mark.parametrize("method, form, dtype", COMBINATIONS)
@settings(deadline=None, max_examples=25)
@given(
    worker=st.integers(0, WORKERS - 1),
    offsets=st.lists(
        st.integers(0, PERIOD - 1), min_size=2 * ROUNDS, max_size=2 * ROUNDS
    ),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    leaf=st.sampled_from(["a", "b"]),
)
def test_others_go_on_as_without_a_worker_with_a_bad_step_in_every_round(
    method, form, dtype, worker, offsets, value, leaf
):
    others = [w for w in range(WORKERS) if w != worker]
    steps = {PERIOD * (i % ROUNDS) + offset for i, offset in enumerate(offsets)}
    if method == "fragments":  # whose rounds end at different steps
        steps = set(range(STEPS))
    grads = poisoned(grads_of(dtype, slice(None)), worker, steps, value, leaf)
    rows, centers, state = program(method, form, dtype, WORKERS)(grads)
    assert_finite(rows, centers, state)
    expected = program(method, "stacked", dtype, WORKERS - 1)(grads_of(dtype, others))
    # Sums of three and of two are taken in other orders; bfloat16 has 8 bits.
    tolerance = {"rtol": 2e-5, "atol": 2e-5}
    if dtype == jnp.bfloat16 or method == "bfloat16":
        tolerance = {"rtol": 0.05, "atol": 0.05}
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: np.float32(x[:, np.array(others)]), rows),
        jax.tree.map(np.float32, expected[0]),
        **tolerance,
    )
    chex.assert_trees_all_close(one_center(centers, form), expected[1], **tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["diloco", "easgd", "in turns", "int8"])
@pytest.mark.parametrize("bad", range(PERIOD))
def test_a_worker_with_a_bad_step_pulls_the_center_and_takes_part_again(
    method, form, bad
):
    grads = poisoned(grads_of(jnp.float32, slice(None)), 1, [bad], jnp.nan, "b")
    rows, centers, state = program(method, form, jnp.float32, WORKERS)(grads)
    centers = one_center(centers, form)
    before = jax.tree.map(lambda x: x[bad - 1, 1], rows)
    if bad:  # the step was not taken
        taken = jax.tree.map(lambda x: x[bad, 1], rows)
        if bad < PERIOD - 1:
            chex.assert_trees_all_equal(taken, before)
    pulled = jax.tree.map(lambda x: x[PERIOD - 1], (rows, centers))
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[1], pulled[0]), pulled[1], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(np.ravel(state.num_left_out)[0], 1)
    np.testing.assert_array_equal(
        np.reshape(state.num_missed, (WORKERS, -1))[:, 0], [0, 1, 0]
    )
    assert not np.any(state.has_missed[0])
    # It counts at the next exchange: with another gradient there, another center.
    again = grads | {"b": grads["b"].at[PERIOD, 1].add(1.0)}
    _, others, _ = program(method, form, jnp.float32, WORKERS)(again)
    moved = one_center(others, form)["b"] - centers["b"]
    assert np.all(moved[: 2 * PERIOD - 1] == 0) and np.any(moved[2 * PERIOD - 1] != 0)


@pytest.mark.parametrize("form", ["stacked", "vmap"])
@pytest.mark.parametrize("method", METHODS)
def test_all_workers_may_be_bad_at_once(method, form):
    grads = grads_of(jnp.float32, slice(None))
    for worker in range(WORKERS):
        grads = poisoned(grads, worker, [1], jnp.inf, "a")
    rows, centers, state = program(method, form, jnp.float32, WORKERS)(grads)
    assert_finite(rows, centers, state)
    exchanges = 2 if method == "fragments" else 1
    assert np.ravel(state.num_left_out)[0] == exchanges * WORKERS
    moved = jax.tree.map(lambda x: np.any(x[-1] != x[PERIOD]), one_center(centers, form))
    assert all(jax.tree.leaves(moved))


@pytest.mark.quick(2)
@pytest.mark.parametrize("jitted", [True, False])
def test_gradients_of_a_step_that_is_not_taken_are_not_summed(jitted):
    tx = emaopt.local_updates(
        optax.sgd(0.1), optax.sgd(1.0), period=9, num_workers=2, commit="mean_gradient"
    )
    params, good = jnp.ones((2, 3)), jnp.array([[1.0] * 3, [2.0] * 3])
    update, state = jax.jit(tx.update) if jitted else tx.update, tx.init(params)
    for grads in (good.at[1, 0].set(jnp.nan), good, good.at[0, 2].set(jnp.inf)):
        _, state = update(grads, state, params)
    np.testing.assert_array_equal(state.accumulated, 2 * good)


SLOTS = {
    "a NaN learning rate": lambda n: jnp.where(n == 1, jnp.nan, -0.1),
    "an infinite one": lambda n: jnp.where(n == 1, -jnp.inf, -0.1),
}


@pytest.mark.parametrize("schedule", SLOTS)
def test_updates_that_are_not_finite_are_no_step_either(schedule):
    inner = optax.chain(optax.trace(0.9), optax.scale_by_schedule(SLOTS[schedule]))
    tx = emaopt.local_sgd(inner, period=4, num_workers=2)
    params = emaopt.stack_workers(jnp.ones(3), 2)
    update, state = jax.jit(tx.update), tx.init(params)
    _, state = update(jnp.ones((2, 3)), state, params)
    slots = state.inner_state
    missed, state = update(jnp.ones((2, 3)), state, params)
    chex.assert_trees_all_equal(state.inner_state, slots)
    np.testing.assert_array_equal(missed, 0)
    np.testing.assert_array_equal(state.num_missed, [1, 1])


@pytest.mark.slow
def test_a_bad_step_leaves_slots_of_every_kind_as_they_are():
    inner = optax.chain(
        optax.add_noise(0.1, 0.5, 3),
        optax.contrib.prodigy(0.1),
        optax.inject_hyperparams(optax.adam)(0.1),
    )
    tx = emaopt.local_sgd(inner, period=9, num_workers=2)
    params = emaopt.stack_workers({"w": jnp.ones((2, 3)), "n": jnp.ones(())}, 2)
    update, state = jax.jit(tx.update), tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    for step in range(3):
        before = state.inner_state
        bad = grads | {"n": grads["n"].at[1].set(jnp.nan)} if step == 1 else grads
        updates, state = update(bad, state, params)
        if step == 1:
            row = jax.tree.map(lambda x: x[1], (before, state.inner_state))
            chex.assert_trees_all_equal(*row)
            assert not any(np.any(u[1]) for u in jax.tree.leaves(updates))
        assert np.any(updates["w"][0])


@pytest.mark.quick(2)
@pytest.mark.parametrize("jitted", [True, False])
def test_a_bad_step_leaves_slots_that_are_passed_on_or_constant(jitted):
    def init(params):
        return {"last": 0 * params, "before": 0 * params, "number": jnp.zeros(())}

    def update(updates, state, params=None):
        after = {"last": updates, "before": state["last"], "number": jnp.ones(())}
        return updates, after

    inner = optax.GradientTransformation(init, update)
    tx = emaopt.local_sgd(inner, period=9, num_workers=2)
    params, grads = jnp.ones((2, 3)), jnp.array([[1.0] * 3, [2.0] * 3])
    update, state = jax.jit(tx.update) if jitted else tx.update, tx.init(params)
    for worker, now in ((0, [0, 1]), (1, [1, 1])):
        _, state = update(grads.at[worker].set(jnp.nan), state, params)
        np.testing.assert_array_equal(state.inner_state["number"], now)
    np.testing.assert_array_equal(state.inner_state["last"], grads)
    np.testing.assert_array_equal(state.inner_state["before"], 0 * grads)


def test_gradients_that_a_wrapper_inside_would_mend_are_no_step():
    tx = emaopt.local_sgd(
        optax.apply_if_finite(optax.adam(0.1), 9), period=2, num_workers=2
    )
    params = emaopt.stack_workers(jnp.ones(3), 2)
    grads = jnp.ones((2, 3)).at[1].set(jnp.nan)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(state.inner_state.total_notfinite, [0, 0])
    np.testing.assert_array_equal(state.num_missed, [0, 1])


def test_synchronize_leaves_out_a_worker_that_missed_a_step():
    tx = emaopt.local_sgd(optax.sgd(1.0), period=9, num_workers=2)
    params = emaopt.stack_workers(jnp.zeros(1), 2)
    grads = jnp.array([[1.0], [jnp.nan]])
    updates, state = tx.update(grads, tx.init(params), params)
    params, state = emaopt.synchronize(state, optax.apply_updates(params, updates))
    np.testing.assert_array_equal(params, [[-1], [-1]])
    assert state.num_left_out == 1 and not np.any(state.has_missed[0])


def test_synchronize_leaves_a_worker_out_of_the_fragments_that_it_missed():
    tx = emaopt.local_sgd(optax.sgd(1.0), period=2, num_workers=2, num_fragments=2)
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 2))}  # b met at step 1
    state = tx.init(params)
    for bad in (1.0, jnp.nan):
        grads = jax.tree.map(lambda p, bad=bad: jnp.ones_like(p).at[1].set(bad), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.has_missed, [[False, False], [False, True]])
    params, state = emaopt.synchronize(state, params)
    for leaf in jax.tree.leaves((params, emaopt.get_center(state))):
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, -2))
    assert state.num_left_out == 2  # at step 2, of a, and now, of b


@pytest.mark.slow
@pytest.mark.parametrize("case", ["local_round", "exchange"])
def test_a_round_that_is_one_program_leaves_out_a_bad_worker(case):
    tx = METHODS["local_sgd"](period=99, num_workers=WORKERS)
    params = emaopt.stack_workers(jax.tree.map(jnp.float32, START), WORKERS)
    grads = poisoned(grads_of(jnp.float32, slice(None)), 2, [0], jnp.nan, "a")
    grads = jax.tree.map(lambda g: g[:PERIOD], grads)
    if case == "local_round":
        params, state, _ = emaopt.local_round(
            tx, lambda _, g: (jnp.zeros(()), g), params, tx.init(params), grads
        )
    else:
        state = tx.init(params)
        for step in range(PERIOD):
            now = jax.tree.map(lambda g, step=step: g[step], grads)
            updates, state = tx.update(now, state, params, exchange=step == PERIOD - 1)
            params = optax.apply_updates(params, updates)
    assert_finite(params, state)
    assert state.num_left_out == 1
    np.testing.assert_array_equal(state.num_missed, [0, 0, 1])


# Steps that are finite


@pytest.mark.parametrize("form", ["stacked", "vmap"])
@pytest.mark.parametrize(
    "dtype, gradient_dtype, start, gradient",
    [
        ("float16", "float16", 6e4, -6e4),
        ("float16", "float32", 0.0, 1e5),  # beyond what the parameters can be
        ("bfloat16", "bfloat16", 3e38, -3e38),
        ("float32", "float32", 3e38, -3e38),
    ],
)
def test_parameters_that_would_overflow_are_no_step(
    dtype, gradient_dtype, start, gradient, form
):
    named = {"num_workers": 2} if form == "stacked" else {"axis_name": "w"}
    tx = emaopt.local_sgd(optax.sgd(1.0), period=2, **named)
    params = jnp.full((2, 3), start, dtype)
    grads = jnp.zeros((2, 3), gradient_dtype)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step, state = in_form(form, tx, step, params)
    step = jax.jit(step)
    after, state = step(params, state, grads.at[0, 1].set(gradient))
    np.testing.assert_array_equal(np.float32(after), np.float32(params))
    np.testing.assert_array_equal(state.num_missed.reshape(2, -1)[:, 0], [1, 0])
    for _ in range(3):
        after, state = step(after, state, grads)
    np.testing.assert_array_equal(np.float32(after), np.float32(params))
    np.testing.assert_array_equal(state.num_missed.reshape(2, -1)[:, 0], [1, 0])
    assert np.all(state.num_left_out == 1)


def test_gradients_of_integers_do_not_hide_what_the_step_is():
    inner = optax.stateless(lambda updates, _: updates * jnp.nan)
    tx = emaopt.local_sgd(inner, period=2, num_workers=2)
    params, grads = jnp.ones((2, 3)), jnp.ones((2, 3), jnp.int32)
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(state.num_missed, [1, 1])


def test_the_outer_optimizer_does_not_count_the_turn_of_who_is_left_out():
    options = {"period": 1, "num_workers": 3, "reduce": "sequential"}
    tx = emaopt.local_updates(optax.sgd(0.1), optax.adam(0.5), **options)
    params = jnp.ones((3, 2))
    _, state = tx.update(params.at[1].set(jnp.nan), tx.init(params), params)
    assert optax.tree.get(state.outer_state, "count") == 2
