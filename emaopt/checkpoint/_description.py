"""What a checkpoint holds, in numbers and names; arrays are not read."""

import os
from typing import Any, NamedTuple

from emaopt._checks import check_text
from emaopt._paths import check_readable
from emaopt._profiles import decay_of
from emaopt._weights import MOST, WeightSummary, weight_summary
from emaopt.checkpoint import _files, _replacement, _selection, _synthesis


class Leaf(NamedTuple):
    """An array on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int  # in memory


class AverageDescription(NamedTuple):
    """An average in a checkpoint."""

    name: str
    num_updates: int
    served: bool  # whether it stands under the parameters' names
    summary: WeightSummary | None  # of its profile, if its name says its decay


class Description(NamedTuple):
    """What `describe` finds."""

    path: str
    parameters: str  # the names that lead to them, joined with "/"; of several with ", "
    served: str  # which weights stand there, in words
    leaves: list[Leaf]
    averages: list[AverageDescription]
    record: dict[str, Any]  # what a combination was made of, else empty
    nbytes_on_disk: int


@_replacement.whole
def describe(path: str | os.PathLike, *, at: str | None = None) -> Description:
    """Describes a checkpoint: its arrays, its averages, and what is served.

    Reads metadata and step counters.

    Args:
      path: A checkpoint, as for `load_averaged`, or any of Orbax's.
      at: Where the parameters stand, as for `combine`; of several averages' parameters,
        without it, all.

    Returns:
      A `Description`. The summary of an average is that of its decay without `every` and
      `start`, which no checkpoint tells.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      ValueError: If it is not complete or damaged, or has nothing at `at`.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt, jax.numpy as jnp, optax, tempfile
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params = {"w": jnp.ones(2)}
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> emaopt.checkpoint.save(path, {"params": params, "opt_state": tx.init(params)})
      >>> print(describe(path).served)
      the averages of opt_state/averaging
    """
    check_readable("describe", "path", path)
    check_text("describe", "at", at, optional=True)
    files = _files.open_files("describe", path, at=at, option="at")
    ways, served = _selection.what_stands("describe", files, at)
    leaves = []
    for names, leaf in _files.all_leaves(files).items():
        kind = str(getattr(leaf, "dtype", "text"))
        shape, size = _files.shape(leaf), _files.nbytes(leaf)
        name = "/".join(_files.shown(files, names))
        leaves.append(Leaf(name, kind, shape, size))
    averages = []
    for one in _selection.averages_in(files):
        updates = _synthesis.updates("describe", files, one)
        summary = None
        if (spec := _selection.decay_said(one.names)) is not None:
            summary = _summary(decay_of(spec), updates, one.debias)
        name = "/".join(one.names)
        averages.append(AverageDescription(name, updates, one.served, summary))
    return Description(
        str(files.path),
        ", ".join(map("/".join, ways)),
        served,
        leaves,
        averages,
        files.combination or {},
        _size(files.path),
    )


def _summary(decay: Any, updates: int, debias: bool) -> WeightSummary | None:
    try:
        return weight_summary(decay, updates, debias=debias)
    except ValueError:
        if updates <= MOST:
            raise
        return None  # of a decay without a closed form, nothing to fail for


def _size(path: Any) -> int:
    """The bytes of the files in a directory."""
    return sum(map(_size, path.iterdir())) if path.is_dir() else path.stat().length
