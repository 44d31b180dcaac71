"""How the commits of all workers move the center, and what the workers then pull."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from emaopt._collectives import after
from emaopt._commits import decoded, encoded
from emaopt._rounding import applied
from emaopt._types import DTypeLike, PyTree, Scalar
from emaopt._workers import Mapped, Stacked

Rows: TypeAlias = dict[int, jax.Array]  # by position of the leaf in the fragment
Subtree: TypeAlias = Callable[[list[jax.Array]], PyTree]


class Center(NamedTuple):
    """The center of one fragment, and its outer optimizer's state."""

    leaves: list[jax.Array]
    outer_state: PyTree


class Reduced(NamedTuple):
    """The results of a reduction."""

    center: Center
    pulled: Rows  # what workers pull, where that differs between them
    sent: Rows  # the commits as they were sent
    num_valid: Scalar  # () int32, how many commits counted
    reduced: Rows  # of all commits, what the center moved against; {} in turns


class OfWorkers(optax.GradientTransformationExtraArgs):
    """An outer optimizer that depends on how many workers there are: `num_workers`."""


@dataclass(frozen=True)
class Reduction(abc.ABC):
    """One way to reduce the workers' commits to one step of the center.

    Called with (old, local, commits, counted, weights, subtree): the old `Center`; the
    workers' parameters and commits; flags of the workers whose commits count; their
    weights, with a mean of 1, or None; and a function that makes of a list like the
    leaves a tree with the parameters' names. Returns a `Reduced`.
    """

    workers: Stacked | Mapped
    outer: optax.GradientTransformation
    dtype: DTypeLike | None  # in which commits travel
    rate: Callable[[int], float] | None  # α of elastic workers, by their number

    # Whether the workers, which are not elastic, pull different values one after the
    # other, so that the state has to keep them.
    pulls_differ: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self,
        old: Center,
        local: Rows,
        commits: Rows,
        counted: jax.Array,
        weights: jax.Array | None,
        subtree: Subtree,
    ) -> Reduced: ...

    def _gathered(
        self, rows: Rows, counted: jax.Array, weights: jax.Array | None
    ) -> tuple[Rows, Rows, jax.Array, jax.Array | None]:
        """(rows as they were sent; rows of all workers, which count, their weights)."""

        def decode(codes: list[tuple[jax.Array, jax.Array | None]]) -> Rows:
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

    def _moved(self, old: Center, commits: Rows, subtree: Subtree) -> Center:
        """The center after a step of the outer optimizer against reduced commits."""
        gradients = [commits.get(k, jnp.zeros_like(c)) for k, c in enumerate(old.leaves)]
        params = subtree(old.leaves)
        number = {}
        if isinstance(self.outer, OfWorkers):
            number["num_workers"] = self.workers.num_workers
        updates, outer_state = self.outer.update(
            subtree(gradients), old.outer_state, params, **number
        )
        moved = jax.tree.leaves(applied(params, updates))
        # Weight decay, say, may move a leaf without a commit: such a leaf stays as it is.
        return Center(
            [x if k in commits else old.leaves[k] for k, x in enumerate(moved)],
            outer_state,
        )


