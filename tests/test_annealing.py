"""Averages that stand in for a decay of the learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt import posthoc

SCHEDULES = {
    "cosine": optax.cosine_decay_schedule(3.0, 40),
    "linear": optax.linear_schedule(1.0, 0.0, 40),
    "to a tenth": optax.linear_schedule(1.0, 0.1, 20),
    "exponential": optax.exponential_decay(0.01, 10, 0.5),
    "steps": optax.piecewise_constant_schedule(1.0, {10: 0.5, 30: 0.2}),
    "joined": optax.join_schedules(
        [optax.constant_schedule(1.0), optax.polynomial_schedule(1.0, 0.0, 2, 20)], [20]
    ),
    "a function": lambda count: 1 / (1 + count),
}
POINTS = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_are_those_of_a_run_with_the_schedule(schedule):
    """Had the steps been as long as the schedule says, it would have ended there."""
    schedule = SCHEDULES[schedule]
    points = np.concatenate([[np.zeros(3)], POINTS.astype(np.float64)])
    moves = np.diff(points, axis=0)
    factors = [float(schedule(t)) / float(schedule(0)) for t in range(40)]
    weights = posthoc.annealing_weights(schedule, 40)
    np.testing.assert_allclose(weights.sum(), 1)
    np.testing.assert_allclose(weights @ points, factors @ moves, atol=1e-6)


def test_a_schedule_counts_from_where_the_fraction_begins():
    whole = posthoc.annealing_weights(optax.linear_schedule(1.0, 0.0, 10), 10)
    tail = posthoc.annealing_weights(optax.linear_schedule(1.0, 0.0, 10), 50, 0.2)
    np.testing.assert_allclose(tail[40:], whole, atol=1e-7)
    assert not tail[:40].any()


def test_where_a_schedule_rises_weights_are_negative():
    rising = optax.linear_schedule(1.0, 2.0, 4)
    weights = posthoc.annealing_weights(rising, 4)
    assert weights[1] < 0
    np.testing.assert_allclose(weights.sum(), 1)
    with pytest.raises(ValueError, match="annealing_decay: the schedule must fall"):
        emaopt.annealing_decay(rising, 4)


NAMED = ["linear", "cosine", "1-sqrt"]


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("shape", [*NAMED, *SCHEDULES])
def test_one_average_ends_at_the_merge_of_all_iterates(shape, fraction):
    shape = SCHEDULES.get(shape, shape)
    decay = emaopt.annealing_decay(shape, 40, fraction)
    weights = posthoc.annealing_weights(shape, 40, fraction)
    np.testing.assert_allclose(emaopt.decay_weights(decay, 40), weights, atol=1e-7)
    averager = emaopt.average_tree(decay)
    state = averager.init(jnp.zeros(3))
    update = jax.jit(averager.update)
    for x in POINTS:
        state = update(x, state)
    wanted = weights[1:] @ POINTS.astype(np.float64)
    np.testing.assert_allclose(state.average, wanted, rtol=1e-5, atol=1e-6)
    later = update(100 * POINTS[0], state)
    np.testing.assert_array_equal(later.average, state.average)


@pytest.mark.parametrize("shape", NAMED)
def test_sums_of_a_long_annealing_need_no_array(shape):
    decay = emaopt.annealing_decay(shape, 200_000, 0.3)
    wanted = emaopt.weight_summary(posthoc.annealing_weights(shape, 200_000, 0.3))
    found = emaopt.weight_summary(decay, 200_000)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)


def test_before_the_end_it_is_the_profile_so_far():
    decay, weights = emaopt.annealing_decay("cosine", 40), None
    weights = posthoc.annealing_weights("cosine", 40)
    np.testing.assert_allclose(
        emaopt.decay_weights(decay, 25), weights[:26] / weights[:26].sum(), atol=1e-12
    )


def test_profiles_of_a_million_steps_are_exact_in_float32_in_their_sums():
    """A share in float32 may be off by some percent; Σ of many may not."""
    decay = emaopt.annealing_decay("cosine", 1_000_000)

    def older(i):
        """Σ w over the iterates up to i, by the average's own arithmetic."""
        steps = jnp.arange(1, 1_000_001)
        newest = jax.vmap(decay.one_minus)(steps)
        kept = jnp.where(steps > i, jnp.log1p(-newest.astype(jnp.float32)), 0.0)
        return np.exp(np.float64(kept).sum())

    weights = posthoc.annealing_weights("cosine", 1_000_000)
    for i in (100_000, 500_000, 900_000):
        np.testing.assert_allclose(older(i), weights[: i + 1].sum(), rtol=2e-4)


