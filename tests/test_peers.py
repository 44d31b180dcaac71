"""Defects found in other libraries' averages, each as a claim that emaopt keeps.

Ours is compared with the definition. A peer that is installed runs beside it (its
numbers: pytest -rP); where it is not, its rule is written from its formula.
"""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import weighted_average

import emaopt

STEPS = 10_000
RAMP = np.arange(STEPS + 1, dtype=np.float32) / STEPS


def assert_nearer(peer, ours, theirs, fixed=1e-2):
    """Our error is below that of the peer, unless the peer has been repaired."""
    print(f"error of {peer}: {theirs}, of emaopt: {ours}")
    assert ours < theirs or theirs < fixed


def mean_age(weights):
    """In steps, of float [T+1] weights of θ_0 ... θ_T."""
    return weights @ np.arange(len(weights))[::-1]


def every_k_with_the_decay_of_one_step(beta, every, steps=STEPS):
    """The weights where β(s) is applied at every k-th step as it is, not raised to k."""
    weights = np.zeros(steps + 1)
    weights[0] = 1
    for s in range(every, steps + 1, every):
        weights *= beta(s)
        weights[s] += 1 - beta(s)
    return weights


def averages_of(averager, iterates):
    """The averages after each of θ_1 ... θ_T, in one compiled scan."""

    def step(state, iterate):
        state = averager.update(iterate, state)
        return state, state.average

    state = averager.init(iterates[0])
    return jax.jit(lambda s: jax.lax.scan(step, s, iterates[1:]))(state)[1]


class Weights(nnx.Module):
    def __init__(self, value):
        self.w = nnx.Param(value)


def nnx_ema(decay, start, value, steps):
    """flax.nnx.EMA, started at `start` and then shown `value`."""
    graphdef, state = nnx.split(nnx.EMA(Weights(start), decay))

    def step(state, _):
        ema = nnx.merge(graphdef, state)
        ema.update(Weights(value))
        return nnx.state(ema), None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(state)
    return jax.tree.leaves(state)[0]


def incremental_update(decay, start, value, steps):
    def step(average, _):
        return optax.incremental_update(value, average, 1 - decay), None

    return jax.jit(lambda a: jax.lax.scan(step, a, length=steps)[0])(start)


PEERS = {"optax.incremental_update": incremental_update}
if hasattr(nnx, "EMA"):  # Flax 0.12.8 and newer
    PEERS["flax.nnx.EMA"] = nnx_ema


# The window, when the average moves on every k-th step only.


@pytest.mark.parametrize(
    "every, their_age, their_initial", [(10, 0.557, 0.002), (100, 0.926, 0.662)]
)
def test_power_profile_survives_every_where_that_of_ema_pytorch_ages(
    every, their_age, their_initial
):
    """PostHocEMA takes the β(t) of one step every k steps (100 by default)."""
    decay = emaopt.power_decay(sigma_rel=0.10)
    exponent = 7.937203937601809  # γ + 1, which solves the next line for σ_rel = 0.10
    np.testing.assert_allclose(exponent / (exponent + 1) ** 2 / (exponent + 2), 0.10**2)
    moves = np.arange(every, STEPS + 1, every)
    truth = np.zeros(STEPS + 1)
    truth[moves] = np.diff((np.append(0, moves) / STEPS) ** exponent)
    theirs = every_k_with_the_decay_of_one_step(lambda s: (1 - 1 / s) ** exponent, every)
    np.testing.assert_allclose(theirs[0], their_initial, atol=1e-3)
    np.testing.assert_allclose(mean_age(theirs) / STEPS, their_age, atol=1e-3)

    ours = emaopt.decay_weights(decay, STEPS, every=every)
    np.testing.assert_allclose(ours, truth, rtol=1e-9, atol=1e-14)
    ideal = 1 / (exponent + 1)  # 0.112 of the run
    np.testing.assert_allclose(mean_age(ours) / STEPS, ideal, atol=every / STEPS)
    average = averages_of(emaopt.average_tree(decay, every=every), RAMP)[-1]
    np.testing.assert_allclose(average, truth @ RAMP, rtol=1e-5)


@pytest.mark.parametrize("every", [10, 100])
def test_constant_decay_keeps_its_window_with_every_where_others_stretch_it(every):
    """ema-pytorch, Lightning and NeMo do not raise the decay to k: a window k times as
    long."""
    decay = 0.99
    truth = every * decay**every / (1 - decay**every)  # mean age of Σ β^(ki) θ_(T-ki)
    theirs = every_k_with_the_decay_of_one_step(lambda s: decay, every)
    assert mean_age(theirs) > 0.3 * every * decay / (1 - decay)

    ours = emaopt.decay_weights(decay, STEPS, every=every)
    np.testing.assert_allclose(mean_age(ours), truth, rtol=1e-9)
    average = averages_of(emaopt.average_tree(decay, every=every), RAMP)[-1]
    np.testing.assert_allclose((1 - average) * STEPS, truth, rtol=1e-2)


