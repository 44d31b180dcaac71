"""Profiles by name, and what they weigh the checkpoints of a run with."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emaopt._advice import advised
from emaopt._betas import evaluate, log_kept_of
from emaopt._checks import check_decay, check_number
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

LONG = 1 << 20  # steps, from which on no array is made of them
_DRAWN = 2000  # of a long run's steps, from each end


class BadProfile(ValueError):
    """Words that say no profile; the message lists those that do."""


def annealing_weights(shape: str, num_steps: int, fraction: float) -> np.ndarray:
    """Returns the profile that stands in for a decay of the learning rate.

    Had the learning rate of the last steps been multiplied by w_t, falling from 1 to 0,
    and had the gradients stayed what they were, the run would have ended at

        θ_0 + Σ_t w_t (θ_t - θ_{t-1}) = Σ_t (w_t - w_{t+1}) θ_t,    w_0 = 1, w_{T+1} = 0.

    w is a function of x, how far the step is into the last `fraction` of the run:
    "linear" 1 - x, "cosine" (1 + cos πx)/2, "1-sqrt" 1 - √x. "linear" is the plain mean
    of the last iterates.

    Args:
      shape: "linear", "cosine" or "1-sqrt".
      num_steps: T, at least 1.
      fraction: In (0, 1]: how much of the run the decay takes.

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
    """w of the middle of each step."""
    x = (step - 0.5 - num_steps) / (fraction * num_steps) + 1
    return SHAPES[shape](np.clip(x, 0, 1))


def _annealing(shape: str, num_steps: int, fraction: float) -> Profile:
    """`annealing_weights` without the array."""
    check_number("annealing_weights", "fraction", fraction, 0, 1, above=True)

    def kept(step):
        return _kept(shape, step, num_steps, fraction)

    first = num_steps * (1 - fraction)  # where w begins to fall; it ends within a step
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
    """`decay_weights` without the array; None if there is no closed form."""
    if (log_kept := log_kept_of(decay)) is None:
        return None
    return Profile(
        num_steps,
        lambda i: log_kept(i, num_steps),
        lambda i: evaluate(decay, i) * np.exp(log_kept(i, num_steps)),
        getattr(decay, "breaks", ()),
    )


def checkpoint_weights(weights: Any, steps: Any) -> np.ndarray:
    """Returns the weights of a few checkpoints that come nearest to a profile of steps.

    Between two checkpoints the iterates are taken to lie on the line that joins them;
    what came before the first is taken to be the first. So an iterate's weight goes to
    its two neighbours, the nearer one getting more.

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
    position = np.interp(np.arange(last + 1), steps, np.arange(steps.size))
    before = np.minimum(position.astype(int), max(steps.size - 2, 0))
    share = position - before
    found = np.bincount(before, weights * (1 - share), minlength=steps.size)
    if steps.size > 1:
        found += np.bincount(before + 1, weights * share, minlength=steps.size)
    return found


_DECAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "ema": (lambda beta: beta, "β"),
    "half-life": (half_life_decay, "steps"),
    "polynomial": (polynomial_decay, "η"),
    "power": (lambda sigma_rel: power_decay(sigma_rel=sigma_rel), "σ_rel"),
    "uniform": (uniform_decay, ""),
    "warmup": (warmup_decay, "β"),
}


def decay_of(spec: str, others: Sequence[str] = ()) -> DecayLike:
    """The decay that a word says: "ema:0.999" or "0.999", "power:0.1", "uniform" ...

    Raises:
      BadProfile: If it says none; the message lists what there is, and `others`.
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
    """Whether the name of an average is a decay's: "power:0.1"; not a mere number."""
    try:
        return ":" in name and decay_of(name) is not None
    except BadProfile:
        return False


def weights_of(spec: str, num_steps: int) -> np.ndarray:
    """The weight of every iterate, [T+1], of a decay's average or of an annealing."""
    return _of(spec, num_steps, decay_weights, annealing_weights)


def summary_of(spec: str, num_steps: int) -> WeightSummary:
    """What `weights_of` amounts to, of a run of any length."""
    weights_of(spec, 1)  # whether it is a profile at all
    return _of(spec, num_steps, weight_summary, _annealing_summary)


def profile_of(spec: str, num_steps: int) -> Profile | None:
    """`weights_of` without the array; None if there is no closed form."""
    return _of(spec, num_steps, _averaging, _annealing)


def curve_of(spec: str, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and their weights to draw: all of them, of a long run a few thousand."""
    profile = profile_of(spec, num_steps) if num_steps > LONG else None
    if profile is None:
        return np.arange(num_steps + 1), weights_of(spec, num_steps)
    ends = np.geomspace(1, num_steps, _DRAWN)  # many near both ends of the run
    steps = np.unique(np.rint(np.concatenate([ends, num_steps + 1 - ends])))
    with np.errstate(divide="ignore", under="ignore"):
        return steps, profile.weights(steps)


def _of(spec: str, num_steps: int, of_decay: Any, of_annealing: Any) -> Any:
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
    """The weights of checkpoints, oldest first, for what `emaopt average --profile` says.

    "uniform" weighs all alike. Any other profile of the steps up to the newest
    checkpoint goes to the checkpoints by `checkpoint_weights`; an annealing without a
    fraction begins at the oldest one.
    """
    if spec == "uniform":
        return np.full(count, 1 / count)
    if spec not in SHAPES:
        weights_of(spec, 1)  # whether it is a profile at all
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
