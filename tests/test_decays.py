"""The decays against their formulae in float64, and the weights that they imply."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import emaopt
from emaopt._decay_type import one_minus

# Few arguments are whole numbers, and each limit binds at some step: a formula with a
# rounded argument, or without a limit, is another one.
DECAYS = {
    "warmup": (emaopt.warmup_decay(0.99), lambda t: min(0.99, (1 + t) / (10 + t))),
    "uniform": (emaopt.uniform_decay(), lambda t: (t - 1) / t),
    "polynomial": (emaopt.polynomial_decay(2.5), lambda t: 1 - 3.5 / (t + 2.5)),
    "power gamma": (emaopt.power_decay(gamma=2.5), lambda t: (1 - 1 / t) ** 3.5),
    "negative gamma": (emaopt.power_decay(gamma=-0.5), lambda t: (1 - 1 / t) ** 0.5),
    "inverse gamma": (
        emaopt.inverse_gamma_decay(2.5, 0.75, min_decay=0.5, max_decay=0.95),
        lambda t: min(max(1 - (1 + t / 2.5) ** -0.75, 0.5), 0.95),
    ),
    "half-life": (emaopt.half_life_decay(2.5), lambda t: 0.5 ** (1 / 2.5)),
    "ramped half-life": (
        emaopt.half_life_decay(30, ramp=0.5),
        lambda t: 0.5 ** (1 / min(30, 0.5 * t)),
    ),
    "ramp to the end": (
        emaopt.half_life_decay(math.inf, ramp=0.5),
        lambda t: 0.5 ** (1 / (0.5 * t)),
    ),
    "scaled constant": (emaopt.scale_decay(0.99, 8), lambda t: 0.99**8),
    "scaled to a smaller batch": (emaopt.scale_decay(0.99, 0.5), lambda t: 0.99**0.5),
    "scaled schedule": (
        emaopt.scale_decay(emaopt.uniform_decay(), 2.5),
        lambda t: ((t - 1) / t) ** 2.5,
    ),
}


@pytest.mark.quick(1000)
@pytest.mark.parametrize("decay, formula", DECAYS.values(), ids=DECAYS)
def test_decay_is_its_formula(decay, formula):
    steps = np.arange(1, 200)
    actual = jax.jit(jax.vmap(decay))(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(actual, [formula(t) for t in steps], rtol=1e-5, atol=1e-7)


@pytest.mark.quick(1000)
@pytest.mark.parametrize("decay, formula", DECAYS.values(), ids=DECAYS)
def test_one_minus_decay_is_exact_in_float32_and_numpy_at_a_million_steps(decay, formula):
    steps = [1, 2, 3, 10, 1000, 10**6]
    exact = [1 - formula(t) for t in steps]
    actual = jax.vmap(lambda t: one_minus(decay, t))(jnp.asarray(steps, jnp.int32))
    # TensorFlow's rule is kept in TensorFlow's precision, a rounded float32 β.
    tensorflow = "warmup" in repr(decay)
    np.testing.assert_allclose(actual, exact, rtol=2e-5 if tensorflow else 2e-6)
    # As decay_weights asks for it.
    float64 = one_minus(decay, np.asarray(steps))
    np.testing.assert_allclose(float64, exact, rtol=2e-5 if tensorflow else 1e-9)


@pytest.mark.parametrize(
    "decay, expected",
    {
        "warmup": (emaopt.warmup_decay(0.999), 0.1),
        "uniform": (emaopt.uniform_decay(), 0.0),
        "polynomial": (emaopt.polynomial_decay(3), 0.0),
        "power": (emaopt.power_decay(sigma_rel=0.1), 0.0),
        "inverse gamma": (emaopt.inverse_gamma_decay(), 0.0),
        "ramped half-life": (emaopt.half_life_decay(30, ramp=0.5), 0.0),
    }.values(),
)
def test_decay_at_zero_is_a_copy_where_the_formula_has_no_value(decay, expected):
    assert float(decay(0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("x64", [False, True])
def test_first_warmup_decay_is_that_of_tensorflow(x64):
    with jax.enable_x64(x64):
        assert emaopt.warmup_decay(0.9999)(1) == np.float32(2) / np.float32(11)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_power_decay_solves_gamma_from_sigma_rel(sigma_rel):
    weights = emaopt.decay_weights(emaopt.power_decay(sigma_rel=sigma_rel), 200_000)
    position = np.arange(weights.size) / (weights.size - 1)
    deviation = np.sqrt(weights @ position**2 - (weights @ position) ** 2)
    assert deviation == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("eta", [0, 1, 3, 8])
def test_polynomial_decay_weighs_like_its_polynomial(eta):
    # Unrolled, the weight of iterate i is proportional to (i+η-1)(i+η-2)...i.
    weights = emaopt.decay_weights(emaopt.polynomial_decay(eta), 50)[1:]
    expected = np.ones(50)
    for j in range(eta):
        expected *= np.arange(1, 51) + j
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-9)


def test_uniform_weights_are_equal_and_leave_the_initial_parameters_out():
    weights = emaopt.decay_weights(emaopt.uniform_decay(), 7)
    np.testing.assert_allclose(weights, [0] + 7 * [1 / 7], rtol=1e-12)


def test_tail_average_weighs_only_the_tail():
    # The copy at s = start is replaced at the next step, where β = 0.
    weights = emaopt.decay_weights(emaopt.uniform_decay(), 10, start=6)
    np.testing.assert_allclose(weights, [0] * 7 + [1 / 4] * 4, rtol=1e-12)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "decay, thinned",
    [
        (0.9, lambda k: 0.9**k),
        (emaopt.uniform_decay(), lambda k: emaopt.uniform_decay()),
        (emaopt.power_decay(gamma=3), lambda k: emaopt.power_decay(gamma=3)),
    ],
    ids=["constant", "uniform", "power"],
)
def test_every_kth_step_is_the_same_decay_on_the_thinned_path(decay, thinned, every):
    weights = emaopt.decay_weights(decay, 30, every=every)
    expected = np.zeros(31)
    expected[::every] = emaopt.decay_weights(thinned(every), 30 // every)
    np.testing.assert_allclose(weights, expected, atol=1e-12)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("start", [0, 1, 7, 100])
@pytest.mark.parametrize("every", [1, 4])
def test_weights_are_a_distribution(every, start, debias):
    for decay in [0.0, 0.5, 1.0, *(decay for decay, _ in DECAYS.values())]:
        weights = emaopt.decay_weights(decay, 50, every=every, start=start, debias=debias)
        assert weights.dtype == np.float64 and np.all(weights >= 0)
        assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_debias_forgets_all_before_the_start():
    weights = emaopt.decay_weights(0.9, 20, start=5, debias=True)
    kept = 0.9 ** np.arange(15, -1, -1)
    np.testing.assert_allclose(weights, [0] * 5 + list(kept / kept.sum()), rtol=1e-12)


def test_weights_of_a_users_own_schedule():
    weights = emaopt.decay_weights(lambda t: jnp.where(t % 2 == 0, 0.5, 1.0), 4)
    np.testing.assert_allclose(weights, [0.25, 0, 0.25, 0, 0.5])


def test_a_users_own_schedule_may_be_a_table():
    # A table takes whole numbers alone, also from decay_weights and when it is scaled.
    table = jnp.array([0.0, 1.0, 0.5, 1.0, 0.5])
    scaled = emaopt.scale_decay(lambda t: table[t], 2)  # 1, 1/4, 1, 1/4
    np.testing.assert_allclose(jax.jit(scaled)(2), 0.25, rtol=1e-6)
    for decay, expected in [
        (lambda t: table[t], [0.25, 0, 0.25, 0, 0.5]),
        (scaled, [0.0625, 0, 0.1875, 0, 0.75]),
    ]:
        np.testing.assert_allclose(emaopt.decay_weights(decay, 4), expected, rtol=1e-6)


def test_weights_of_a_million_steps_are_quick_to_have():
    assert emaopt.decay_weights(0.9999, 1_000_000)[-1] == pytest.approx(1e-4)


def test_summary_of_an_exponential_average():
    summary = emaopt.weight_summary(emaopt.decay_weights(0.99, 5000))
    expected = (99.0, 199.0, 0.99**5000, np.log(0.5) / np.log(0.99))
    np.testing.assert_allclose(summary, expected, rtol=1e-4)


def test_summary_of_a_long_decay_shows_the_initial_parameters():
    # Constant 0.9999 from the first weights on, 10,000 steps: over a third is random.
    summary = emaopt.weight_summary(emaopt.decay_weights(0.9999, 10_000))
    assert summary.initial_weight == pytest.approx(0.368, abs=1e-3)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: emaopt.warmup_decay(1.5), ValueError, r"warmup_decay.*max_decay.*1\.5"),
        (lambda: emaopt.polynomial_decay(-1), ValueError, "polynomial_decay: eta.*-1"),
        (lambda: emaopt.power_decay(), ValueError, "exactly one of sigma_rel and gamma"),
        (
            lambda: emaopt.power_decay(sigma_rel=0.1, gamma=1),
            ValueError,
            "exactly one of sigma_rel and gamma",
        ),
        (lambda: emaopt.power_decay(sigma_rel=0.3), ValueError, r"below 1/sqrt\(12\)"),
        (
            lambda: emaopt.power_decay(gamma=-1),
            ValueError,
            "gamma must be greater than -1",
        ),
        (
            lambda: emaopt.half_life_decay(0),
            ValueError,
            "half_life must be greater than 0",
        ),
        (lambda: emaopt.half_life_decay(5, ramp=0), ValueError, "ramp must be greater"),
        (
            lambda: emaopt.inverse_gamma_decay(min_decay=0.9, max_decay=0.5),
            ValueError,
            r"max_decay must be in \[0\.9, 1\], got 0\.5",
        ),
        (lambda: emaopt.scale_decay(0.9, 0), ValueError, "batch_factor"),
        (lambda: emaopt.scale_decay("a", 2), TypeError, "scale_decay: decay must be"),
        (lambda: emaopt.decay_weights(2, 10), ValueError, r"decay must be in \[0, 1\]"),
        (
            lambda: emaopt.decay_weights(0.5, -1),
            ValueError,
            "num_steps must be at least 0",
        ),
        (lambda: emaopt.decay_weights(0.5, 1.5), TypeError, "num_steps must be a whole"),
        (lambda: emaopt.decay_weights(0.5, 9, every=0), ValueError, "every must be at"),
        (lambda: emaopt.weight_summary([0.5, 0.4]), ValueError, "vector.*with sum 1"),
    ],
)
def test_bad_argument_says_what_and_where(build, error, message):
    with pytest.raises(error, match=message):
        build()
