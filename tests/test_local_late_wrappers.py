"""Late exchanges in what trainers have: wrappers, frozen leaves, donation, dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from local_oracle import NOISE, WORKERS
from test_local_delay import START, late, value_and_grad

import emaopt

pytestmark = pytest.mark.quick(2)

EACH = jax.vmap(value_and_grad)


def jitted(tx, **options):
    """The transformation with an update that is compiled on its own."""
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update, **options))


@pytest.mark.parametrize(
    "delay, options",
    [
        (0, {}),
        (0, {"static_argnames": "exchange"}),
        (1, {"static_argnames": "exchange"}),
        (3, {"static_argnames": "exchange"}),
    ],
)
def test_rounds_take_an_update_that_is_jitted(delay, options):
    tx = late(delay, 0.0)
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
    start = emaopt.stack_workers(start, WORKERS)
    results = []
    for one in (tx, jitted(tx, **options)):
        params, state = start, tx.init(start)
        for step in range(0, 6, 3):
            batches = jnp.asarray(NOISE[step : step + 3], jnp.float32)
            params, state, _ = emaopt.local_round(one, EACH, params, state, batches)
        results.append((params, state.center))
    for value, right in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_wrappers_read_from_the_flag_whether_commits_are_made(delay):
    tx, flags = late(delay, 0.0), []

    def update(updates, state, params=None, *, exchange=None, **extra_args):
        flags.append(bool(exchange))
        return tx.update(updates, state, params, exchange=exchange, **extra_args)

    reading = optax.GradientTransformationExtraArgs(tx.init, update)
    params = emaopt.stack_workers({"a": jnp.ones(4), "b": jnp.ones(4)}, WORKERS)
    batches = jnp.ones((3, WORKERS, 1))
    emaopt.local_round(reading, EACH, params, tx.init(params), batches)
    assert flags[-1] and not any(flags[:-1])


def test_a_leaf_without_a_gradient_stays_as_it_is_in_rounds():
    def update(updates, state, params=None):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {k: zeros[k] if g is None else -g for k, g in updates.items()}, state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    decay = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0))

    def frozen(params, batch):
        return jnp.sum(batch), {"a": params["a"] + batch, "b": None}

    for delay in (1, 2):
        tx = emaopt.local_updates(inner, decay, period=2, delay=delay)
        params = {"a": jnp.ones(2), "b": jnp.ones(3)}
        state = tx.init(params)
        for _ in range(3):
            batches = jnp.ones((2, 1))
            params, state, _ = emaopt.local_round(tx, frozen, params, state, batches)
        np.testing.assert_array_equal(state.center["b"], 1)
        assert np.all(state.center["a"] != 1)


@pytest.mark.parametrize("mix", [0.0, "carry"])
def test_a_wrapper_that_skips_the_pull_of_a_round_loses_no_commit(mix):
    tx = emaopt.local_updates(
        optax.sgd(0.1), optax.sgd(1.0), period=3, num_workers=2, delay=1, mix=mix
    )
    whole = optax.apply_if_finite(tx, 10)
    params = jnp.zeros((2, 4))
    state = whole.init(params)

    def gradient(params, batch):
        return jnp.zeros(2), jnp.broadcast_to(batch, params.shape)

    batches = jnp.ones((3, 1, 1))
    params, state, _ = emaopt.local_round(whole, gradient, params, state, batches)
    bad = batches.at[0].set(jnp.nan)  # the step that would pull what is in flight
    params, state, _ = emaopt.local_round(whole, gradient, params, state, bad)
    params, _ = emaopt.synchronize(state, params)
    np.testing.assert_allclose(params, -0.5, rtol=1e-6)  # five steps of 0.1


def test_a_state_of_integers_is_donated_with_its_parameters():
    for delay in (0, 1):
        tx = emaopt.local_updates(
            optax.sgd(0.1), optax.sgd(1.0), period=2, num_workers=WORKERS, delay=delay
        )
        params = {"a": jnp.ones((WORKERS, 4)), "n": jnp.arange(WORKERS)}
        grads = {"a": jnp.ones((WORKERS, 4)), "n": None}

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return params | {"a": params["a"] + updates["a"]}, state

        params, _ = step(params, tx.init(params), grads)
        np.testing.assert_array_equal(params["n"], np.arange(WORKERS))


def test_a_worker_whose_residual_would_overflow_is_left_out():
    tx = emaopt.local_updates(
        optax.sgd(1.0),
        optax.sgd(1.0),
        period=1,
        num_workers=2,
        delay=1,
        exchange_dtype=jnp.float16,
        error_feedback=True,
    )
    params = jnp.zeros((2, 4))
    state = tx.init(params)
    grads = jnp.array([[1.0], [2.5e38]]) * jnp.ones(4)
    for _ in range(5):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert np.isfinite(state.residual).all()
    assert int(state.num_left_out) > 0


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex64])
def test_dtypes_are_promoted_nowhere_in_silence(dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        tx = late(1, 0.5, num_workers=2)
        params = jnp.ones((2, 3), dtype)
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        assert params.dtype == dtype


@pytest.mark.parametrize(
    "made, used",
    [
        ({"delay": 0}, {"delay": 1}),
        ({"delay": 1}, {"delay": 0}),
        ({"delay": 0}, {"delay": 0, "mix": 0.5}),
        ({"delay": 0, "mix": 0.5}, {"delay": 0}),
        ({"delay": 3}, {"delay": 3, "eager": True}),
        ({"delay": 1, "commit": "mean_gradient"}, {"delay": 1, "mix": "carry"}),
    ],
    ids=str,
)
def test_a_state_of_another_delay_is_refused(made, used):
    def sums(params, batch):
        return params.sum(1), params + batch

    used = {"mix": 0.0, "commit": made.get("commit", "delta")} | used
    params = jnp.ones((WORKERS, 4))
    state = late(**({"mix": 0.0} | made)).init(params)
    for call in ("update", "round"):
        tx = late(**used)
        with pytest.raises(ValueError, match=r"^local_updates: delay=.*this state"):
            if call == "update":
                tx.update(params, state, params)
            else:
                batches = jnp.ones((2, WORKERS, 1))
                emaopt.local_round(tx, sums, params, state, batches)
