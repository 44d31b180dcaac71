"""Combinations of checkpoints, leaf by leaf."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from emaopt._checks import check_dtype
from emaopt._combination import add, weighted_sum
from emaopt._names import nested, own_values
from emaopt._types import DTypeLike, Json, Path, Report
from emaopt.checkpoint import _files, _orbax, _replacement, _selection, _stream, _trees
from emaopt.checkpoint._files import Names
from emaopt.checkpoint._selection import Weights

PREFIX = ("params",)  # where the leaves of a copy stand

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
    names: Mapping[Names, Names] | None = None,
) -> None:
    """Writes Σ_i c_i weights_i as a checkpoint of the parameters alone.

    The last weights are the newest: leaves that are not averaged are taken from them.
    With `names`, the only weights are copied, all their bits, to leaves of these names.
    """
    cast = caster(function, dtype)
    _selection.check_alike(function, weights)
    newest = weights[-1]
    _selection.refuse_optimizer_state(function, newest)
    # Through a link, the directory that it leads to is replaced: it must be no source.
    place = _replacement.followed(_files.absolute(out))
    for one in weights:
        refuse_own(function, place, one.files.path, "combined")
    empty = _selection.empty(newest)
    # Orbax has no files for arrays of size 0; their shapes stand in the record.
    full = [n for n, there in newest.places.items() if there not in empty]
    if not full:
        raise ValueError(f"{function}: {newest.files.path} holds no weights.")
    # What weighs 0 is not opened, except for the newest, which has the other leaves.
    opened = {
        i: _stream.stored(function, one.files, [one.places[n] for n in full])
        for i, one in enumerate(weights)
        if coefficients[i] != 0 or one is newest
    }
    leaves = opened[len(weights) - 1]
    summed = [
        names is None
        and weighted_sum((0,), leaf.dtype) is not None
        and name not in newest.kept
        for name, leaf in zip(full, leaves, strict=True)
    ]
    pieces = _sums(function, full, opened, summed, coefficients, cast, progress, report)
    blocks = [_stream.block_of(alike) for alike in zip(*opened.values(), strict=True)]
    pending = {
        n: _orbax.Pending(n, leaf.shape, cast(leaf.dtype), block)
        for n, leaf, block in zip(full, leaves, blocks, strict=True)
    }
    nothing = {n: np.zeros((0,)) for n in newest.places.keys() - set(full)}
    prefix = newest.prefix if names is None else PREFIX

    def named(name: Names) -> Names:
        return prefix + (name if names is None else names[name])

    if names is None:
        tree = _selection.containers(newest, pending | nothing)
    else:
        leaves_by_name = {
            _files.shown(newest.files, named(n), newest.places[n]): leaf
            for n, leaf in (pending | nothing).items()
        }
        tree = _trees.without_empty(nested(leaves_by_name))
    known = newest.files.values
    own = [named(n) for n, there in newest.places.items() if there in known]
    said = {
        "params": list(prefix),
        "weights": newest.said,
        "checkpoints": [str(one.files.path) for one in weights],
        "coefficients": [float(c) for c in coefficients],
        **_trees.values(own, own_values(tree)),
        **record,
    }
    with _replacement.taking_place(
        function, place, force=force, report=report
    ) as written:
        _stream.write(written, tree, pieces, said, named, place)
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
) -> Iterator[list[tuple[Names, _stream.Piece, np.ndarray]]]:
    """The pieces of the combination, batch by batch, while the next ones are read."""
    newest = max(opened)
    leaves = opened[newest]
    batches = list(_stream.batches(*opened.values()))

    def wanted(i: int, batch: list[_stream.Piece]) -> list[_stream.Piece]:
        """The pieces of a batch that are read from checkpoint i."""
        return [
            piece
            for piece in batch
            if (coefficients[i] if summed[piece.leaf] else i == newest) != 0
        ]

    # The reads run ahead in the order of the loops below: all checkpoints of each batch.
    plan = [(i, wanted(i, batch)) for batch in batches for i in opened]
    total = sum(piece.nbytes for _, pieces in plan for piece in pieces)
    arrays = _stream.arrays(
        function, [([opened[i][p.leaf] for p in pieces], pieces) for i, pieces in plan]
    )
    done = 0
    odd: set[Names] = set()
    for batch in batches:
        sums = {
            piece: weighted_sum(piece.shape, leaves[piece.leaf].dtype)
            for piece in batch
            if summed[piece.leaf]
        }
        values = {}
        for i in opened:
            for piece, array in zip(wanted(i, batch), next(arrays), strict=True):
                if summed[piece.leaf]:
                    add(sums[piece], array, coefficients[i])
                else:
                    values[piece] = array
                done += piece.nbytes
            progress(done, total)
        for piece in batch:
            leaf, name = leaves[piece.leaf], names[piece.leaf]
            if (wide := sums.pop(piece, None)) is not None:
                # A sum that overflows in its leaf's dtype is reported by name instead.
                with np.errstate(over="ignore"):
                    values[piece] = wide.astype(cast(leaf.dtype)).reshape(piece.shape)
                if name not in odd and not np.isfinite(values[piece]).all():
                    odd.add(name)
                    shown = _files.shown(leaf.files, name, leaf.names)
                    report(f"{'/'.join(shown)} holds values that are not finite")
            values[piece] = values[piece].astype(cast(leaf.dtype), copy=False)
        yield [(names[piece.leaf], piece, values.pop(piece)) for piece in batch]


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
