"""What an exchange costs and loses: narrow dtypes, error feedback, fragments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from local_oracle import (
    NOISE,
    TARGETS,
    WORKERS,
    adam,
    gradient,
    sgd,
    simulate,
    train,
)

import emaopt

pytestmark = pytest.mark.quick(1)

# Largest relative error of a rounding: 2^-p for p bits of the significand, hidden one
# included. (Values here stay off the subnormal ones.)
ROUNDING = {
    jnp.bfloat16: 2**-8,
    jnp.float16: 2**-11,
    jnp.float8_e4m3fn: 2**-4,
    jnp.float8_e5m2: 2**-3,
}
STEPS = {jnp.int8: 127, jnp.int16: 32767}  # of the largest magnitude
REDUCE = ["mean", "sum", "sequential"]


def commits_and_center(reduce, dtype, rate=None):
    """The workers' progress [W, ...] from 0 and the center, after an exchange of it."""
    tx = emaopt.local_updates(
        optax.sgd(1.0),
        optax.sgd(1.0),
        period=1,
        num_workers=WORKERS,
        reduce=reduce,
        exchange_dtype=dtype,
        moving_rate=rate,
    )
    random = np.random.default_rng(0)
    commits = random.uniform(0.5, 2, (WORKERS, 100)) * random.choice([-1, 1], 100)
    commits = np.float32(commits)
    params = jnp.zeros(commits.shape)
    grads = -jnp.asarray(commits)
    updates, state = tx.update(grads, tx.init(params), params, exchange=True)
    return np.float64(commits), np.float64(emaopt.get_center(state)), params + updates


def bound(commits, reduce, dtype):
    """The largest error of the center: of each commit, and of their sum if in `dtype`."""
    share = 1 / WORKERS if reduce == "mean" else 1
    if dtype in STEPS:
        quanta = np.abs(commits).max(axis=1, keepdims=True) / STEPS[dtype]
        return share * np.broadcast_to(quanta / 2, commits.shape).sum(axis=0)
    roundings = 1 if reduce == "sequential" else WORKERS
    return 1.1 * share * roundings * ROUNDING[dtype] * np.abs(commits).sum(axis=0)


@pytest.mark.parametrize("dtype", [*ROUNDING, *STEPS])
@pytest.mark.parametrize("reduce", REDUCE)
def test_narrow_exchange_is_exact_up_to_its_rounding(reduce, dtype):
    commits, center, _ = commits_and_center(reduce, dtype)
    exact = commits.mean(axis=0) if reduce == "mean" else commits.sum(axis=0)
    error, largest = np.abs(center - exact), bound(commits, reduce, dtype)
    assert np.all(error <= largest + 1e-6)
    assert np.mean(error) > 0.05 * np.mean(largest)  # it does travel in that dtype


@pytest.mark.parametrize("dtype", [*ROUNDING, *STEPS])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_narrow_elastic_exchange_moves_the_workers_exactly(reduce, dtype):
    commits, center, params = commits_and_center(reduce, dtype, rate=0.25)
    exact = 0.25 * (commits.mean(axis=0) if reduce == "mean" else commits.sum(axis=0))
    error = np.abs(center - exact)
    assert np.all(error <= bound(0.25 * commits, reduce, dtype) + 1e-6)
    assert np.mean(error) > 1e-6
    np.testing.assert_allclose(params, 0.75 * commits, rtol=1e-6)


@pytest.mark.slow
def test_int8_holds_a_leaf_of_zeros_and_scales_each_leaf_of_each_worker():
    tx = emaopt.local_updates(
        optax.sgd(1.0),
        optax.sgd(1.0),
        period=1,
        num_workers=2,
        reduce="sum",
        exchange_dtype=jnp.int8,
    )
    grads = {
        "zero": jnp.zeros((2, 3)),
        "big": jnp.array([[127.0, 1.0], [254.0, 2.0]]),
        "small": jnp.array([[1.27, 0.01], [1e-30, 0.0]]),
    }
    params = jax.tree.map(jnp.zeros_like, grads)
    _, state = tx.update(grads, tx.init(params), params)
    for name, center in emaopt.get_center(state).items():
        np.testing.assert_allclose(center, -np.sum(grads[name], axis=0), rtol=1e-6)


