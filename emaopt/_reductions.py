"""How the commits of all workers move the center, and what the workers pull then."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from emaopt._collectives import after
from emaopt._commits import decoded, encoded
from emaopt._rounding import applied
from emaopt._workers import Mapped, Stacked


class Center(NamedTuple):
    """The center of one fragment, and its outer optimizer's state."""

    leaves: list[Any]
    outer_state: Any


class Reduced(NamedTuple):
    """What a reduction makes; dicts are by position in the fragment."""

    center: Center
    pulled: dict[int, Any]  # the rows that workers pull, where they differ
    sent: dict[int, Any]  # the rows of the commits, as they were sent
    num_valid: Any  # () int32, how many commits counted


@dataclass(frozen=True)
class Reduction(abc.ABC):
    """One way to reduce the commits; called with what the workers hand in.

    Called with (old, local, commits, counted, weights, subtree): the old `Center`; the
    workers' parameters and commits, rows by position in the fragment; which of them
    count; what each counts, with a mean of 1, or None; and what makes a tree with the
    parameters' names of a list like the leaves. Returns a `Reduced`.
    """

    workers: Stacked | Mapped
    outer: optax.GradientTransformation
    dtype: Any  # in which commits travel, or None
    rate: Callable[[int], float] | None  # of elastic workers, by their number
    mean: bool  # or the sum

    @abc.abstractmethod
    def __call__(self, old, local, commits, counted, weights, subtree) -> Reduced: ...

    def _gathered(self, rows: dict, counted: Any, weights: Any) -> tuple:
        """(rows as they were sent; those of all workers, which count, their weights)."""

        def decode(codes):
            return {
                k: decoded(code, scale, row.dtype)
                for (k, row), (code, scale) in zip(rows.items(), codes, strict=True)
            }

        axes = self.workers.axes
        codes = [encoded(row, self.dtype, axes(row)) for row in rows.values()]
        leaves, treedef = jax.tree.flatten(codes)
        gathered = jax.tree.unflatten(treedef, self.workers.gather(leaves))
        if weights is not None:
            (weights,) = self.workers.gather([weights])
        return decode(codes), decode(gathered), self.workers.valid(counted), weights

    def _moved(self, old: Center, commits: dict, subtree: Any) -> Center:
        """The center after a step of the outer optimizer against the commits."""
        gradients = [commits.get(k, jnp.zeros_like(c)) for k, c in enumerate(old.leaves)]
        params = subtree(old.leaves)
        updates, outer_state = self.outer.update(
            subtree(gradients), old.outer_state, params
        )
        moved = jax.tree.leaves(applied(params, updates))
        return Center(
            [x if k in commits else old.leaves[k] for k, x in enumerate(moved)],
            outer_state,
        )


class AtOnce(Reduction):
    """One outer step against the mean or the sum of all commits."""

    def __call__(self, old, local, commits, counted, weights, subtree):
        pulled = {}
        if self.rate is not None:
            # By the commit, not towards the old center: to read that beside the new one
            # would cost a copy of it, even at steps without an exchange.
            rate = self.rate(self.workers.num_workers)
            commits = {k: rate * row for k, row in commits.items()}
            for k, row in local.items():
                pulled[k] = row.astype(commits[k].dtype) + commits[k]
        if self.dtype is not None and jnp.issubdtype(self.dtype, jnp.integer):
            sent, rows, valid, weights = self._gathered(commits, counted, weights)
            sums = {k: jnp.sum(_times(row, weights), 0) for k, row in rows.items()}
            num_valid = jnp.sum(valid, dtype=jnp.int32)
        else:
            parts = self.workers.num_workers  # of the dtype's range, for each its own
            codes = {
                k: encoded(_times(row, weights), self.dtype, (), parts)[0]
                for k, row in commits.items()
            }
            *sums, flags = self.workers.total(
                [*codes.values(), counted.astype(jnp.float32)]
            )
            sums = dict(zip(codes, sums, strict=True))
            sent, sums = (
                {k: decoded(row, None, commits[k].dtype) for k, row in coded.items()}
                for coded in (codes, sums)
            )
            if weights is not None:  # what was sent of the commit itself
                shares = jnp.where(weights > 0, weights, 1)
                sent = {k: _times(row, 1 / shares) for k, row in sent.items()}
            num_valid = flags.astype(jnp.int32)
        # The slots may be overwritten when this number is there: no commit is read then.
        num_done = after(num_valid, list(sums.values()))
        if self.mean:
            divisor = jnp.maximum(num_valid, 1)
            sums = {k: row / divisor.astype(row.dtype) for k, row in sums.items()}
        center = self._moved(old, sums, subtree)
        return Reduced(self.workers.equal_as(center, old), pulled, sent, num_done)


class InTurns(Reduction):
    """An outer step for each worker's commit, in rank order."""

    def __call__(self, old, local, commits, counted, weights, subtree):
        elastic = self.rate is not None
        rate = self.rate(self.workers.num_workers) if self.rate else 0.0
        handed = local if elastic else commits
        sent, rows, valid, weights = self._gathered(handed, counted, weights)

        def turn(center, of_worker):
            rows, valid, weight = of_worker
            if elastic:
                rows = {k: rate * (center.leaves[k] - x) for k, x in rows.items()}
            commits = {k: _times(row, weight) for k, row in rows.items()}
            moved = jax.tree.map(
                lambda new, old: jnp.where(valid, new, old),
                self._moved(center, commits, subtree),
                center,
            )
            return moved, rows if elastic else {k: moved.leaves[k] for k in rows}

        start, xs = self.workers.varying((old, (rows, valid, weights)))
        center, pulled = lax.scan(turn, start, xs)
        own = dict(zip(pulled, self.workers.own(list(pulled.values())), strict=True))
        if elastic:
            own = {k: local[k].astype(row.dtype) + row for k, row in own.items()}
        num_done = after(jnp.sum(valid, dtype=jnp.int32), list(rows.values()))
        return Reduced(self.workers.equal_as(center, old), own, sent, num_done)


# By the option `reduce`.
REDUCTIONS: dict[str, type[Reduction]] = {
    "mean": AtOnce,
    "sum": AtOnce,
    "sequential": InTurns,
}


def _times(row: jax.Array, weights: Any) -> jax.Array:
    """A row of each worker times its weight; None: as it is."""
    if weights is None:
        return row
    return row * weights.reshape(weights.shape + (1,) * (row.ndim - weights.ndim))
