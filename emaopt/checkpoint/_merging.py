"""Combinations of checkpoints, and the export of one, leaf by leaf."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from emaopt._combining import add, weighted_sum
from emaopt._names import own_values
from emaopt._writing import (
    is_url,
    making_parents,
    own_name,
    refuse_existing,
    undisturbed,
    writing,
)
from emaopt.checkpoint import _files, _replacing, _selecting, _streaming, _trees
from emaopt.checkpoint._files import Names
from emaopt.checkpoint._selecting import Weights

Progress = Callable[[int, int], Any]  # bytes done, bytes in all

_SAFETENSORS = {
    np.dtype(kind): name
    for kind, name in {
        np.bool_: "BOOL",
        np.uint8: "U8",
        np.int8: "I8",
        jnp.float8_e4m3fn: "F8_E4M3",
        jnp.float8_e5m2: "F8_E5M2",
        np.uint16: "U16",
        np.int16: "I16",
        np.float16: "F16",
        jnp.bfloat16: "BF16",
        np.uint32: "U32",
        np.int32: "I32",
        np.float32: "F32",
        np.uint64: "U64",
        np.int64: "I64",
        np.float64: "F64",
        np.complex64: "C64",
    }.items()
}


def combined(
    function: str,
    weights: Sequence[Weights],
    coefficients: np.ndarray,
    out: str | os.PathLike,
    *,
    dtype: Any,
    force: bool,
    record: dict[str, Any],
    progress: Progress,
    report: Callable[[str], Any],
) -> None:
    """Writes Σ_i c_i weights_i as a checkpoint of the parameters alone.

    The last one is the newest: what is not averaged is taken from it.
    """
    cast = _cast(function, dtype)
    _selecting.check_alike(function, weights)
    newest = weights[-1]
    _selecting.refuse_optimizer_state(function, newest)
    place = _replacing.followed(_files.absolute(out))
    for one in weights:
        if _holds(place, one.files.path):
            raise ValueError(
                f"{function}: {place} is, or holds, what is combined: {one.files.path}. "
                "Write it elsewhere."
            )
    if place.exists() and not force:
        raise ValueError(
            f"{function}: {place} already exists; pass force=True to replace it."
        )
    empty = newest.files.marker.empty if newest.files.marker else {}
    names = [n for n, there in newest.places.items() if there not in empty]
    if not names:
        raise ValueError(f"{function}: {newest.files.path} holds no weights.")
    opened = {
        i: _streaming.stored(function, one.files, [one.places[n] for n in names])
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
        n: _streaming.Pending(n, leaf.shape, cast(leaf.dtype))
        for n, leaf in zip(names, leaves, strict=True)
    }
    nothing = {n: np.zeros((0,)) for n in newest.places.keys() - set(names)}
    # Under a name of its own: others may be making the same, or a save be under way.
    written = place.parent / os.path.basename(own_name(place.name))
    tree = _selecting.containers(newest, pending | nothing)
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
    with making_parents(place):
        _streaming.write(written, tree, arrays, said, newest.prefix, place)
        with undisturbed():
            _put(function, written, place, force=force, report=report)


def _put(
    function: str, written: Any, place: Any, *, force: bool, report: Callable[[str], Any]
) -> None:
    """Gives what was written its name."""
    try:
        _replacing.refuse_replaced()
    except ValueError:
        written.rmtree()
        raise
    if place.exists() and not force:
        written.rmtree()
        raise ValueError(f"{function}: {place} has come to exist; it was left as it is.")
    _replacing.settle(place, report)
    if place.exists():
        _replacing.replace(place, written)
    else:
        written.rename(place)


def _sums(
    function: str,
    names: Sequence[Names],
    opened: dict[int, list[_streaming.Stored]],
    summed: Sequence[bool],
    coefficients: np.ndarray,
    cast: Callable[[np.dtype], np.dtype],
    progress: Progress,
    report: Callable[[str], Any],
) -> Iterator[dict[Names, np.ndarray]]:
    """The leaves of the combination, batch by batch, while the next ones are read."""
    newest = max(opened)
    leaves = opened[newest]

    def wanted(i: int, batch: list[int]) -> list[int]:
        """The leaves of a batch that are read from checkpoint i."""
        return [k for k in batch if (coefficients[i] if summed[k] else i == newest) != 0]

    plan = [(i, wanted(i, b)) for b in _streaming.batches(leaves) for i in opened]
    total = sum(leaves[k].nbytes for _, rows in plan for k in rows)
    arrays = _streaming.prefetched(
        functools.partial(_streaming.read, function, [opened[i][k] for k in rows])
        for i, rows in plan
    )
    done = 0
    for batch in _streaming.batches(leaves):
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
                with np.errstate(over="ignore"):
                    values[k] = wide.astype(cast(leaves[k].dtype))
                values[k] = values[k].reshape(leaves[k].shape)
                if not np.isfinite(values[k]).all():
                    shown = _files.shown(leaves[k].files, names[k], leaves[k].names)
                    report(f"{'/'.join(shown)} holds values that are not finite")
        yield {
            names[k]: values[k].astype(cast(leaves[k].dtype), copy=False) for k in batch
        }


def _holds(outer: Any, inner: Any) -> bool:
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


def _cast(function: str, dtype: Any) -> Callable[[np.dtype], np.dtype]:
    """What a leaf of a dtype is written as: floating ones in `dtype`, if there is one."""
    if dtype is None:
        return lambda kind: kind
    if not jnp.issubdtype(wanted := jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"{function}: dtype must be floating, got {wanted!r}.")
    return lambda kind: wanted if jnp.issubdtype(kind, jnp.floating) else kind


def exported(
    function: str,
    weights: Weights,
    out: str | os.PathLike,
    *,
    dtype: Any,
    separator: str,
    force: bool,
    progress: Progress,
) -> str:
    """Writes weights as a safetensors file: its header and the arrays, one after another.

    References:
      https://github.com/huggingface/safetensors#format
    """
    _selecting.refuse_optimizer_state(function, weights)
    out = os.fspath(out)
    out = out if is_url(out) else os.path.abspath(out)
    source = weights.files.path
    if _holds(source, out) or _holds(out, source):
        raise ValueError(
            f"{function}: {out} is, holds, or stands in what is exported: {source}. "
            "Write it elsewhere."
        )
    if os.path.isdir(out):
        raise ValueError(
            f"{function}: {out} is a directory; give the file to make, such as "
            f"{os.path.join(out, 'model.safetensors')}."
        )
    if not force:
        refuse_existing(function, out)
    cast = _cast(function, dtype)
    empty = weights.files.marker.empty if weights.files.marker else {}
    full = [n for n, there in weights.places.items() if there not in empty]
    leaves = _streaming.stored(function, weights.files, [weights.places[n] for n in full])
    kinds = {n: (leaf.shape, leaf.dtype) for n, leaf in zip(full, leaves, strict=True)}
    for names in weights.places.keys() - set(full):
        nothing = empty[weights.places[names]]
        kinds[names] = nothing.shape, nothing.dtype

    header, end = {}, 0
    for names, (shape, kind) in kinds.items():
        kind = cast(kind)
        if kind not in _SAFETENSORS:
            raise ValueError(
                f"{function}: safetensors has no {kind}; {'/'.join(names)} is."
            )
        name = separator.join(_files.shown(weights.files, names, weights.places[names]))
        if name == "__metadata__":
            raise ValueError(
                f"{function}: a parameter is called {name!r}, which in safetensors is no "
                "array's name; rename it, or export a part that lacks it: at=."
            )
        if name in header:
            raise ValueError(
                f"{function}: two parameters are called {name!r} with the separator "
                f"{separator!r}; choose another."
            )
        begin, end = end, end + int(np.prod(shape)) * kind.itemsize
        header[name] = {
            "dtype": _SAFETENSORS[kind],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    batches = list(_streaming.batches(leaves))
    arrays = _streaming.prefetched(
        functools.partial(_streaming.read, function, [leaves[k] for k in batch])
        for batch in batches
    )
    done = 0
    with writing(out) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for batch, values in zip(batches, arrays, strict=True):
            for k, array in zip(batch, values, strict=True):
                array = array.astype(cast(array.dtype), copy=False)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                done += leaves[k].nbytes
            progress(done, sum(leaf.nbytes for leaf in leaves))
        _replacing.refuse_replaced()
    return weights.said
