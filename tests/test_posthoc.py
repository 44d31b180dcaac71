"""Post-hoc synthesis against definitions: quadrature, sums and normal equations."""

import inspect
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

import emaopt
from emaopt import _profiles, posthoc
from emaopt.posthoc import Recorded, snapshot_weights, solve, solve_recorded

power = emaopt.power_decay


def recorded(num_steps, count, widths=(0.05, 0.1)):
    steps = np.arange(1, count + 1) * num_steps // count
    return [Recorded(power(sigma_rel=width), steps) for width in widths]


@given(st.floats(1e-3, 0.2886))
def test_width_and_exponent_are_inverse(sigma_rel):
    gamma = posthoc.sigma_rel_to_gamma(sigma_rel)
    assert posthoc.gamma_to_sigma_rel(gamma) == pytest.approx(sigma_rel, rel=1e-9)


def test_table_of_the_docstring_is_the_width_of_the_profile():
    rows = re.findall(r"^    (?:γ|σ_rel) (.*)$", inspect.getdoc(posthoc) or "", re.M)
    for gamma, width in np.array([row.split() for row in rows], float).T:

        def moment(k, g=gamma):
            return integrate.quad(lambda x: (g + 1) * x ** (g + k), 0, 1)[0]

        assert np.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(width, abs=1e-4)


@pytest.mark.parametrize("gamma_a", [-0.2, 0, 0.5, 6.94, 16.97, 80])
@pytest.mark.parametrize("gamma_b", [0, 1.5, 16.97])
@pytest.mark.parametrize("ends", [(1, 1), (3, 7), (900, 17), (1, 1e6)])
def test_inner_products_are_the_integrals(gamma_a, gamma_b, ends):
    a, b = ends

    # x = τ / t_min; the powers apart, so that neither over- nor underflows.
    low = min(ends)
    scale = (gamma_a + 1) * (gamma_b + 1) * low / (a * b)

    def integrand(x):
        return scale * (x * low / a) ** gamma_a * (x * low / b) ** gamma_b

    expected = integrate.quad(integrand, 0, 1, epsabs=0, epsrel=1e-12, limit=400)[0]
    actual = posthoc.power_inner_product(gamma_a, a, gamma_b, b)
    assert actual == pytest.approx(expected, rel=1e-9)


def test_sums_over_the_steps_come_near_the_integrals():
    end_a, end_b, errors = 3, 4, []
    for scale in (100, 1000, 10_000):
        a, b = (
            emaopt.decay_weights(power(sigma_rel=width), end * scale)
            for width, end in ((0.1, end_a), (0.2, end_b))
        )
        gammas = [posthoc.sigma_rel_to_gamma(width) for width in (0.1, 0.2)]
        exact = posthoc.power_inner_product(gammas[0], end_a, gammas[1], end_b)
        errors.append(abs(a @ b[: a.size] * scale / exact - 1))
    assert errors[0] < 3e-2 and errors[2] < 3e-4 and errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"start": 5}, {"debias": True}])
@pytest.mark.parametrize(
    "decay, beta",
    [
        (0.9, lambda t: 0.9),
        (emaopt.uniform_decay(), lambda t: (t - 1) / t if t > 1 else 0.0),
        (power(gamma=2.5), lambda t: (1 - 1 / t) ** 3.5 if t > 1 else 0.0),
    ],
    ids=["constant", "uniform", "power"],
)
def test_weights_of_irregular_snapshots_are_those_of_the_definition(decay, beta, options):
    steps = [0, 1, 4, 17, 23]
    actual = snapshot_weights([Recorded(decay, steps, **options)], 25)
    definition = {"every": 1, "start": 0, "debias": False} | options
    for row, step in zip(actual, steps, strict=True):
        _, weights = oracles.weighted_average(
            beta, **definition, iterates=np.zeros(step + 1)
        )
        np.testing.assert_allclose(
            row, np.append(weights, np.zeros(25 - step)), atol=1e-12
        )


