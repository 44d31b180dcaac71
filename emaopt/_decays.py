"""β as a function of t.

An average keeps β_t of its old value at step t and takes 1 - β_t of the newest
iterate. All kinds of average (exponential, uniform, tail, polynomial, power function)
are choices of β_t.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from jax.typing import ArrayLike

from emaopt._checks import check_decay, check_number
from emaopt._decay_type import Array, Decay, evaluate, one_minus
from emaopt._power_profiles import gamma_of_sigma_rel
from emaopt._types import DecayLike

# t -> β, as an array of NumPy's if t is one, else as one of JAX's.
DecayFunction: TypeAlias = Callable[[ArrayLike], Array]

# In the formulas below, xp is numpy or jax.numpy, and t a floating array of its kind.


def warmup_decay(max_decay: float = 0.9999) -> DecayFunction:
    """Rises as TensorFlow's `num_updates` rule: β(t) = min(max_decay, (1+t)/(10+t)).

    The window grows with the run: the mean age of the weights is a tenth of it until β
    reaches `max_decay`, at t = (10 max_decay - 1)/(1 - max_decay). β is computed in
    float32 as TensorFlow does, also under x64.

    Args:
      max_decay: The largest β, in [0, 1].

    Returns:
      A function t -> β. t = 1, the first update, gives 2/11; t = 0 gives 1/10.

    Raises:
      ValueError: If `max_decay` is outside [0, 1].
      TypeError: If an argument is of another kind.

    Example:
      >>> print(warmup_decay(0.999)(1))
      0.18181819

    References:
      TensorFlow, `tf.train.ExponentialMovingAverage`,
      https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """
    check_number("warmup_decay", "max_decay", max_decay, 0, 1)

    def beta(xp: ModuleType, t: Array) -> Array:
        t = t.astype(np.float32)
        return xp.minimum(t.dtype.type(max_decay), (1 + t) / (10 + t))

    # β is (1+t)/(10+t) up to the step `reached`, and from there the largest β, rounded to
    # float32. Above 0.99999, 1 - β is a few units in the last place of float32: too far
    # from the formula for a closed form.
    largest = float(np.float32(max_decay))
    reached = (10 * largest - 1) / (1 - largest) if largest < 1 else math.inf
    reached = float(math.floor(reached)) if reached < math.inf else reached

    def log_kept(xp: ModuleType, i: Array, n: Array) -> Array:
        # Π (1+t)/(10+t) telescopes: nine factors (i+k)/(rising+k) are left.
        last, most = i + n, max(reached, 0)
        i_rising, rising = xp.minimum(i, most), xp.minimum(last, most)
        found = sum(xp.log((i_rising + k) / (rising + k)) for k in range(2, 11))
        log_beta = math.log(largest) if largest > 0 else -math.inf
        steps = last - xp.maximum(i, rising)
        return found + xp.where(steps > 0, xp.maximum(steps, 1e-9) * log_beta, 0.0)

    return Decay(
        f"warmup_decay({max_decay})",
        beta,
        lambda xp, t: 1 - beta(xp, t),
        log_kept if largest < 0.999991 else None,
        (reached,),
    )


def uniform_decay() -> DecayFunction:
    """Gives all iterates the same weight: β(t) = (t-1)/t.

    This is the Polyak-Ruppert average; with `start`, the tail average of stochastic
    weight averaging; with `every`, the mean of every k-th iterate.

    Returns:
      A function t -> β. t <= 1 gives 0: the average is the first iterate itself.

    Example:
      >>> print(uniform_decay()(4))
      0.75

    References:
      Polyak & Juditsky, 1992, Acceleration of stochastic approximation by averaging,
      eq. 3, https://doi.org/10.1137/0330046
      Izmailov et al., 2018, Averaging weights leads to wider optima and better
      generalization, https://arxiv.org/abs/1803.05407
    """

    # From t itself, not as 1 - β: for t = 1e6, float32 would lose several percent of it.
    def complement(xp: ModuleType, t: Array) -> Array:
        return 1 / xp.maximum(t, 1)

    def beta(xp: ModuleType, t: Array) -> Array:
        t = xp.maximum(t, 1)
        return (t - 1) / t

    def log_kept(xp: ModuleType, i: Array, n: Array) -> Array:
        return -xp.log1p(n / i)

    return Decay("uniform_decay()", beta, complement, log_kept, of_time=True)


def polynomial_decay(eta: float) -> DecayFunction:
    """Weighs iterate i about as i^η: the newest one gets 1 - β(t) = (1+η)/(t+η).

    η = 0 is the uniform average; η = 3 is a common choice. The window is the same
    fraction of a run of any length.

    Args:
      eta: η, at least 0.

    Returns:
      A function t -> β. t <= 1 gives 0.

    Raises:
      ValueError: If `eta` is negative.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(polynomial_decay(3)(5))
      0.5

    References:
      Shamir & Zhang, 2013, Stochastic gradient descent for non-smooth optimization,
      eq. 2, https://arxiv.org/abs/1212.1824
    """
    check_number("polynomial_decay", "eta", eta, 0)

    def complement(xp: ModuleType, t: Array) -> Array:
        return (1 + eta) / (xp.maximum(t, 1) + eta)

    def beta(xp: ModuleType, t: Array) -> Array:
        t = xp.maximum(t, 1)
        return (t - 1) / (t + eta)

    # Π (t-1)/(t+η) = r(i) / r(j) with j = i + n and r(i) = Γ(i+k) / Γ(i), k = 1+η.
    # Γ(x+1) = x Γ(x) takes all arguments past 16, where Stirling's series errs by 2e-12.
    # In log r(j) - log r(i) the terms that do not vanish with n cancel, and are never
    # formed: all that is left is proportional to n.
    def stirling(z: Array) -> Array:
        return 1 / (12 * z) - 1 / (360 * z**3) + 1 / (1260 * z**5)

    def log_kept(xp: ModuleType, i: Array, n: Array) -> Array:
        k = 1 + eta

        def log_ratio(y: Array) -> Array:
            """log of (1 + k/(y+n)) / (1 + k/y)."""
            return xp.log1p(-k * n / ((y + k) * (y + n)))

        y = i + 16
        grown = k * xp.log1p(n / (y + k)) + n * xp.log1p(k / (y + n))
        grown = grown + (y - 0.5) * log_ratio(y)
        grown = grown + stirling(y + n + k) - stirling(y + k)
        grown = grown - stirling(y + n) + stirling(y)
        return sum(log_ratio(i + m) for m in range(16)) - grown

    name = f"polynomial_decay({eta})"
    return Decay(name, beta, complement, log_kept, of_time=True)


def power_decay(
    *, sigma_rel: float | None = None, gamma: float | None = None
) -> DecayFunction:
    """Weighs iterate i as i^γ: β(t) = (1 - 1/t)^(γ+1), the power-function average.

    σ_rel is the standard deviation of the weights' positions as a fraction of the run:

        σ_rel² = (γ+1) / ((γ+2)² (γ+3)).

    Args:
      sigma_rel: In (0, 0.2886...); 0.05 to 0.1 is common. γ is the root above 0.
      gamma: γ, greater than -1. Give exactly one of the two.

    Returns:
      A function t -> β. t <= 1 gives 0.

    Raises:
      ValueError: If none or both are given, or the value is out of range.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(power_decay(gamma=1.0)(2))
      0.25

    References:
      Karras et al., 2024, Analyzing and improving the training dynamics of diffusion
      models, §3.1 and appendix C, https://arxiv.org/abs/2312.02696
    """
    if (sigma_rel is None) == (gamma is None):
        raise ValueError(
            "power_decay: give exactly one of sigma_rel and gamma, got "
            f"sigma_rel={sigma_rel!r}, gamma={gamma!r}."
        )
    if gamma is None:
        gamma = gamma_of_sigma_rel("power_decay", sigma_rel)
        description = f"power_decay(sigma_rel={sigma_rel})"
    else:
        check_number("power_decay", "gamma", gamma, -1, above=True)
        description = f"power_decay(gamma={gamma})"
    exponent = gamma + 1

    def log_beta(xp: ModuleType, t: Array) -> Array:
        # `where` below computes both choices, and log1p(-1/t) is -inf or NaN for t <= 1.
        t = xp.maximum(t, 2)
        return exponent * xp.log1p(-1 / t)

    def beta(xp: ModuleType, t: Array) -> Array:
        return xp.where(t > 1, xp.exp(log_beta(xp, t)), 0.0)

    def complement(xp: ModuleType, t: Array) -> Array:
        return xp.where(t > 1, -xp.expm1(log_beta(xp, t)), 1.0)

    def log_kept(xp: ModuleType, i: Array, n: Array) -> Array:
        return -exponent * xp.log1p(n / i)

    return Decay(description, beta, complement, log_kept, of_time=True)


def inverse_gamma_decay(
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    *,
    min_decay: float = 0.0,
    max_decay: float = 0.9999,
) -> DecayFunction:
    """Rises as β(t) = 1 - (1 + t/inv_gamma)^-power, clipped to [min_decay, max_decay].

    Args:
      inv_gamma: The time scale of the rise in steps, greater than 0.
      power: How fast it rises: 2/3 for runs of a million steps and more, 3/4 for
        shorter ones.
      min_decay: The smallest β, in [0, 1].
      max_decay: The largest β, in [min_decay, 1].

    Returns:
      A function t -> β. t = 0 gives `min_decay`.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(inverse_gamma_decay(power=1.0)(3))
      0.75
    """
    name = "inverse_gamma_decay"
    check_number(name, "inv_gamma", inv_gamma, 0, above=True)
    check_number(name, "power", power, 0, above=True)
    check_number(name, "min_decay", min_decay, 0, 1)
    check_number(name, "max_decay", max_decay, min_decay, 1)

    def complement(xp: ModuleType, t: Array) -> Array:
        newest = xp.exp(-power * xp.log1p(t / inv_gamma))
        return xp.clip(newest, 1 - max_decay, 1 - min_decay)

    def beta(xp: ModuleType, t: Array) -> Array:
        return xp.clip(1 - complement(xp, t), min_decay, max_decay)

    return Decay(
        f"{name}({inv_gamma}, {power}, min_decay={min_decay}, max_decay={max_decay})",
        beta,
        complement,
    )


def half_life_decay(half_life: float, *, ramp: float | None = None) -> DecayFunction:
    """Halves an iterate's weight every `half_life` steps: β(t) = 0.5^(1/h).

    h is `half_life`. With `ramp` it is the smaller of `half_life` and ramp·t, so that
    early in the run the window is a fixed fraction of the steps so far.

    Args:
      half_life: In steps, greater than 0; of an average with clock="examples", in
        examples. With a ramp, math.inf keeps the fraction fixed to the end.
      ramp: The half-life as a fraction of the steps so far, greater than 0; 0.05 is
        common. None for none.

    Returns:
      A function t -> β. With `ramp`, t = 0 gives 0.

    Raises:
      ValueError: If an argument is not greater than 0.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(half_life_decay(1)(100))
      0.5
    """
    check_number("half_life_decay", "half_life", half_life, 0, above=True)
    if ramp is not None:
        check_number("half_life_decay", "ramp", ramp, 0, above=True)

    def exponent(xp: ModuleType, t: Array) -> Array:
        if ramp is None:
            return xp.full_like(t, -math.log(2) / half_life)
        # At t = 0 the half-life is 0 and β is 0. The least half-life keeps the division
        # finite; exp(-1000) is 0 in float64, too.
        tiny = xp.finfo(t.dtype).tiny
        return xp.maximum(-math.log(2) / xp.clip(ramp * t, tiny, half_life), -1e3)

    # With a ramp, h grows up to the step `reached`. Σ 1/t over the steps of it is a
    # difference of ψ(t+1); ψ(x+1) = ψ(x) + 1/x takes both past 16, where the series about
    # t + 1/2 errs by 1e-13. Each term of the difference is proportional to n.
    reached = half_life / ramp if ramp else math.inf
    reached = float(math.floor(reached)) if reached < math.inf else reached

    def series(m: Array) -> Array:
        return 1 / (24 * m**2) - 7 / (960 * m**4) + 31 / (8064 * m**6)

    def log_kept(xp: ModuleType, i: Array, n: Array) -> Array:
        if ramp is None:
            return n * (-math.log(2) / half_life)
        rest = xp.where(i >= reached, n, xp.maximum(i + n - reached, 0))
        n = n - rest
        i = xp.minimum(i, reached)
        m = i + 16.5
        harmonic = xp.log1p(n / m) + series(m + n) - series(m)
        harmonic = harmonic + sum(n / ((i + k) * (i + n + k)) for k in range(1, 17))
        return -math.log(2) * (harmonic / ramp + rest / half_life)

    return Decay(
        f"half_life_decay({half_life}" + (f", ramp={ramp})" if ramp else ")"),
        lambda xp, t: xp.exp(exponent(xp, t)),
        lambda xp, t: -xp.expm1(exponent(xp, t)),
        log_kept,
        (reached,) if reached < math.inf else (),
        of_time=True,
    )


def scale_decay(decay: DecayLike, batch_factor: float) -> DecayFunction:
    """Adapts a decay to a batch κ times larger: β(t)^κ, the EMA scaling rule.

    A run with κ times the batch takes κ times fewer steps; β^κ keeps the window the same
    in examples.

    Args:
      decay: The decay that suits the original batch.
      batch_factor: κ, new batch over original batch, greater than 0.

    Returns:
      A function t -> β.

    Raises:
      ValueError: If `batch_factor` is not greater than 0.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(f"{scale_decay(0.99, 2)(1):.4f}")
      0.9801

    References:
      Busbridge et al., 2023, How to scale your EMA, definition 1.2,
      https://arxiv.org/abs/2307.13813
    """
    check_decay("scale_decay", decay)
    check_number("scale_decay", "batch_factor", batch_factor, 0, above=True)

    # β^κ = exp(κ log1p(-(1 - β))), from the decay's own 1 - β. Where β is 0 the exponent
    # would be -inf: these steps are told apart and get β^κ = 0 directly.
    def log_beta(xp: ModuleType, t: Any) -> tuple[Array, Array]:
        # The decay is given whole steps, as in an average, not t as floating point.
        steps = t.astype(np.int32)
        newest = evaluate(decay, steps) if xp is np else one_minus(decay, steps)
        newest = xp.asarray(newest, dtype=t.dtype)
        copies = newest >= 1
        safe = xp.where(copies, 0.0, newest)
        return copies, batch_factor * xp.log1p(-safe) + xp.zeros_like(t)

    def beta(xp: ModuleType, t: Array) -> Array:
        copies, exponent = log_beta(xp, t)
        return xp.where(copies, 0.0, xp.exp(exponent))

    def complement(xp: ModuleType, t: Array) -> Array:
        copies, exponent = log_beta(xp, t)
        return xp.where(copies, 1.0, -xp.expm1(exponent))

    return Decay(f"scale_decay({decay}, {batch_factor})", beta, complement)
