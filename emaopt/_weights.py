"""The weights that a decay implies: which iterates an average is made of."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from emaopt._checks import check_decay, check_flag, check_integer
from emaopt._clock import by_time, checked_units
from emaopt._decay_type import evaluate, log_kept_of, until
from emaopt._sums import Profile, sums_of
from emaopt._types import DecayLike, Vector

MOST = 1 << 25  # steps; no array is made for a longer run


def decay_weights(
    decay: DecayLike,
    num_steps: int,
    *,
    every: int = 1,
    start: int = 0,
    debias: bool = False,
    units: Vector | None = None,
) -> np.ndarray:
    """Returns the weight of each iterate in the average after `num_steps` steps.

    The average is Σ_i w_i θ_i over the initial θ_0 and the iterates θ_1 ... θ_T. The
    arguments have the same meaning as in `average_params`.

    Args:
      decay: A constant β or a function t -> β.
      num_steps: T, at least 0, at most 2^25, because the result is an array [T+1].
        `weight_summary(decay, num_steps)` needs no array for most decays.
      every: The average is updated on every k-th step only, at least 1.
      start: The first step to average; before it the average is a copy. At least 0.
      debias: Whether the weight of what came before `start` is removed.
      units: Of an average with a `clock`: how many units each step took, float [T]. The
        decay then is one of these. None: of steps.

    Returns:
      float64 NumPy array of shape [T+1]; non-negative, sum 1. With `zero_init` the first
      entry is the weight of the zeros instead.

    Raises:
      ValueError, TypeError: If an argument is out of its range.

    Example:
      >>> print(decay_weights(0.5, 3))
      [0.125 0.125 0.25  0.5  ]
    """
    return weights_of_shares(
        shares_taken(
            "decay_weights",
            decay,
            num_steps,
            every=every,
            start=start,
            debias=debias,
            units=units,
        )
    )


def weights_of_shares(taken: np.ndarray) -> np.ndarray:
    """The weight of each iterate, [T+1], from `shares_taken`."""
    # kept[i] is the fraction that steps i ... T keep of what there was before step i.
    kept = np.cumprod((1 - taken)[::-1])[::-1]
    return taken * np.append(kept[1:], 1.0)


def check_num_steps(function: str, num_steps: int, low: int) -> None:
    """Raises unless `num_steps` is whole, and small enough for an array of the steps."""
    check_integer(function, "num_steps", num_steps, low, most=1 << 53)
    if num_steps > MOST:
        raise ValueError(
            f"{function}: num_steps must be at most {MOST}, of which an array is made, "
            f"got {num_steps}. emaopt.weight_summary(decay, num_steps) sums a longer run "
            "up; for its weights, count in longer steps."
        )


def shares_taken(
    name: str,
    decay: DecayLike,
    num_steps: int,
    *,
    every: int,
    start: int,
    debias: bool,
    units: Vector | None = None,
) -> np.ndarray:
    """The share of the average that each new iterate takes at its step, float64 [T+1].

    θ_0 takes all. The weight of iterate i is its share times Π (1 - share) over the later
    iterates.
    """
    check_decay(name, decay)
    check_num_steps(name, num_steps, 0)
    check_integer(name, "every", every, 1)
    check_integer(name, "start", start, 0)
    check_flag(name, "debias", debias)

    steps = np.arange(1, num_steps + 1)
    if units is None:
        newest = evaluate(decay, np.maximum(steps - start, 0))
    else:
        newest = by_time(name, decay, start, checked_units(name, units, num_steps))
    # Written so that NaN fails it, too.
    if num_steps and not (newest.min() >= 0 and newest.max() <= 1):
        low, high = 1 - newest.max(), 1 - newest.min()
        raise ValueError(
            f"{name}: decay must stay in [0, 1], {decay!r} goes from {low:.6g} to "
            f"{high:.6g}."
        )
    # The recursion of the average itself, on its scalars: `taken` is the share of the new
    # iterate at each step, `total` the weight of all iterates so far, and `pending` is
    # 1 - Πβ over the steps since the average last moved.
    taken = np.zeros(num_steps + 1)
    taken[0] = 1.0
    # The usual case needs no loop: no step depends on another.
    if every == 1 and not debias:
        taken[1:] = np.where(steps < start, 1.0, newest)
        return taken
    total, pending = float(not debias), 0.0
    for i, step in enumerate(steps, 1):
        if step < start:
            taken[i] = 1.0
            continue
        pending += newest[i - 1] * (1 - pending)
        if (step - start) % every == 0:
            total += pending * (1 - total)
            taken[i] = pending / total if total > 0 else 0.0
            pending = 0.0
    return taken


class WeightSummary(NamedTuple):
    """Four numbers that describe a weight profile; see `weight_summary`.

    mean_age: steps before the newest iterate. effective_iterates: 1/Σw², as many equal
    weights have the same variance. initial_weight: that of θ_0. half_life: the iterates
    younger than this, in steps, hold half the weight.
    """

    mean_age: float
    effective_iterates: float
    initial_weight: float
    half_life: float


def weight_summary(
    weights: Vector | DecayLike,
    num_steps: int | None = None,
    *,
    debias: bool = False,
) -> WeightSummary:
    """Sums up a weight profile in four numbers.

    The profile of a decay after `num_steps` steps is summed up without an array of its
    weights, so that neither time nor memory grows with T: the products Πβ have closed
    forms, and Gauss' rule for sums adds them over dyadic blocks of steps. The relative
    error is below 1e-6; for `warmup_decay`, whose β is rounded to float32 at every step,
    below 1e-3.

    Args:
      weights: float [T+1], as `decay_weights` returns them: oldest first, sum 1. Or a
        decay, with `num_steps`: a constant, or what `warmup_decay` (up to 0.99999),
        `uniform_decay`, `polynomial_decay`, `power_decay` or `half_life_decay` returns.
        Other decays have no closed form, and T is at most 2^25.
      num_steps: T, if `weights` is a decay; else None. For an average with a `clock`, the
        time in its units, up to 2^53; ages then are in units, too.
      debias: As for `decay_weights`, if `weights` is a decay.

    Returns:
      A `WeightSummary`: mean age in steps, effective number of iterates 1/Σw², weight of
      θ_0, half-life in steps (linear between whole steps).

    Raises:
      ValueError, TypeError: If `weights` is not a non-empty vector with sum 1, or, with
        `num_steps`, not a decay.

    Example:
      >>> print(f"{weight_summary(decay_weights(0.99, 10_000)).mean_age:.1f}")
      99.0
      >>> print(f"{weight_summary(0.99, 2**31 - 1).mean_age:.1f}")
      99.0
    """
    check_flag("weight_summary", "debias", debias)
    if num_steps is not None:
        return _decay_summary(weights, num_steps, debias)
    weights = checked_weights("weight_summary", weights)
    ages = np.arange(weights.size)
    by_age = weights[::-1]
    younger = np.append(0.0, np.cumsum(by_age))  # weight of the iterates of age < n
    return WeightSummary(
        mean_age=float(by_age @ ages),
        effective_iterates=float(1 / np.sum(weights**2)),
        initial_weight=float(weights[0]),
        half_life=float(np.interp(0.5, younger, np.append(ages, ages.size))),
    )


def _decay_summary(decay: Any, num_steps: int, debias: bool) -> WeightSummary:
    check_decay("weight_summary", decay)
    log_kept = log_kept_of(decay)
    check_integer("weight_summary", "num_steps", num_steps, 0, most=1 << 53)
    # A `Profile` has one step at least.
    if log_kept is None or num_steps == 0:
        taken = shares_taken(
            "weight_summary", decay, num_steps, every=1, start=0, debias=debias
        )
        return weight_summary(weights_of_shares(taken))
    breaks = getattr(decay, "breaks", ())
    log_older = until(log_kept, num_steps)

    def weights(i: np.ndarray) -> np.ndarray:
        return evaluate(decay, i) * np.exp(log_older(i))

    profile = Profile(num_steps, log_older, weights, breaks)
    return WeightSummary(*sums_of(profile, debias))


def checked_weights(function: str, weights: Any, argument: str = "weights") -> np.ndarray:
    """The weights as float64 [T+1], or an error."""
    given = weights
    try:
        weights = np.asarray(given)
        numbers = weights.dtype.kind in "iu"
        numbers = numbers or jnp.issubdtype(weights.dtype, jnp.floating)
        weights = weights.astype(np.float64) if numbers else weights
    except (ValueError, TypeError):  # ragged, say
        numbers = False
    if not numbers:
        raise TypeError(
            f"{function}: {argument} must be a vector of numbers, got {given!r}."
        )
    if weights.ndim != 1 or weights.size == 0 or not np.isclose(weights.sum(), 1):
        raise ValueError(
            f"{function}: {argument} must be a vector [T+1] with sum 1, such as "
            f"decay_weights(0.99, 1000), got shape {weights.shape} with sum "
            f"{weights.sum()}."
            + (" Of a decay, give num_steps." if function == "weight_summary" else "")
        )
    return weights
