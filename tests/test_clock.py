"""Averages whose decay counts examples, tokens or any other unit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt import posthoc

DECAYS = {
    "constant": 0.9,
    "uniform": emaopt.uniform_decay(),
    "polynomial": emaopt.polynomial_decay(3.5),
    "power": emaopt.power_decay(sigma_rel=0.1),
    "half-life": emaopt.half_life_decay(7.0),
    "ramp": emaopt.half_life_decay(20, ramp=0.5),
}
OPTIONS = {
    "plain": {},
    "every": {"every": 3},
    "start": {"start": 5},
    "start, every and debias": {"start": 4, "every": 3, "debias": True},
}
POINTS = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
UNITS = np.random.default_rng(1).integers(1, 9, 40)


def run(averager, points=POINTS, units=UNITS):
    state = averager.init(jnp.zeros(3))
    update = jax.jit(lambda x, state, n: averager.update(x, state, tokens=n))
    for x, n in zip(points, units, strict=True):
        state = update(x, state, n)
    return state


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("decay", DECAYS)
def test_steps_of_one_unit_are_steps(decay, options):
    plain = emaopt.average_tree(DECAYS[decay], **OPTIONS[options])
    state = plain.init(jnp.zeros(3))
    for x in POINTS:
        state = plain.update(x, state)
    timed = emaopt.average_tree(DECAYS[decay], clock="tokens", **OPTIONS[options])
    of_time = run(timed, units=np.ones(40, np.int32))
    np.testing.assert_allclose(of_time.average, state.average, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_long_step_keeps_what_as_many_short_ones_keep(decay):
    """The last point is seen for n units at once, or for n steps of one unit."""
    timed = emaopt.average_tree(DECAYS[decay], clock="tokens")
    at_once = run(timed)
    split = run(timed, np.repeat(POINTS, UNITS, axis=0), np.ones(UNITS.sum(), int))
    np.testing.assert_allclose(at_once.average, split.average, rtol=1e-5, atol=1e-6)
    assert at_once.elapsed["tokens"][0] == UNITS.sum() == split.elapsed["tokens"][0]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("decay", DECAYS)
def test_average_is_that_of_decay_weights_with_the_units(decay, options):
    average = run(
        emaopt.average_tree(DECAYS[decay], clock="tokens", **OPTIONS[options])
    ).average
    weights = emaopt.decay_weights(DECAYS[decay], 40, units=UNITS, **OPTIONS[options])
    np.testing.assert_allclose(weights.sum(), 1)
    wanted = weights[1:] @ POINTS.astype(np.float64)
    np.testing.assert_allclose(average, wanted, rtol=1e-5, atol=1e-6)


def test_uniform_weights_are_the_time_that_each_iterate_took():
    weights = emaopt.decay_weights(emaopt.uniform_decay(), 4, units=[3, 1, 4, 2])
    np.testing.assert_allclose(weights, [0, 0.3, 0.1, 0.4, 0.2])


def test_a_half_life_in_tokens_is_one():
    decay = emaopt.half_life_decay(2e9)
    tx = optax.chain(optax.sgd(1.0), emaopt.average_params(decay, clock="tokens"))
    params = jnp.zeros(1)
    update = jax.jit(tx.update)
    updates, state = update(-jnp.ones(1), tx.init(params), params, tokens=0)
    params = optax.apply_updates(params, updates)
    zero = jnp.zeros(1)
    for _ in range(500):  # at a constant parameter, 2e9 tokens in all
        _, state = update(zero, state, params, tokens=jnp.int32(4_000_000))
    np.testing.assert_allclose(emaopt.get_average(state), 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(np.full(500, 2**31 - 1, np.int32), id="int32"),
        pytest.param(np.full(40, 2.5e10 + 1), id="Python numbers"),
        pytest.param(np.full(999, 255, np.uint8), id="uint8"),
    ],
)
def test_time_is_exact_to_a_trillion_units_in_float32(times):
    averager = emaopt.average_tree(emaopt.uniform_decay(), clock="tokens")
    state = averager.init(jnp.zeros(1))
    wide = times.dtype == np.float64
    update = jax.jit(lambda x, s, n: averager.update(x, s, tokens=n))
    for n in times:
        state = (
            averager.update(jnp.ones(1), state, tokens=int(n))
            if wide
            else update(jnp.ones(1), state, n)
        )
    pair = state.elapsed["tokens"]
    assert pair.dtype == jnp.float32
    assert np.sum(np.asarray(pair, np.float64)) == sum(int(n) for n in times)


@pytest.mark.parametrize("decay", ["uniform", "polynomial", "power", "half-life"])
def test_shares_are_right_late_in_a_run_of_a_trillion_units(decay):
    averager = emaopt.average_tree(DECAYS[decay], clock="tokens")
    state = averager.init(jnp.zeros(1))
    state = averager.update(jnp.zeros(1), state, tokens=10**12)
    late = averager.update(jnp.ones(1), state, tokens=1)
    wanted = 1 - np.exp(
        -{"uniform": 1, "polynomial": 4.5, "power": 7.93725}.get(decay, 0) * 1e-12
    )
    if decay == "half-life":
        wanted = 1 - 0.5 ** (1 / 7)
    np.testing.assert_allclose(late.average, wanted, rtol=1e-3)


@pytest.mark.parametrize("kind", [np.array, np.int64, np.float64, int])
def test_times_of_numpy_keep_their_digits(kind):
    averager = emaopt.average_tree(0.5, clock="tokens")
    state = averager.update(
        jnp.ones(1), averager.init(jnp.zeros(1)), tokens=kind(2**35 + 1)
    )
    assert np.sum(np.float64(state.elapsed["tokens"])) == 2**35 + 1


def test_a_traced_nan_shows():
    averager = emaopt.average_tree(0.5, clock="tokens")
    update = jax.jit(lambda s, n: averager.update(jnp.ones(1), s, tokens=n))
    assert np.isnan(update(averager.init(jnp.zeros(1)), jnp.float32(np.nan)).average)


def test_no_time_is_no_nan_to_a_debugger():
    averager = emaopt.average_tree(emaopt.polynomial_decay(3), clock="tokens", start=1)
    with jax.debug_nans(True):
        state = averager.update(jnp.ones(1), averager.init(jnp.zeros(1)), tokens=0)
    assert state.average == 0


def test_no_time_moves_nothing_and_a_first_step_of_none_neither():
    averager = emaopt.average_tree(emaopt.uniform_decay(), clock="tokens")
    state = averager.init(jnp.zeros(1))
    state = averager.update(jnp.ones(1), state, tokens=0)
    assert state.average == 0
    state = averager.update(jnp.ones(1), state, tokens=5)
    assert state.average == 1
    assert averager.update(jnp.zeros(1), state, tokens=0).average == 1


def test_time_passes_the_optimizer_to_the_average_in_every_wrapper():
    average = emaopt.average_params(0.5, clock="tokens")
    params = jnp.zeros(1)
    for tx in (
        optax.chain(optax.sgd(1.0), average),
        emaopt.averaged(optax.sgd(1.0), 0.5, clock="tokens"),
        optax.named_chain(("sgd", optax.sgd(1.0)), ("ema", average)),
        optax.chain(optax.sgd(1.0), optax.masked(average, True)),
        optax.MultiSteps(optax.chain(optax.sgd(1.0), average), 1),
        optax.apply_if_finite(optax.chain(optax.sgd(1.0), average), 3),
    ):
        state = tx.init(params)
        _, state = tx.update(jnp.ones(1), state, params, tokens=2)
        np.testing.assert_allclose(emaopt.get_average(state), -0.75)


def test_weight_summary_of_a_trillion_tokens():
    summary = emaopt.weight_summary(emaopt.half_life_decay(2e9), 10**12)
    np.testing.assert_allclose(summary.half_life, 2e9, rtol=1e-6)
    np.testing.assert_allclose(summary.mean_age, 2e9 / np.log(2), rtol=1e-6)


def test_reset_takes_the_time_with_the_count():
    tx = emaopt.averaged(optax.sgd(1.0), emaopt.uniform_decay(), clock="tokens")
    params = jnp.zeros(2)
    state = emaopt.reset_average(
        tx.init(params), jnp.ones(2), num_updates=3, elapsed=30_000_001
    )
    assert np.sum(np.float64(state.averaging.elapsed["tokens"])) == 30_000_001
    _, state = tx.update(-jnp.full(2, 5.0), state, params, tokens=10_000_000)
    np.testing.assert_allclose(emaopt.get_average(state), 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match="elapsed is the time of that many updates"):
        emaopt.reset_average(state, params, num_updates=3)
    emaopt.reset_average(state, params, num_updates=3, elapsed=0)  # before `start`
    plain = emaopt.averaged(optax.sgd(1.0), 0.5).init(params)
    with pytest.raises(ValueError, match="no clock"):
        emaopt.reset_average(plain, params, num_updates=3, elapsed=1.0)


ERRORS = {
    "warmup": (dict(decay=emaopt.warmup_decay(0.9)), "needs a decay that is a function"),
    "own": (dict(decay=lambda t: jnp.float32(0.5)), "needs a decay that is a function"),
    "annealing": (dict(decay=emaopt.annealing_decay("cosine", 9)), "needs a decay"),
    "array": (dict(decay=jnp.float32(0.5)), "needs a decay that is a function"),
    "no name": (dict(clock="two words"), "must be a name by which update"),
    "keyword": (dict(clock="lambda"), "must be a name by which update"),
    "taken": (dict(clock="num_updates"), "must be a name by which update"),
    "no clock": (dict(clock="steps"), "must be a name by which update"),
    "the loss": (dict(clock="value"), "must be a name by which update"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_clocks_that_cannot_be_are_refused(case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        emaopt.average_params(**{"decay": 0.5, "clock": "tokens", **arguments})


def test_updates_without_a_time_or_with_a_bad_one_are_refused():
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, clock="tokens")
    params = jnp.zeros(1)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params, tokens=n\)"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="tokens must be at least 0"):
        tx.update(params, state, params, tokens=-1)
    with pytest.raises(ValueError, match="tokens must be at least 0"):
        tx.update(params, state, params, tokens=jnp.int32(-1))
    with pytest.raises(ValueError, match="tokens must be finite"):
        tx.update(params, state, params, tokens=np.inf)
    with pytest.raises(ValueError, match="tokens must be finite"):
        tx.update(params, state, params, tokens=jnp.float32(np.inf))
    with pytest.raises(ValueError, match="tokens must be finite"):
        tx.update(params, state, params, tokens=10**400)
    with pytest.raises(TypeError, match="tokens must be a number or a scalar"):
        tx.update(params, state, params, tokens=jnp.ones(2))
    with pytest.raises(ValueError, match="leave one of them out"):
        tx.update(params, state, params, tokens=1, num_updates=3)
    other = emaopt.averaged(optax.sgd(1.0), 0.5)
    with pytest.raises(ValueError, match="clock=None, but the state was made with"):
        other.update(params, state, params)
    averager = emaopt.average_tree(0.5)
    with pytest.raises(TypeError, match="tokens; it takes no such argument"):
        averager.update(params, averager.init(params), tokens=1)


def test_recorded_averages_take_the_units_of_their_steps():
    units = np.arange(1, 31)
    recorded = [
        posthoc.Recorded(emaopt.power_decay(sigma_rel=s), [10, 20, 30], units=units)
        for s in (0.05, 0.1)
    ]
    matrix = posthoc.snapshot_weights(recorded, 30)
    for row, last in ((0, 10), (4, 20)):
        decay = recorded[row // 3].decay
        wanted = emaopt.decay_weights(decay, last, units=units[:last])
        np.testing.assert_allclose(matrix[row, : last + 1], wanted, atol=1e-15)


def test_units_that_are_no_times_of_all_steps_are_refused():
    with pytest.raises(
        ValueError, match="units must be the time of each step, 3 numbers"
    ):
        emaopt.decay_weights(0.5, 3, units=[1, 2])
    with pytest.raises(ValueError, match="of at least 0"):
        emaopt.decay_weights(0.5, 2, units=[1, -2])
    with pytest.raises(
        ValueError, match="units needs a decay that is a function of time"
    ):
        emaopt.decay_weights(emaopt.warmup_decay(), 2, units=[1, 2])