def test_solution_is_that_of_the_normal_equations():
    rng = np.random.default_rng(0)
    matrix = rng.dirichlet(np.ones(40), 6)
    target = rng.dirichlet(np.ones(40))
    gram = np.block([[matrix @ matrix.T, np.ones((6, 1))], [np.ones((1, 6)), 0]])
    expected = np.linalg.solve(gram, np.append(matrix @ target, 1))[:6]
    solution = solve(matrix, target)
    error = np.linalg.norm(expected @ matrix - target) / np.linalg.norm(target)
    np.testing.assert_allclose(solution.coefficients, expected, atol=1e-9)
    assert solution.residual == pytest.approx(error, rel=1e-9)
    assert solution.noise_gain == pytest.approx(np.sqrt(np.sum(expected**2)), rel=1e-9)


def test_a_recorded_average_is_found_again():
    matrix = snapshot_weights(recorded(2000, 32), 2000)
    solution = solve(matrix, matrix[63])
    np.testing.assert_allclose(solution.coefficients, np.eye(64)[63], atol=1e-8)
    assert solution.residual < 1e-12


def test_of_equal_snapshots_the_noise_is_shared():
    row = emaopt.decay_weights(0.9, 50)
    solution = solve([row] * 4, row)
    np.testing.assert_allclose(solution.coefficients, [0.25] * 4, atol=1e-12)
    assert (solution.noise_gain, solution.residual) == pytest.approx((0.5, 0))


def test_coefficients_sum_to_one_for_nearly_equal_snapshots():
    matrix = snapshot_weights([Recorded(0.999, np.arange(400, 500))], 500)
    target = emaopt.decay_weights(power(sigma_rel=0.01), 500)
    solution = solve(matrix, target)
    assert solution.coefficients.sum() == pytest.approx(1, abs=1e-9)
    at_most = solve(matrix, target, rcond=1e-2)
    assert at_most.noise_gain < solution.noise_gain
    assert at_most.residual > solution.residual


# Relative errors of profiles from 64 snapshots of each of two averages.
PROFILES = {
    "power 0.03": (emaopt.decay_weights(power(sigma_rel=0.03), 10_000), 0.003),
    "power 0.07": (emaopt.decay_weights(power(sigma_rel=0.07), 10_000), 0.0003),
    "power 0.2": (emaopt.decay_weights(power(sigma_rel=0.2), 10_000), 0.002),
    "half-life 10 %": (
        emaopt.decay_weights(emaopt.half_life_decay(1000), 10_000, debias=True),
        0.0007,
    ),
    "half-life 3 %": (
        emaopt.decay_weights(emaopt.half_life_decay(300), 10_000),
        0.0011,
    ),
    "last half": (
        emaopt.decay_weights(emaopt.uniform_decay(), 10_000, start=5000),
        0.0024,
    ),
    "cosine": (posthoc.annealing_weights("cosine", 10_000, 0.2), 0.0044),
}


@pytest.mark.parametrize("target, bound", PROFILES.values(), ids=PROFILES)
def test_profiles_are_as_near_as_promised(target, bound):
    solution = solve_recorded(recorded(10_000, 64), target)
    assert solution.residual < bound and solution.noise_gain < 10


def test_solving_by_blocks_is_solving_with_the_matrix():
    num_steps = 30_000  # several blocks
    averages = [
        Recorded(power(sigma_rel=0.05), [3, 8191, 8192, 20_000, 29_000]),
        Recorded(0.9995, [700, 24_576, 30_000], every=7, start=300, debias=True),
    ]
    target = emaopt.decay_weights(power(sigma_rel=0.1), num_steps)
    whole = solve(snapshot_weights(averages, num_steps), target)
    blocks = solve_recorded(averages, target)
    np.testing.assert_allclose(blocks.coefficients, whole.coefficients, atol=1e-9)
    np.testing.assert_allclose(blocks[1:], whole[1:], rtol=1e-9)


def test_snapshots_after_the_target_may_help_and_do_not_harm():
    averages = recorded(1000, 20)
    target = emaopt.decay_weights(power(sigma_rel=0.1), 700)
    assert solve_recorded(averages, target).residual < 1e-9  # step 700 is one of them


