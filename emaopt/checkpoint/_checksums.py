"""Checksums of arrays, so that a bit that changed on disk is noticed in reading.

Orbax's files have none of values: most flipped bits make decompression fail, some give
other numbers. A checksum here is Σ_i (2 i + 1) w_i mod 2³² over the words w of an array:
its bits in C order, in words of 32, or of 8 or 16 where elements are smaller. One flipped
bit changes it for certain, because the factors are odd. It is a sum over all elements, so
it does not depend on how an array is split over devices.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from emaopt._names import Names, leaves_with_keys

Checksum = tuple[str, int]  # the array's dtype, the sum

_PART = 1 << 16  # words of a NumPy array that are summed at once


def checksums(tree: Any) -> list[list[Any]]:
    """The checksum of each array, JSON-serializable: names, dtype, sum.

    All processes call it. Arrays are not held when it returns.
    """
    sums = [(list(names), _checksum(leaf)) for names, leaf in leaves_with_keys(tree)]
    return [[names, *found] for names, found in sums if found is not None]


def recorded(entries: Iterable[Any]) -> dict[Names, Checksum]:
    return {tuple(names): (dtype, total) for names, dtype, total in entries}


def check(
    function: str, path: Any, sums: dict[Names, Checksum], values: dict[Names, Any]
) -> None:
    """Raises if an array that was read is not the one that was saved.

    One of another dtype than was saved was converted, and cannot be checked.
    """
    odd = [n for n in values if n in sums and _differ(sums[n], values[n])]
    if odd:
        where = ", ".join(map("/".join, sorted(odd)))
        raise ValueError(
            f"{function}: {path} holds other numbers at {where} than were saved: the "
            "checksums differ. Its files are damaged, take another step; nothing was "
            "restored from this one."
        )


def _differ(saved: Checksum, value: Any) -> bool:
    read = _checksum(value)
    return read is not None and read[0] == saved[0] and read[1] != saved[1]


def _checksum(leaf: Any) -> Checksum | None:
    """The checksum of an array or a number that this process has a part of."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)  # what Orbax writes
        if not leaf.sharding.addressable_devices:
            return None
        # One after another: on CPUs, XLA makes the products of a whole array.
        return str(leaf.dtype), int(_of_array(_on_device(leaf)))
    if isinstance(leaf, (np.ndarray, np.generic, bool, int, float)):
        leaf = np.asarray(leaf)
        return str(leaf.dtype), _of_numpy(leaf)
    return None


def _on_device(leaf: jax.Array) -> jax.Array:
    kind = next(iter(leaf.sharding.addressable_devices)).default_memory().kind
    if leaf.sharding.memory_kind in (None, kind):
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))


@jax.jit
def _of_array(array: jax.Array) -> jax.Array:
    # Not flattened: that would gather an array that is split over devices.
    words = _words(array)
    strides = [math.prod(words.shape[i + 1 :]) for i in range(words.ndim)]
    place: Any = np.uint32(0)
    for axis, stride in enumerate(strides):
        index = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += index * np.uint32(stride % 2**32)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], -1)
    if array.dtype != jnp.bool_:
        array = lax.bitcast_convert_type(array, f"uint{_bits(array.dtype)}")
    return array.astype(jnp.uint32)


def _bits(dtype: Any) -> int:
    return min(32, jax.dtypes.itemsize_bits(dtype))


def _of_numpy(array: np.ndarray) -> int:
    words = np.ascontiguousarray(array).reshape(-1)
    words = words.view(f"u{min(4, array.dtype.itemsize)}")
    bits = np.uint32(2 ** _bits(array.dtype) - 1)  # of 4 in a byte, the rest is undefined
    total = 0
    for begin in range(0, words.size, _PART):
        part = words[begin : begin + _PART].astype(np.uint32) & bits
        odd = np.arange(begin, begin + part.size, dtype=np.uint64) * 2 + 1
        total += int(np.sum(part * odd.astype(np.uint32), dtype=np.uint32))
    return total % 2**32
