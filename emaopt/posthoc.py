"""Choose the average after training, from averages that were recorded during it.

An average of the iterates is given by its weight profile, so a linear combination of
averages is an average, too. Record two of them in training and keep a snapshot of both
now and then:

    tx = optax.named_chain(
        ("adam", optax.adam(1e-3)),
        ("power:0.05", emaopt.average_params(emaopt.power_decay(sigma_rel=0.05))),
        ("power:0.1", emaopt.average_params(emaopt.power_decay(sigma_rel=0.1))),
    )

`emaopt synthesize` reads the decays from these names. After the training, `solve` finds
the combination of snapshots whose profile is nearest to a target profile, and its error.
`combine` adds up trees of weights with the coefficients; `annealing_weights` makes
profiles that stand in for a decay of the learning rate. All of this is NumPy on the host
and touches no files; `emaopt.checkpoint.synthesize` and `emaopt synthesize` do the same
on checkpoints.

The exponents of power averages and their widths:

    γ        0       1       2       4       6.94    10      16.97   20      50
    σ_rel    0.2887  0.2357  0.1936  0.1409  0.1000  0.0767  0.0500  0.0434  0.0189

References:
  Karras et al., 2024, Analyzing and improving the training dynamics of diffusion models,
  §3.2 and appendix C, https://arxiv.org/abs/2312.02696
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from emaopt._annealing import annealing_weights
from emaopt._checks import (
    check_flag,
    check_integer,
    check_number,
    check_real,
    check_sequence,
    check_vector,
)
from emaopt._combination import combine
from emaopt._judging import Selection, select
from emaopt._least_squares import nearest
from emaopt._power_profiles import (
    gamma_of_sigma_rel,
    gamma_to_sigma_rel,
    power_inner_product,
    power_residual,
    sigma_rel_to_gamma,
)
from emaopt._types import DecayLike, Vector
from emaopt._weights import checked_weights, shares_taken

__all__ = [
    "Recorded",
    "Selection",
    "Solution",
    "annealing_weights",
    "combine",
    "gamma_to_sigma_rel",
    "power_inner_product",
    "select",
    "sigma_rel_to_gamma",
    "snapshot_weights",
    "snapshots_needed",
    "solve",
    "solve_recorded",
]

_BLOCK = 1 << 13  # steps at a time


class Recorded(NamedTuple):
    """An average that was recorded: its snapshots, and its arguments.

    steps: int [n], increasing, the number of updates at each snapshot. decay, every,
    start and debias: as `average_params` had them. units: with a `clock`, how many units
    each step took, float [T], T at least the last of the steps; else None.
    """

    decay: DecayLike
    steps: Sequence[int] | np.ndarray
    every: int = 1
    start: int = 0
    debias: bool = False
    units: Vector | None = None


class Solution(NamedTuple):
    """A combination of snapshots, its error, and how much it amplifies rounding."""

    coefficients: np.ndarray  # float64 [n], sum 1
    residual: float  # ‖profile got - profile wanted‖₂ / ‖profile wanted‖₂
    noise_gain: float  # ‖coefficients‖₂


def snapshot_weights(recorded: Sequence[Recorded], num_steps: int) -> np.ndarray:
    """Returns the weight of every iterate in every snapshot.

    All steps are on one timeline: after a restart the counter of an average goes on, and
    so do the steps.

    Args:
      recorded: The averages that were recorded.
      num_steps: T, at least the last step of any snapshot.

    Returns:
      float64 [n, T+1]: the snapshots of the first average, then of the second, and so
      on; each row is `decay_weights` at its step, and zero after it.

    Raises:
      ValueError, TypeError: If a decay is not one, or steps do not increase within
        [0, T].

    Example:
      >>> print(snapshot_weights([Recorded(0.5, [1, 2])], 2))
      [[0.5  0.5  0.  ]
       [0.25 0.25 0.5 ]]
    """
    check_integer("snapshot_weights", "num_steps", num_steps, 0)
    ends = _checked_steps("snapshot_weights", recorded, num_steps)
    blocks = _blocks("snapshot_weights", recorded, ends, num_steps)
    return np.concatenate(list(blocks)[::-1], axis=1)


def solve(
    snapshot_weights: ArrayLike,
    target_weights: Vector,
    *,
    rcond: float | None = None,
) -> Solution:
    """Finds the combination of snapshots that is nearest to a target profile.

    Minimizes ‖cᵀS - p‖₂ over c with Σc = 1; of several minima it takes the one with the
    least ‖c‖₂. Neighbouring snapshots are nearly equal, so SSᵀ is never formed. QR
    reduces Sᵀ to a triangle, block by block. An orthonormal basis of the vectors with sum
    0 keeps the constraint. Singular values solve the rest, in n - 1 dimensions.

    What to watch in the solution:
      residual: ‖cᵀS - p‖₂ / ‖p‖₂. The relative error of the parameters is of the order
        of the residual times how much they move: smaller, as a rule.
      noise_gain: ‖c‖₂. Rounding errors of the snapshots that are independent with
        standard deviation ε become errors of noise_gain · ε; if all are equal, at worst
        √n times that. For bfloat16 snapshots (ε = 0.1 % of a weight) a gain of 10 means
        1 %.

    Args:
      snapshot_weights: S, float [n, T+1]: the weight of every iterate in every snapshot,
        as the function `snapshot_weights` returns it; may be a memory map.
      target_weights: p, float [T+1], sum 1, such as `decay_weights` of any decay.
      rcond: Directions in which the snapshots differ by less than rcond · ‖S‖ are left
        out: a larger rcond lowers the noise gain and raises the residual. None: the
        rounding of float64.

    Returns:
      A `Solution`.

    Raises:
      ValueError: If the shapes do not fit, values are not finite, or the target does not
        sum to 1.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> recorded = [Recorded(0.9, [50, 100]), Recorded(0.95, [50, 100])]
      >>> target = emaopt.decay_weights(0.92, 100)
      >>> solution = solve(snapshot_weights(recorded, 100), target)
      >>> print(f"{solution.residual:.3f} {solution.noise_gain:.2f}")
      0.025 0.74

    References:
      Karras et al., 2024, §3.2, https://arxiv.org/abs/2312.02696 (for power profiles,
      by their inner products, without the constraint)
    """
    if rcond is not None:
        check_number("solve", "rcond", rcond, 0)
    # A memory map stays one: the blocks are read as they are needed.
    matrix: Any = np.asanyarray(snapshot_weights)
    target = checked_weights("solve", target_weights, "target_weights")
    if matrix.dtype.kind not in "iuf":
        raise TypeError(
            f"solve: snapshot_weights must be numbers, got {snapshot_weights!r}."
        )
    if matrix.ndim != 2 or not matrix.shape[0] or matrix.shape[1] != target.size:
        raise ValueError(
            "solve: snapshot_weights must be [n, T+1] with n >= 1 and target_weights "
            f"[T+1], got shapes {matrix.shape} and {target.shape}."
        )
    slices = (slice(i, i + _BLOCK) for i in range(0, target.size, _BLOCK))
    return _solution(
        "solve", ((matrix[:, s], target[s]) for s in slices), len(matrix), rcond
    )


def solve_recorded(
    recorded: Sequence[Recorded],
    target_weights: Vector,
    *,
    rcond: float | None = None,
) -> Solution:
    """Does what `solve(snapshot_weights(recorded, T), target_weights)` does, in blocks.

    The matrix is never whole in memory, so a run of a million steps needs megabytes and
    seconds. Snapshots may be later than the target's last step.

    Args:
      recorded: The averages that were recorded.
      target_weights: float [T+1], sum 1.
      rcond: As for `solve`.

    Returns:
      A `Solution`; its coefficients are in the order of `recorded`, and within each in
      the order of the steps.

    Raises:
      ValueError, TypeError: As `snapshot_weights` and `solve` do.

    Example:
      >>> import emaopt
      >>> target = emaopt.decay_weights(0.9, 10)
      >>> print(solve_recorded([Recorded(0.9, [10])], target).residual < 1e-12)
      True
    """
    name = "solve_recorded"
    if rcond is not None:
        check_number(name, "rcond", rcond, 0)
    target = checked_weights(name, target_weights, "target_weights")
    ends = _checked_steps(name, recorded, None)
    num_steps = max(target.size - 1, int(ends.max()))
    # Iterates after the target's last step weigh 0 in it.
    target = np.append(target, np.zeros(num_steps + 1 - target.size))

    # `_blocks` goes from the newest step backwards; QR takes the steps in any order.
    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        stop = num_steps + 1
        for block in _blocks(name, recorded, ends, num_steps):
            stop -= block.shape[1]
            yield block, target[stop : stop + block.shape[1]]

    return _solution(name, pairs(), ends.size, rcond)


def snapshots_needed(
    error: float,
    *,
    sigma_rel: Vector,
    recorded: Sequence[float] = (0.05, 0.1),
) -> int:
    """Returns how many evenly spaced snapshots bring the residual below an error.

    A snapshot of every recorded power average is taken at each of these steps, the last
    one at the end of the run. The profiles are compared by `power_inner_product`, so that
    the length of the run does not matter.

    Args:
      error: The largest residual to accept, in [1e-6, 1].
      sigma_rel: The width of the power average to synthesize at the end of the run, or a
        sequence of widths, of which the worst counts.
      recorded: The widths of the averages that are recorded.

    Returns:
      The number of steps at which to keep a snapshot of each recorded average.

    Raises:
      ValueError: If a width is out of its range, or 512 are too few.
      TypeError: If an argument is of another kind.

    Example:
      >>> snapshots_needed(0.01, sigma_rel=[0.05, 0.25])
      88
    """
    check_number("snapshots_needed", "error", error, 1e-6, 1)
    sigma_rel = check_real("snapshots_needed", "sigma_rel", sigma_rel, "widths", (0, 1))
    widths = check_vector("snapshots_needed", "recorded", recorded)
    targets = [
        gamma_of_sigma_rel("snapshots_needed", s) for s in np.atleast_1d(sigma_rel)
    ]
    gammas = [gamma_of_sigma_rel("snapshots_needed", s) for s in widths]

    def enough(count: int) -> bool:
        return all(power_residual(gammas, count, target) <= error for target in targets)

    # Doubling, then bisection: enough(high) holds and enough(low) does not.
    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > 512:
            raise ValueError(
                "snapshots_needed: 512 snapshots of sigma_rel="
                f"{tuple(map(float, widths))} give no residual of {error} at "
                f"sigma_rel={sigma_rel}. Record a width nearby."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _checked_steps(
    function: str, recorded: Sequence[Recorded], num_steps: int | None
) -> np.ndarray:
    """The steps of all snapshots, [n], or an error."""
    check_sequence(function, "recorded", recorded, "Recorded")
    for one in recorded:
        if not isinstance(one, Recorded):
            raise TypeError(f"{function}: recorded must hold Recorded, got {one!r}.")
        check_sequence(function, "the steps of an average", one.steps, "whole numbers")
        check_flag(function, "debias", one.debias)
    ends = [np.asarray(one.steps) for one in recorded]
    for steps in ends:
        whole = steps.ndim == 1 and steps.size and np.issubdtype(steps.dtype, np.integer)
        if not whole or steps[0] < 0 or np.any(np.diff(steps) <= 0):
            raise ValueError(
                f"{function}: the steps of an average must be whole numbers that "
                f"increase from 0 or more, got {steps}."
            )
        if num_steps is not None and steps[-1] > num_steps:
            raise ValueError(
                f"{function}: a snapshot of step {steps[-1]} is later than num_steps="
                f"{num_steps}."
            )
    if not ends:
        raise ValueError(f"{function}: give at least one recorded average.")
    return np.concatenate(ends)


def _blocks(
    function: str, recorded: Sequence[Recorded], ends: np.ndarray, num_steps: int
) -> Iterator[np.ndarray]:
    """The rows of `snapshot_weights` in blocks of steps, the newest steps first.

    A weight is the share that the iterate took at its step, times Π (1 - share) over the
    later ones up to the snapshot's step. From the newest step backwards that product
    gains one factor a step, so each block continues the product of the block before.
    """
    # Shares do not depend on where the run ends: those up to the last snapshot of an
    # average are those of its other snapshots, too.
    shares = [
        shares_taken(
            function,
            one.decay,
            int(np.max(one.steps)),
            every=one.every,
            start=one.start,
            debias=one.debias,
            units=_up_to(one),
        )
        for one in recorded
    ]
    rows = [share for share, one in zip(shares, recorded, strict=True) for _ in one.steps]
    left = np.ones(ends.size)  # Π (1 - share) of each snapshot over the steps passed
    for start in range(num_steps // _BLOCK * _BLOCK, -1, -_BLOCK):
        block = np.zeros((ends.size, min(start + _BLOCK, num_steps + 1) - start))
        for row, share, end in zip(range(ends.size), rows, ends, strict=True):
            # Empty for a block after the snapshot, which leaves its row 0.
            taken = share[start : min(start + _BLOCK, end + 1)]
            kept = np.cumprod(np.append(left[row], 1 - taken[::-1]))[::-1]
            block[row, : taken.size] = taken * kept[1:]
            left[row] = kept[0]
        yield block


def _up_to(one: Recorded) -> np.ndarray | None:
    """The units of the steps up to the last snapshot."""
    return None if one.units is None else np.asarray(one.units)[: int(np.max(one.steps))]


def _solution(*problem: Any) -> Solution:
    """The solution of the arguments of `nearest`."""
    coefficients, residual = nearest(*problem)
    return Solution(coefficients, residual, float(np.linalg.norm(coefficients)))