def test_int8_holds_a_leaf_without_elements():
    tx = emaopt.local_sgd(
        optax.sgd(1.0), period=1, num_workers=2, exchange_dtype=jnp.int8
    )
    params = {"w": jnp.zeros((2, 3)), "empty": jnp.zeros((2, 0, 2))}
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, tx.init(params), params)
    center = emaopt.get_center(state)
    np.testing.assert_allclose(center["w"], np.full(3, -1), rtol=1e-6)
    assert center["empty"].shape == (0, 2)


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_narrow_exchange_keeps_both_parts_of_a_complex_leaf(dtype, reduce):
    tx = emaopt.local_updates(
        optax.sgd(1.0),
        optax.sgd(1.0),
        period=1,
        num_workers=2,
        reduce=reduce,
        exchange_dtype=dtype,
    )
    grads = jnp.array([[1 + 2j, 3j], [2 - 1j, 4.0]])
    params = jnp.zeros_like(grads)
    _, state = tx.update(grads, tx.init(params), params, exchange=True)
    workers = 2 if reduce == "mean" else 1
    expected = -np.sum(grads, axis=0) / workers
    np.testing.assert_allclose(emaopt.get_center(state), expected, rtol=2e-2)


BEYOND = {jnp.float16: 6e4, jnp.float8_e4m3fn: 4e2, jnp.float8_e5m2: 5e4}  # if doubled


@pytest.mark.parametrize("commits", [[2.0, 0.01], [1.0, 1.0]], ids=["one", "sum"])
@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("dtype", BEYOND)
def test_commits_beyond_the_dtypes_range_leave_the_center_finite(dtype, reduce, commits):
    tx = emaopt.local_updates(
        optax.sgd(1.0),
        optax.sgd(1.0),
        period=1,
        num_workers=2,
        reduce=reduce,
        exchange_dtype=dtype,
    )
    params = jnp.zeros((2, 1))
    grads = BEYOND[dtype] * jnp.array(commits)[:, None]
    _, state = tx.update(grads, tx.init(params), params, exchange=True)
    assert jnp.isfinite(emaopt.get_center(state)[0])


# Error feedback

# A gradient whose second element every exchange rounds by the same amount.
LOST = {
    jnp.int8: ([1.0, 1e-3], 1e-3),  # quanta are a share of the first
    jnp.int16: ([1.0, 1e-5], 1e-5),
    jnp.float8_e4m3fn: ([1.0, 6e-4], 6e-4),  # below half of the smallest number
    jnp.float8_e5m2: ([1.0, 5e-6], 5e-6),
    jnp.float16: ([0.0, (1 + 2**-12) / 64], 2**-12 / 64),
    jnp.bfloat16: ([0.0, (1 + 2**-9) / 64], 2**-9 / 64),
}


@pytest.mark.parametrize(
    "dtype, reduce",
    [
        *((dtype, "mean") for dtype in LOST),
        (jnp.int8, "sequential"),
        (jnp.bfloat16, "sum"),
    ],
)
def test_error_feedback_keeps_the_error_from_growing(dtype, reduce):
    gradient, lost = LOST[dtype]
    grads, exchanges = jnp.tile(jnp.array(gradient), (2, 1)), 200

    def errors(error_feedback):
        tx = emaopt.local_updates(
            optax.sgd(1.0),
            optax.sgd(1.0),
            period=1,
            num_workers=2,
            reduce=reduce,
            commit="mean_gradient",
            exchange_dtype=dtype,
            error_feedback=error_feedback,
        )
        params = jnp.zeros((2, 2))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), state.center[1]

        _, centers = jax.lax.scan(step, (params, tx.init(params)), length=exchanges)
        workers = 1 if reduce == "mean" else 2
        exact = -np.float64(grads[0, 1]) * np.arange(1, exchanges + 1)
        return np.abs(np.float64(centers) / workers - exact)

    without, fed_back = errors(False), errors(True)
    np.testing.assert_allclose(without[-1], exchanges * lost, rtol=1e-2)
    assert fed_back.max() < 0.1 * without[-1]
    assert fed_back[100:].max() < 1.1 * fed_back[:100].max()


