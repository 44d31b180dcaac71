"""Statistics that are not parameters: recompute them for the averaged weights.

BatchNorm's running statistics belong to the weights that they were gathered with. Served
with averaged weights, there are three policies: keep the newest ones, average them as
the weights are (`emaopt.average_tree`), or recompute them from data (`recalibrate`).

Recompute them. `benchmarks/batch_stats.py` compares the three on handwritten digits (5
seeds, a high constant learning rate). Held-out loss of the averaged weights:

    BatchNorm momentum   decay    keep     average   recompute
    0.9                  0.99     0.2264   0.0306    0.0189
    0.9                  0.998    0.3780   0.0405    0.0179
    0.99                 0.99     0.0331   0.1090    0.0189
    0.99                 0.998    0.1452   0.0540    0.0179

Running statistics of a momentum near the decay are such an average already: averaging
them again doubles their lag.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._averaging import average_tree
from emaopt._checks import check_arrays, check_callable, check_iterable
from emaopt._decays import uniform_decay
from emaopt._names import leaves_with_keys

__all__ = ["recalibrate"]


def recalibrate(
    apply_fn: Callable[[Any, Any, Any], Any],
    averaged_params: Any,
    batches: Iterable[Any],
    batch_stats: Any,
) -> Any:
    """Recomputes BatchNorm statistics for averaged weights: their mean over batches.

    Each batch counts alike, whatever the layers' momentum and whatever stands in
    `batch_stats`: with m the momentum, a layer returns m·old + (1-m)·(statistic of the
    batch). A zero in old's place leaves the batch's own, times 1-m, and m is the share of
    old's growth that the result grows by.

    What to watch: the batches should be drawn as the training batches were, and be as
    large: the variance of a small batch is not that of the data. Statistics that take
    part in the forward pass are no means over batches, such as the vectors of a spectral
    norm, which a few passes bring to the averaged weights: keep them apart, as below.

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
      TypeError: If `batches` is an array or a mapping.
      ValueError: If there is no batch, or `apply_fn` returns another tree than
        `batch_stats`, or statistics that do not follow the rule above (the forward pass
        was not in training mode, or they take part in it).

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
            model = nnx.merge(graphdef, params, stats, others, copy=True)
            model.train()
            model(x)
            return nnx.state(model, nnx.BatchStat)

      With a spectral norm in a linen model, first its own statistics, then the others:

        def statistics(params, stats, x):
            variables = {"params": params, "batch_stats": stats}
            return model.apply(variables, x, True, mutable=["batch_stats"])[1][
                "batch_stats"
            ]

        for _ in range(100):  # power iterations, for the averaged weights
            stats = statistics(averaged_params, stats, batch)
        spectral = {"SpectralNorm_0": stats.pop("SpectralNorm_0")}

        def apply_fn(params, stats, x):
            new = statistics(params, stats | spectral, x)
            return {name: new[name] for name in stats}

        stats = recalibrate(apply_fn, averaged_params, batches, stats) | spectral

    References:
      Izmailov et al., 2018, Averaging weights leads to wider optima and better
      generalization, §3.2, https://arxiv.org/abs/1803.05407
    """
    check_callable("recalibrate", "apply_fn", apply_fn, 3)
    check_arrays("recalibrate", "averaged_params", averaged_params, others=True)
    check_arrays("recalibrate", "batch_stats", batch_stats)
    shape = getattr(batches, "shape", None)
    if shape is not None:
        raise TypeError(
            "recalibrate: batches must be an iterable of batches, got one array of shape "
            f"{shape}: its rows would be taken for batches. Pass [batch]."
        )
    if isinstance(batches, Mapping):
        raise TypeError(
            "recalibrate: batches must be an iterable of batches, got one "
            f"{type(batches).__name__}: its keys would be taken for batches. Pass "
            "[batch]."
        )
    check_iterable("recalibrate", "batches", batches, "batches")
    treedef = jax.tree.structure(batch_stats)

    # The weights are an argument: as constants, they would be compiled into the program.
    @jax.jit
    def forward(params, stats, batch):
        returned = apply_fn(params, stats, batch)
        if isinstance(returned, tuple) and jax.tree.structure(returned) != treedef:
            returned = returned[1]["batch_stats"]
        if jax.tree.structure(returned) != treedef:
            raise ValueError(
                "recalibrate: apply_fn must return a tree like batch_stats, "
                f"{treedef}, got {jax.tree.structure(returned)}."
            )
        return returned

    zeros = jax.tree.map(
        lambda x: jnp.zeros_like(x) if _is_floating(x) else x, batch_stats
    )
    mean = average_tree(uniform_decay())
    state, kept = None, None
    for batch in batches:
        scaled = forward(averaged_params, zeros, batch)
        if state is None:
            probe = jax.tree.map(_probe, scaled)
            probed = forward(averaged_params, probe, batch)
            try:
                kept = _kept_shares(scaled, probe, probed)
            except ValueError:
                _refuse_those_in_the_pass(forward, averaged_params, batch_stats, batch)
                raise
            state = mean.init(scaled)
        own = jax.tree.map(
            lambda new, m: new / (1 - m) if _is_floating(new) else new, scaled, kept
        )
        state = mean.update(own, state)
    if state is None:
        raise ValueError("recalibrate: batches is empty; give at least one batch.")
    return jax.tree.map(
        lambda old, new: new.astype(old.dtype) if _is_floating(old) else old,
        batch_stats,
        state.average,
    )


def _probe(scaled: Any) -> Any:
    """A value of the statistic's own size to put in old's place."""
    if not _is_floating(scaled) or scaled.size == 0:
        return scaled
    size = jnp.max(jnp.abs(scaled))
    return jnp.full_like(scaled, jnp.where(size > 0, size, 1))


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _kept_shares(of_zeros: Any, probes: Any, of_probes: Any) -> Any:
    """The momentum m of each leaf, from what a layer makes of zeros and of probes."""

    def share(name, zero, probe, other):
        if not _is_floating(zero) or zero.size == 0:
            return 0.0
        zero, probe, other = (np.asarray(x, np.float64) for x in (zero, probe, other))
        if not np.all(np.isfinite(zero)):
            raise ValueError(f"recalibrate: of the first batch, {name} is not finite.")
        grown = (other - zero) / probe
        m = float(np.median(grown))
        # float32 leaves 1e-7 of doubt, which 1/(1-m) enlarges; people write decimals.
        if abs(m - round(m, 6)) < 5e-7:
            m = round(m, 6)
        if not 0 <= m < 1 or np.ptp(grown) > 1e-4:
            raise ValueError(
                f"recalibrate: what apply_fn returns as {name} is not momentum · old + "
                "(1 - momentum) · new with one momentum in [0, 1): of what old grew by, "
                f"it kept {grown.min():.6g} to {grown.max():.6g}. Run the forward pass "
                "in training mode, and keep the statistics in float32."
            )
        return m

    return jax.tree.map(share, _names(of_zeros), of_zeros, probes, of_probes)


def _refuse_those_in_the_pass(forward: Any, params: Any, stats: Any, batch: Any) -> None:
    """Raises if a statistic changes what the others become.

    Asked at the values that the user has, not at zeros: these may be worth nothing in a
    forward pass.
    """
    leaves, treedef = jax.tree.flatten(stats)
    own = jax.tree.leaves(forward(params, stats, batch))
    found = []
    for i, name in enumerate(jax.tree.leaves(_names(stats))):
        if not _is_floating(leaves[i]) or leaves[i].size == 0:
            continue
        # Another direction, too: a spectral norm takes no more of its vector.
        wave = jnp.cos(jnp.arange(leaves[i].size, dtype=leaves[i].dtype) + 1)
        other = leaves[i] + _probe(leaves[i]) * wave.reshape(leaves[i].shape)
        changed = [*leaves[:i], other, *leaves[i + 1 :]]
        new = jax.tree.leaves(
            forward(params, jax.tree.unflatten(treedef, changed), batch)
        )
        pairs = [(a, b) for j, (a, b) in enumerate(zip(own, new, strict=True)) if j != i]
        if not all(np.allclose(a, b, 1e-4, 0, equal_nan=True) for a, b in pairs):
            found.append(name)
    if found:
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise ValueError(
            "recalibrate: part of the forward pass, which changes the other statistics, "
            f"are {', '.join(found[:10])}{more}: as the vectors of a spectral norm or "
            "the statistics of a frozen layer, they are no means over batches. Keep the "
            "statistics of their layers apart, at values that belong to averaged_params: "
            "pass the others alone as batch_stats, and let apply_fn add these. The "
            "docstring has an example."
        )


def _names(stats: Any) -> Any:
    """A tree like the statistics of their names."""
    names = ["/".join(keys) or "the statistic" for keys, _ in leaves_with_keys(stats)]
    return jax.tree.unflatten(jax.tree.structure(stats), names)
