"""Checksums of arrays, by which a reader notices a bit that changed on disk.

Orbax's files have no checksums of values: most flipped bits make decompression fail, some
give other numbers. A checksum here is Σ_j (2 (j mod 2³⁰) + 1) g(w_j) mod 2³², where
g(w) = w + K ⌊w / 2¹⁶⌋ with an odd K. The w_j are the array's bytes in C order as
little-endian words of 32 bits, the last one padded with zeros. A flipped bit changes g by
an odd multiple of a power of two below 2¹⁶, and the factors are odd, so it always changes
the checksum; and so it does if the same bit flips in up to 2¹⁵ equal parts of the array,
which compressed files hold once. With w in place of g(w) a flipped sign would cancel in
two parts. It is a sum over all elements, so it does not depend on how an array is split
over devices.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax
from jax.experimental import multihost_utils

from emaopt._leaves import key_data
from emaopt._names import Names, leaves_with_keys
from emaopt._types import Leaf, PyTree

Checksum = tuple[str, int]  # the array's dtype, the sum
Entry: TypeAlias = list[list[str] | str | int]  # names, dtype and sum, as JSON has them

_K = 0x9E3779B1
_COLUMNS = 1 << 12  # words in a row of the matrix of `_of_words`
_PART = 1 << 19  # words that are summed at once: as many as stay in a core's cache
_THREADS = min(4, os.cpu_count() or 1)  # more would wait for the memory
_SMALL = 1 << 18  # bytes below which an array is not worth a thread
_FACTORS = 2 * np.arange(_COLUMNS, dtype=np.uint32) + 1


def checksums(tree: PyTree) -> list[Entry]:
    """The checksum of each array, JSON-serializable: names, dtype, sum.

    All processes call it. It keeps no reference to an array.
    """
    return of_leaves(leaves_with_keys(tree), together=True)


def of_leaves(leaves: Iterable[tuple[Names, Leaf]], *, together: bool) -> list[Entry]:
    """The same for leaves with their names; `together`: all processes call it.

    An array whose copies differ gets no checksum, because nothing tells which parts of
    which copies Orbax writes.
    """
    leaves = list(leaves)
    names = [list(name) for name, _ in leaves]
    rows = [(set(sums), dtype) for dtype, sums in _sums(leaf for _, leaf in leaves)]
    if together and jax.process_count() > 1:
        # How many sums each process has of its copies, and one of them.
        own = [(min(len(sums), 2), max(sums, default=0)) for sums, _ in rows]
        own = np.asarray(own, np.uint32).reshape(-1, 2)
        all_ = np.asarray(multihost_utils.process_allgather(own))
        for i, (sums, _) in enumerate(rows):
            sums |= {int(s) for count, s in all_[:, i] if count}
            # Of copies that differ in one process only one sum came: no checksum, either.
            sums |= {-1, -2} if (all_[:, i, 0] > 1).any() else set()
    return [
        [name, dtype, sums.pop()]
        for name, (sums, dtype) in zip(names, rows, strict=True)
        if len(sums) == 1
    ]


def recorded(entries: Iterable[Any]) -> dict[Names, Checksum]:
    """The checksums of a record, whose fields were checked, by name."""
    return {tuple(names): (dtype, total) for names, dtype, total in entries}


def check(
    function: str,
    path: epath.Path,
    sums: dict[Names, Checksum],
    values: dict[Names, Leaf],
) -> None:
    """Raises if an array that was read is not the one that was saved.

    An array in another dtype than it was saved in was cast, and cannot be checked.
    """
    names = [n for n in values if n in sums]
    odd = []
    for name, (dtype, found) in zip(names, _sums(values[n] for n in names), strict=True):
        saved_dtype, saved = sums[name]
        if dtype == saved_dtype and any(one != saved for one in found):
            odd.append(name)
    if odd:
        raise differing(function, path, odd)


def differing(function: str, path: epath.Path, odd: Iterable[Names]) -> ValueError:
    """The error for arrays that are not those that were saved."""
    where = ", ".join(map("/".join, sorted(odd)))
    return ValueError(
        f"{function}: {path} holds other numbers at {where} than were saved: the "
        "checksums differ. Its files are damaged, take another step; nothing was "
        "restored from this one."
    )


def has_one(dtype: np.dtype) -> bool:
    """Whether arrays of a dtype have checksums."""
    return jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_


def _sums(leaves: Iterable[Leaf]) -> list[tuple[str, list[int]]]:
    """The dtype of each array or number, and the sums of the copies in this process."""
    # Two passes: devices and threads have work of all leaves before any is awaited.
    with ThreadPoolExecutor(_THREADS) as pool:
        begun = [_begin(leaf, pool) for leaf in leaves]
        return [(dtype, [int(end()) for end in ends]) for dtype, ends in begun]


def _begin(leaf: Leaf, pool: Executor) -> tuple[str, list[Callable[[], int]]]:
    """The dtype of a leaf, and a function for each copy that returns its sum."""
    if isinstance(leaf, jax.Array):
        leaf = key_data(leaf)  # what Orbax writes
        return str(leaf.dtype), _of_copies(leaf, pool)
    if isinstance(leaf, (np.ndarray, np.generic, bool, int, float)):
        leaf = np.asarray(leaf)
        if not has_one(leaf.dtype):
            return "", []  # text, objects, integers beyond 64 bits
        return str(leaf.dtype), [_begin_numpy(leaf, pool)]
    return "", []


def _begin_numpy(array: np.ndarray, pool: Executor) -> Callable[[], int]:
    if array.nbytes < _SMALL:
        return functools.partial(_of_numpy, array)
    return pool.submit(_of_numpy, array).result  # NumPy lets go of the GIL


def _of_copies(leaf: jax.Array, pool: Executor) -> list[Callable[[], int]]:
    """A function for each copy in this process that returns its sum."""
    devices = leaf.sharding.addressable_devices
    platforms = {device.platform for device in devices}
    if not devices:
        return []
    if platforms == {"cpu"} and leaf.is_fully_replicated:
        # NumPy takes a tenth of XLA's time. It sees each shard's own jax.Array: the leaf
        # itself would keep NumPy's view, and could not be donated any more.
        shards = leaf.addressable_shards
        return [_begin_numpy(np.asarray(shard.data), pool) for shard in shards]
    if not platforms <= {"cpu", "gpu"} and leaf.dtype in (np.float64, np.complex128):
        return []  # XLA cannot take the bits there
    there = _on_device(leaf)
    sums = [shard.data for shard in _of_array(there).addressable_shards]
    if platforms == {"cpu"} or there is not leaf:
        # One array after the other: on CPUs XLA holds the products of a whole array, and
        # arrays of the host's memory may not fit on a device together.
        jax.block_until_ready(sums)
    return [functools.partial(int, one) for one in sums]


def _on_device(leaf: jax.Array) -> jax.Array:
    """The array in its devices' own memory, brought from the host's if it is there."""
    kind = next(iter(leaf.sharding.addressable_devices)).default_memory().kind
    if leaf.sharding.memory_kind in (None, kind):
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))


@jax.jit
def _of_array(array: jax.Array) -> jax.Array:
    """The sum of an array, as XLA computes it on the devices that hold the parts."""
    # Not flattened: that would gather an array that is split over devices.
    values, in_word = _as_integers(array)
    strides = [math.prod(values.shape[i + 1 :]) for i in range(values.ndim)]
    place: np.uint32 | jax.Array = np.uint32(0)
    for axis, stride in enumerate(strides):
        index = lax.broadcasted_iota(jnp.uint32, values.shape, axis)
        place += index * np.uint32(stride % 2**32)
    # `place` wraps at 2³² elements: 2³⁰ words if elements are bytes, else a multiple. The
    # factor has the period 2³⁰ words, so it comes out the same.
    factor = 2 * (place // in_word % 2**30) + 1
    if in_word == 1:
        words = values + np.uint32(_K) * (values >> 16)
    else:
        begin = place % in_word * (32 // in_word)  # the element's first bit in its word
        upper = jnp.where(begin < 16, 0, values << (begin.astype(jnp.uint32) - 16) % 32)
        words = (values << begin) + np.uint32(_K) * upper
    return jnp.sum(words * factor, dtype=jnp.uint32)


def _as_integers(array: jax.Array) -> tuple[jax.Array, int]:
    """The bits of the elements, and how many of them make a word."""
    # XLA takes no bits of complex numbers; NumPy's bytes have the real part first.
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], -1)
    in_word = max(1, 4 // np.dtype(array.dtype).itemsize)
    if array.dtype != jnp.bool_:
        bits = min(32, jax.dtypes.itemsize_bits(array.dtype))
        array = lax.bitcast_convert_type(array, f"uint{bits}")
    return array.astype(jnp.uint32), in_word


class Running:
    """The checksum of an array that comes in pieces, in C order."""

    def __init__(self) -> None:
        self._total = self._words = 0  # the sum, and how many words are in it
        self._rest = np.zeros(0, np.uint8)  # bytes that do not make a word yet

    def add(self, array: np.ndarray) -> None:
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if (bits := jax.dtypes.itemsize_bits(array.dtype)) < 8:
            content = content & np.uint8(2**bits - 1)  # the rest of a byte is undefined
        if self._rest.size:
            content = np.concatenate([self._rest, content])
        size = content.size // 4
        words, self._rest = content[: 4 * size].view("<u4"), content[4 * size :].copy()
        done = 0
        while done < size:
            # _PART divides 2³⁰, so no part crosses a place where the factors begin anew.
            part = words[done : done + _PART - self._words % _PART]
            mixed = part + np.uint32(_K) * (part >> np.uint32(16))
            self._total += _of_words(mixed, self._words % 2**30)
            done += part.size
            self._words += part.size

    def result(self) -> int:
        last = np.zeros(4, np.uint8)
        last[: self._rest.size] = self._rest
        word = int(last.view("<u4")[0])
        factor = 2 * (self._words % 2**30) + 1
        return (self._total + (word + _K * (word >> 16)) * factor) % 2**32


def _of_numpy(array: np.ndarray) -> int:
    """The sum of an array, as NumPy computes it."""
    running = Running()
    running.add(array)
    return running.result()


def _of_words(words: np.ndarray, begin: int) -> int:
    """The sum over words whose first one is the array's word number `begin`.

    In a matrix with C columns, the factor of row r and column c is 2 (begin + C r) +
    (2 c + 1): one term for the row, one for the column. So plain sums over rows and over
    columns are enough, which NumPy computes at the speed of memory.
    """
    rows = words.size // _COLUMNS
    rest = words[rows * _COLUMNS :]
    total = _dot(rest, _FACTORS) + 2 * (begin + rows * _COLUMNS) * _sum(rest)
    if rows:
        matrix = words[: rows * _COLUMNS].reshape(rows, _COLUMNS)
        of_rows = np.add.reduce(matrix, axis=1, dtype=np.uint32)
        of_columns = np.add.reduce(matrix, axis=0, dtype=np.uint32)
        before = _dot(of_rows, _FACTORS) - _sum(of_rows)  # Σ 2 r of the rows r
        total += _dot(of_columns, _FACTORS)
        total += _COLUMNS * before + 2 * begin * _sum(of_rows)
    return total


def _dot(words: np.ndarray, factors: np.ndarray) -> int:
    return _sum(words * factors[: words.size])


def _sum(words: np.ndarray) -> int:
    return int(np.add.reduce(words, dtype=np.uint32))
