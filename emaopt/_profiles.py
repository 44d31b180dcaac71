"""Profiles by name, and the weights that they give to the checkpoints of a run."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jax.typing import ArrayLike

from emaopt._advice import advised
from emaopt._checks import check_decay, check_number
from emaopt._decay_type import evaluate, log_kept_of
from emaopt._decays import (
    half_life_decay,
    polynomial_decay,
    power_decay,
    uniform_decay,
    warmup_decay,
)
from emaopt._sums import Profile, shared_out, sums_of
from emaopt._types import DecayLike
from emaopt._weights import (
    WeightSummary,
    check_num_steps,
    checked_weights,
    decay_weights,
    weight_summary,
)

SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # w(x), x in [0, 1]
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
}

LONG = 1 << 20  # steps; for a longer run no array of them is made
_DRAWN = 2000  # steps of a long run to draw, from each end

T = TypeVar("T")


class BadProfile(ValueError):
    """A string that names no profile; the message lists those that do."""


def annealing_weights(shape: str, num_steps: int, fraction: float) -> np.ndarray:
    """Returns the profile that stands in for a decay of the learning rate.

    Had the learning rate of the last steps been multiplied by w_t, falling from 1 to 0,
    and had the gradients stayed what they were, the run would have ended at

        θ_0 + Σ_t w_t (θ_t - θ_{t-1}) = Σ_t (w_t - w_{t+1}) θ_t,    w_0 = 1, w_{T+1} = 0.

    w is a function of x, the position of the step within the last `fraction` of the run,
    from 0 to 1: "linear" is 1 - x, "cosine" (1 + cos πx)/2, "1-sqrt" 1 - √x. "linear"
    makes the plain mean of the last iterates.

    Args:
      shape: "linear", "cosine" or "1-sqrt".
      num_steps: T, at least 1.
      fraction: The part of the run over which the learning rate decays, in (0, 1].

    Returns:
      float64 [T+1], sum 1.

    Raises:
      ValueError, TypeError: If an argument is out of its range.

    Example:
      >>> print(annealing_weights("linear", 10, 0.2).round(3))
      [0.   0.   0.   0.   0.   0.   0.   0.   0.25 0.5  0.25]

    References:
      Tian et al., 2025, WSM: decay-free learning rate schedule via checkpoint merging,
      https://arxiv.org/abs/2507.17634
      Hägele et al., 2024, Scaling laws and compute-optimal training beyond fixed training
      durations, §3, https://arxiv.org/abs/2405.18392 (1-sqrt)
    """
    if not isinstance(shape, str) or shape not in SHAPES:
        raise ValueError(
            f"annealing_weights: shape must be one of {', '.join(SHAPES)}, got {shape!r}."
        )
    check_num_steps("annealing_weights", num_steps, 1)
    check_number("annealing_weights", "fraction", fraction, 0, 1, above=True)
    kept = _kept(shape, np.arange(1.0, num_steps + 1), num_steps, fraction)
    kept = np.concatenate([[1.0], kept, [0.0]])
    return kept[:-1] - kept[1:]


def _kept(shape: str, step: np.ndarray, num_steps: int, fraction: float) -> np.ndarray:
    """w at the middle of each step."""
    x = (step - 0.5 - num_steps) / (fraction * num_steps) + 1
    return SHAPES[shape](np.clip(x, 0, 1))


def _annealing(shape: str, num_steps: int, fraction: float) -> Profile:
    """`annealing_weights` without the array of weights."""
    check_number("annealing_weights", "fraction", fraction, 0, 1, above=True)

    # θ_0 ... θ_i weigh 1 - w_{i+1} together.
    def kept(step: np.ndarray) -> np.ndarray:
        return _kept(shape, step, num_steps, fraction)

    first = num_steps * (1 - fraction)  # where w begins to fall
    # Within one step of either end of the decay, w_i - w_{i+1} is not smooth in i.
    kinks = (first - 1, first, first + 1, num_steps - 1)
    return Profile(
        num_steps,
        lambda i: np.log1p(-kept(i + 1)),
        lambda i: kept(i) - kept(i + 1),
        kinks,
    )


def _annealing_summary(shape: str, num_steps: int, fraction: float) -> WeightSummary:
    return WeightSummary(*sums_of(_annealing(shape, num_steps, fraction), False))


def _averaging(decay: DecayLike, num_steps: int) -> Profile | None:
    """`decay_weights` without the array of weights; None without a closed form."""
    if (log_kept := log_kept_of(decay)) is None:
        return None
    return Profile(
        num_steps,
        lambda i: log_kept(i, num_steps),
        lambda i: evaluate(decay, i) * np.exp(log_kept(i, num_steps)),
        getattr(decay, "breaks", ()),
    )


def checkpoint_weights(
    weights: ArrayLike | Sequence[float], steps: ArrayLike | Sequence[int]
) -> np.ndarray:
    """Returns weights of a few checkpoints that stand for a profile of all steps.

    Iterates between two checkpoints are taken to lie on the line that joins them, and
    iterates before the first one to equal it. So the weight of an iterate is split
    between its two neighbours, linearly, and the nearer one gets more.

    Args:
      weights: float [T+1], sum 1.
      steps: int [n], increasing, the last one T.

    Returns:
      float64 [n], sum 1.

    Raises:
      ValueError: If the steps do not increase up to T.

    Example:
      >>> print(checkpoint_weights([0.2, 0.2, 0.2, 0.2, 0.2], [2, 4]))
      [0.7 0.3]
    """
    weights = checked_weights("checkpoint_weights", weights)
    steps = np.asarray(steps)
    last = weights.size - 1
    if steps.ndim != 1 or not steps.size or np.any(np.diff(steps) <= 0):
        raise ValueError(f"checkpoint_weights: steps must increase, got {steps}.")
    if steps[0] < 0 or steps[-1] != last:
        raise ValueError(
            f"checkpoint_weights: steps must go up to {last}, the last of the profile, "
            f"got {steps}."
        )
    # The position of each iterate among the checkpoints: 2.25 is between the third and
    # the fourth. np.interp puts those before the first at 0.
    position = np.interp(np.arange(last + 1), steps, np.arange(steps.size))
    # The last iterate is at the last checkpoint, which has no neighbour after it.
    before = np.minimum(position.astype(int), max(steps.size - 2, 0))
    share = position - before
    found = np.bincount(before, weights * (1 - share), minlength=steps.size)
    if steps.size > 1:
        found += np.bincount(before + 1, weights * share, minlength=steps.size)
    return found


# Name -> (function that makes the decay, symbol or unit of its argument)
_DECAYS: dict[str, tuple[Callable[..., DecayLike], str]] = {
    "ema": (lambda beta: beta, "β"),
    "half-life": (half_life_decay, "steps"),
    "polynomial": (polynomial_decay, "η"),
    "power": (lambda sigma_rel: power_decay(sigma_rel=sigma_rel), "σ_rel"),
    "uniform": (uniform_decay, ""),
    "warmup": (warmup_decay, "β"),
}


def decay_of(spec: str, others: Sequence[str] = ()) -> DecayLike:
    """The decay that a string names: "ema:0.999" or "0.999", "power:0.1", "uniform" ...

    Raises:
      BadProfile: If it names none; the message lists the known names, and `others`.
    """
    name, _, argument = spec.partition(":")
    if name not in _DECAYS and not argument and _is_number(name):
        name, argument = "ema", name
    if name not in _DECAYS or (argument != "") != (_DECAYS[name][1] != ""):
        known = [f"{n}:{what}" if what else n for n, (_, what) in _DECAYS.items()]
        kind = "profile" if others else "decay"
        raise BadProfile(
            f"{spec!r} is no {kind}: take one of {', '.join([*known, *others])}."
        )
    if not argument:
        return _DECAYS[name][0]()
    if not _is_number(argument):
        raise BadProfile(f"{spec!r}: {argument!r} is not a number.")
    try:
        decay = _DECAYS[name][0](float(argument))
        check_decay(spec, decay)
    except ValueError as error:
        raise BadProfile(f"{spec!r} is no decay: {error}") from None
    return decay


def says_decay(name: str) -> bool:
    """Whether the name of an average names its decay, as "power:0.1" but not "0.1"."""
    # `optax.chain` names its members by numbers: "0" is a position, not a β.
    try:
        return ":" in name and decay_of(name) is not None
    except BadProfile:
        return False


def weights_of(spec: str, num_steps: int) -> np.ndarray:
    """The weight of every iterate, [T+1], in a decay's average or in an annealing."""
    return _of(spec, num_steps, decay_weights, annealing_weights)


