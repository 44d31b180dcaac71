"""Checkpoints of a run, added up: by given coefficients, or by a profile."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from emaopt._checks import (
    check_callable,
    check_dtype,
    check_flag,
    check_integer,
    check_iterable,
    check_json,
    check_text,
    check_vector,
)
from emaopt._paths import check_readable, check_writable
from emaopt._profiles import BadProfile, merge_weights
from emaopt.checkpoint import _merge, _record, _replacement, _restore, _selection
from emaopt.checkpoint._merge import Progress


@_replacement.whole
def combine(
    paths: Sequence[str | os.PathLike],
    coefficients: Any,
    out: str | os.PathLike,
    *,
    weights: str | None = None,
    at: str | None = None,
    dtype: Any = None,
    force: bool = False,
    custom_metadata: dict[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
    report: Callable[[str], Any] = _restore.log_warning,
) -> None:
    """Writes Σ_i c_i θ_i of the weights in several checkpoints, as a checkpoint.

    It goes leaf by leaf: memory holds a few arrays, or about 100 MB of small ones, not a
    model. Sums are in float64, the result has the leaves' dtypes. What is not floating
    (step counters) is taken from the last checkpoint; what weighs 0 is not read.

    The result is a checkpoint of Orbax's of the parameters alone, under their original
    names, as NumPy arrays, so that it restores on any devices. `load_averaged` reads it,
    too. custom_metadata["emaopt_combination"] says what it was made of.

    The coefficients are yours: `average` and `synthesize` choose them by a profile, and
    `posthoc.combine` adds up trees in memory.

    Args:
      paths: Checkpoints of emaopt's or of Orbax's, oldest first; of a CheckpointManager,
        directories of steps.
      coefficients: float [n].
      out: Directory to make. It never holds half a checkpoint.
      weights: None: what stands under the parameters' names, in a checkpoint of emaopt's
        the averages. "raw": the raw parameters. "average": the only average, wherever it
        stands. Else the average of that name.
      at: The names that lead to the parameters, as in "model/params", or to a part of
        them. None: found by the average of them, or "params", or all of a checkpoint that
        holds no optimizer's state.
      dtype: Floating dtype to cast floating arrays to. None: as saved.
      force: Replace what stands at `out`, as `save` does; never what is combined.
      custom_metadata: Further entries for the record.
      progress: Called with the bytes that are read and those that there are.
      report: Called with a sentence for each leaf that comes out with NaN or inf.

    Raises:
      FileNotFoundError: If there is no checkpoint at a path.
      ValueError: If checkpoints differ in names, shapes, dtypes or which weights stand
        under the names (both are named), are not complete or damaged, do not hold the
        weights; or if `out` exists, or holds what is combined.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, orbax.checkpoint as ocp, tempfile
      >>> run = tempfile.mkdtemp()
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     for step in (1, 2):
      ...         params = {"w": jnp.full(2, step, jnp.float32)}
      ...         checkpointer.save(f"{run}/{step}", {"params": params})
      >>> combine([f"{run}/1", f"{run}/2"], [0.5, 0.5], f"{run}/mean")
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     print(checkpointer.restore(f"{run}/mean")["params"])
      {'w': array([1.5, 1.5], dtype=float32)}
    """
    check_merging("combine", out, at, dtype, force, progress, report)
    paths = _checked_paths("combine", paths)
    check_text("combine", "weights", weights, optional=True)
    check_json("combine", "custom_metadata", custom_metadata)
    if odd := sorted(_record.OF_COMBINATIONS.intersection(custom_metadata or {})):
        raise ValueError(
            f"combine: custom_metadata has {odd}, which the record has of its own; take "
            "other keys."
        )
    coefficients = check_vector("combine", "coefficients", coefficients)
    if not len(paths) or coefficients.shape != (len(paths),):
        raise ValueError(
            f"combine: give a coefficient for each checkpoint, got {len(paths)} of these "
            f"and coefficients of shape {coefficients.shape}."
        )
    _merge.combined(
        "combine",
        _selection.select_alike("combine", paths, weights, at),
        coefficients,
        out,
        dtype=dtype,
        force=force,
        record=custom_metadata or {},
        progress=progress,
        report=report,
    )


@_replacement.whole
def average(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    profile: str = "uniform",
    steps: Sequence[int] | None = None,
    weights: str | None = None,
    at: str | None = None,
    dtype: Any = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    report: Callable[[str], Any] = _restore.log_warning,
) -> dict[str, float]:
    """Averages checkpoints of a run, instead of a decay of its learning rate.

    Profiles:
      "uniform": all alike, as LAWA and PMA do.
      "linear:f", "cosine:f", "1-sqrt:f": as if the learning rate had been brought to 0 in
        that way over the last fraction f of the run, as WSM does
        (`posthoc.annealing_weights`). Without ":f", from the oldest checkpoint on.
      "ema:β", "half-life:steps", "power:σ_rel", "polynomial:η", "warmup:β": as near to
        that average of all the steps up to the newest as these checkpoints allow.
    All but the first weigh the steps of training; an iterate's weight goes to
    the two checkpoints around it, the nearer one getting more.

    Args:
      paths: Checkpoints, or directories of a CheckpointManager: all its steps. In the
        order of their steps if these are known, else oldest first.
      out: Directory to make, as for `combine`.
      profile: One of the above.
      steps: The step of each path. None: the numbers in which the paths end.
      weights: As for `combine`, as are the other arguments.

    Returns:
      {checkpoint: its weight}, oldest first.

    Raises:
      FileNotFoundError, ValueError: As `combine` does; if the profile is none, or needs
        steps and there are none, or two checkpoints have the same.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, orbax.checkpoint as ocp, tempfile
      >>> run = tempfile.mkdtemp()
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     for step in (100, 200, 300):
      ...         checkpointer.save(f"{run}/{step}", {"params": jnp.ones(2)})
      >>> weights = average([run], f"{run}/mean", profile="linear")
      >>> print(*[f"{weight:.2f}" for weight in weights.values()])
      0.25 0.50 0.25

    References:
      Kaddour, 2022, Stop wasting my time! Saving days of ImageNet and BERT training with
      latest weight averaging, https://arxiv.org/abs/2209.14981
      Li et al., 2025, Model merging in pre-training of large language models,
      https://arxiv.org/abs/2505.12082
      Tian et al., 2025, WSM: decay-free learning rate schedule via checkpoint merging,
      https://arxiv.org/abs/2507.17634
    """
    check_merging("average", out, at, dtype, force, progress, report)
    paths = _checked_paths("average", paths)
    check_text("average", "profile", profile)
    if steps is not None:
        check_iterable("average", "steps", steps, "whole numbers")
        steps = [*steps]
        for step in steps:
            check_integer("average", "each of steps", step, 0)
    check_text("average", "weights", weights, optional=True)
    found, numbers = _selection.in_order("average", paths, steps, report)
    try:
        coefficients = merge_weights(profile, len(found), numbers)
    except BadProfile as error:
        raise BadProfile(f"average: {error}") from None
    _merge.combined(
        "average",
        _selection.select_alike("average", found, weights, at),
        coefficients,
        out,
        dtype=dtype,
        force=force,
        record={"profile": profile},
        progress=progress,
        report=report,
    )
    pairs = zip(found, coefficients, strict=True)
    return {str(path): float(coefficient) for path, coefficient in pairs}


def check_merging(
    function: str, out: Any, at: Any, dtype: Any, force: Any, progress: Any, report: Any
) -> None:
    """Checks what all three take."""
    check_writable(function, "out", out)
    check_text(function, "at", at, optional=True)
    check_dtype(function, "dtype", dtype)
    check_flag(function, "force", force)
    check_callable(function, "progress", progress, 2)
    check_callable(function, "report", report, 1)


def _checked_paths(function: str, paths: Any) -> list[Any]:
    check_iterable(function, "paths", paths, "paths")
    paths = [*paths]
    for path in paths:
        check_readable(function, "each of paths", path)
    return paths