@pytest.mark.parametrize("shape", NAMED)
def test_shares_of_a_very_long_run_are_not_rounded_away_under_jit(shape):
    """Of the last million of 40 million steps; each alone is less than float32 tells."""
    last, some = 40_000_000, 1 << 20
    decay = emaopt.annealing_decay(shape, last, 0.5)
    steps = np.arange(last - some, last)
    found = jax.jit(jax.vmap(decay.one_minus))(jnp.asarray(steps, jnp.int32))
    wanted = decay.one_minus(steps).sum()
    assert wanted > 1e-3
    np.testing.assert_allclose(np.asarray(found, np.float64).sum(), wanted, rtol=1e-3)


def test_window_is_the_mean_of_the_last_iterates_on_its_multiples():
    weights = emaopt.decay_weights(emaopt.window_decay(8), 24)
    np.testing.assert_allclose(weights, np.repeat([0, 1 / 8], [17, 8]), atol=1e-12)
    between = emaopt.decay_weights(emaopt.window_decay(8), 26)
    np.testing.assert_allclose(between[-2:], 0.5)
    every = emaopt.decay_weights(emaopt.window_decay(8), 24, every=2)
    np.testing.assert_allclose(every[[18, 20, 22, 24]], 0.25)
    averager = emaopt.average_tree(emaopt.window_decay(8))
    state = averager.init(jnp.zeros(3))
    for x in POINTS[:32]:
        state = averager.update(x, state)
    np.testing.assert_allclose(state.average, POINTS[24:32].mean(0), rtol=1e-5)


def test_window_counts_whole_steps_late_in_a_run():
    decay = emaopt.window_decay(3)
    late = 2**30 + 1  # float32 holds multiples of 128 there
    assert [float(decay.one_minus(jnp.int32(late + i))) for i in range(3)] == [
        pytest.approx(1 / ((late + i - 1) % 3 + 1)) for i in range(3)
    ]


ERRORS = {
    "no shape": (("exp", 9), ValueError, "shape must be one of linear, cosine, 1-sqrt"),
    "of two": ((lambda a, b: 1.0, 9), TypeError, "shape must be a function of 1"),
    "warm-up": (
        (optax.warmup_cosine_decay_schedule(0.0, 1.0, 3, 9), 9),
        ValueError,
        "the schedule must begin above 0",
    ),
    "NaN": (
        (lambda count: jnp.where(count > 3, jnp.nan, 1.0), 9),
        ValueError,
        "the schedule must be finite",
    ),
    "negative": (
        (optax.linear_schedule(1.0, -1.0, 9), 9),
        ValueError,
        "not below 0",
    ),
    "fraction": (
        ("cosine", 9, 0.0),
        ValueError,
        r"fraction must be in \(0, 1.0\]|\(0, 1\]",
    ),
    "steps": (("cosine", 0), ValueError, "num_steps must be at least 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_no_annealing_is_refused(case):
    arguments, error, message = ERRORS[case]
    with pytest.raises(error, match=f"annealing_decay: .*{message}"):
        emaopt.annealing_decay(*arguments)
    if case != "negative":
        with pytest.raises(error, match=f"annealing_weights: .*{message}"):
            posthoc.annealing_weights(*arguments)
    with pytest.raises(ValueError, match="window_decay: num_steps must be at least 1"):
        emaopt.window_decay(0)
