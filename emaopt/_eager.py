"""Eager updates: each worker applies its own commit at once, the others' a round late.

At its commit D_i of round t, when the mean of the round before has landed, worker i takes
a step of the outer optimizer, with a state of its own, from a center of its own,

    c_i := outer(c_i, D_i(t)/W + (mean(t-1) - D_i(t-1)/W))        θ_i := c_i

The estimates add up to what all workers committed: what a worker counted of itself in
advance, it takes back from the mean. The shared center takes the means only, and is equal
on all workers.

Kale, Douillard and Donchev, 2025, https://arxiv.org/abs/2502.12996
"""

import jax
import jax.numpy as jnp
import optax

from emaopt._collectives import of_all
from emaopt._exchange import Exchange, Part
from emaopt._in_flight import Flight, committed
from emaopt._reductions import Reduced, Subtree
from emaopt._rounding import applied
from emaopt._types import PyTree


def others(exchange: Exchange, flight: Flight, reduced: Reduced) -> list[jax.Array]:
    """mean(t-1) - D_i(t-1)/W of each leaf, from commits that have just landed."""
    count = jnp.maximum(reduced.num_valid, 1)

    def of(k: int, row: jax.Array) -> jax.Array:
        if k not in reduced.reduced:  # the leaf is not exchanged
            return jnp.zeros_like(row)
        own = weighted(exchange, flight, reduced.sent[k]) / count.astype(row.dtype)
        return of_all(reduced.reduced[k], row) - own

    return [of(k, row) for k, row in enumerate(flight.sums)]


def weighted(exchange: Exchange, flight: Flight, row: jax.Array) -> jax.Array:
    """The commits that count, times their weights; zeros for the others."""
    workers = exchange.workers
    weights = workers.spread(flight.weights, row).astype(row.dtype)
    # Selected as well, because 0 · NaN is NaN.
    return jnp.where(workers.spread(flight.weights > 0, row), weights * row, 0)


def step(
    function: str,
    exchange: Exchange,
    part: Part,
    flight: Flight,
    rest: list[jax.Array],
    moving: list[bool],
    subtree: Subtree,
) -> tuple[Part, PyTree]:
    """(the part with the workers' own centers after the step, their outer states)."""
    workers = exchange.workers
    gradients = [
        weighted(exchange, flight, row) / workers.num_workers + other
        for row, other in zip(committed(exchange, part, flight), rest, strict=True)
    ]
    params = subtree([jnp.asarray(leaf.pulled) for leaf in part.leaves])
    outer = optax.with_extra_args_support(exchange.outer)
    updates, state = workers.step(
        function, outer, subtree(gradients), flight.eager, params, {}, ()
    )
    moved = jax.tree.leaves(applied(params, updates))
    leaves = [
        leaf._replace(pulled=new) if moves else leaf
        for leaf, new, moves in zip(part.leaves, moved, moving, strict=True)
    ]
    return part._replace(leaves=leaves), state