def summary_of(spec: str, num_steps: int) -> WeightSummary:
    """The summary of `weights_of`, for a run of any length."""
    weights_of(spec, 1)  # raises unless `spec` names a profile
    return _of(spec, num_steps, weight_summary, _annealing_summary)


def profile_of(spec: str, num_steps: int) -> Profile | None:
    """`weights_of` without the array of weights; None without a closed form."""
    return _of(spec, num_steps, _averaging, _annealing)


def curve_of(spec: str, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps to draw and their weights: all steps, or a few thousand of a long run."""
    profile = profile_of(spec, num_steps) if num_steps > LONG else None
    if profile is None:
        return np.arange(num_steps + 1), weights_of(spec, num_steps)
    ends = np.geomspace(1, num_steps, _DRAWN)  # many near both ends of the run
    steps = np.unique(np.rint(np.concatenate([ends, num_steps + 1 - ends])))
    with np.errstate(divide="ignore", under="ignore"):
        return steps, profile.weights(steps)


def _of(
    spec: str,
    num_steps: int,
    of_decay: Callable[[DecayLike, int], T],
    of_annealing: Callable[[str, int, float], T],
) -> T:
    """The result of one of two functions for the decay or annealing that `spec` names."""
    shape, _, fraction = spec.partition(":")
    others = [f"{shape}:fraction" for shape in SHAPES]
    if shape in SHAPES and not _is_number(fraction):
        raise BadProfile(
            f"{spec!r}: say which fraction of the run it takes, as in {shape}:0.2."
        )
    decay = None if shape in SHAPES else decay_of(spec, others)
    try:
        if decay is None:
            return of_annealing(shape, num_steps, float(fraction))
        return of_decay(decay, num_steps)
    except ValueError as error:
        raise BadProfile(f"{spec!r}: {error}") from None


def merge_weights(spec: str, count: int, steps: Sequence[int] | None) -> np.ndarray:
    """The weights of checkpoints, oldest first, for `emaopt average --profile SPEC`.

    "uniform" gives all checkpoints the same weight. Any other profile is one of the steps
    up to the newest checkpoint, and `checkpoint_weights` shares it among the checkpoints;
    an annealing without a fraction begins at the oldest one.
    """
    if spec == "uniform":
        return np.full(count, 1 / count)
    if spec not in SHAPES:
        weights_of(spec, 1)  # a wrong name is reported before missing steps
    if steps is None:
        raise advised(
            BadProfile,
            f"the profile {spec!r} needs the steps of the checkpoints: their names do "
            "not all end in numbers.",
            "Give them as steps=.",
            "Give them with --steps.",
        )
    if spec in SHAPES:
        if count == 1:
            return np.ones(1)
        # !r: the fraction is read back by float() and loses nothing.
        spec = f"{spec}:{1 - steps[0] / steps[-1]!r}"
    profile = profile_of(spec, steps[-1]) if steps[-1] > LONG else None
    if profile is None:
        return checkpoint_weights(weights_of(spec, steps[-1]), steps)
    return shared_out(profile.log_older, steps, profile.breaks)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
