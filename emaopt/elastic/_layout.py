"""Arrays in host memory as one row of elements, and the sum of such rows."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_ALIGNMENT = 64  # bytes; JAX takes memory that begins there over without a copy


class Row:
    """Arrays, one after the other, as one row of elements and one of bytes.

    They are views of the arrays' own memory: what is written to the row is in them.
    """

    def __init__(self, arrays: Sequence[Array]):
        self.arrays: list[Array] = [array.reshape(-1) for array in arrays]
        sizes = [array.size for array in self.arrays]
        self._elements = [0, *itertools.accumulate(sizes)]
        self._bytes = [0, *itertools.accumulate(array.nbytes for array in self.arrays)]

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._elements[-1]

    def segments(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The elements from `start` to `stop`: (number of an array, a slice of it)."""
        yield from _cut(self._elements, start, stop)

    def byte(self, element: int) -> int:
        """The byte at which an element begins."""
        number = bisect.bisect_right(self._elements, element) - 1
        if number == len(self.arrays):
            return self._bytes[-1]
        inside = element - self._elements[number]
        return self._bytes[number] + inside * self.arrays[number].itemsize

    def memory(self, start: int, stop: int) -> Iterator[memoryview]:
        """The memory of the bytes from `start` to `stop`."""
        for number, inside in _cut(self._bytes, start, stop):
            yield self.arrays[number].view(np.uint8)[inside].data


def _cut(offsets: list[int], start: int, stop: int) -> Iterator[tuple[int, slice]]:
    number = max(bisect.bisect_right(offsets, start) - 1, 0)
    while start < stop:
        begin, end = offsets[number : number + 2]
        if start < end:
            yield number, slice(start - begin, min(stop, end) - begin)
            start = min(stop, end)
        number += 1


class Arena:
    """Memory for rows that is used again: fresh pages cost more than the sums."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def rows(self, *kinds: Sequence[tuple[int, np.dtype[Any]]]) -> list[Row]:
        """Rows of arrays of these sizes and dtypes, in the place of all rows before."""
        offsets, total = [], 0
        for kind in kinds:
            for size, dtype in kind:
                offsets.append(total)
                total += -(-size * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._memory.nbytes < total + _ALIGNMENT:
            self._memory = np.empty(total + _ALIGNMENT, np.uint8)
        start = -self._memory.ctypes.data % _ALIGNMENT
        places = iter(offsets)

        def array(size: int, dtype: np.dtype[Any]) -> Array:
            begin = start + next(places)
            return self._memory[begin : begin + size * dtype.itemsize].view(dtype)

        return [Row([array(*one) for one in kind]) for kind in kinds]


def kinds_of(row: Row, start: int, stop: int) -> list[tuple[int, np.dtype[Any]]]:
    """(size, dtype) of the pieces of a part of a row."""
    pieces = [row.arrays[k][inside] for k, inside in row.segments(start, stop)]
    return [(piece.size, piece.dtype) for piece in pieces]


def part_bounds(size: int, num_parts: int) -> list[int]:
    """Where parts of like sizes begin in a row of elements, and where the last ends."""
    return [size * k // num_parts for k in range(num_parts + 1)]


def sum_dtype(code: np.dtype[Any], center: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which the sum of codes travels: their own, if it is floating.

    Integers of different scales have no sum of their kind.
    """
    return center if jnp.issubdtype(code, jnp.integer) else code


def add_up(
    out: Array,
    rows: Sequence[Array],
    weights: Sequence[float] | None,
    scales: Sequence[float] | None,
) -> None:
    """Writes the weighted sum of the rows' values to `out`, in the order of the rows.

    It is computed in float32 at least, so narrow codes are rounded once.

    Args:
      out: [n], in the dtype of `sum_dtype`.
      rows: Codes of the workers, each [n].
      weights: Of each row; None: all count alike.
      scales: Of each row's code, for integers, else None.
    """
    wide = np.dtype(np.float32) if out.dtype.itemsize < 4 else out.dtype
    total = out if out.dtype == wide else np.empty(out.shape, wide)
    if not rows:
        total[...] = 0
    for number, row in enumerate(rows):
        value = row
        for factors in (scales, weights):
            if factors is not None:
                value = np.multiply(value, wide.type(factors[number]), dtype=wide)
        if number == 0:
            total[...] = value
        else:
            np.add(total, value, out=total, dtype=wide)
    if total is not out:
        limit = float(jnp.finfo(out.dtype).max)
        out[...] = np.clip(total, -limit, limit).astype(out.dtype)
