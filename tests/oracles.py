"""Float64 references that share no code and no recursion with the library."""

import numpy as np


def weighted_average(betas, start, every, debias, iterates):
    """Σ_i w_i θ_i by the definition: the share of each iterate times all that keep it.

    Args:
      betas: function of t = s - start, the decay.
      iterates: float64 [T+1, ...], θ_0 ... θ_T.
    """
    steps = len(iterates) - 1
    share = np.zeros(steps + 1)  # of θ_s in the average right after step s
    share[0] = 1.0
    moves = [s for s in range(1, steps + 1) if s >= start and (s - start) % every == 0]
    last = max(start - 1, 0)
    share[1 : last + 1] = 1.0
    seen = []
    for s in moves:
        interval = np.prod([betas(i - start) for i in range(last + 1, s + 1)])
        seen.append(interval)
        share[s] = 1 - interval
        last = s
    weights = np.array(
        [share[i] * np.prod(1 - share[i + 1 :]) for i in range(steps + 1)], np.float64
    )
    if debias and moves:
        kept = np.zeros(steps + 1)
        kept[moves] = weights[moves]
        if kept.sum() > 0:
            weights = kept / kept.sum()
    return np.tensordot(weights, iterates, axes=1), weights