class Sum(Reduction):
    """One outer step against the sum of all commits."""

    def __call__(self, old, local, commits, counted, weights, subtree) -> Reduced:
        pulled: Rows = {}
        if self.rate is not None:
            # The worker moves by its commit, not towards the old center. To read the old
            # center beside the new one would cost a copy, even without an exchange.
            rate = self.rate(self.workers.num_workers)
            commits = {k: rate * row for k, row in commits.items()}
            for k, row in local.items():
                pulled[k] = row.astype(commits[k].dtype) + commits[k]
        sent, sums, num_valid = self._added(commits, counted, weights)
        # When this number is computed, no commit is read any more. The engine waits for
        # it before it overwrites the slots.
        num_done = after(num_valid, list(sums.values()))
        sums = self._scaled(sums, num_valid)
        center = self._moved(old, sums, subtree)
        center = self.workers.equal_as(center, old)
        return Reduced(center, pulled, sent, num_done, sums)

    def _added(
        self, commits: Rows, counted: jax.Array, weights: jax.Array | None
    ) -> tuple[Rows, Rows, Scalar]:
        """(commits as they were sent, their weighted sums, how many counted)."""
        # Integers of different scales have no sum: they are gathered, decoded, weighed.
        # Floating commits are weighed before they travel, since the collective adds them.
        if self.dtype is not None and jnp.issubdtype(self.dtype, jnp.integer):
            sent, rows, valid, weights = self._gathered(commits, counted, weights)
            sums = {k: jnp.sum(_times(row, weights), 0) for k, row in rows.items()}
            return sent, sums, jnp.sum(valid, dtype=jnp.int32)
        parts = self.workers.num_workers  # each gets a part of the dtype's range
        codes = {
            k: encoded(_times(row, weights), self.dtype, (), parts)[0]
            for k, row in commits.items()
        }
        *sums, flags = self.workers.total([*codes.values(), counted.astype(jnp.float32)])
        sums = dict(zip(codes, sums, strict=True))
        sent, sums = (
            {k: decoded(row, None, commits[k].dtype) for k, row in coded.items()}
            for coded in (codes, sums)
        )
        if weights is not None:  # back to the scale of the commits themselves
            shares = jnp.where(weights > 0, weights, 1)
            sent = {k: _times(row, 1 / shares) for k, row in sent.items()}
        return sent, sums, flags.astype(jnp.int32)

    def _scaled(self, sums: Rows, num_valid: Scalar) -> Rows:
        """What the center moves against, of the sums."""
        del num_valid
        return sums


class Mean(Sum):
    """One outer step against the mean of all commits that count."""

    def _scaled(self, sums: Rows, num_valid: Scalar) -> Rows:
        divisor = jnp.maximum(num_valid, 1)
        return {k: row / divisor.astype(row.dtype) for k, row in sums.items()}


class Sequential(Reduction):
    """An outer step for each worker's commit, in rank order."""

    pulls_differ = True

    def __call__(self, old, local, commits, counted, weights, subtree) -> Reduced:
        elastic = self.rate is not None
        rate = self.rate(self.workers.num_workers) if self.rate else 0.0
        # An elastic commit depends on the center at the worker's turn, so the parameters
        # travel and not the commits.
        handed = local if elastic else commits
        sent, rows, valid, weights = self._gathered(handed, counted, weights)

        def turn(center, of_worker):
            rows, valid, weight = of_worker
            if elastic:
                rows = {k: rate * (center.leaves[k] - x) for k, x in rows.items()}
            commits = {k: _times(row, weight) for k, row in rows.items()}
            # A worker that is left out moves nothing; a step against zeros would move the
            # outer optimizer's state.
            moved = jax.tree.map(
                lambda new, old: jnp.where(valid, new, old),
                self._moved(center, commits, subtree),
                center,
            )
            return moved, rows if elastic else {k: moved.leaves[k] for k in rows}

        # With check_vma the carry of a scan must vary over the workers from the start.
        start, xs = self.workers.varying((old, (rows, valid, weights)))
        center, pulled = lax.scan(turn, start, xs)
        own = dict(zip(pulled, self.workers.own(list(pulled.values())), strict=True))
        if elastic:
            own = {k: local[k].astype(row.dtype) + row for k, row in own.items()}
        num_done = after(jnp.sum(valid, dtype=jnp.int32), list(rows.values()))
        return Reduced(self.workers.equal_as(center, old), own, sent, num_done, {})


# By the value of the option `reduce`.
REDUCTIONS: dict[str, type[Reduction]] = {
    "mean": Mean,
    "sum": Sum,
    "sequential": Sequential,
}


def _times(row: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The row of each worker times the worker's weight; unchanged for None."""
    if weights is None:
        return row
    weights = weights.reshape(weights.shape + (1,) * (row.ndim - weights.ndim))
    return row * weights.astype(row.dtype)
