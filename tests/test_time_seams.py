"""Seams of clocks and annealings: what a fault in one line would change."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import emaopt
from emaopt import _annealing, checkpoint, posthoc, tf1
from emaopt.tf1 import _slots

P = {"w": jnp.ones(3)}


def test_a_traced_time_below_zero_is_none():
    averager = emaopt.average_tree(0.5, clock="tokens")
    update = jax.jit(lambda s, n: averager.update(jnp.ones(1), s, tokens=n))
    for n in (jnp.int32(-3), jnp.float32(-3)):
        state = update(averager.init(jnp.zeros(1)), n)
        assert state.average == 0 and not np.any(state.elapsed["tokens"])


def test_a_time_too_large_for_float32_is_refused():
    averager = emaopt.average_tree(0.5, clock="tokens")
    with pytest.raises(ValueError, match="tokens must be finite in float32"):
        averager.update(jnp.ones(1), averager.init(jnp.zeros(1)), tokens=1e39)


def test_steps_of_no_time_weigh_nothing():
    for decay in (emaopt.uniform_decay(), emaopt.polynomial_decay(3), 0.5, 0.0):
        w = emaopt.decay_weights(decay, 4, units=[0, 2, 0, 2])
        assert w[1] == w[3] == 0
        np.testing.assert_allclose(w.sum(), 1)
    np.testing.assert_allclose(
        emaopt.decay_weights(emaopt.uniform_decay(), 4, units=[0, 2, 0, 2]),
        [0, 0, 0.5, 0, 0.5],
    )


def test_the_time_that_is_described_is_exact(tmp_path):
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, clock="tokens")
    params = {"w": jnp.zeros(2)}
    state = emaopt.reset_average(
        tx.init(params), params, num_updates=3, elapsed=30_000_001
    )
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": state})
    assert checkpoint.describe(tmp_path / "c").averages[0].elapsed == 30_000_001


def test_traced_flags_and_complex_numbers_are_no_time():
    averager = emaopt.average_tree(0.5, clock="tokens")
    update = jax.jit(lambda s, n: averager.update(jnp.ones(1), s, tokens=n))
    state = averager.init(jnp.zeros(1))
    for bad in (jnp.bool_(True), jnp.complex64(1), jnp.ones(1)):
        with pytest.raises(TypeError, match="tokens must be a number or a scalar"):
            update(state, bad)


def test_names_of_other_arguments_are_no_clocks():
    for name in (
        "updates",
        "tree",
        "state",
        "params",
        "num_updates",
        "steps",
        "value",
        "grad",
        "value_fn",
        "exchange",
        "weights",
    ):
        with pytest.raises(ValueError, match="must be a name by which update"):
            emaopt.average_params(0.5, clock=name)


@pytest.mark.parametrize("eta", [0.5, 3.0, 40.0])
@pytest.mark.parametrize("i, n", [(1.0, 1.0), (1.0, 5.0), (1.0, 1000.0), (7.5, 2.5)])
def test_products_of_a_polynomial_decay_are_those_of_gamma_functions(eta, i, n):
    def r(x):
        return math.lgamma(x + 1 + eta) - math.lgamma(x)

    got = emaopt.polynomial_decay(eta).log_kept(np, np.float64(i), np.float64(n))
    np.testing.assert_allclose(got, r(i) - r(i + n), rtol=1e-11)


@pytest.mark.parametrize("i, n", [(0.0, 1.0), (0.0, 9.0), (1.0, 1.0), (3.0, 400.0)])
def test_products_of_a_ramp_are_sums_of_one_over_t(i, n):
    decay = emaopt.half_life_decay(np.inf, ramp=0.5)
    t = np.arange(i + 1, i + n + 1)
    got = decay.log_kept(np, np.float64(i), np.float64(n))
    np.testing.assert_allclose(got, -math.log(2) / 0.5 * np.sum(1 / t), rtol=2e-12)


def test_a_schedule_may_reach_zero_early():
    decay = emaopt.annealing_decay(optax.linear_schedule(1.0, 0.0, 10), 40)
    w = emaopt.decay_weights(decay, 40)
    np.testing.assert_allclose(
        w, posthoc.annealing_weights(optax.linear_schedule(1.0, 0.0, 10), 40), atol=1e-7
    )


def test_a_schedule_may_rise_by_a_rounding():
    decay = emaopt.annealing_decay(
        lambda c: jnp.float32(1) + jnp.float32(1e-7) * (c % 2), 9
    )
    np.testing.assert_allclose(emaopt.decay_weights(decay, 9)[-1], 1, atol=1e-6)


def test_a_rise_between_two_blocks_is_seen(monkeypatch):
    monkeypatch.setattr(_annealing, "_LOOKED_AT", 10)
    rising = optax.piecewise_constant_schedule(1.0, {5: 0.1, 10: 5.0})
    with pytest.raises(ValueError, match="must fall"):
        emaopt.annealing_decay(rising, 20)


def test_a_narrow_accumulator_is_judged_by_time_no_more():
    emaopt.average_params(0.9999, clock="tokens", accumulator_dtype=jnp.bfloat16)


def test_a_long_step_copies_to_the_bit():
    averager = emaopt.average_tree(0.9, clock="tokens")
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    state = averager.update(
        jnp.asarray(100 * x[::-1]), averager.init(jnp.asarray(100 * x[::-1])), tokens=1
    )
    state = averager.update(jnp.asarray(x), state, tokens=10_000)
    np.testing.assert_array_equal(state.average, x)


def test_a_skipped_step_takes_its_time():
    averager = emaopt.average_tree(
        emaopt.uniform_decay(), clock="tokens", skip_nonfinite=True
    )
    state = averager.update(jnp.full(1, jnp.nan), averager.init(jnp.zeros(1)), tokens=7)
    assert state.num_updates == 1 and state.elapsed["tokens"][0] == 7


def test_a_reset_refuses_time_without_a_count():
    tx = emaopt.averaged(optax.sgd(0.1), 0.9, clock="tokens")
    state = tx.init(P)
    with pytest.raises(ValueError, match="elapsed is the time of that many updates"):
        emaopt.reset_average(state, P, elapsed=5.0)
    with pytest.raises(ValueError, match="elapsed must be at least 0"):
        emaopt.reset_average(state, P, num_updates=3, elapsed=-5.0)


def test_a_first_step_of_several_units():
    averager = emaopt.average_tree(0.5, clock="tokens")
    update = jax.jit(lambda s, n: averager.update(jnp.ones(1), s, tokens=n))
    state = update(averager.init(jnp.zeros(1)), jnp.int32(3))
    np.testing.assert_allclose(state.average, 1 - 0.5**3)


def _tx(start=0, clock="tokens"):
    return optax.named_chain(
        ("sgd", optax.sgd(1.0)),
        ("ema:0.9", emaopt.average_params(0.9, start=start, clock=clock)),
        ("ema:0.99", emaopt.average_params(0.99, start=start, clock=clock)),
    )


def run_of(directory, tx, steps, clock="tokens", restart=None):
    """Saves a run after some numbers of steps of 5 units each."""
    params, done = {"w": jnp.zeros(2)}, 0
    state = tx.init(params)
    for step in steps:
        for _ in range(step - done):
            _, state = tx.update(params, state, params, **{clock: 5})
        done = step
        if restart:
            state = restart(state, params)
        whole = {"params": params, "opt_state": state}
        checkpoint.save(directory / str(step), whole, name="ema:0.9")


def test_a_synthesis_knows_that_steps_before_start_take_no_time(tmp_path):
    run_of(tmp_path / "run", _tx(start=4), [6, 10])
    made = checkpoint.synthesize(
        tmp_path / "run", tmp_path / "out", target="ema:0.95", start=4
    )
    recorded = [
        posthoc.Recorded(d, [6, 10], start=4, units=[0.0] * 4 + [5.0] * 6)
        for d in (0.9, 0.99)
    ]
    target = emaopt.decay_weights(0.95, 10, units=[0.0] * 4 + [5.0] * 6)
    wanted = posthoc.solve_recorded(recorded, target)
    np.testing.assert_allclose(made.solution.coefficients, wanted.coefficients, rtol=1e-6)


def test_clocks_that_change_in_mid_run_are_refused(tmp_path):
    run_of(tmp_path / "run", _tx(), [6])
    run_of(tmp_path / "run", _tx(clock="examples"), [10], clock="examples")
    with pytest.raises(
        ValueError,
        match=r"ema:0\.9.* counts examples and tokens in different",
    ):
        checkpoint.synthesize(tmp_path / "run", tmp_path / "out", target="ema:0.95")


def _theirs(path):
    theirs = {"params": {"w": jnp.ones(2)}, "ema_params": {"w": jnp.zeros(2)}, "step": 99}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, theirs)


def test_adopted_time_is_exact(tmp_path):
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, clock="tokens")
    params = {"w": jnp.ones(2)}
    _theirs(tmp_path / "c")
    target = (params, tx.init(params))

    def t(**k):
        return np.float64(
            checkpoint.adopt(tmp_path / "c", target, report=lambda s: None, **k)[
                1
            ].averaging.elapsed["tokens"]
        ).sum()

    assert t(elapsed=30_000_001) == 30_000_001
    with pytest.raises(ValueError, match="elapsed must be at least 0"):
        t(elapsed=-1.0)


def test_adopted_time_may_be_told_over_that_of_the_file(tmp_path):
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, clock="tokens")
    params = {"w": jnp.ones(2)}
    state = emaopt.reset_average(tx.init(params), params, num_updates=3, elapsed=50)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": state})
    target = {"params": params, "opt_state": tx.init(params)}

    def t(**k):
        return np.float64(
            checkpoint.adopt(tmp_path / "c", target, report=lambda s: None, **k)[
                "opt_state"
            ].averaging.elapsed["tokens"]
        ).sum()

    assert t() == 50
    assert t(elapsed=70.0) == 70


def test_tiny_rises_of_a_schedule_take_nothing():
    def schedule(c):
        return jnp.where(c < 3, 1.0, 0.5 + 1e-7 * (c % 2))

    decay = emaopt.annealing_decay(schedule, 9)
    np.testing.assert_allclose(
        emaopt.decay_weights(decay, 9), posthoc.annealing_weights(schedule, 9), atol=1e-6
    )


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_a_summary_of_an_annealing_that_is_not_over(shape):
    decay = emaopt.annealing_decay(shape, 1000, 0.3)
    for length in (10, 500, 701, 900, 1000):
        np.testing.assert_allclose(
            emaopt.weight_summary(decay, length),
            emaopt.weight_summary(emaopt.decay_weights(decay, length)),
            rtol=1e-9,
            atol=1e-12,
        )


def test_a_target_in_the_middle_of_a_run(tmp_path):
    run_of(tmp_path / "run", _tx(), [6, 10])
    made = checkpoint.synthesize(
        tmp_path / "run",
        tmp_path / "out",
        target="ema:0.95",
        step=8,
        report=lambda s: None,
    )
    assert made.step == 8


def test_small_steps_add_up_late_in_a_run():
    tx = emaopt.averaged(optax.sgd(1.0), emaopt.uniform_decay(), clock="tokens")
    params = jnp.zeros(1)
    state = emaopt.reset_average(tx.init(params), params, num_updates=1, elapsed=2**40)

    def step(s, _):
        return (tx.update(params, s, params, tokens=jnp.int32(30_001))[1], None)

    state, _ = jax.lax.scan(step, state, length=1000)
    assert np.sum(np.float64(state.averaging.elapsed["tokens"])) == 2**40 + 30_001_000
    high, low = np.float64(state.averaging.elapsed["tokens"])
    assert high == np.float32(high + low)


def test_a_ramp_is_a_constant_half_life_late_in_a_run():
    decay = emaopt.half_life_decay(1000.0, ramp=0.5)
    averager = emaopt.average_tree(decay, clock="tokens")
    state = averager.update(jnp.zeros(1), averager.init(jnp.zeros(1)), tokens=10**12)
    late = averager.update(jnp.ones(1), state, tokens=100)
    np.testing.assert_allclose(late.average, 1 - 0.5**0.1, rtol=1e-5)


def test_the_time_of_an_average_is_no_slot():
    for params, clock in (({"tokens": jnp.ones(3)}, "tokens"), (jnp.ones(2), "examples")):
        tx = optax.chain(optax.adam(0.1), emaopt.average_params(0.9, clock=clock))
        state = tx.init(params)
        assert tf1.get_slot_names(state, params) == ["average", "mu", "nu"]
        marks = _slots.marked(state, params, ["mine"], "other")
        assert marks[1].elapsed == {clock: "other"}


def test_averages_that_tell_different_times_are_not_mixed(tmp_path):
    def restart(state, params):
        return emaopt.reset_average(
            state, params, name="ema:0.99", num_updates=6, elapsed=11
        )

    run_of(tmp_path / "run", _tx(), [6], restart=restart)
    with pytest.raises(ValueError, match=r"ema:0\.9\b.*ema:0\.99 count tokens, and say"):
        checkpoint.synthesize(tmp_path / "run", tmp_path / "out", target="ema:0.95")
    checkpoint.synthesize(
        tmp_path / "run",
        tmp_path / "out",
        target=0.9,
        recorded={"ema:0.99": 0.99},
        report=lambda said: None,
    )


def test_elapsed_of_an_adoption_needs_one_clock(tmp_path):
    _theirs(tmp_path / "c")
    params = {"w": jnp.ones(2)}
    plain = emaopt.averaged(optax.sgd(1.0), 0.5)
    with pytest.raises(ValueError, match=r"averages count steps\. Leave it out"):
        checkpoint.adopt(tmp_path / "c", (params, plain.init(params)), elapsed=3.0)
    two = optax.chain(
        emaopt.average_params(0.5, clock="tokens"),
        emaopt.average_params(0.9, clock="examples"),
    )
    with pytest.raises(ValueError, match=r"examples and tokens\. Adopt each"):
        checkpoint.adopt(tmp_path / "c", (params, two.init(params)), elapsed=3.0)
