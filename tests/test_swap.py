"""`swap`: its bits, its names, under jit; through wrappers it is in test_reading."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_reading import PARAMS, WRAPPERS, assert_same, train

import emaopt

DTYPES = [
    jnp.bool_, jnp.int8, jnp.int32, jnp.float8_e4m3fn, jnp.bfloat16, jnp.float16,
    jnp.float32, jnp.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_exchanges_every_bit_of_every_dtype(dtype):
    params = {"w": jnp.asarray([0, 1, 1, 0], dtype), "scalar": jnp.asarray(0, dtype)}
    newer = {"w": jnp.asarray([1, 0, 1, 0], dtype), "scalar": jnp.asarray(1, dtype)}
    averager = emaopt.average_tree(0.7)
    state = averager.update(newer, averager.init(params))
    served, kept = emaopt.swap(params, state)
    # Twice is as before also where nothing is exchanged.
    assert_same((served, kept.average), (state.average, params))
    assert_same(emaopt.swap(served, kept), (params, state))


def test_swap_works_under_jit_and_donated():
    params, state, expected = train(WRAPPERS["chain"], PARAMS)
    swapped = jax.jit(emaopt.swap, donate_argnums=(0, 1))(params, state)
    assert_same(swapped[0], jax.tree.map(jnp.asarray, expected))


def test_swap_takes_the_names_that_leaves_have_in_each_part():
    """A "value" that is alone in its container has no name of its own there."""
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, zero_init=True)
    value, b = jnp.ones(2), jnp.ones(3)
    state = tx.init({"value": value})
    served, kept = emaopt.swap({"value": value, "b": b}, state)
    np.testing.assert_array_equal(served["value"], [0, 0])
    np.testing.assert_array_equal(served["b"], b)
    equal = jax.tree.map(np.array_equal, emaopt.swap(served, kept)[1], state)
    assert all(jax.tree.leaves(equal))


def test_swap_exchanges_whatever_has_the_names_and_shapes():
    state = emaopt.averaged(optax.sgd(1.0), 0.5).init({"w": jnp.ones(2)})
    served, kept = emaopt.swap({"w": np.array([3, 4])}, state)
    assert served["w"].dtype == jnp.float32
    np.testing.assert_array_equal(emaopt.swap(served, kept)[0]["w"], [3, 4])