# 16-bit parameters.


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("peer", PEERS)
def test_average_of_16_bit_parameters_is_exact_where_optax_and_flax_round_it_away(
    peer, dtype, every
):
    decay, steps = 0.9999, 20_000
    truth = 2 - decay**steps  # 1.865, from 1 towards 2
    start, value = jnp.ones(4, dtype), jnp.full(4, 2, dtype)
    theirs = PEERS[peer](decay**every, start, value, steps // every)
    iterates = jnp.full((steps + 1, 4), 2, dtype).at[0].set(1)
    ours = averages_of(emaopt.average_tree(decay, every=every), iterates)[-1]
    np.testing.assert_allclose(ours, truth, rtol=1e-5)
    assert_nearer(peer, abs(ours[0] - truth), abs(theirs[0].astype(float) - truth))


def test_uniform_weight_keeps_falling_in_bfloat16_where_schedule_frees_stops():
    """optax.contrib.schedule_free sums its weights in the parameters' dtype."""
    steps, rate = 2000, 0.01
    params = jnp.zeros(4, jnp.bfloat16)
    tx = optax.contrib.schedule_free(optax.sgd(rate), rate)

    def step(state, _):
        return tx.update(params, state, params)[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(tx.init(params))
    theirs = rate**2 / float(state.weight_sum)  # of the newest iterate

    newest = jnp.zeros((steps + 1, 4), jnp.bfloat16).at[-1].set(1)
    ours = averages_of(emaopt.average_tree(emaopt.uniform_decay()), newest)[-1][0]
    np.testing.assert_allclose(ours, 1 / steps, rtol=1e-6)
    assert_nearer("schedule_free", abs(ours * steps - 1), abs(theirs * steps - 1))


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=lambda d: d.__name__
)
def test_swap_is_exact_where_that_of_keras_rounds(dtype):
    """tf-models and Keras swap by a = a + b; b = a - b; a = a - b."""
    rng = np.random.default_rng(0)
    params = rng.standard_normal(1000).astype(dtype)
    average = (params + 0.1 * rng.standard_normal(1000)).astype(dtype)
    a, b = average, params
    for _ in range(2):
        a = a + b
        b = a - b
        a = a - b
    assert np.mean(a != average) > 0.1 and np.mean(b != params) > 0.01

    tx = emaopt.average_params(0.5, accumulator_dtype=dtype)
    state = emaopt.reset_average(tx.init(jnp.asarray(params)), jnp.asarray(average))
    served, swapped = emaopt.swap(jnp.asarray(params), state)
    back, state = emaopt.swap(served, swapped)
    assert np.asarray(served).tobytes() == average.tobytes()
    assert np.asarray(back).tobytes() == params.tobytes()
    assert np.asarray(state.average).tobytes() == average.tobytes()


# What the average starts from.


@pytest.mark.parametrize(
    "decay, debias, initial",
    [
        (0.9999, False, 0.9999**STEPS),
        (0.9999, True, 0),
        (emaopt.warmup_decay(0.9999), False, 0),
        (emaopt.power_decay(sigma_rel=0.10), False, 0),
    ],
    ids=["constant", "constant, debias", "warmup", "power"],
)
def test_random_initialization_is_forgotten_where_a_constant_keeps_37_percent(
    decay, debias, initial
):
    """The constant 0.9999 is the default of most peers, most of them without a remedy."""
    first = jnp.zeros(STEPS + 1).at[0].set(1)
    average = averages_of(emaopt.average_tree(decay, debias=debias), first)[-1]
    weight = emaopt.decay_weights(decay, STEPS, debias=debias)[0]
    np.testing.assert_allclose([average, weight], initial, rtol=1e-3, atol=1e-20)


@pytest.mark.skipif("flax.nnx.EMA" not in PEERS, reason="needs Flax 0.12.8 or newer")
def test_initialization_is_forgotten_by_debias_where_nnx_ema_has_no_such_option():
    first = jnp.zeros(STEPS + 1).at[0].set(1)
    ours = averages_of(emaopt.average_tree(0.9999, debias=True), first)[-1]
    theirs = nnx_ema(0.9999, jnp.ones(1), jnp.zeros(1), STEPS)[0]
    assert ours == 0
    assert_nearer("flax.nnx.EMA", ours, theirs)


@pytest.mark.parametrize(
    "decay, beta",
    [
        (0.99, lambda t: 0.99),
        (emaopt.warmup_decay(0.99), lambda t: min(0.99, (1 + t) / (10 + t))),
        (lambda t: 0.5 + t / 500, lambda t: 0.5 + t / 500),
    ],
    ids=["constant", "warmup", "own"],
)
def test_debias_is_exact_for_every_decay_where_others_assume_a_constant(decay, beta):
    """Others mean by it Adam's correction (Optax), a warm-up (Kauldron) or a schedule."""
    iterates = np.random.default_rng(0).standard_normal(201)
    truth, _ = weighted_average(beta, 0, 1, True, iterates)
    averager = emaopt.average_tree(decay, debias=True)
    ours = averages_of(averager, jnp.asarray(iterates, jnp.float32))[-1]
    np.testing.assert_allclose(ours, truth, rtol=1e-5)


def test_debias_of_a_constant_decay_is_that_of_optax_ema():
    iterates = jnp.asarray(np.random.default_rng(0).standard_normal(201), jnp.float32)
    tx = optax.ema(0.99, debias=True)
    step = lambda state, x: tx.update(x, state)[::-1]  # noqa: E731
    _, theirs = jax.lax.scan(step, tx.init(iterates[0]), iterates[1:])
    ours = averages_of(emaopt.average_tree(0.99, debias=True), iterates)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_exponential_average_is_not_the_uniform_one_as_levanters_is():
    """EmaDecaySqrt takes the new weight over the sum of all weights, which is 1/n."""
    ramp = jnp.arange(1001, dtype=jnp.float32)
    powers = 0.999 ** np.arange(1000)[::-1]
    truth = powers @ ramp[1:] / powers.sum()
    theirs = np.mean(ramp[1:])
    np.testing.assert_allclose([truth, theirs], [582.5, 500.5], atol=0.05)
    ours = averages_of(emaopt.average_tree(0.999, debias=True), ramp)[-1]
    np.testing.assert_allclose(ours, truth, rtol=1e-5)


@pytest.mark.parametrize(
    "decay, debias, age, effective",
    [
        (0.9999, False, 0.632, 7),
        (0.9999, True, 0.418, 9242),
        (emaopt.warmup_decay(0.9999), False, 0.100, 2100),
        (emaopt.inverse_gamma_decay(power=2 / 3), False, 0.045, 913),
        (emaopt.inverse_gamma_decay(power=3 / 4), False, 0.093, 1923),
        (emaopt.half_life_decay(1e9, ramp=0.05), False, 0.067, 1391),
        (emaopt.power_decay(sigma_rel=0.05), False, 0.053, 1082),
        (emaopt.power_decay(sigma_rel=0.10), False, 0.112, 2361),
        (emaopt.uniform_decay(), False, 0.500, 10_000),
    ],
    ids=str,
)
def test_profile_of_a_rule_in_use_is_the_one_that_was_measured(
    decay, debias, age, effective
):
    """Mean age as a share of a run of 10,000 steps, and 1/Σw², simulated by others."""
    summary = emaopt.weight_summary(emaopt.decay_weights(decay, STEPS, debias=debias))
    np.testing.assert_allclose(summary.mean_age / STEPS, age, atol=6e-4)
    np.testing.assert_allclose(summary.effective_iterates, effective, rtol=1e-3, atol=0.5)


# Models with more than parameters.


class WithDropout(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.linear(x))


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible:FutureWarning")
def test_model_with_dropout_is_averaged_where_nnx_ema_raises():
    model = WithDropout(nnx.Rngs(0))
    if hasattr(nnx, "EMA"):
        try:
            nnx.EMA(model, 0.5).update(model)
            print("flax.nnx.EMA: repaired")
        except Exception as error:
            print(f"flax.nnx.EMA: {error!r}")

    averager = emaopt.average_tree(0.5)
    graphdef, before = nnx.split(model)
    state = averager.init(before)
    kernel = model.linear.kernel
    model(jnp.ones((1, 2)))  # draws a key
    kernel[...] = kernel[...] + 1
    after = nnx.state(model)
    average = jax.jit(averager.update)(after, state).average
    served = nnx.merge(graphdef, average)
    np.testing.assert_allclose(served.linear.kernel[...], kernel[...] - 0.5, atol=1e-6)
    pairs = zip(jax.tree.leaves(average), jax.tree.leaves(after), strict=True)
    others = [(a, b) for a, b in pairs if not jnp.issubdtype(a.dtype, jnp.inexact)]
    assert others and all(a == b for a, b in others)  # the key and its counter


@pytest.mark.slow
def test_the_command_of_the_comparison_measures_what_its_page_says():
    root = Path(__file__).parents[1]
    command = [sys.executable, root / "benchmarks" / "peers.py", "--peers", "emaopt"]
    command += ["optax", "flax"] if "flax.nnx.EMA" in PEERS else ["optax"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    rows = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines() if line}
    assert rows["emaopt"][1:] == ["94.58", "0", "1.865", "0.0005", "works", "works"]
    assert rows["exact"] == ["94.58", "0", "1.865", "0.0005"]
    page = (root / "docs" / "comparison.md").read_text()
    assert "| 94.58 | 94.58 |" in page and "| 1.865 | 1.865 |" in page
