"""Summaries of profiles: the same as of the array of weights, for runs of any length."""

import time
import tracemalloc
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt import _profiles, _sums, checkpoint

DECAYS = {
    "0": 0.0,
    "0.5": 0.5,
    "0.99": 0.99,
    "0.999999": 0.999999,
    "1": 1.0,
    "uniform": emaopt.uniform_decay(),
    "polynomial 0": emaopt.polynomial_decay(0),
    "polynomial 2.5": emaopt.polynomial_decay(2.5),
    "polynomial 1000": emaopt.polynomial_decay(1000),
    "power 0.1": emaopt.power_decay(sigma_rel=0.1),
    "power 0.001": emaopt.power_decay(sigma_rel=0.001),
    "power -0.5": emaopt.power_decay(gamma=-0.5),
    "half-life 0.01": emaopt.half_life_decay(0.01),
    "half-life 500": emaopt.half_life_decay(500),
    "half-life inf": emaopt.half_life_decay(np.inf),
    "warm-up 0": emaopt.warmup_decay(0.0),
    "warm-up 0.05": emaopt.warmup_decay(0.05),
    "warm-up 0.9": emaopt.warmup_decay(0.9),
    "warm-up 0.9999": emaopt.warmup_decay(0.9999),
    "warm-up 0.99999": emaopt.warmup_decay(0.99999),
    "warm-up 1": emaopt.warmup_decay(1.0),
    "ramp": emaopt.half_life_decay(500, ramp=0.1),
    "inverse gamma": emaopt.inverse_gamma_decay(),
    "another's": lambda t: 0.9 * (1 - 1.0 / t),
}
ANNEALINGS = [f"{s}:{f}" for s in ("linear", "cosine", "1-sqrt") for f in (1, 0.2, 0.001)]
LENGTHS = [0, 1, 2, 3, 10, 79, 81, 200, 1000, 12_345]
LONG = 2**31 - 1


@pytest.mark.quick(1000)
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_a_decay_is_summed_up_as_its_weights_are(decay, debias):
    rounded = "warmup" in repr(decay)
    for length in LENGTHS:
        found = emaopt.weight_summary(decay, length, debias=debias)
        weights = emaopt.decay_weights(decay, length, debias=debias)
        np.testing.assert_allclose(
            found,
            emaopt.weight_summary(weights),
            rtol=1e-5 if rounded else 1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_a_long_run_is_summed_up_within_the_error_that_is_stated(decay, debias):
    rtol = 1e-3 if "warmup" in repr(decay) else 1e-6
    weights = emaopt.decay_weights(decay, 1_000_000, debias=debias)
    found = emaopt.weight_summary(decay, 1_000_000, debias=debias)
    expected = emaopt.weight_summary(weights)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


@pytest.mark.quick(1000)
@pytest.mark.parametrize("spec", ANNEALINGS)
def test_an_annealing_is_summed_up_as_its_weights_are(spec):
    for length in LENGTHS[1:]:
        found = _profiles.summary_of(spec, length)
        expected = emaopt.weight_summary(_profiles.weights_of(spec, length))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


# (mean age, effective iterates, half-life) of 2^31 - 1 steps, by hand.
T = float(LONG)
BY_HAND = {
    "0.999": (999, 1999, -np.log(2) / np.log(0.999)),
    "uniform": ((T - 1) / 2, T, T / 2),
    "polynomial:3": (T / 5, T * 7 / 16, T * (1 - 0.5**0.25)),
    "half-life:500": (1 / (2 ** (1 / 500) - 1), 2 / (1 - 0.5 ** (1 / 500)) - 1, 500),
    "linear:0.2": (T / 10, T / 5, T / 10),
    "cosine:0.2": (T / 10, T / 5 * 8 / np.pi**2, T / 10),
}


@pytest.mark.quick(1000)
@pytest.mark.parametrize("spec", BY_HAND)
def test_two_billion_steps_are_summed_up_at_once_without_an_array(spec):
    _profiles.summary_of(spec, LONG)  # the rules are computed once
    tracemalloc.start()
    began = time.perf_counter()
    found = _profiles.summary_of(spec, LONG)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    numbers = found.mean_age, found.effective_iterates, found.half_life
    np.testing.assert_allclose(numbers, BY_HAND[spec], rtol=1e-6)
    assert found.initial_weight == 0
    assert peak < 2**20 and seconds < 5


def test_rule_for_sums_is_exact_for_polynomials():
    for count in (1, 40, 41, 100, 12_345, 10**9):
        places, weights = _sums._nodes(0, count)
        np.testing.assert_allclose(weights.sum(), count, rtol=1e-12)
        total = weights @ (places / count) ** 3
        np.testing.assert_allclose(total, (count + 1) ** 2 / count / 4, rtol=1e-11)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: emaopt.decay_weights(0.9, LONG), ValueError, "decay_weights: num_steps"),
        (
            lambda: emaopt.weight_summary(DECAYS["another's"], LONG),
            ValueError,
            "weight_summary: num_steps must be at most 33554432",
        ),
        (
            lambda: _profiles.annealing_weights("cosine", LONG, 0.5),
            ValueError,
            "annealing_weights: num_steps must be at most 33554432",
        ),
        (lambda: emaopt.weight_summary(0.9), ValueError, "weight_summary: .* num_steps"),
        (
            lambda: emaopt.weight_summary([1.0], 3),
            TypeError,
            "weight_summary: decay must be a number",
        ),
    ],
)
@pytest.mark.quick(1000)
def test_arrays_of_billions_are_refused_and_told_what_to_do(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_checkpoint_of_two_billion_updates_is_described_at_once(tmp_path):
    names = ["power:0.1", "warmup:0.9999999"]  # the latter has no closed form
    tx = optax.named_chain(
        ("sgd", optax.sgd(1.0)),
        *((name, emaopt.average_params(_profiles.decay_of(name))) for name in names),
    )
    params = {"w": jnp.ones(2)}
    state: Any = tx.init(params)
    for name in names:
        state[name] = state[name]._replace(num_updates=jnp.int32(LONG))
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": state}, name=names[0])
    began = time.perf_counter()
    one, other = checkpoint.describe(tmp_path / "c").averages
    assert time.perf_counter() - began < 10
    assert one.num_updates == other.num_updates == LONG
    summaries = {one.name: one.summary, other.name: other.summary}
    assert summaries.pop("opt_state/warmup:0.9999999") is None
    (found,) = summaries.values()
    assert found is not None
    gamma = emaopt.posthoc.sigma_rel_to_gamma(0.1)
    np.testing.assert_allclose(found.mean_age, T / (gamma + 2), rtol=1e-6)
