"""Profiles by name, and the weights that they give to the checkpoints of a run."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jax.typing import ArrayLike

from emaopt._advice import advised
from emaopt._annealing import (
    SHAPES,
    annealing_profile,
    annealing_summary,
    annealing_weights,
)
from emaopt._checks import check_decay
from emaopt._decay_type import evaluate, log_kept_of, until
from emaopt._decays import (
    half_life_decay,
    polynomial_decay,
    power_decay,
    uniform_decay,
    warmup_decay,
)
from emaopt._sums import Profile, shared_out
from emaopt._types import DecayLike
from emaopt._weights import (
    WeightSummary,
    checked_weights,
    decay_weights,
    weight_summary,
)

LONG = 1 << 20  # steps; for a longer run no array of them is made
_DRAWN = 2000  # steps of a long run to draw, from each end

T = TypeVar("T")


class BadProfile(ValueError):
    """A string that names no profile; the message lists those that do."""


def _averaging(decay: DecayLike, num_steps: int) -> Profile | None:
    """`decay_weights` without the array of weights; None without a closed form."""
    if (log_kept := log_kept_of(decay)) is None:
        return None
    log_older = until(log_kept, num_steps)
    return Profile(
        num_steps,
        log_older,
        lambda i: evaluate(decay, i) * np.exp(log_older(i)),
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


def is_annealing(spec: str) -> bool:
    """Whether a string names an annealing, which is one of steps, and no decay."""
    return spec.partition(":")[0] in SHAPES


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
    return _of(spec, num_steps, weight_summary, annealing_summary)


def profile_of(spec: str, num_steps: int) -> Profile | None:
    """`weights_of` without the array of weights; None without a closed form."""
    return _of(spec, num_steps, _averaging, annealing_profile)


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
