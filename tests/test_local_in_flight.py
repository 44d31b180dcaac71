"""States with commits in flight: saved, resumed, placed; and options that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from local_oracle import NOISE, STARTS, WORKERS, gradients
from test_local_delay import INNER, OUTER, PERIOD, START, late, value_and_grad

import emaopt
from emaopt import checkpoint

pytestmark = pytest.mark.quick(2)

EACH = jax.vmap(value_and_grad)

IN_FLIGHT = {
    "delta": {"delay": 2, "mix": 0.5},
    "gradients": {"delay": 3, "mix": "carry", "commit": "mean_gradient"},
    "fragments": {"delay": 2, "num_fragments": 2, "mix": "carry"},
    "int8": {"delay": 1, "exchange_dtype": jnp.int8, "error_feedback": True},
    "eager": {"delay": 3, "eager": True},
}


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize("case", IN_FLIGHT)
def test_a_killed_run_goes_on_bit_for_bit(case, stop, tmp_path):
    options = {"mix": 0.0} | IN_FLIGHT[case]
    tx = late(**options)

    @jax.jit
    def advanced(state, number):
        params = state["params"]
        grads = jax.tree.map(lambda p: 0.3 * p + jnp.asarray(NOISE)[number], params)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}

    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
    params = emaopt.stack_workers(start, WORKERS)
    whole = {"params": params, "opt_state": tx.init(params)}
    resumed = whole
    for number in range(10):
        if number == stop:
            checkpoint.save(tmp_path / "here", whole)
            resumed = checkpoint.restore(tmp_path / "here", whole)
        whole = advanced(whole, number)
        if number >= stop:
            resumed = advanced(resumed, number)
    for value, right in zip(*map(jax.tree.leaves, (resumed, whole)), strict=True):
        np.testing.assert_array_equal(value, right)


def test_another_number_of_workers_starts_with_nothing_in_flight(tmp_path):
    tx = late(2, 0.5)
    params = emaopt.stack_workers(jnp.asarray(STARTS[0], jnp.float32), WORKERS)
    state = tx.init(params)
    for step in range(1, 5):
        updates, state = tx.update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    assert int(state.in_flight.num_steps[0]) == PERIOD
    checkpoint.save(tmp_path / "of 3", {"params": params, "opt_state": state})
    five = late(2, 0.5, num_workers=5)
    params = jnp.zeros((5, 4))
    target = {"params": params, "opt_state": five.init(params)}
    said = []
    restored = checkpoint.restore(tmp_path / "of 3", target, report=said.append)
    assert any("commits in flight were dropped" in line for line in said)
    np.testing.assert_array_equal(restored["params"][4], state.center)
    for leaf in jax.tree.leaves(restored["opt_state"].in_flight):
        assert not np.any(leaf)


def test_a_checkpoint_without_the_field_begins_with_nothing_in_flight(tmp_path):
    before, after = late(0, 0.0), late(2, 0.0)
    params = emaopt.stack_workers(jnp.asarray(STARTS[0], jnp.float32), WORKERS)
    checkpoint.save(
        tmp_path / "old", {"params": params, "opt_state": before.init(params)}
    )
    target = {"params": params, "opt_state": after.init(params)}
    restored = checkpoint.restore(tmp_path / "old", target, keep_missing=True)
    for leaf in jax.tree.leaves(restored["opt_state"].in_flight):
        assert not np.any(leaf)


@pytest.mark.parametrize("case", IN_FLIGHT)
def test_specs_of_what_is_in_flight_tell_rows_from_what_is_shared(case):
    tx = late(**({"mix": 0.0} | IN_FLIGHT[case]))
    params = emaopt.stack_workers(jax.tree.map(jnp.asarray, START), WORKERS)
    specs = emaopt.state_specs(tx, params, "workers").in_flight
    state = tx.init(params).in_flight
    for spec, leaf in zip(*map(jax.tree.leaves, (specs, state)), strict=True):
        assert (spec == P("workers")) == (leaf.shape[:1] == (WORKERS,))
        assert (spec == P()) == (leaf.ndim == 0)


@pytest.mark.parametrize("case", IN_FLIGHT)
def test_shardings_of_what_is_in_flight_are_those_of_the_parameters(case):
    mesh = jax.make_mesh((WORKERS, 2), ("workers", "model"), devices=jax.devices()[:6])
    place = NamedSharding(mesh, P("workers", "model"))
    params = {k: jax.device_put(jnp.ones((WORKERS, 4)), place) for k in START}
    tx = late(**({"mix": 0.0} | IN_FLIGHT[case]))
    found = emaopt.state_shardings(tx, params).in_flight
    state = tx.init(params).in_flight
    for sharding, leaf in zip(*map(jax.tree.leaves, (found, state)), strict=True):
        spec = [P(), P("workers"), P("workers", "model")][leaf.ndim]
        for one in (sharding, leaf.sharding):
            assert one.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)


@pytest.mark.parametrize(
    "case, buffers",
    [("delta", 1), ("gradients", 2), ("fragments", 1), ("int8", 1), ("eager", 3)],
)
def test_what_is_in_flight_takes_one_buffer_and_is_updated_in_place(case, buffers):
    options = {"mix": 0.0} | IN_FLIGHT[case]
    row = jax.ShapeDtypeStruct((WORKERS, 512, 128), jnp.float32)
    tree = {"a": row, "b": row}
    own, sizes = 2 * row.size * 4, []
    for delay in (0, options["delay"]):
        eager = {"eager": delay > 0} if "eager" in options else {}
        tx = late(**(options | eager | {"delay": delay}))
        state = jax.eval_shape(tx.init, tree)

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        program = jax.jit(step, donate_argnums=(0, 1)).lower(tree, state, tree).compile()
        memory = program.memory_analysis()
        # All but the gradients is donated, and stays where it is.
        kept = memory.argument_size_in_bytes - memory.alias_size_in_bytes
        assert kept < 1.01 * own
        sizes.append(memory.argument_size_in_bytes)
    assert sizes[1] - sizes[0] == pytest.approx(buffers * own, abs=400)


# What lands, and what does not


def test_absent_workers_are_not_counted_as_left_out_when_commits_land():
    tx = late(2, 0.5)
    params = emaopt.stack_workers(jnp.ones(4), WORKERS)
    state = tx.init(params)
    for _ in range(5):
        weights = jnp.array([1.0, 0.0, 2.0])
        _, state = tx.update(params, state, params, weights=weights)
    assert int(state.in_flight.num_steps[0]) == 0  # it has landed
    assert int(state.num_left_out) == 0


@pytest.mark.parametrize("mix", [0.4, "carry"])
@pytest.mark.parametrize("delay", [1, 3])
def test_rounds_leave_out_the_same_workers(delay, mix):
    noise = jnp.asarray(NOISE[:12]).at[2, 0].set(jnp.nan).at[4, 1].set(jnp.nan)
    with jax.enable_x64(True):
        tx = late(delay, mix)
        start = emaopt.stack_workers(jax.tree.map(jnp.asarray, START), WORKERS)
        params, state = start, tx.init(start)
        for step in range(12):
            _, grads = EACH(params, noise[step])
            updates, state = tx.update(grads, state, params, exchange=step % 3 == 2)
            params = optax.apply_updates(params, updates)
        expected = params, state
        params, state = start, tx.init(start)
        for step in range(0, 12, 3):
            params, state, _ = emaopt.local_round(
                tx, EACH, params, state, noise[step : step + 3]
            )
    assert int(state.num_left_out) == 2
    for value, right in zip(
        *map(jax.tree.leaves, ((params, state), expected)), strict=True
    ):
        np.testing.assert_allclose(value, right, rtol=1e-9, atol=1e-12)


def test_a_round_lands_nothing_twice():
    tx = late(2, 0.0)
    params = emaopt.stack_workers(jax.tree.map(jnp.asarray, START), WORKERS)
    state = tx.init(params)
    for step in range(5):  # the commits of step 3 have landed, and are still in memory
        _, grads = EACH(params, jnp.asarray(NOISE[step]))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    _, after, _ = emaopt.local_round(tx, EACH, params, state, jnp.asarray(NOISE[5:6]))
    jax.tree.map(np.testing.assert_array_equal, after.center, state.center)
    jax.tree.map(np.testing.assert_array_equal, after.outer_state, state.outer_state)


@pytest.mark.parametrize("delay, stop", [(2, 3), (3, 6)])
def test_synchronize_drops_sums_of_gradients_but_no_progress(delay, stop):
    tx = late(delay, 0.0, commit="mean_gradient", outer=optax.sgd(1.0))
    params = emaopt.stack_workers(jnp.asarray(STARTS[0], jnp.float32), WORKERS)
    state = tx.init(params)
    for step in range(1, stop + 1):  # gradients are in flight, of steps that may be gone
        updates, state = tx.update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    assert int(state.in_flight.num_steps[0]) == PERIOD
    mean = np.mean(params, 0)
    params, state = emaopt.synchronize(state, params)
    np.testing.assert_allclose(state.center, mean, rtol=1e-6)


def test_synchronize_leaves_out_who_missed_a_step_since_the_commit():
    tx = late(3, "carry", outer=optax.sgd(1.0))
    params = emaopt.stack_workers(jnp.asarray(STARTS[0], jnp.float32), WORKERS)
    state = tx.init(params)
    for step in range(1, PERIOD + 2):
        grads = gradients(params, step)
        grads = grads.at[1].set(jnp.nan) if step == PERIOD + 1 else grads
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    in_flight = np.asarray(state.in_flight.sums)
    new = np.asarray(state.center) - np.asarray(params) - in_flight
    expected = state.center - in_flight.mean(0) - new[[0, 2]].mean(0)
    _, state = emaopt.synchronize(state, params)
    np.testing.assert_allclose(state.center, expected, rtol=1e-5)
    assert int(state.num_left_out) == 1


@pytest.mark.parametrize("mix", [0.5, "carry"])
def test_a_leaf_without_a_gradient_commits_nothing(mix):
    """Not even what is in flight once more, to land when it has a gradient again."""
    tx = emaopt.local_updates(
        optax.sgd(0.1), optax.sgd(1.0), period=3, num_workers=WORKERS, delay=2, mix=mix
    )
    params = emaopt.stack_workers(jax.tree.map(jnp.asarray, START), WORKERS)
    state = tx.init(params)
    for step in range(1, 9):
        grads = gradients(params, step) | ({"b": None} if step in (4, 5, 6) else {})
        updates, state = tx.update(grads, state, params)
        updates = updates | ({"b": 0.0} if updates["b"] is None else {})
        params = optax.apply_updates(params, updates)
        if step == 3:
            assert np.any(state.in_flight.sums["b"])
        if step == 6:
            assert not np.any(state.in_flight.sums["b"])
    np.testing.assert_array_equal(state.center["b"], START["b"].astype(np.float32))


def test_workers_mix_in_the_dtype_of_the_center():
    tx = late(1, 0.3, outer=optax.sgd(1.0))
    params = emaopt.stack_workers(jnp.full(64, 1.0, jnp.bfloat16), WORKERS)
    state = tx.init(params)
    rng = np.random.default_rng(5)
    for _ in range(4):
        grads = jnp.asarray(rng.normal(size=params.shape), jnp.bfloat16)
        updates, state = tx.update(grads, state, params)
        before, params = params, optax.apply_updates(params, updates)
    # the local step, of SGD with momentum
    trace = jax.tree.leaves(state.inner_state)[0]
    own = (before + (-0.1 * trace).astype(jnp.bfloat16)).astype(jnp.float32)
    expected = 0.3 * own + 0.7 * state.center
    np.testing.assert_array_equal(params, expected.astype(jnp.bfloat16))


def test_no_progress_is_kept_beside_gradients_for_a_number():
    params = emaopt.stack_workers(jnp.ones(4), WORKERS)
    for mix, kept in [(0.5, False), ("carry", True)]:
        state = late(2, mix, commit="mean_gradient").init(params)
        assert (state.in_flight.progress is not None) == kept


def test_residual_of_an_absent_worker_stays_when_commits_land():
    tx = late(1, 0.0, exchange_dtype=jnp.int8, error_feedback=True)
    params = emaopt.stack_workers(jnp.asarray(STARTS[0], jnp.float32), WORKERS)
    state = tx.init(params)
    for step in range(1, 2 * PERIOD + 2):
        before = state.residual
        weights = jnp.array([1.0, 0.0 if step > PERIOD else 1.0, 1.0])
        updates, state = tx.update(
            gradients(params, step), state, params, weights=weights
        )
        params = optax.apply_updates(params, updates)
    assert np.any(before[1])
    np.testing.assert_array_equal(state.residual[1], before[1])
    assert np.any(state.residual[0] != before[0])


def test_nothing_in_flight_divides_by_nothing():
    tx = late(1, 0.0, commit="mean_gradient")
    params = emaopt.stack_workers(jnp.ones(4), WORKERS)
    state = tx.init(params)
    with jax.debug_nans(True):
        for _ in range(3):
            _, state = tx.update(params, state, params)
        start = params, tx.init(params), jnp.zeros((2, 1))
        emaopt.local_round(tx, lambda p, batch: (p.sum(1), p), *start)
        emaopt.synchronize(state, params)


# Errors


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"delay": 4}, ValueError, "delay must be at most period=3, .* got 4"),
        ({"delay": -1}, ValueError, "delay must be at least 0, got -1"),
        ({"delay": 1.0}, TypeError, "delay must be a whole number, got 1.0"),
        ({"mix": 1.5}, ValueError, r"mix must be in \[0, 1\], got 1.5"),
        ({"mix": "keep"}, ValueError, "mix must be a number from 0 to 1 or 'carry'"),
        ({"mix": None}, TypeError, "mix must be a number, got None"),
        ({"moving_rate": 0.1, "delay": 1}, ValueError, "elastic workers do not pull"),
        ({"moving_rate": 0.1, "mix": 0.5}, ValueError, "elastic workers do not pull"),
        ({"moving_rate": 0.1, "mix": "carry"}, ValueError, "elastic workers do not pull"),
        ({"eager": 1}, TypeError, "eager must be True or False, got 1"),
        ({"eager": True}, ValueError, "eager workers .* got period=3, delay=0,"),
        ({"eager": True, "delay": 2}, ValueError, "eager workers .* delay=2, mix=0.0"),
        ({"eager": True, "delay": 3, "mix": 0.5}, ValueError, "eager .* mix=0.5"),
        (
            {"eager": True, "delay": 3, "reduce": "sum"},
            ValueError,
            "eager workers .*'sum'",
        ),
    ],
    ids=str,
)
def test_delays_and_mixes_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=f"^local_updates: {message}"):
        emaopt.local_updates(INNER, OUTER, period=3, **options)


def test_elastic_methods_refuse_a_delay_under_their_own_name():
    with pytest.raises(ValueError, match=r"^easgd: elastic workers do not pull"):
        emaopt.easgd(INNER, period=3, delay=1)
    with pytest.raises(TypeError, match="delay"):
        emaopt.lookahead(INNER, period=3, delay=1)  # type: ignore[call-arg]


def test_a_late_exchange_refuses_a_conditional_also_where_no_commit_is_made():
    tx = late(2, 0.0, num_workers=None, axis_name="w")
    params = jnp.zeros((2, 4))
    state = jax.vmap(tx.init, axis_name="w")(params)

    def step(params, state):
        return jax.lax.cond(
            params[0] > 0,
            lambda: tx.update(params, state, params, exchange=False),
            lambda: tx.update(params, state, params, exchange=False),
        )

    with pytest.raises(ValueError, match="stands in a branch of a conditional"):
        jax.vmap(step, axis_name="w")(params, state)
