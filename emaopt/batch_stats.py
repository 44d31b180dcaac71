"""Statistics that are not parameters, recomputed for the averaged weights.

BatchNorm's running statistics belong to the weights that they were gathered with. For
averaged weights there are three policies: keep the newest statistics, average them like
the weights (`emaopt.average_tree`), or recompute them from data (`recalibrate`).

Recompute them. `benchmarks/batch_stats.py` compares the three on handwritten digits (5
seeds, a high constant learning rate). Held-out loss of the averaged weights:

    BatchNorm momentum   decay    keep     average   recompute
    0.9                  0.99     0.2264   0.0306    0.0189
    0.9                  0.998    0.3780   0.0405    0.0179
    0.99                 0.99     0.0331   0.1090    0.0189
    0.99                 0.998    0.1452   0.0540    0.0179

With a momentum near the decay, running statistics are such an average already:
averaging them again doubles their lag.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._averaging import average_tree
from emaopt._checks import check_callable, check_iterable
from emaopt._decays import uniform_decay
from emaopt._names import leaves_with_keys
from emaopt._tree_checks import check_arrays
from emaopt._types import Leaf, PyTree

__all__ = ["recalibrate"]

# (params, batch_stats, batch) -> the statistics after one forward pass
Forward: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]


def recalibrate(
    apply_fn: Forward,
    averaged_params: PyTree,
    batches: Iterable[PyTree],
    batch_stats: PyTree,
) -> PyTree:
    """Recomputes BatchNorm statistics for averaged weights: their mean over batches.

    All batches count alike; neither the momentum of the layers nor the values in
    `batch_stats` matter. A layer of momentum m returns m·old + (1-m)·(statistic of the
    batch). With old = 0 that is (1-m) times the batch's own statistic. m is measured: if
    old grows by 1, the result grows by m.

    What to watch: draw the batches as the training batches were drawn, and as large: the
    variance of a small batch is not that of the data. Statistics that take part in the
    forward pass, such as the vectors of a spectral norm, are no means over batches; a few
    passes bring them to the averaged weights. Keep them apart, as below.

    Args:
      apply_fn: (params, batch_stats, batch) -> the statistics after one forward pass in
        training mode, as a tree like `batch_stats`; also what a linen module's `apply`
        returns with mutable=["batch_stats"], (outputs, {"batch_stats": ...}). It is
        compiled.
      averaged_params: The weights to recompute the statistics for.
      batches: At least one; each is passed as `batch`, and the iterable is read once.
      batch_stats: The statistics so far, for their names, shapes and dtypes. Leaves that
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

        graphdef, params, stats, others = nnx.split(
            model, nnx.Param, nnx.BatchStat, ...)

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
    def forward(params: PyTree, stats: PyTree, batch: PyTree) -> PyTree:
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
        # The momenta are measured on the first batch and hold for all.
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
    # The mean is float32 at least; the statistics get their own dtypes back.
    return jax.tree.map(
        lambda old, new: new.astype(old.dtype) if _is_floating(old) else old,
        batch_stats,
        state.average,
    )


def _probe(scaled: Leaf) -> Leaf:
    """An old value to measure the momentum with, as large as the statistic itself."""
    # Much smaller, m · old would be lost in the statistic's rounding.
    if not _is_floating(scaled) or scaled.size == 0:
        return scaled
    size = jnp.max(jnp.abs(scaled))
    return jnp.full_like(scaled, jnp.where(size > 0, size, 1))


def _is_floating(leaf: Leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _kept_shares(of_zeros: PyTree, probes: PyTree, of_probes: PyTree) -> PyTree:
    """The momentum m of each leaf, from the layers' results for zeros and for probes."""

    def share(name: str, zero: Leaf, probe: Leaf, other: Leaf) -> float:
        if not _is_floating(zero) or zero.size == 0:
            return 0.0
        zero, probe, other = (np.asarray(x, np.float64) for x in (zero, probe, other))
        if not np.all(np.isfinite(zero)):
            raise ValueError(f"recalibrate: of the first batch, {name} is not finite.")
        grown = (other - zero) / probe
        m = float(np.median(grown))
        # In float32 m is known to 1e-7 or so, and a division by 1 - m enlarges the error.
        # Momenta are written with a few decimals, so the nearest such number is taken.
        if abs(m - round(m, 6)) < 5e-7:
            m = round(m, 6)
        # In evaluation mode the old value comes back, and m is 1. With another rule, or
        # if the pass uses the statistic, m differs from element to element.
        if not 0 <= m < 1 or np.ptp(grown) > 1e-4:
            raise ValueError(
                f"recalibrate: what apply_fn returns as {name} is not momentum · old + "
                "(1 - momentum) · new with one momentum in [0, 1): of what old grew by, "
                f"it kept {grown.min():.6g} to {grown.max():.6g}. Run the forward pass "
                "in training mode, and keep the statistics in float32."
            )
        return m

    return jax.tree.map(share, _names(of_zeros), of_zeros, probes, of_probes)


def _refuse_those_in_the_pass(
    forward: Forward, params: PyTree, stats: PyTree, batch: PyTree
) -> None:
    """Raises if the new values of some statistics depend on the old value of another.

    It starts from the user's own statistics: in a forward pass, zeros may make no sense.
    """
    leaves, treedef = jax.tree.flatten(stats)
    own = jax.tree.leaves(forward(params, stats, batch))
    found = []
    for i, name in enumerate(jax.tree.leaves(_names(stats))):
        if not _is_floating(leaves[i]) or leaves[i].size == 0:
            continue
        # Each element is changed by another amount: a spectral norm uses the direction of
        # its vector alone, so a multiple of the vector would change nothing.
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


def _names(stats: PyTree) -> PyTree:
    """The names of the statistics, as a tree like them."""
    names = ["/".join(keys) or "the statistic" for keys, _ in leaves_with_keys(stats)]
    return jax.tree.unflatten(jax.tree.structure(stats), names)