def test_residual_is_what_the_exchange_lost():
    tx = emaopt.local_updates(
        optax.sgd(1.0),
        optax.sgd(1.0),
        period=1,
        num_workers=2,
        exchange_dtype=jnp.bfloat16,
        error_feedback=True,
    )
    params = jnp.zeros((2, 3))
    grads = jnp.array([[1.001, 1.0, 3.3], [0.7, -0.1, 1e-3]])
    _, state = tx.update(grads, tx.init(params), params)
    lost = np.float64(grads) - np.float64(grads.astype(jnp.bfloat16))
    np.testing.assert_allclose(state.residual, lost, atol=1e-9)


# Fragments

SIZES = {"a": 8, "b": 5, "c": 4, "d": 3}


def fragmented(inner, num_fragments, period, steps, **options):
    """The start, centers and parameters by leaf, and the steps with its exchanges."""
    random = np.random.default_rng(0)
    start = {n: random.normal(size=(size, 4)) for n, size in SIZES.items()}
    tx = emaopt.local_updates(
        inner,
        optax.sgd(0.7, momentum=0.9, nesterov=True),
        period=period,
        num_workers=WORKERS,
        num_fragments=num_fragments,
        **options,
    )

    def gradients(params, step):
        one = jax.vmap(lambda p, target, noise: 0.3 * (p - target) + noise)
        return jax.tree.map(lambda p: one(p, TARGETS, NOISE[step]), params)

    with jax.enable_x64(True):
        centers, rows, _ = train(tx, jax.tree.map(jnp.asarray, start), steps, gradients)
    exchanges = {}
    for name, center in centers.items():
        moved = np.diff(center, axis=0, prepend=start[name][None]) != 0
        exchanges[name] = 1 + np.flatnonzero(moved.any(axis=(1, 2)))
    return start, centers, rows, exchanges


@pytest.mark.slow
@pytest.mark.parametrize("num_fragments, period", [(2, 4), (3, 3), (4, 9), (4, 11)])
def test_fragments_of_like_sizes_take_turns(num_fragments, period):
    *_, exchanges = fragmented(optax.sgd(0.1), num_fragments, period, 2 * period)
    at_step = np.zeros(2 * period, int)
    for name, steps in exchanges.items():
        np.testing.assert_array_equal(np.diff(steps), [period])
        at_step[steps - 1] += SIZES[name]
    used = np.flatnonzero(at_step)
    assert len(used) == 2 * num_fragments
    assert np.ptp(np.diff(used)) <= 1  # period/F apart, rounded
    share = sum(SIZES.values()) / num_fragments
    assert at_step.max() <= max(1.1 * share, max(SIZES.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduce": "sequential"},
        {"commit": "mean_gradient", "reduce": "sum"},
        {"commit": "mean_delta", "warmup_steps": 2},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "delta",
)
def test_each_fragment_is_trained_by_its_own_exchanges(options):
    start, centers, rows, exchanges = fragmented(optax.adam(0.1), 3, 4, 12, **options)
    options = {k: v for k, v in options.items() if k != "warmup_steps"}
    for name, x in start.items():
        expected = simulate(
            x,
            gradient,
            12,
            adam(0.1),
            sgd(0.7, 0.9, nesterov=True),
            lambda step, since, name=name: step in exchanges[name],
            num_workers=WORKERS,
            **options,
        )
        np.testing.assert_allclose(centers[name], expected[0], rtol=1e-9)
        np.testing.assert_allclose(rows[name], expected[1], rtol=1e-9)
