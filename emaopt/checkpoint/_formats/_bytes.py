"""Arrays that stand as plain bytes in files, read in pieces."""

import io
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from emaopt.checkpoint._arrays import MadeArray, Part

PIECE = 1 << 22  # bytes that are read at once

Check = Callable[[], None]  # raises if the bytes of an array are not those written


class Stretch(NamedTuple):
    """Bytes of a file."""

    file: epath.Path
    offset: int
    size: int


def array(
    stretches: Sequence[Stretch],
    shape: Sequence[int],
    dtype: np.dtype,
    *,
    check: Check = lambda: None,
) -> MadeArray:
    """An array whose bytes stand in C order in stretches of files, one after another.

    `dtype` may be of either byte order. `check` is called before the first byte is used.
    """
    shape, checked = tuple(shape), _Once(check)

    def read(part: Part) -> np.ndarray:
        checked()
        out = np.empty([stop - start for start, stop in part], dtype)
        for begin, piece in _rows(out, shape, part, dtype.itemsize):
            _read_into(stretches, begin * dtype.itemsize, piece)
        return out.astype(dtype.newbyteorder("="), copy=False)

    chunk = pieces(shape, dtype.itemsize)
    return MadeArray(shape, dtype.newbyteorder("="), read, chunk, checked)


def constant(value: np.ndarray | np.generic) -> MadeArray:
    """An array that is in memory."""
    value = np.asarray(value)
    return MadeArray(value.shape, value.dtype, lambda part: value[_index(part)].copy())


def joined(
    shape: Sequence[int],
    dtype: np.dtype,
    parts: Sequence[tuple[Sequence[int], MadeArray]],
) -> MadeArray:
    """An array made of parts that cover it, each with the place of its first element."""

    def read(part: Part) -> np.ndarray:
        out = np.empty([stop - start for start, stop in part], dtype)
        for first, one in parts:
            # What is asked for of this part: in the whole, in the part, and in `out`.
            common = [
                (max(a, start), min(b, start + n))
                for (a, b), start, n in zip(part, first, one.shape, strict=True)
            ]
            if all(a < b for a, b in common):
                there = tuple(
                    (a - s, b - s) for (a, b), s in zip(common, first, strict=True)
                )
                here = tuple(
                    (a - s, b - s) for (a, b), (s, _) in zip(common, part, strict=True)
                )
                out[_index(here)] = one.read(there)
        return out

    return MadeArray(tuple(shape), dtype, read, pieces(shape, dtype.itemsize))


def pieces(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The shape of pieces that are contiguous in C order, of at most `PIECE` bytes."""
    piece, size = [], itemsize
    for n in reversed(shape):
        rows = max(1, min(n, PIECE // size))
        piece.append(rows)
        size = size * rows if rows == n else PIECE  # the axes before it: one by one
    return tuple(reversed(piece))


def _index(part: Part) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in part)


def _rows(
    out: np.ndarray, shape: tuple[int, ...], part: Part, itemsize: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The reads that fill a part of an array: the first element, and the bytes to fill.

    What the part leaves out within a row is read with it, to a buffer, from which the
    part is taken when the next read is asked for.
    """
    # A row is as many of the last axes as fit into one read.
    axis = next(i for i in range(len(shape) + 1) if _nbytes(shape[i:], itemsize) <= PIECE)
    is_whole = part[axis:] == tuple((0, n) for n in shape[axis:])
    if axis == 0:
        target = out if is_whole else np.empty(shape, out.dtype)
        yield 0, _as_bytes(target)
        if not is_whole:
            out[...] = target[_index(part)]
        return
    *above, (first, last) = part[:axis]
    row = math.prod(shape[axis:])
    most = PIECE // max(1, row * itemsize)  # rows in one read
    for lead in itertools.product(*(range(*bounds) for bounds in above)):
        place = tuple(i - start for i, (start, _) in zip(lead, above, strict=True))
        for begin in range(first, last, most):
            end = min(begin + most, last)
            here = (*place, slice(begin - first, end - first))
            target = out[here]
            if not is_whole:
                target = np.empty((end - begin, *shape[axis:]), out.dtype)
            yield (
                (_flat(shape[: axis - 1], lead) * shape[axis - 1] + begin) * row,
                _as_bytes(target),
            )
            if not is_whole:
                out[here] = target[(slice(None), *_index(part[axis:]))]


def _nbytes(shape: Sequence[int], itemsize: int) -> int:
    return math.prod(shape) * itemsize


def _flat(shape: Sequence[int], index: Sequence[int]) -> int:
    """The position in C order of an element."""
    position = 0
    for n, i in zip(shape, index, strict=True):
        position = position * n + i
    return position


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _read_into(stretches: Sequence[Stretch], skip: int, out: np.ndarray) -> None:
    """Fills an array of bytes from stretches, without the first `skip` bytes of them."""
    filled = 0
    for file, offset, size in stretches:
        count = min(size - skip, out.size - filled)
        if count > 0:
            with file.open("rb") as opened:
                opened.seek(offset + skip)
                found = _filled(opened, out[filled : filled + count])
            if found != count:
                raise ValueError(
                    f"{file} ends before its arrays do: it was cut off, or replaced"
                )
            filled += count
        skip = max(0, skip - size)


def _filled(opened: Any, out: np.ndarray) -> int:
    """Reads bytes into an array, and returns how many there were."""
    if isinstance(opened, io.BufferedReader):
        return opened.readinto(out.data)
    found = opened.read(out.size)  # of a store, whose files have no more than that
    out[: len(found)] = np.frombuffer(found, np.uint8)
    return len(found)


class _Once:
    """Calls a function once, at the first of many calls from many threads."""

    def __init__(self, function: Check):
        self._function, self._lock, self._done = function, threading.Lock(), False

    def __call__(self) -> None:
        with self._lock:
            if not self._done:
                self._function()
                self._done = True
