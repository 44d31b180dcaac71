"""What a training loop with local updates needs: rounds, an end, specs, rows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from local_oracle import NOISE, STARTS, TARGETS, WORKERS

import emaopt

pytestmark = pytest.mark.quick(1)

START = {"w": STARTS[0], "b": STARTS[1][:2]}
OPTIONS = {
    "delta": {},
    "mean_gradient": {"commit": "mean_gradient"},
    "sequential": {"reduce": "sequential"},
    "elastic": {"moving_rate": 0.3},
    "elastic, sequential": {"moving_rate": 0.3, "reduce": "sequential"},
    "fragments": {"num_fragments": 2},
    "int8": {"exchange_dtype": jnp.int8, "error_feedback": True},
}
PULLS = {"delta", "mean_gradient", "fragments", "int8"}  # all the same, the center


def loss(params, batch):
    noise, target = batch
    return (
        0.3 * jnp.sum((params["w"] - target) ** 2)
        + jnp.sum(params["b"] ** 2)
        + jnp.dot(noise, params["w"])
    ).astype(jnp.float32)


VALUE_AND_GRAD = jax.vmap(jax.value_and_grad(loss))


def batches(first, last):
    """For the steps from `first` on, before `last`."""
    noise = NOISE[first:last]
    return jnp.asarray(noise, jnp.float32), jnp.asarray(
        np.broadcast_to(TARGETS, noise.shape), jnp.float32
    )


def method(options, period=99):
    return emaopt.local_updates(
        optax.adam(0.1),
        optax.sgd(0.7, momentum=0.9, nesterov=True),
        period=period,
        num_workers=WORKERS,
        **OPTIONS[options],
    )


def begin(tx, dtype=jnp.float32):
    start = jax.tree.map(lambda x: jnp.asarray(x, dtype), START)
    params = emaopt.stack_workers(start, WORKERS)
    return params, tx.init(params)


@functools.cache
def compiled(options):
    """A step (params, state, batch, exchange) -> (params, state), value."""
    tx = method(options)

    def step(params, state, batch, exchange):
        value, grads = VALUE_AND_GRAD(params, batch)
        updates, state = tx.update(grads, state, params, exchange=exchange)
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(step, static_argnames="exchange")


def walk(options, params, state, steps, exchanges):
    """Steps one by one, from those of `range` with an exchange at some."""
    values = []
    for number in steps:
        batch = jax.tree.map(lambda x: x[0], batches(number, number + 1))
        (params, state), value = compiled(options)(
            params, state, batch, exchange=number in exchanges
        )
        values.append(value)
    return params, state, jnp.stack(values)


def walked(options, steps, exchanges, dtype=jnp.float32):
    """The parameters and the state after the first steps."""
    start = begin(method(options), dtype)
    return walk(options, *start, range(steps), exchanges)[:2]


# local_round


@functools.cache
def rounds(options, dtype):
    """The parameters, the state and the values after two rounds of three steps."""
    tx = method(options, period=2)  # which does not matter
    run = jax.jit(lambda *args: emaopt.local_round(tx, VALUE_AND_GRAD, *args))
    params, state, first = run(*begin(tx, dtype), batches(0, 3))
    params, state, second = run(params, state, batches(3, 6))
    return params, state, jnp.concatenate([first, second])


@pytest.mark.parametrize("options", OPTIONS)
def test_rounds_are_the_same_steps_with_one_exchange_after_the_last(options):
    start = begin(method(options))
    expected = walk(options, *start, range(6), exchanges=(2, 5))
    actual = rounds(options, jnp.float32)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, dtype",
    [*((options, jnp.float32) for options in OPTIONS), ("delta", jnp.bfloat16)],
)
def test_after_a_round_the_parameters_are_exactly_what_workers_pulled(options, dtype):
    params, state, _ = rounds(options, dtype)
    pulled = state.pulled
    if options in PULLS:
        pulled = emaopt.stack_workers(emaopt.get_center(state), WORKERS)
    rounded = jax.tree.map(lambda x: x.astype(dtype), pulled)
    chex.assert_trees_all_equal(params, rounded)
    assert all(since == 0 for since in state.since_exchange)


def test_a_round_may_be_of_one_step_and_is_found_in_any_wrapper():
    tx = optax.chain(optax.clip(100.0), emaopt.averaged(method("delta"), 0.5))
    run = jax.jit(lambda *args: emaopt.local_round(tx, VALUE_AND_GRAD, *args))
    params, state, values = run(*begin(tx), batches(0, 1))
    assert values.shape == (1, WORKERS)
    center = emaopt.get_center(state)
    chex.assert_trees_all_equal(params, emaopt.stack_workers(center, WORKERS))


@pytest.mark.parametrize(
    "batches",
    [jnp.zeros((0, 3)), {"x": jnp.zeros((2, 3)), "y": jnp.zeros((3, 3))}, 1.0, {}],
    ids=["no steps", "of different lengths", "without an axis", "no leaves"],
)
def test_round_without_a_number_of_steps(batches):
    tx = method("delta")
    with pytest.raises(ValueError, match=r"^local_round: .*one entry for each"):
        emaopt.local_round(tx, VALUE_AND_GRAD, *begin(tx), batches)


# Programs and swaps


@pytest.mark.slow
@pytest.mark.parametrize("options", ["delta", "sequential"])
def test_scan_and_donation_give_the_numbers_of_the_loop(options):
    tx = method(options, period=3)

    def step(carry, batch):
        params, state = carry
        value, grads = VALUE_AND_GRAD(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    expected = walk(options, *begin(tx), range(7), exchanges=(2, 5))
    (params, state), values = jax.jit(lambda *args: jax.lax.scan(step, *args))(
        begin(tx), batches(0, 7)
    )
    chex.assert_trees_all_close((params, state, values), expected, rtol=1e-5, atol=1e-6)
    donated, carry = jax.jit(step, donate_argnums=0), begin(tx)
    for number in range(7):
        carry, _ = donated(carry, jax.tree.map(lambda x, n=number: x[n], batches(0, 7)))
    chex.assert_trees_all_close(carry, expected[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_swap_serves_the_center_and_swapping_again_restores_all(options):
    params, state = walked(options, 3, exchanges=[1])
    served, kept = emaopt.swap(params, state)
    chex.assert_trees_all_equal(served, emaopt.get_center(state))
    chex.assert_trees_all_equal(emaopt.swap(served, kept), (params, state))


# synchronize


@pytest.mark.parametrize("options", OPTIONS)
def test_synchronize_adds_the_mean_of_what_workers_did_since_the_exchange(options):
    pulled, exchanged = walked(options, 2, exchanges=[1])
    moved, state = walked(options, 4, exchanges=[1])
    params, state = emaopt.synchronize(state, moved)
    center = emaopt.get_center(state)
    chex.assert_trees_all_equal(params, emaopt.stack_workers(center, WORKERS))
    assert all(since == 0 for since in state.since_exchange)
    for name, before in emaopt.get_center(exchanged).items():
        did = np.float64(moved[name]) - np.float64(pulled[name])
        expected = np.float64(before) + did.mean(axis=0)
        np.testing.assert_allclose(center[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_synchronize_right_after_an_exchange_keeps_the_center(options):
    params, state = walked(options, 2, exchanges=[1])
    synchronized, after = emaopt.synchronize(state, params)
    chex.assert_trees_all_equal(after.center, state.center)
    rows = emaopt.stack_workers(state.center, WORKERS)
    chex.assert_trees_all_equal(synchronized, rows)


@pytest.mark.parametrize("options", OPTIONS)
def test_training_goes_on_from_where_synchronize_left_it(options):
    # As if the workers had started there: only slots and counters are older.
    params, state = walked(options, 4, exchanges=[1])
    params, state = emaopt.synchronize(state, params)
    anew = (
        method(options)
        .init(params)
        ._replace(
            num_steps=state.num_steps,
            inner_state=state.inner_state,
            outer_state=state.outer_state,
            residual=state.residual,
        )
    )
    ways = [walk(options, params, s, range(4, 7), exchanges=[6]) for s in (state, anew)]
    chex.assert_trees_all_close(ways[0][0], ways[1][0], rtol=1e-6)


def test_synchronize_leaves_bad_workers_out():
    params, state = walked("delta", 2, exchanges=[])
    params["b"] = params["b"].at[1, 0].set(jnp.nan)
    rows, state = emaopt.synchronize(state, params)
    mean = jax.tree.map(lambda x: (x[0] + x[2]) / 2, params)
    chex.assert_trees_all_close(emaopt.get_center(state), mean, rtol=1e-6)
    chex.assert_trees_all_equal(rows, emaopt.stack_workers(state.center, WORKERS))
    assert state.num_left_out == 1


def test_synchronize_keeps_leaves_that_no_mean_exists_of_and_other_states():
    params, state = walked("int8", 2, exchanges=[])
    params = {**params, "n": jnp.arange(WORKERS)}
    state = state._replace(center={**state.center, "n": jnp.int32(0)})
    beside = {"beside": jnp.arange(3), "local": state}
    synchronized, after = emaopt.synchronize(beside, params)
    np.testing.assert_array_equal(synchronized["n"], params["n"])
    assert after["beside"] is beside["beside"]
    for field in ("num_steps", "inner_state", "outer_state", "residual"):
        assert getattr(after["local"], field) is getattr(state, field)


# Rows and specs


def test_stack_workers_gives_each_a_copy():
    tree = {"w": jnp.arange(6.0).reshape(2, 3), "n": np.int32(7), "none": None}
    stacked = emaopt.stack_workers(tree, 3)
    np.testing.assert_array_equal(stacked["w"], np.stack([tree["w"]] * 3))
    np.testing.assert_array_equal(stacked["n"], np.full(3, 7, np.int32))
    assert stacked["none"] is None and stacked["n"].dtype == jnp.int32
    tree["w"].delete()  # it shares no memory
    assert stacked["w"].sum() == 45


@pytest.mark.parametrize("options", OPTIONS)
def test_state_specs_of_the_stacked_form_replicate_the_center_alone(options):
    tx = optax.chain(optax.trace(0.9), method(options))
    params, state = begin(tx)
    trace, specs = emaopt.state_specs(tx, params, "workers")
    own = {"inner_state", "accumulated", "pulled", "residual"}
    own |= {"num_missed", "has_missed"}
    for field, part in specs._asdict().items():
        spec = P("workers") if field in own else P()
        expected = jax.tree.map(lambda _, s=spec: s, getattr(state[1], field))
        assert part == expected, field
    assert jax.tree.leaves(trace) == [P("workers")] * 2


def test_state_specs_replicate_what_has_another_length_than_the_workers():
    beside = optax.GradientTransformation(
        lambda params: {"rows": jnp.zeros(WORKERS), "table": jnp.zeros(WORKERS + 1)},
        lambda updates, state, params=None: (updates, state),
    )
    tx = optax.chain(beside, method("delta"))
    specs, _ = emaopt.state_specs(tx, begin(method("delta"))[0], "workers")
    assert specs == {"rows": P("workers"), "table": P()}


@pytest.mark.parametrize("options", OPTIONS)
def test_state_specs_of_the_mapped_form_replicate_the_scalars_alone(options):
    tx = emaopt.local_updates(
        optax.adam(0.1), optax.adam(0.1), period=2, axis_name="w", **OPTIONS[options]
    )
    params = emaopt.stack_workers(jax.tree.map(jnp.asarray, START), WORKERS)
    specs = emaopt.state_specs(tx, jax.eval_shape(lambda: params), ("x", "w"))
    expected = jax.tree.map(
        lambda leaf: P(("x", "w")) if leaf.shape[:1] == (WORKERS,) else P(),
        tx.init(params),
    )
    assert specs == expected


@pytest.mark.parametrize("reduce", ["mean", "sequential"])
@pytest.mark.parametrize("end", ["synchronize", "local_round"])
def test_what_an_end_returns_may_be_donated(end, reduce):
    tx = emaopt.local_updates(optax.sgd(0.1), optax.sgd(1.0), period=2, reduce=reduce)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    if end == "synchronize":
        params, state = emaopt.synchronize(state, params)
    else:
        value_and_grad = jax.value_and_grad(lambda params, x: jnp.sum(params["w"] * x))
        params, state, _ = emaopt.local_round(
            tx, value_and_grad, params, state, jnp.ones((2, 3))
        )
    step = jax.jit(tx.update, donate_argnums=(1, 2))
    updates, _ = step({"w": jnp.ones(3)}, state, params)
    assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize("form", [{"num_workers": 2}, {"axis_name": "workers"}])
def test_parts_of_the_parameters_have_specs_and_ends(form):
    tx = optax.masked(
        emaopt.local_sgd(optax.sgd(1.0), period=9, **form), {"w": True, "b": False}
    )
    params = {"w": jnp.zeros((2, 3)), "b": jnp.ones((2, 3))}
    specs = emaopt.state_specs(tx, params, "workers").inner_state
    assert specs.num_missed == P("workers")
    assert specs.center["b"] == optax.MaskedNode()
    if "num_workers" in form:
        grads = {"w": jnp.array([[1.0] * 3, [3.0] * 3]), "b": jnp.zeros((2, 3))}
        updates, state = tx.update(grads, tx.init(params), params)
        after, _ = emaopt.synchronize(state, optax.apply_updates(params, updates))
        np.testing.assert_array_equal(after["w"], np.full((2, 3), -2))
        np.testing.assert_array_equal(after["b"], params["b"])


def test_rounds_refuse_a_wrapper_that_drops_the_exchange():
    inner = emaopt.local_sgd(optax.sgd(1.0), period=9, num_workers=2)
    for tx in (
        optax.GradientTransformation(inner.init, inner.update),
        optax.MultiSteps(inner, 1).gradient_transformation(),
    ):
        params = emaopt.stack_workers(jnp.zeros(()), 2)
        given = (params, tx.init(params), jnp.ones((3, 2)))
        with pytest.raises(ValueError, match=r"local_round: .* extra arguments"):
            emaopt.local_round(tx, jax.vmap(lambda p, b: (b, p)), *given)
