"""Sums of a smooth profile over the iterates of a run of any length.

If the N equidistant terms of a sum are a polynomial of degree below 2m, the sum is a
weighted sum of the polynomial at m nodes: Gauss' rule for the discrete measure, whose
orthogonal polynomials are Chebyshev's of a discrete variable. Near an end of the run or a
kink, profiles vary on the scale of the distance from it. So blocks that double in length
from there need the same m each.

References:
  Golub & Welsch, 1969, Calculation of Gauss quadrature rules,
  https://doi.org/10.1090/S0025-5718-69-99647-1 (nodes from the recurrence)
  NIST Digital Library of Mathematical Functions, §18.22(i), https://dlmf.nist.gov/18.22
  (the recurrence of Hahn's polynomials; α = β = 0 are Chebyshev's)
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

_NODES = 40  # m; blocks up to this long are summed term by term


class Profile(NamedTuple):
    """The weights of θ_0 ... θ_T, without an array of them; the functions take arrays."""

    num_steps: int  # T, at least 1
    log_older: Callable[[np.ndarray], np.ndarray]  # i -> log Σ_{j <= i} w_j
    weights: Callable[[np.ndarray], np.ndarray]  # i -> w_i, for i >= 1 not whole, too
    breaks: Iterable[float]  # the i where they have a kink


def sums_of(profile: Profile, debias: bool) -> tuple[float, float, float, float]:
    """Mean age, 1/Σw², w_0, half-life; with `debias`, of the profile without its θ_0."""
    last = profile.num_steps
    # log 0 = -inf and exp(-inf) = 0 are meant: a profile may leave old iterates out.
    with np.errstate(divide="ignore", under="ignore", over="ignore"):
        log_initial = float(profile.log_older(np.zeros(1))[0])
        # If θ_0 has all of the weight, nothing is left to divide by.
        if debias and log_initial < 0:
            initial, total = 0.0, -np.expm1(log_initial)
        else:
            initial, total = np.exp(log_initial), 1.0

        # `weights` is defined for i >= 1 only, so θ_0 is counted apart.
        age, squares = initial * last, initial**2
        for i, count in _blocks(last, profile.breaks):
            w = profile.weights(i) / total
            age += count @ (w * (last - i))
            squares += count @ w**2

        def younger(n: int) -> float:  # weight of the iterates of age < n
            if n > last:
                return 1.0
            older = profile.log_older(np.full(1, float(last - n)))[0]
            return -np.expm1(older) / total

        # Bisection on whole steps, then linear between the two of them.
        low, high = 0, last + 1  # younger(low) <= 0.5 < younger(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if younger(middle) <= 0.5 else (low, middle)
        below, above = younger(low), younger(high)
        half_life = low + (0.5 - below) / (above - below)
    return float(age), float(1 / squares), float(initial), float(half_life)


def shared_out(
    log_older: Callable[[np.ndarray], np.ndarray],
    points: Sequence[int],
    breaks: Iterable[float],
) -> np.ndarray:
    """The weights of a few steps, among which the weights of all iterates are shared.

    An iterate's weight goes to the two points around it, linearly: the nearer one gets
    more. Iterates before the first point go to it; the last point is T. Let W(i) be the
    sum of w_0 ... w_i, and a < b two neighbouring points. Of the weight between them, b
    gets

        Σ_i (i - a)/(b - a) w_i = W(b) - M,    M = Σ_{a <= i < b} W(i) / (b - a),

    and a the rest, M - W(a). So a point gets the difference of the two M beside it.
    """
    means = [0.0]
    with np.errstate(divide="ignore", under="ignore"):
        for a, b in itertools.pairwise(points):
            # `_blocks` counts from 1: node i is the iterate a - 1 + i.
            inner = [one - a + 1 for one in breaks]
            total = sum(
                count @ np.exp(log_older(a - 1 + i)) for i, count in _blocks(b - a, inner)
            )
            means.append(float(total) / (b - a))
    return np.diff([*means, 1.0])


def _blocks(
    last: int, breaks: Iterable[float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Nodes and weights, block by block, of the rule for the steps 1 ... T."""
    inner = {int(b) for b in breaks if 0 < b < last}
    edges = sorted({0, *inner, last})
    for start, stop in itertools.pairwise(edges):
        size, left, right = _NODES, start, stop
        while right - left > 2 * size:  # towards the middle from both sides
            yield _nodes(left, size)
            yield _nodes(right - size, size)
            left, right, size = left + size, right - size, 2 * size
        half = (right - left) // 2
        for first, count in ((left, half), (left + half, right - left - half)):
            if count:
                yield _nodes(first, count)


def _nodes(before: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rule for the steps before + 1 ... before + count."""
    if count <= _NODES:
        return before + np.arange(1.0, count + 1), np.ones(count)
    places, weights = _rule(count)
    return before + (count + 1) / 2 + places, weights


@functools.lru_cache(256)
def _rule(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rule for `count` terms, around their middle."""
    # Nodes and weights are the eigenvalues, and the squared first components of the
    # eigenvectors, of the tridiagonal matrix of the recurrence (Golub & Welsch).
    k = np.arange(1.0, _NODES)
    off = k * np.sqrt((1 - (k / count) ** 2) / (4 * (4 * k**2 - 1)))
    places, vectors = np.linalg.eigh(np.diag(off, 1) + np.diag(off, -1))
    return count * places, count * vectors[0] ** 2
