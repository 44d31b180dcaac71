"""The weights that a decay implies: which iterates an average is made of."""

from typing import Any, NamedTuple

import numpy as np

from emaopt._checks import check_decay, check_integer
from emaopt._decays import DecayLike, evaluate


def decay_weights(
    decay: DecayLike,
    num_steps: int,
    *,
    every: int = 1,
    start: int = 0,
    debias: bool = False,
) -> np.ndarray:
    """Returns the weight of each iterate in the average after `num_steps` steps.

    The average is Σ_i w_i θ_i over the initial θ_0 and the iterates θ_1 ... θ_T. The
    arguments mean what they mean in `average_params`.

    Args:
      decay: A constant β or a function t -> β.
      num_steps: T, at least 0.
      every: The average is updated on every k-th step only, at least 1.
      start: The step until which the average is a copy of the parameters, at least 0.
      debias: Whether what came before `start` is forgotten.

    Returns:
      float64 NumPy array of shape [T+1]; non-negative, sum 1. With `zero_init` the first
      entry is the weight of the zeros instead.

    Raises:
      ValueError, TypeError: If an argument is out of its range.

    Example:
      >>> print(decay_weights(0.5, 3))
      [0.125 0.125 0.25  0.5  ]
    """
    taken = shares_taken(
        "decay_weights", decay, num_steps, every=every, start=start, debias=debias
    )
    kept = np.cumprod((1 - taken)[::-1])[::-1]  # [T+1], of what there was before step i
    return taken * np.append(kept[1:], 1.0)


def shares_taken(
    name: str, decay: DecayLike, num_steps: int, *, every: int, start: int, debias: bool
) -> np.ndarray:
    """The share of each new iterate in the average when it comes, float64 [T+1].

    θ_0 takes all. The weight of iterate i is its share times what later ones leave of it.
    """
    check_decay(name, decay)
    check_integer(name, "num_steps", num_steps, 0)
    check_integer(name, "every", every, 1)
    check_integer(name, "start", start, 0)

    steps = np.arange(1, num_steps + 1)
    t = np.maximum(steps - start, 0)
    newest = evaluate(decay, t)
    if num_steps and not (newest.min() >= 0 and newest.max() <= 1):
        low, high = 1 - newest.max(), 1 - newest.min()
        raise ValueError(
            f"{name}: decay must stay in [0, 1], {decay!r} goes from {low:.6g} to "
            f"{high:.6g}."
        )
    # The recursion of the average itself, on its scalars: `taken` is the share of the new
    # value at each step, `total` the weight so far, `pending` what the steps since the
    # last update have taken together.
    taken = np.zeros(num_steps + 1)
    taken[0] = 1.0
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
    """What a weight profile amounts to; see `weight_summary`."""

    mean_age: float  # steps before the newest iterate
    effective_iterates: float  # 1/Σw²: as many equal weights have the same variance
    initial_weight: float  # weight of θ_0
    half_life: float  # steps; the iterates younger than this hold half the weight


def weight_summary(weights: Any) -> WeightSummary:
    """Sums up a weight profile in four numbers.

    Args:
      weights: float [T+1], as `decay_weights` returns them: oldest first, sum 1.

    Returns:
      A `WeightSummary`: mean age in steps, effective number of iterates 1/Σw², weight of
      θ_0, half-life in steps (linear between whole steps).

    Raises:
      ValueError: If `weights` is not a non-empty vector with sum 1.

    Example:
      >>> print(f"{weight_summary(decay_weights(0.99, 10_000)).mean_age:.1f}")
      99.0
    """
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


def checked_weights(function: str, weights: Any) -> np.ndarray:
    """The weights as float64 [T+1], or an error."""
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1 or weights.size == 0 or not np.isclose(weights.sum(), 1):
        raise ValueError(
            f"{function}: weights must be a vector [T+1] with sum 1, such as "
            f"decay_weights(0.99, 1000), got shape {weights.shape} with sum "
            f"{weights.sum()}."
        )
    return weights
