"""Describes what a checkpoint holds, in numbers and names, without reading arrays."""

import glob
import math
from typing import NamedTuple

from etils import epath

from emaopt._beside import whole_trees
from emaopt._checks import check_text
from emaopt._paths import check_readable
from emaopt._profiles import decay_of
from emaopt._types import DecayLike, Json, Path
from emaopt._weights import MOST, WeightSummary, weight_summary
from emaopt.checkpoint import _files, _replacement, _selection, _sources, _timelines


class Leaf(NamedTuple):
    """An array on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int  # in memory


class AverageDescription(NamedTuple):
    """An average in a checkpoint."""

    name: str
    num_updates: int | None  # None if other code wrote it and does not say
    served: bool  # whether it stands under the parameters' names
    summary: WeightSummary | None  # of its weights, if its name tells its decay
    clock: str | None  # what its decay counts, such as "tokens"; None: updates
    elapsed: float | None  # the time on that clock


class Description(NamedTuple):
    """What `describe` returns.

    parameters: the keys that lead to the parameters, joined with "/". served: which
    weights stand there, in words. beside: the keys that lead to what else is served, such
    as "batch_stats", all of it or single arrays. leaves: (name, dtype, shape, nbytes) of
    each array. averages: (name, num_updates, served, summary, clock, elapsed) of each
    average; the summary is a `WeightSummary` if its name tells its decay, else None. With
    a clock, its ages are in units of that, effective_iterates is NaN, for it depends on
    the length of each step, and the time is `elapsed`. record: how `combine` and its kin
    made the checkpoint, else empty.
    """

    path: str
    parameters: str  # the names that lead to them, joined with "/"; several with ", "
    served: str  # which weights stand under these names, in words
    beside: list[str]  # names of what else is served, with raw values of its own
    leaves: list[Leaf]
    averages: list[AverageDescription]
    record: Json  # how a combination was made; of other checkpoints, empty
    nbytes_on_disk: int


@_replacement.whole
def describe(path: Path, *, at: str | None = None) -> Description:
    """Describes a checkpoint: its arrays, its averages, and which weights it serves.

    Reads metadata and step counters, and no other arrays.

    Args:
      path: A checkpoint, as for `load_averaged`, or any that Orbax wrote.
      at: Where the parameters are, as for `combine`. None: the parameters of all averages
        in it.

    Returns:
      A `Description`. The summary of an average (EMA) is that of its decay β alone:
      checkpoints do not record `every` and `start`.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      ValueError: If the checkpoint is incomplete or damaged, or has nothing at `at`.
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
    files = _sources.open_source("describe", path, at=at)
    ways, served = _selection.what_stands("describe", files, at)
    leaves = []
    for names, leaf in _files.all_leaves(files).items():
        if _files.is_added(files, names):
            continue
        kind = str(getattr(leaf, "dtype", "text"))
        shape, size = _files.shape(leaf), _files.nbytes(leaf)
        name = _files.in_file(files, names)
        leaves.append(Leaf(name, kind, shape, size))
    averages = []
    for one in _selection.averages_in(files):
        _, updates, elapsed = _timelines.snapshot("describe", files, one)
        summary = None
        # Nothing on disk tells a decay but a name that somebody chose, as "power:0.1".
        if one.names in files.found and files.found[one.names].updates is None:
            updates = None
        elif (spec := _selection.decay_said(one.names)) is not None:
            if elapsed is None:
                summary = _summary(decay_of(spec), updates, one.debias)
            # Of time in other than whole units, as of epochs, sums have no closed form.
            elif elapsed.is_integer():
                summary = _summary(decay_of(spec), int(elapsed), one.debias)
                # It depends on how long each step was, which no file says.
                summary = summary and summary._replace(effective_iterates=math.nan)
        name, clock = "/".join(one.names), one.elapsed[-1] if one.elapsed else None
        averages.append(
            AverageDescription(name, updates, one.served, summary, clock, elapsed)
        )
    return Description(
        str(files.path),
        ", ".join(map("/".join, ways)),
        served,
        _beside(files),
        leaves,
        averages,
        files.combination or {},
        _size(files.path),
    )


def _beside(files: _files.Files) -> list[str]:
    """The names of what is served beside averages: of trees, where it is all of them."""
    present = _files.all_leaves(files).keys()
    if files.combination:
        return sorted(map("/".join, files.combination.get("beside", ())))
    beside = files.marker.beside & present if files.marker else ()  # items may be missing
    return sorted(map("/".join, whole_trees(beside, present)))


def _summary(decay: DecayLike, updates: int, debias: bool) -> WeightSummary | None:
    """The summary of a decay's weights, or None if it would take too long."""
    try:
        return weight_summary(decay, updates, debias=debias)
    except ValueError:
        # A decay without a closed form, after too many updates to go through.
        if updates <= MOST:
            raise
        return None


def _size(path: epath.Path) -> int:
    """The bytes of the files in a directory, and in those below it."""
    if path.is_dir():
        return sum(map(_size, path.iterdir()))
    if path.exists():
        return path.stat().length
    # What TensorFlow calls a checkpoint's path is the beginning of its files' names.
    return sum(map(_size, path.parent.glob(f"{glob.escape(path.name)}.*")))
