"""Collectives in few pieces and in an order, and values held back until others are there.

Left alone, XLA combines collectives, keeps all their operands at once, or reorders them,
which costs memory.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from emaopt._jax_internals import traced, varying
from emaopt._xla import held_until_there

# Leaves up to this size share a collective: copying them costs less than one for each.
_SMALL = 2**20  # bytes


def packed(
    collective: Callable[[jax.Array], jax.Array], leaves: list[jax.Array]
) -> list[jax.Array]:
    """One collective for the small leaves of each dtype, and one for each large leaf.

    One flat vector is faster than a collective for each leaf, but it is a copy.
    """
    packs: dict[np.dtype | int, list[int]] = {}
    for i, leaf in enumerate(leaves):
        packs.setdefault(leaf.dtype if _is_small(leaf) else i, []).append(i)

    def operand(pack):
        if len(pack) == 1:
            return leaves[pack[0]]
        return jnp.concatenate([leaves[i].ravel() for i in pack])

    done = list(leaves)
    results = in_turn(collective, [operand(pack) for pack in packs.values()])
    for pack, result in zip(packs.values(), results, strict=True):
        if len(pack) == 1:
            done[pack[0]] = result
            continue
        # A gathered result has a leading axis of workers, so it is cut at its last axis.
        start = 0
        for i in pack:
            end = start + math.prod(leaves[i].shape)
            part = result[..., start:end]
            done[i] = part.reshape(part.shape[:-1] + leaves[i].shape)
            start = end
    return done


def in_turn(
    reduction: Callable[[jax.Array], jax.Array], operands: list[jax.Array]
) -> list[jax.Array]:
    """The results of a reduction; on CPU the large ones one after the other.

    On CPU XLA combines all collectives that do not wait for each other, and keeps the
    operands and results of all of them at once: fresh pages at every exchange, which cost
    more than the sums. An `optimization_barrier` is gone before XLA combines them.
    """
    results = list(operands)
    # Small operands wait for nothing, so XLA still combines them. They go first: a large
    # operand waits for the result before it, which has to be the previous large one's.
    before = []
    for i in _small_first(operands):
        operand = operands[i] if _is_small(operands[i]) else after(operands[i], before)
        results[i] = reduction(operand)
        before = [results[i]]
    return results


def _small_first(leaves: list[jax.Array]) -> list[int]:
    """The positions of the leaves, small ones first; the order is kept otherwise."""
    return sorted(range(len(leaves)), key=lambda i: not _is_small(leaves[i]))


def _is_small(leaf: jax.Array) -> bool:
    return leaf.size * leaf.dtype.itemsize <= _SMALL


def after(leaf: jax.Array, results: list[jax.Array]) -> jax.Array:
    """The leaf, to be read on CPU only when results of `total` or `gather` are there.

    They come in turn, so the leaf waits for the last one. It does not wait where an
    element of that result cannot be read: along a sharded axis of an Explicit mesh, or
    where the result differs between workers and the leaf does not.
    """
    for i in _small_first(results)[-1:] if traced(leaf) else []:
        whole = results[i].size and not any(jax.typeof(results[i]).sharding.spec)
        if whole and varying(results[i]) <= varying(leaf):
            return lax.platform_dependent(
                leaf, results[i], cpu=held_until_there, default=lambda leaf, _: leaf
            )
    return leaf


def of_all(value: jax.Array, rows: jax.Array) -> jax.Array:
    """A value that all workers share, in a shape that broadcasts against their rows."""
    # The axes are explicit, for users who set jax_numpy_rank_promotion to "raise".
    return jnp.expand_dims(value, tuple(range(jnp.ndim(rows) - jnp.ndim(value))))


@functools.partial(jax.jit, static_argnums=1, inline=True)  # one call outside of jit
def all_finite(rows: list[jax.Array], axes: tuple[int, ...]) -> jax.Array:
    """Whether all elements along the axes are finite, in all arrays of one shape."""
    # x - x is 0, or NaN where x is not finite. The arrays are not added up: XLA on CPU
    # would write elements of their own width for that, where a flag has one byte. It also
    # finds the smallest int8 in a seventh of the time of `all`.
    zero = functools.reduce(jnp.logical_and, [row - row == 0 for row in rows])
    return jnp.min(zero.astype(jnp.int8), axis=axes, initial=1) == 1
