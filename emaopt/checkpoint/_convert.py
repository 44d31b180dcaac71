"""Weights of any format as a checkpoint of Orbax's."""

from collections.abc import Mapping

import numpy as np

from emaopt._checks import check_mapping, check_text
from emaopt._names import Names, is_below
from emaopt._paths import check_readable
from emaopt._types import DTypeLike, Path, Report
from emaopt.checkpoint import (
    _merge,
    _renaming,
    _replacement,
    _restore,
    _selection,
    _sources,
)
from emaopt.checkpoint._combinations import check_merging
from emaopt.checkpoint._merge import Progress


@_replacement.whole
def convert(
    source: Path,
    out: Path,
    *,
    layout: str | None = _sources.AUTO,
    weights: str | None = "served",
    rename: Mapping[str, str] | None = None,
    at: str | None = None,
    dtype: DTypeLike | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    report: Report = _restore.log_warning,
) -> str:
    """Writes the weights of a checkpoint of any format as one of Orbax's.

    The result is {"params": parameters}, the averages under the parameters' names. Every
    bit is kept, and memory holds a few pieces of arrays at a time, not a model.

    Args:
      source: A checkpoint, as for `adopt`.
      out: Directory to make, as for `combine`.
      layout: As for `adopt`.
      weights: "served": the average, wherever it stands, or the parameters if the source
        holds no average. "raw": the raw parameters. "average": the only average. None:
        what stands under the parameters' names. Else the average of that name.
      rename: {their name: your name} of parameters, or of what names begin with, joined
        with "/", as for `adopt`.
      at: Where the parameters stand in the source, as for `combine`.
      dtype: Floating dtype to cast floating arrays to. None: as saved.
      force, progress: As for `combine`.
      report: Called with a sentence on what was left out: the optimizer's state, and all
        that is not below the parameters, such as batch statistics.

    Returns:
      Which weights were written, in words.

    Raises:
      FileNotFoundError: If nothing is at `source`.
      ValueError: If it holds several averages, or not the weights that are asked for; if
        `out` exists; if the files are damaged.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, optax, orbax.checkpoint as ocp, tempfile
      >>> theirs = {"params": {"w": jnp.ones(2)}, "ema_params": {"w": jnp.zeros(2)}}
      >>> path = tempfile.mkdtemp()
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     checkpointer.save(path + "/theirs", theirs)
      >>> print(convert(path + "/theirs", path + "/mine", rename={"w": "dense/kernel"}))
      the averages of ema_params
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     print(checkpointer.restore(path + "/mine"))
      {'params': {'dense': {'kernel': array([0., 0.], dtype=float32)}}}
    """
    check_readable("convert", "source", source)
    check_merging("convert", out, at, dtype, force, progress, report)
    check_text("convert", "layout", layout, optional=True)
    check_text("convert", "weights", weights, optional=True)
    check_mapping("convert", "rename", rename, optional=True, of_text=True)
    found = _selection.select("convert", source, weights, at, layout=layout)
    names: Mapping[Names, Names] = _renaming.renamed(
        "convert", found.files.path, found.prefix, list(found.places), rename or {}
    )
    inside = [*found.files.found, found.prefix]
    left = {n[0] for n in found.files.saved if not any(is_below(n, w) for w in inside)}
    if left and found.prefix:
        report(f"convert: {found.files.path}: left out {', '.join(sorted(left))}.")
    _merge.combined(
        "convert",
        [found],
        np.ones(1),
        out,
        dtype=dtype,
        force=force,
        record={"converted": True},
        progress=progress,
        report=report,
        names=names,
    )
    return found.said
