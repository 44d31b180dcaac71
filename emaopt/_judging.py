"""Whether a candidate is better than a baseline, and more than by chance."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from emaopt._checks import check_integer, check_number, check_real

_POWER = 0.8  # at which `Selection.detectable` is found


class Selection(NamedTuple):
    """What `select` found.

    chosen: the candidate that is better than the baseline, or None. best: the candidate
    with the least loss in the part that chooses. The rest is of the part that judges:
    difference: loss of `best` minus that of the baseline, mean. standard_error: of that
    difference. p_value: how often a candidate no better than the baseline would look as
    good. num_judged: examples, or groups, in that part. detectable: the gain that would
    be found four times out of five.
    """

    chosen: int | None
    best: int
    difference: float
    standard_error: float
    p_value: float
    num_judged: int
    detectable: float


def select(
    losses: ArrayLike | Sequence[Sequence[float]],
    *,
    baseline: int = 0,
    groups: ArrayLike | Sequence[int] | None = None,
    fraction: float = 0.5,
    level: float = 0.025,
    seed: int = 0,
) -> Selection:
    """Chooses the best of several candidates, or none that is better by chance alone.

    Candidates are weights of one run: averages of several widths, annealings, steps. The
    best of many looks better than it is, for it was chosen by its luck, too. So the
    examples are split at random: one part chooses the candidate with the least mean loss,
    the other judges it against the baseline, by a one-sided t-test of the differences of
    each example. The judging part has not been looked at before, so the number of
    candidates needs no further correction.

    Args:
      losses: The loss of every candidate on every example, float [candidates, examples]:
        the same examples for all of them, held out from training. At least 2 candidates
        and 20 examples.
      baseline: The candidate that is taken unless another one is better.
      groups: [examples], equal for examples that belong together, such as tokens of one
        document: these are averaged first, for they are no independent evidence. None:
        each by itself.
      fraction: The part of the examples, or groups, that chooses. Default a half.
      level: How often the baseline's equal may be chosen, in (0, 0.5). Default 1 in 40.
      seed: Of the split.

    Returns:
      A `Selection`; its `chosen` is None if no candidate proved better than the baseline.

    Raises:
      ValueError: If an argument is out of its range, or a loss is not finite.
      TypeError: If an argument is of another kind.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> hardness = rng.random(1000)  # the same for all candidates
      >>> better = hardness - 0.02 + 0.1 * rng.standard_normal(1000)
      >>> alike = hardness + 0.1 * rng.standard_normal(1000)
      >>> select([hardness, alike, better]).chosen, select([hardness, alike]).chosen
      (2, None)

    References:
      Cox, 1975, A note on data-splitting for the evaluation of significance levels,
      https://doi.org/10.1093/biomet/62.2.441
    """
    name = "select"
    table = check_real(name, "losses", losses, "a matrix of numbers", (2,))
    count, size = table.shape
    if count < 2:
        raise ValueError(f"{name}: losses must be of at least 2 candidates, got {count}.")
    check_integer(name, "baseline", baseline, 0)
    if baseline >= count:
        raise ValueError(
            f"{name}: baseline must be one of the {count} candidates, got {baseline}."
        )
    check_number(name, "fraction", fraction, 0, 1, above=True)
    check_number(name, "level", level, 0, 0.5, above=True)
    check_integer(name, "seed", seed, 0)
    if groups is not None:
        table = _grouped(name, table, groups)
        size = table.shape[1]
    what = "examples" if groups is None else "groups"
    num_choosing = round(fraction * size)
    if size < 20 or not 10 <= num_choosing <= size - 10:
        raise ValueError(
            f"{name}: at least 10 {what} must choose and 10 must judge, got {size} in "
            f"all and fraction={fraction}."
        )
    from scipy import stats  # a second to import

    order = np.random.default_rng(seed).permutation(size)
    choosing, judging = table[:, order[:num_choosing]], table[:, order[num_choosing:]]
    best = int(np.argmin(choosing.mean(1)))
    differences = judging[best] - judging[baseline]
    number = differences.size
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / np.sqrt(number))
    student = stats.t(number - 1)
    if error > 0:
        p_value = float(student.cdf(mean / error))
    else:  # all alike: no better, or better on every example by the same
        p_value = 0.0 if mean < 0 else 1.0
    return Selection(
        chosen=best if best != baseline and p_value < level else None,
        best=best,
        difference=mean,
        standard_error=error,
        p_value=p_value,
        num_judged=number,
        detectable=float((student.isf(level) + student.ppf(_POWER)) * error),
    )


def _grouped(function: str, table: np.ndarray, groups: Any) -> np.ndarray:
    """The mean losses of each group, [candidates, groups]."""
    found = np.asarray(groups)
    if found.shape != (table.shape[1],):
        raise ValueError(
            f"{function}: groups must name the group of each of {table.shape[1]} "
            f"examples, got shape {found.shape}."
        )
    _, which, sizes = np.unique(found, return_inverse=True, return_counts=True)
    return np.stack([np.bincount(which, row) / sizes for row in table])
