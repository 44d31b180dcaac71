"""Averages that stand in for a decay of the learning rate."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._checks import check_callable, check_integer, check_number
from emaopt._decay_type import Array, Decay
from emaopt._decays import DecayFunction
from emaopt._sums import Profile, sums_of
from emaopt._weights import WeightSummary, check_num_steps

SHAPES: dict[str, Callable[[ModuleType, Array], Array]] = {  # w(x), x in [0, 1]
    "linear": lambda xp, x: 1 - x,
    "cosine": lambda xp, x: (1 + xp.cos(np.pi * x)) / 2,
    "1-sqrt": lambda xp, x: 1 - xp.sqrt(x),
}

# The name of a shape, or a schedule of Optax's: a function of the step, from 0 on.
Shape: TypeAlias = str | Callable[[Any], Any]

_LOOKED_AT = 1 << 20  # steps of a schedule that are looked at together


def annealing_weights(shape: Shape, num_steps: int, fraction: float = 1.0) -> np.ndarray:
    """Returns the profile that stands in for a decay of the learning rate.

    Had the learning rate of the last steps been multiplied by w_t, falling from 1 to 0,
    and had the gradients stayed what they were, the run would have ended at

        θ_0 + Σ_t w_t (θ_t - θ_{t-1}) = Σ_t (w_t - w_{t+1}) θ_t,    w_0 = 1, w_{T+1} = 0.

    Of the shapes known by name, w is a function of x, the position of the middle of the
    step within the last `fraction` of the run, from 0 to 1: "linear" is 1 - x, "cosine"
    (1 + cos πx)/2, "1-sqrt" 1 - √x. "linear" makes the plain mean of the last iterates.
    Of a schedule, w_t = schedule(t-1) / schedule(0), with t counted from where the last
    `fraction` begins.

    Args:
      shape: "linear", "cosine" or "1-sqrt", or any Optax schedule, such as
        `optax.cosine_decay_schedule(1.0, num_steps)`. Where a schedule rises, weights are
        negative.
      num_steps: T, at least 1.
      fraction: The part of the run over which the learning rate decays, in (0, 1].
        Default 1.

    Returns:
      float64 [T+1], sum 1.

    Raises:
      ValueError: If an argument is out of its range, or a schedule is not finite, or does
        not begin above 0.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(annealing_weights("linear", 10, 0.2).round(3))
      [0.   0.   0.   0.   0.   0.   0.   0.   0.25 0.5  0.25]
      >>> import optax
      >>> print(annealing_weights(optax.linear_schedule(1.0, 0.0, 4), 4))
      [0.   0.25 0.25 0.25 0.25]

    References:
      Tian et al., 2025, WSM: decay-free learning rate schedule via checkpoint merging,
      https://arxiv.org/abs/2507.17634
      Hägele et al., 2024, Scaling laws and compute-optimal training beyond fixed training
      durations, §3, https://arxiv.org/abs/2405.18392 (1-sqrt)
    """
    name = "annealing_weights"
    check_num_steps(name, num_steps, 1)
    kept = _kept(name, shape, num_steps, fraction)
    w = kept(np, np.arange(1, num_steps + 1))
    _check_values(name, shape, w)
    w = np.concatenate([[1.0], w, [0.0]])
    return w[:-1] - w[1:]


def annealing_decay(shape: Shape, num_steps: int, fraction: float = 1.0) -> DecayFunction:
    """Ends at what `posthoc.annealing_weights` would make of all iterates of the run.

    With c_t the weights of that profile, the average takes 1 - β(t) = c_t / Σ_{i<=t} c_i
    of the newest iterate: it always is the profile so far, scaled to sum 1, and after T
    steps it is the profile itself. So a run at a constant learning rate ends with the
    weights that merging its checkpoints would give, and keeps none. Later steps leave the
    average as it is.

    Before the end it is an average of a shorter tail, with no meaning of its own. For a
    merge at several lengths, keep one such average for each.

    Args:
      shape: "linear", "cosine", "1-sqrt" or an Optax schedule that does not rise, which
        counts steps from where the last `fraction` begins.
      num_steps: T, the number of updates of the run after `start`.
      fraction: The part of the run over which the learning rate decays, in (0, 1].

    Returns:
      A function t -> β. Before the decay begins it is 0: the average is a copy.

    Raises:
      ValueError: As `annealing_weights` does, or if a schedule rises or falls below 0.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(annealing_decay("linear", 10, 0.2)(10))
      0.75
      >>> import optax
      >>> schedule = optax.linear_schedule(1.0, 0.0, 2)  # of the last 20 % of 10 steps
      >>> print(annealing_decay(schedule, 10, 0.2)(10))
      0.5

    References:
      Tian et al., 2025, WSM: decay-free learning rate schedule via checkpoint merging,
      https://arxiv.org/abs/2507.17634
    """
    name = "annealing_decay"
    check_integer(name, "num_steps", num_steps, 1)
    kept = _kept(name, shape, num_steps, fraction)
    if callable(shape):
        last = np.ones(1)
        for first in range(1, num_steps + 1, _LOOKED_AT):
            steps = np.arange(first, min(first + _LOOKED_AT, num_steps + 1))
            w = np.append(last, kept(np, steps))
            _check_values(name, shape, w)
            # Rounded to float32, a schedule may rise by a unit in the last place.
            if w[-1] < 0 or np.any(np.diff(w) > 1e-6):
                raise ValueError(
                    f"{name}: the schedule must fall from its first value on, and not "
                    f"below 0: the average would need negative weights; {shape!r} does "
                    "not. posthoc.annealing_weights takes it."
                )
            last = w[-1:]

    def newer(xp: ModuleType, t: Array) -> Array:
        """w_{t+1}, the weight of all iterates after t."""
        return xp.where(t < num_steps, kept(xp, t + 1), 0.0)

    def complement(xp: ModuleType, t: Array) -> Array:
        # Of equal roundings of w in both places: products of β are exact to 1e-7, though
        # single shares late in a long run are not.
        later = newer(xp, t)
        own = xp.where(t < 1, 1.0, newer(xp, t - 1)) - later
        share = xp.where(later < 1, own / xp.where(later < 1, 1 - later, 1.0), 1.0)
        return xp.where(t > num_steps, 0.0, xp.clip(share, 0.0, 1.0))

    def log_kept(xp: ModuleType, i: Array, n: Array) -> Array:
        begun, end = newer(xp, i), newer(xp, xp.minimum(i + n, num_steps))
        known = xp.log1p(-begun) - xp.log1p(-xp.where(end < 1, end, 0.0))
        return xp.where(n > 0, xp.where(end < 1, known, -math.inf), 0.0)

    return Decay(
        f"{name}({shape!r}, {num_steps}, {fraction})",
        lambda xp, t: 1 - complement(xp, t),
        complement,
        None if callable(shape) else log_kept,
        _kinks(num_steps, fraction),
        of_whole_steps=True,
    )


def window_decay(num_steps: int) -> DecayFunction:
    """Gives the last k iterates the same weight, exactly after each k-th step: LAWA.

    β(t) = j/(j+1) with j = (t-1) mod k: a uniform average that begins anew every k steps.
    After t = k, 2k, ... it is the mean of the last k iterates; in between it is the mean
    of those since then, fewer than k. So save and evaluate on multiples of k. A window
    that is exact after every step would need k copies of the parameters. With `every=n`
    it is the mean of the newest k/n of every n-th iterate; let n divide k.

    Args:
      num_steps: k, at least 1.

    Returns:
      A function t -> β. t <= 1 gives 0.

    Raises:
      ValueError: If `num_steps` is below 1.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(window_decay(3)(6), window_decay(3)(7))
      0.6666667 0.0

    References:
      Kaddour, 2022, Stop wasting my time! Saving days of ImageNet and BERT training with
      latest weight averaging, https://arxiv.org/abs/2209.14981
    """
    check_integer("window_decay", "num_steps", num_steps, 1)

    def older(xp: ModuleType, t: Array) -> Array:
        return xp.maximum(t - 1, 0) % num_steps

    return Decay(
        f"window_decay({num_steps})",
        lambda xp, t: older(xp, t) / (older(xp, t) + 1),
        lambda xp, t: 1 / (older(xp, t) + 1),
        of_whole_steps=True,
    )


def annealing_profile(shape: str, num_steps: int, fraction: float) -> Profile:
    """`annealing_weights` without the array of weights."""
    kept = _kept("annealing_weights", shape, num_steps, fraction)
    # θ_0 ... θ_i weigh 1 - w_{i+1} together.
    return Profile(
        num_steps,
        lambda i: np.log1p(-kept(np, i + 1)),
        lambda i: np.asarray(kept(np, i) - kept(np, i + 1)),
        _kinks(num_steps, fraction),
    )


def annealing_summary(shape: str, num_steps: int, fraction: float) -> WeightSummary:
    """`weight_summary` of `annealing_weights`."""
    return WeightSummary(*sums_of(annealing_profile(shape, num_steps, fraction), False))


def _kinks(num_steps: int, fraction: float) -> tuple[float, ...]:
    """The i around which w_i - w_{i+1} is not smooth: within one step of either end."""
    first = num_steps * (1 - fraction)  # where w begins to fall
    return (first - 1, first, first + 1, num_steps - 1)


def _kept(
    function: str, shape: Shape, num_steps: int, fraction: float
) -> Callable[[ModuleType, Array], Array]:
    """w as a function of the step, from 1 on."""
    check_number(function, "fraction", fraction, 0, 1, above=True)
    if isinstance(shape, str) and shape in SHAPES:

        def of_shape(xp: ModuleType, step: Array) -> Array:
            # From what is left, a whole number: of two large floats XLA folds the
            # constants, and a long run would never move.
            x = 1 - (num_steps - step + 0.5) / (fraction * num_steps)
            return SHAPES[shape](xp, xp.clip(x, 0, 1))

        return of_shape
    if not callable(shape):
        raise ValueError(
            f"{function}: shape must be one of {', '.join(SHAPES)}, or a schedule, got "
            f"{shape!r}."
        )
    check_callable(function, "shape", shape, 1)
    schedule: Callable[[Any], Any] = shape
    first = round(num_steps * (1 - fraction))

    def on_host(count: np.ndarray) -> np.ndarray:
        # In float64, for differences of neighbours. Arrays of its own keep a schedule in
        # float32.
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            try:
                values = jax.vmap(schedule)(jnp.asarray(count, jnp.int32))
            except jax.errors.JAXTypeError as error:
                raise TypeError(
                    f"{function}: the schedule must be one that JAX can trace, as "
                    f"optax.cosine_decay_schedule returns it; {shape!r} is not: {error}"
                ) from None
            real = np.issubdtype(getattr(values, "dtype", None), np.floating)
            if not real or values.shape != count.shape:
                raise TypeError(
                    f"{function}: the schedule must return a floating scalar, {shape!r} "
                    f"returns {jax.tree.map(jnp.shape, values)}."
                )
            return np.asarray(values, np.float64)

    initial = on_host(np.zeros(1))[0]
    if not 0 < initial < math.inf:
        raise ValueError(
            f"{function}: the schedule must begin above 0, {shape!r} is {initial} at 0. "
            "Of a schedule with a warm-up, give the part behind it."
        )

    def of_schedule(xp: ModuleType, step: Array) -> Array:
        if xp is np:
            return on_host(np.maximum(step - 1 - first, 0)) / initial
        # What Optax gives a schedule: a scalar int32 of JAX's.
        count = jnp.maximum(jnp.asarray(step, jnp.int32) - 1 - first, 0)
        return jnp.asarray(schedule(count)) / initial

    return of_schedule


def _check_values(function: str, shape: Shape, w: Array) -> None:
    if not np.isfinite(w).all():
        raise ValueError(f"{function}: the schedule must be finite, {shape!r} is not.")
