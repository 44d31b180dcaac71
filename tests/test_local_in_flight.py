"""States with commits in flight: saved, resumed, placed; and options that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from local_oracle import NOISE, STARTS, WORKERS, gradients
from test_local_delay import INNER, OUTER, PERIOD, START, late

import emaopt
from emaopt import checkpoint

pytestmark = pytest.mark.quick(2)

IN_FLIGHT = {
    "delta": {"delay": 2, "mix": 0.5},
    "gradients": {"delay": 3, "mix": "carry", "commit": "mean_gradient"},
    "fragments": {"delay": 2, "num_fragments": 2, "mix": "carry"},
    "int8": {"delay": 1, "exchange_dtype": jnp.int8, "error_feedback": True},
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
    restored = checkpoint.restore(tmp_path / "of 3", target)
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
        assert (spec == jax.P("workers")) == (leaf.shape[:1] == (WORKERS,))
        assert (spec == jax.P()) == (leaf.ndim == 0)


@pytest.mark.parametrize(
    "case, buffers", [("delta", 1), ("gradients", 2), ("fragments", 1), ("int8", 1)]
)
def test_what_is_in_flight_takes_one_buffer_and_is_updated_in_place(case, buffers):
    options = {"mix": 0.0} | IN_FLIGHT[case]
    row = jax.ShapeDtypeStruct((WORKERS, 512, 128), jnp.float32)
    tree = {"a": row, "b": row}
    own, sizes = 2 * row.size * 4, []
    for delay in (0, options["delay"]):
        tx = late(**(options | {"delay": delay}))
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
