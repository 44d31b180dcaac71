"""Averages in bfloat16 that are rounded up or down at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import emaopt


@pytest.mark.parametrize("decay, steps", [(0.99, 1000), (0.999, 3000), (0.9999, 20_000)])
def test_stochastic_rounding_follows_any_decay_without_bias(decay, steps):
    averager = emaopt.average_tree(
        decay, accumulator_dtype=jnp.bfloat16, stochastic_rounding=True
    )
    state, _ = jax.lax.scan(
        lambda state, _: (averager.update(jnp.full((64, 64), 2.0), state), None),
        averager.init(jnp.ones((64, 64))),
        None,
        length=steps,
    )
    average = np.asarray(state.average, np.float64)
    exact = 2 - decay**steps
    spread = average.std() / np.sqrt(average.size)
    assert abs(average.mean() - exact) < 4 * spread + 2e-5
    noise = np.sqrt((2 - exact + 1e-3) * 2**-7 / 2)
    assert np.sqrt(np.mean((average - exact) ** 2)) < 1.5 * noise + 2**-8


@pytest.mark.slow
def test_stochastic_rounding_is_the_same_on_replicas_shards_and_after_a_restart():
    averager = emaopt.average_tree(
        0.999, accumulator_dtype=jnp.bfloat16, stochastic_rounding=True
    )
    start = jax.random.normal(jax.random.key(0), (16, 8))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    placements = [
        jax.devices()[0],
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("data")),
    ]
    averages = []
    for placement in placements:
        tree = jax.device_put(start, placement)
        state = averager.init(tree)
        for i in range(5):
            state = jax.jit(averager.update)(tree + i, state)
            if i == 2:  # through the disk and back
                state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
                state = state._replace(average=jax.device_put(state.average, placement))
        averages.append(np.asarray(state.average))
    assert averages[0].tobytes() == averages[1].tobytes() == averages[2].tobytes()


def test_stochastic_rounding_keeps_what_is_exact_and_what_is_not_finite():
    averager = emaopt.average_tree(
        0.5, accumulator_dtype=jnp.bfloat16, stochastic_rounding=True
    )
    values = jnp.array([0.0, -0.0, 1.5, jnp.inf, -jnp.inf, jnp.nan])
    state = averager.init(values)
    assert state.average[:3].tolist() == [0.0, -0.0, 1.5]
    state = averager.update(values, state)
    assert state.average[:3].tolist() == [0.0, -0.0, 1.5]
    assert jnp.isnan(state.average[5]) and not jnp.any(jnp.isfinite(state.average[3:]))


@pytest.mark.parametrize("dtype", [None, jnp.float16, jnp.float32])
def test_stochastic_rounding_is_for_bfloat16(dtype):
    with pytest.raises(ValueError, match="stochastic_rounding is for accumulator_dtype"):
        emaopt.average_params(0.9, accumulator_dtype=dtype, stochastic_rounding=True)
