"""Statistics that are not parameters: recompute them for the averaged weights.

BatchNorm's running statistics belong to the weights that they were gathered with. Served
with averaged weights, there are three policies: keep the newest ones, average them as
the weights are (`emaopt.average_tree`), or recompute them from data (`recalibrate`).
`benchmarks/batch_stats.py` compares the three on a real run.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._averaging import average_tree
from emaopt._decays import uniform_decay


def recalibrate(
    apply_fn: Callable[[Any, Any, Any], Any],
    averaged_params: Any,
    batches: Iterable[Any],
    batch_stats: Any,
) -> Any:
    """Recomputes BatchNorm statistics for averaged weights: their mean over batches.

    Each batch counts alike, whatever the layers' momentum and whatever stands in
    `batch_stats`: with m the momentum, a layer returns m·old + (1-m)·(statistic of the
    batch). A zero in old's place leaves the batch's own, times 1-m, and m is what the
    result grows by when old grows by 1.

    What to watch: the batches should be drawn as the training batches were, and be as
    large: the variance of a small batch is not that of the data.

    Args:
      apply_fn: (params, batch_stats, batch) -> the statistics after one forward pass in
        training mode, as a tree like `batch_stats`; also what a linen module's `apply`
        returns with mutable=["batch_stats"], (outputs, {"batch_stats": ...}). It is
        compiled.
      averaged_params: The weights to recompute the statistics for.
      batches: What to pass as `batch`, one after the other, at least one; read once.
      batch_stats: The statistics so far; they give names, shapes and dtypes. Leaves that
        are not floating (counters) keep their values.

    Returns:
      A tree like `batch_stats`.

    Raises:
      ValueError: If there is no batch, or `apply_fn` returns another tree than
        `batch_stats`, or statistics that do not follow the rule above (the forward pass
        was not in training mode).

    Example:
      >>> def apply_fn(params, stats, batch):
      ...     return {"mean": 0.9 * stats["mean"] + 0.1 * (params * batch).mean()}
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0])]
      >>> print(recalibrate(apply_fn, 2.0, batches, {"mean": jnp.array(9.0)})["mean"])
      7.0

      For linen and for NNX, `apply_fn` is

        lambda params, stats, x: model.apply(
            {"params": params, "batch_stats": stats}, x, train=True,
            mutable=["batch_stats"])

        def apply_fn(params, stats, x):
            model = nnx.merge(graphdef, params, stats, others)
            model.train()
            model(x)
            return nnx.state(model, nnx.BatchStat)

    References:
      Izmailov et al., 2018, Averaging weights leads to wider optima and better
      generalization, §3.2, https://arxiv.org/abs/1803.05407
    """
    treedef = jax.tree.structure(batch_stats)

    @jax.jit
    def forward(stats, batch):
        returned = apply_fn(averaged_params, stats, batch)
        if isinstance(returned, tuple) and jax.tree.structure(returned) != treedef:
            returned = returned[1]["batch_stats"]
        if jax.tree.structure(returned) != treedef:
            raise ValueError(
                "recalibrate: apply_fn must return a tree like batch_stats, "
                f"{treedef}, got {jax.tree.structure(returned)}."
            )
        return returned

    zeros = _filled(batch_stats, 0)
    mean = average_tree(uniform_decay())
    state, kept = None, None
    for batch in batches:
        scaled = forward(zeros, batch)
        if state is None:
            kept = _kept_shares(scaled, forward(_filled(batch_stats, 1), batch))
            state = mean.init(scaled)
        own = jax.tree.map(lambda new, m: new / (1 - m), scaled, kept)
        state = mean.update(own, state)
    if state is None:
        raise ValueError("recalibrate: batches is empty; give at least one batch.")
    return jax.tree.map(
        lambda old, new: new.astype(old.dtype) if _is_floating(old) else old,
        batch_stats,
        state.average,
    )


def _filled(batch_stats: Any, value: float) -> Any:
    return jax.tree.map(
        lambda x: jnp.full_like(x, value) if _is_floating(x) else x, batch_stats
    )


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _kept_shares(of_zeros: Any, of_ones: Any) -> Any:
    """The momentum m of each leaf, from what a layer makes of zeros and of ones."""

    def share(zero, one):
        if not _is_floating(zero) or zero.size == 0:
            return 0.0
        grown = np.asarray(one, np.float64) - np.asarray(zero, np.float64)
        m = float(np.median(grown))
        # float32 leaves 1e-7 of doubt, which 1/(1-m) enlarges; people write decimals.
        if abs(m - round(m, 6)) < 3e-7:
            m = round(m, 6)
        scale = 1 + float(np.max(np.abs(np.asarray(zero, np.float64))))
        if not 0 <= m < 1 or np.ptp(grown) > 1e-3 * scale:
            raise ValueError(
                "recalibrate: what apply_fn returns is not momentum · old "
                f"+ (1 - momentum) · new with one momentum in [0, 1): from 0 to 1, old "
                f"moved them by {grown.min():.4g} to {grown.max():.4g}. Run the forward "
                "pass in training mode."
            )
        return m

    return jax.tree.map(share, of_zeros, of_ones)