@pytest.mark.slow
def test_a_run_of_many_steps_needs_no_matrix():
    num_steps = 300_000
    target = emaopt.decay_weights(power(sigma_rel=0.15), num_steps)
    solution = solve_recorded(recorded(num_steps, 32), target)
    assert solution.residual < 0.003


@pytest.mark.parametrize(
    "error, widths", [(0.1, 0.2), (0.01, [0.05, 0.15]), (0.003, 0.07)]
)
def test_as_many_snapshots_as_are_needed_and_no_fewer(error, widths):
    needed = posthoc.snapshots_needed(error, sigma_rel=widths)

    def worst(count):
        return max(
            solve_recorded(
                recorded(20_000, count), emaopt.decay_weights(power(sigma_rel=w), 20_000)
            ).residual
            for w in np.atleast_1d(widths)
        )

    assert worst(needed) <= 1.02 * error < 1.05 * worst(needed - 1)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_annealing_is_a_run_with_smaller_updates(shape):
    num_steps, fraction = 50, 0.3
    iterates = np.random.default_rng(0).standard_normal(num_steps + 1).cumsum()
    position, begin = iterates[0], (1 - fraction) * num_steps
    for t in range(1, num_steps + 1):
        x = max((t - 0.5 - begin) / (num_steps - begin), 0)
        factor = {"linear": 1 - x, "1-sqrt": 1 - x**0.5}.get(
            shape, 0.5 + 0.5 * np.cos(np.pi * x)
        )
        position += factor * (iterates[t] - iterates[t - 1])
    weights = posthoc.annealing_weights(shape, num_steps, fraction)
    assert weights @ iterates == pytest.approx(position, rel=1e-12)


@pytest.mark.parametrize("steps", [[10], [2, 3, 10], [0, 4, 9, 10]])
def test_checkpoints_on_a_broken_line_lose_nothing(steps):
    weights = np.random.default_rng(1).dirichlet(np.ones(11))
    values = np.random.default_rng(2).standard_normal(len(steps))
    path = np.interp(np.arange(11), steps, values)
    found = _profiles.checkpoint_weights(weights, steps)
    assert found @ values == pytest.approx(weights @ path, rel=1e-12)


def test_combination_is_the_sum_in_double_precision():
    rng = np.random.default_rng(3)
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.complex64]
    trees = [
        {k.__name__: rng.standard_normal((3, 5)).astype(k) for k in kinds}
        | {"step": np.int32(i), "empty": np.zeros((0, 2)), "key": jax.random.key(i)}
        for i in range(3)
    ]
    coefficients = [0.5, -1.5, 2.0]
    combined = posthoc.combine(iter(trees), coefficients)
    for kind in kinds:
        wide = np.complex128 if kind is np.complex64 else np.float64
        leaves = [tree[kind.__name__].astype(wide) for tree in trees]
        expected = sum(c * leaf for c, leaf in zip(coefficients, leaves, strict=True))
        leaf = combined[kind.__name__]
        assert leaf.dtype == kind and leaf.shape == (3, 5)
        np.testing.assert_array_equal(leaf, expected.astype(kind))
    assert combined["step"] == 2 and combined["empty"].shape == (0, 2)
    assert jax.random.key_data(combined["key"])[1] == 2


def test_what_weighs_nothing_may_be_anything():
    trees = [{"w": np.full(2, np.nan, np.float32)}, {"w": jnp.ones(2)}]
    np.testing.assert_array_equal(posthoc.combine(trees, [0, 1])["w"], [1, 1])


