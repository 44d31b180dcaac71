"""Combinations of checkpoints, leaf by leaf."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from emaopt._checks import check_dtype
from emaopt._combination import add, weighted_sum
from emaopt._names import own_values
from emaopt._types import DTypeLike, Json, Path, Report
from emaopt.checkpoint import _files, _orbax, _replacement, _selection, _stream, _trees
from emaopt.checkpoint._files import Names
from emaopt.checkpoint._selection import Weights

Progress = Callable[[int, int], Any]  # bytes done, bytes in all


def combined(
    function: str,
    weights: Sequence[Weights],
    coefficients: np.ndarray,
    out: Path,
    *,
    dtype: DTypeLike | None,
    force: bool,
    record: Json,
    progress: Progress,
    report: Report,
) -> None:
    """Writes Σ_i c_i weights_i as a checkpoint of the parameters alone.

    The last weights are the newest: leaves that are not averaged are taken from them.
    """
    cast = caster(function, dtype)
    _selection.check_alike(function, weights)
    newest = weights[-1]
    _selection.refuse_optimizer_state(function, newest)
    # Through a link, the directory that it leads to is replaced: it must be no source.
    place = _replacement.followed(_files.absolute(out))
    for one in weights:
        refuse_own(function, place, one.files.path, "combined")
    empty = newest.files.marker.empty if newest.files.marker else {}
    # Orbax has no files for arrays of size 0; their shapes stand in the record.
    names = [n for n, there in newest.places.items() if there not in empty]
    if not names:
        raise ValueError(f"{function}: {newest.files.path} holds no weights.")
    # What weighs 0 is not opened, except for the newest, which has the other leaves.
    opened = {
        i: _stream.stored(function, one.files, [one.places[n] for n in names])
        for i, one in enumerate(weights)
        if coefficients[i] != 0 or one is newest
    }
    leaves = opened[len(weights) - 1]
    summed = [
        weighted_sum(leaf.shape, leaf.dtype) is not None and name not in newest.kept
        for name, leaf in zip(names, leaves, strict=True)
    ]
    arrays = _sums(function, names, opened, summed, coefficients, cast, progress, report)
    pending = {
        n: _orbax.Pending(n, leaf.shape, cast(leaf.dtype))
        for n, leaf in zip(names, leaves, strict=True)
    }
    nothing = {n: np.zeros((0,)) for n in newest.places.keys() - set(names)}
    tree = _selection.containers(newest, pending | nothing)
    known = newest.files.values
    own = [newest.prefix + n for n, there in newest.places.items() if there in known]
    said = {
        "params": list(newest.prefix),
        "weights": newest.said,
        "checkpoints": [str(one.files.path) for one in weights],
        "coefficients": [float(c) for c in coefficients],
        **_trees.values(own, own_values(tree)),
        **record,
    }
    with _replacement.taking_place(
        function, place, force=force, report=report
    ) as written:
        _stream.write(written, tree, arrays, said, newest.prefix, place)
        # Before the result takes its place: a replaced source may have been half read.
        _replacement.refuse_replaced()


def _sums(
    function: str,
    names: Sequence[Names],
    opened: dict[int, list[_stream.Stored]],
    summed: Sequence[bool],
    coefficients: np.ndarray,
    cast: Callable[[np.dtype], np.dtype],
    progress: Progress,
    report: Report,
) -> Iterator[dict[Names, np.ndarray]]:
    """The leaves of the combination, batch by batch, while the next ones are read."""
    newest = max(opened)
    leaves = opened[newest]

    def wanted(i: int, batch: list[int]) -> list[int]:
        """The leaves of a batch that are read from checkpoint i."""
        return [k for k in batch if (coefficients[i] if summed[k] else i == newest) != 0]

    # The reads run ahead in the order of the loops below: all checkpoints of each batch.
    plan = [(i, wanted(i, b)) for b in _stream.batches(leaves) for i in opened]
    total = sum(leaves[k].nbytes for _, rows in plan for k in rows)
    arrays = _stream.prefetched(
        functools.partial(_stream.read, function, [opened[i][k] for k in rows])
        for i, rows in plan
    )
    done = 0
    for batch in _stream.batches(leaves):
        sums = {k: weighted_sum(leaves[k].shape, leaves[k].dtype) for k in batch}
        values = {}
        for i in opened:
            for k, array in zip(wanted(i, batch), next(arrays), strict=True):
                if summed[k]:
                    add(sums[k], array, coefficients[i])
                else:
                    values[k] = array
                done += leaves[k].nbytes
            progress(done, total)
        for k in batch:
            if (wide := sums.pop(k)) is not None and summed[k]:
                # A sum that overflows in its leaf's dtype is reported by name instead.
                with np.errstate(over="ignore"):
                    values[k] = wide.astype(cast(leaves[k].dtype))
                values[k] = values[k].reshape(leaves[k].shape)
                if not np.isfinite(values[k]).all():
                    shown = _files.shown(leaves[k].files, names[k], leaves[k].names)
                    report(f"{'/'.join(shown)} holds values that are not finite")
        yield {
            names[k]: values[k].astype(cast(leaves[k].dtype), copy=False) for k in batch
        }


def refuse_own(function: str, out: Path, source: Path, what_is: str) -> None:
    """Raises if what is written would replace what is read, or stand in it."""
    if _holds(source, out) or _holds(out, source):
        raise ValueError(
            f"{function}: {out} is, holds, or stands in what is {what_is}: {source}. "
            "Write it elsewhere."
        )


def _holds(outer: Path, inner: Path) -> bool:
    """Whether a path is another, or a directory above it, however they are spelled."""
    outer, inner = os.fspath(outer), os.path.realpath(os.fspath(inner))
    above = inner
    while True:
        if above == os.path.realpath(outer):
            return True
        with contextlib.suppress(OSError):  # such as names that differ in case alone
            if os.path.samefile(above, outer):
                return True
        if (parent := os.path.dirname(above)) == above:
            return False
        above = parent


def caster(function: str, dtype: DTypeLike | None) -> Callable[[np.dtype], np.dtype]:
    """What dtype a leaf is written in: a floating one in `dtype`, if there is one."""
    if (wanted := check_dtype(function, "dtype", dtype)) is None:
        return lambda kind: kind
    return lambda kind: wanted if jnp.issubdtype(kind, jnp.floating) else kind
