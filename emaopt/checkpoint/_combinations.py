"""Checkpoints of a run, added up: by given coefficients, or by a profile."""

from collections.abc import Iterable, Sequence

from emaopt._advice import named
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
from emaopt._types import DTypeLike, Json, Path, Report, Vector
from emaopt.checkpoint import _merge, _record, _replacement, _restore, _selection
from emaopt.checkpoint._merge import Progress


@_replacement.whole
def combine(
    paths: Sequence[Path],
    coefficients: Vector,
    out: Path,
    *,
    weights: str | None = None,
    at: str | None = None,
    dtype: DTypeLike | None = None,
    force: bool = False,
    custom_metadata: Json | None = None,
    progress: Progress = lambda done, total: None,
    report: Report = _restore.log_warning,
) -> None:
    """Writes Σ_i c_i θ_i of the weights in several checkpoints, as a checkpoint.

    Leaves are summed one after another: memory holds a few arrays, or about 100 MB of
    small ones, not a model. Sums are in float64; the result has the leaves' dtypes.
    Leaves that are not floating (step counters) are the last checkpoint's. Leaves that
    weigh 0 are not read.

    The result is an Orbax checkpoint of the parameters alone, under their original names,
    as NumPy arrays, so that it restores on any devices; `load_averaged` reads it as well.
    custom_metadata["emaopt_combination"] says what it was made of.

    Here the caller chooses the coefficients; `average` and `synthesize` compute them from
    a profile. `posthoc.combine` adds up trees in memory.

    Args:
      paths: Checkpoints of emaopt or of Orbax, oldest first; of a CheckpointManager, the
        directories of steps.
      coefficients: float [n].
      out: Directory to make. It never holds half a checkpoint.
      weights: None: the served weights, under the parameters' names: in a checkpoint of
        emaopt the averages. "raw": the raw parameters. "average": the only average,
        wherever it stands. Else the average of that name.
      at: The names that lead to the parameters, as in "model/params", or to a part of
        them. None: the parameters of the average, or "params", or all of a checkpoint
        without an optimizer's state.
      dtype: Floating dtype to cast floating arrays to. None: as saved.
      force: Replace what stands at `out`, as `save` does; never one of `paths`.
      custom_metadata: Further entries for the record.
      progress: Called with the bytes read so far and the bytes to read in all.
      report: Called with a sentence for each leaf that comes out with NaN or inf.

    Raises:
      FileNotFoundError: If there is no checkpoint at a path.
      ValueError: If two checkpoints differ in names, shapes, dtypes or in which weights
        are served (the message names both); if one is incomplete or damaged, or lacks the
        weights; if `out` exists, or holds one of `paths`.
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
    # These entries describe the result, and its readers rely on them.
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
    paths: Sequence[Path],
    out: Path,
    *,
    profile: str = "uniform",
    steps: Sequence[int] | None = None,
    weights: str | None = None,
    at: str | None = None,
    dtype: DTypeLike | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    report: Report = _restore.log_warning,
) -> dict[str, float]:
    """Averages checkpoints of a run, in place of a decay of its learning rate.

    Profiles:
      "uniform": all weigh the same, as in LAWA and PMA.
      "linear:f", "cosine:f", "1-sqrt:f": as if the learning rate had been brought to 0 in
        that shape over the last fraction f of the run, as in WSM
        (`posthoc.annealing_weights`). Without ":f", from the oldest checkpoint on.
      "ema:β", "half-life:steps", "power:σ_rel", "polynomial:η", "warmup:β": what comes
        near to that average of all steps up to the newest checkpoint's.
    All but the first weigh the steps of training. The weight of a step is split between
    the two checkpoints around it, and the nearer one gets more.

    Args:
      paths: Checkpoints, or directories of a CheckpointManager for all of its steps. They
        are sorted by their steps if these are known, and must else be oldest first.
      out: Directory to make, as for `combine`.
      profile: One of the above.
      steps: The step of each path. None: the numbers in which the paths end.
      weights: As for `combine`, as are the other arguments.

    Returns:
      {checkpoint: its weight}, oldest first.

    Raises:
      FileNotFoundError, ValueError: As `combine` does; if there is no such profile, or it
        needs steps that are not known, or two checkpoints have the same step.
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
        raise named("average", error) from None
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
    function: str,
    out: Path,
    at: object,
    dtype: object,
    force: object,
    progress: object,
    report: object,
) -> None:
    """Checks the arguments that `combine`, `average` and `synthesize` have in common."""
    check_writable(function, "out", out)
    check_text(function, "at", at, optional=True)
    check_dtype(function, "dtype", dtype)
    check_flag(function, "force", force)
    check_callable(function, "progress", progress, 2)
    check_callable(function, "report", report, 1)


def _checked_paths(function: str, paths: Iterable[Path]) -> list[Path]:
    check_iterable(function, "paths", paths, "paths")
    # An iterator gives its paths only once.
    paths = [*paths]
    for path in paths:
        check_readable(function, "each of paths", path)
    return paths