@pytest.mark.parametrize(
    "spec, steps, expected",
    [
        ("uniform", None, [0.25] * 4),
        ("uniform", [10, 20, 30, 70], [0.25] * 4),
        # Equal steps from the first to the last: the mean of the updates' factors.
        ("linear", [10, 20, 30, 40], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        ("linear:0.25", [10, 20, 30, 40], [0, 0, 0.5, 0.5]),
    ],
)
def test_profiles_by_name_weigh_checkpoints(spec, steps, expected):
    found = _profiles.merge_weights(spec, 4, steps)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("spec", ["0.999", "ema:0.999", "power:0.1", "half-life:300"])
def test_averages_by_name_are_near_the_average_of_a_smooth_path(spec):
    steps = np.arange(100, 2001, 100)
    weights = emaopt.decay_weights(_profiles.decay_of(spec), 2000)

    def path(t):
        return np.sin(np.maximum(t, 100) / 400)  # before the first: the first

    found = _profiles.merge_weights(spec, 20, list(steps)) @ path(steps)
    assert found == pytest.approx(weights @ path(np.arange(2001)), abs=5e-3)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (
            lambda: posthoc.sigma_rel_to_gamma(0.3),
            ValueError,
            "sigma_rel_to_gamma: .*below",
        ),
        (lambda: posthoc.gamma_to_sigma_rel(-1), ValueError, "greater than -1, got -1"),
        (lambda: solve(np.ones(3), np.ones(3) / 3), ValueError, r"must be \[n, T\+1\]"),
        (lambda: solve(np.ones((1, 2)), [1.0]), ValueError, r"\(1, 2\) and \(1,\)"),
        (lambda: solve([[np.nan, 1]], [0.5, 0.5]), ValueError, "must be finite"),
        (lambda: solve([[1.0, 0]], [0.5, 0.4]), ValueError, "sum 1"),
        (lambda: solve_recorded([], [1.0]), ValueError, "at least one recorded"),
        (
            lambda: solve_recorded([Recorded(0.9, [2, 1])], [1.0]),
            ValueError,
            r"increase from 0 or more, got \[2 1\]",
        ),
        (
            lambda: solve_recorded([Recorded(1.5, [2])], [1.0]),
            ValueError,
            r"solve_recorded: decay must be in \[0, 1\]",
        ),
        (lambda: snapshot_weights([Recorded(0.9, [5])], 4), ValueError, "later than"),
        (
            lambda: posthoc.snapshots_needed(1e-5, sigma_rel=0.28),
            ValueError,
            "Record a width nearby",
        ),
        (
            lambda: posthoc.annealing_weights("exp", 9, 0.1),
            ValueError,
            "one of linear, cosine, 1-sqrt, or a schedule, got 'exp'",
        ),
        (
            lambda: posthoc.annealing_weights("linear", 9, 0),
            ValueError,
            r"fraction must be in \(0, 1\]",
        ),
        (
            lambda: _profiles.checkpoint_weights([0.5, 0.5], [1, 1]),
            ValueError,
            "steps must increase",
        ),
        (
            lambda: _profiles.checkpoint_weights([0.5, 0.5], [0, 2]),
            ValueError,
            "must go up to 1",
        ),
        (
            lambda: posthoc.combine([{"a": 1.0}, {"b": 1.0}], [1, 0]),
            ValueError,
            "the trees differ",
        ),
        (lambda: posthoc.combine([], []), TypeError, "a vector of numbers"),
        (lambda: _profiles.decay_of("ema"), ValueError, "no decay: take one of ema:β"),
        (lambda: _profiles.decay_of("ema:x"), ValueError, "'x' is not a number"),
        (lambda: _profiles.decay_of("uniform:3"), ValueError, "no decay"),
        (lambda: _profiles.decay_of("ema:2"), ValueError, "2.0"),
        (lambda: _profiles.weights_of("cosine", 9), ValueError, "as in cosine:0.2"),
        (lambda: _profiles.weights_of("cosin:1", 9), ValueError, "1-sqrt:fraction"),
        (lambda: _profiles.merge_weights("0.9", 2, None), ValueError, "needs the steps"),
        (lambda: _profiles.merge_weights("powr:1", 2, None), ValueError, "no profile"),
    ],
)
def test_bad_argument_says_what_and_where(build, error, message):
    with pytest.raises(error, match=message):
        build()
