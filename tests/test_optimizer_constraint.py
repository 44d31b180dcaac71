"""`constrain`: the parameters are projected after each update."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt import tf1


def clip(low, high):
    return lambda params: jax.tree.map(lambda p: jnp.clip(p, low, high), params)


def test_constraints_are_tensorflows():
    """The numbers of TensorFlow's own test: loss 5a + 3b, learning rate 3."""
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}

    def projection(params):
        return {"a": jnp.clip(params["a"], -0.1, 0.0), "b": jnp.clip(params["b"], 0, 1)}

    tx = optax.chain(optax.sgd(3.0), tf1.constrain(projection))
    loss = lambda p: 5 * p["a"] + 3 * p["b"]  # noqa: E731
    _, params, _ = tf1.minimize(tx, loss, tx.init(params), params)
    np.testing.assert_allclose(params["a"], [-0.1, -0.1], rtol=1e-6)
    np.testing.assert_array_equal(params["b"], [0.0, 0.0])


@pytest.mark.parametrize("way", ["in the chain", "around"])
def test_average_behind_it_is_of_the_projected_parameters(way):
    constrained = optax.chain(optax.sgd(1.0), tf1.constrain(clip(0.0, 1.0)))
    tx = {
        "in the chain": optax.chain(constrained, emaopt.average_params(0.5)),
        "around": emaopt.averaged(constrained, 0.5),
    }[way]
    params = {"w": jnp.array([0.5, 0.5])}
    state, average = tx.init(params), np.array([0.5, 0.5])
    for grads in ([2.0, -3.0], [-0.25, 5.0], [0.5, -0.75]):
        updates, state = tx.update({"w": jnp.array(grads)}, state, params)
        right = np.clip(np.asarray(params["w"]) - grads, 0, 1)
        params = optax.apply_updates(params, updates)
        average = (average + right) / 2
        np.testing.assert_array_equal(params["w"], right)
        np.testing.assert_array_equal(emaopt.get_average(state)["w"], average)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_parameters_get_the_projection_and_keep_their_dtype(dtype):
    params = jnp.array([0.3, 100.0, -7.0, 0.01], dtype)
    tx = optax.chain(optax.sgd(0.1), tf1.constrain(clip(-0.3, 0.2)))
    updates, _ = jax.jit(tx.update)(jnp.ones(4, dtype), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    right = np.clip(np.asarray(params - jnp.asarray(0.1, dtype), np.float32), -0.3, 0.2)
    assert after.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(after, np.float32), right, rtol=float(jnp.finfo(dtype).eps), atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_stands_behind_a_wrapper_that_chooses_between_updates(dtype):
    inner = optax.apply_if_finite(optax.sgd(1.0), 3)
    tx = optax.chain(inner, tf1.constrain(clip(-0.5, 0.5)))
    params = jnp.array([0.25, 100.0], dtype)
    state = tx.init(params)
    for grads, right in ([1.0, 0.0], [-0.5, 0.5]), ([jnp.nan, 0.0], [-0.5, 0.5]):
        updates, state = jax.jit(tx.update)(jnp.array(grads, dtype), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(np.asarray(params, np.float32), right)


def test_leaves_that_the_projection_returns_as_they_are_move_freely():
    params = {"w": jnp.array([2.0, -1.0]), "n": jnp.int32(3), "free": jnp.array([5.0])}
    tx = optax.chain(
        optax.sgd(1.0), tf1.constrain(lambda p: p | {"w": jnp.maximum(p["w"], 0)})
    )
    grads = {"w": jnp.ones(2), "n": jnp.int32(0), "free": jnp.ones(1)}
    updates, _ = tx.update(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert jax.tree.map(lambda x: x.tolist(), after) == {
        "w": [1.0, 0.0],
        "n": 3,
        "free": [4.0],
    }


@pytest.mark.parametrize(
    "projection, holds",
    [
        (optax.projections.projection_simplex, lambda x: x.sum() == pytest.approx(1)),
        (optax.projections.projection_l2_ball, lambda x: np.sqrt(x @ x) <= 1 + 1e-6),
        (optax.projections.projection_non_negative, lambda x: (x >= 0).all()),
    ],
)
def test_projections_of_optax_hold_after_every_step(projection, holds):
    tx = optax.chain(optax.adam(0.5), tf1.constrain(projection))
    params = jnp.array([1.0, -2.0, 0.5])
    state = tx.init(params)
    for i in range(3):
        grads = jnp.array([-1.0, 2.0, i])
        params, state = tf1.apply_gradients(tx, grads, state, params)
        assert holds(np.asarray(params))


def test_parameters_without_a_gradient_are_not_projected():
    params = {"a": jnp.array([2.0]), "b": jnp.array([2.0])}
    tx = optax.chain(optax.sgd(0.1), tf1.constrain(clip(0.0, 1.0)))
    after, _ = tf1.apply_gradients(
        tx, {"a": jnp.zeros(1), "b": None}, tx.init(params), params
    )
    chex.assert_trees_all_equal(after, {"a": jnp.array([1.0]), "b": params["b"]})


def test_misuse_says_what_is_wrong():
    with pytest.raises(TypeError, match="constrain: projection must be a function"):
        tf1.constrain(1.0)
    tx = tf1.constrain(jnp.abs)
    with pytest.raises(ValueError, match=r"call tx.update\(grads, state, params\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
