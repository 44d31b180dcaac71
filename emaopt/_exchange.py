"""One exchange: commits, their reduction, the outer step, and what workers pull."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from emaopt._collectives import after, of_all
from emaopt._commits import decoded, encoded, make_commit
from emaopt._local_checks import HEAVIEST, LIGHTEST
from emaopt._rounding import applied
from emaopt._workers import Mapped, Stacked


class Leaf(NamedTuple):
    """What an exchange changes of one leaf."""

    pulled: Any  # the center as each worker pulled it, None where they all pull the same
    residual: Any  # what the last commits lost in the dtype of the exchange, or None
    center: Any


class Part(NamedTuple):
    """What an exchange changes, of one fragment of the tree."""

    leaves: list[Leaf]  # in flattening order
    outer_state: Any
    num_left_out: Any  # () int32


class Fixed(NamedTuple):
    """What an exchange only reads of one leaf: a row for each worker."""

    local: Any  # the parameters after the step; None: the leaf is no part of it
    accumulated: Any  # Σ gradients, or None


class Voices(NamedTuple):
    """Which workers' commits count, and what; shaped as the workers' flags are."""

    committing: Any  # bool; the others are left out
    weights: Any  # float, 0 of those that are absent; None: all alike


class Center(NamedTuple):
    leaves: list[Any]
    outer_state: Any


@dataclass(frozen=True)
class Exchange:
    """Applies the workers' commits to the center and lets the workers pull it.

    The arguments are those of `local_updates`. Where something is said to be of a leaf's
    rows, it is what each worker has of the leaf; dicts are by position in the fragment.
    """

    workers: Stacked | Mapped
    outer: optax.GradientTransformation
    commit: str
    reduce: str
    moving_rate: Callable[[int], float] | None  # of the number of workers
    dtype: Any

    def __call__(
        self,
        part: Part,
        read: Callable[[Any], list[Fixed]],
        num_steps: Any,
        voices: Voices,
        subtree: Callable[[list], Any],
    ) -> Part:
        """Returns the part after the exchange.

        Commits are made twice: to check them, and from the same values, held back until
        all are checked, to send them. So they are made leaf by leaf, when they are sent,
        and never kept all at once.

        Args:
          part: Before it.
          read: Makes what the exchange reads of each of its leaves, when flags of the
            workers are there, whatever they say.
          num_steps: () int32, local steps since the last exchange.
          voices: Of the workers.
          subtree: Makes of a list like the leaves a tree with the parameters' names.
        """
        leaves = part.leaves
        old = Center([leaf.center for leaf in leaves], part.outer_state)

        def commits_of(fixed):
            return {
                k: self._commit(leaves[k], f.local, f.accumulated, num_steps)
                for k, f in enumerate(fixed)
                if f.local is not None
            }

        checked = commits_of(read(voices.committing))
        rows = [[row] for row in checked.values()]
        finite = self.workers.finite(rows, voices.committing)
        fixed = read(finite)
        # Elastic workers read their commits twice, so XLA would keep or copy them anyway.
        commits = commits_of(fixed) if self.moving_rate is None else checked
        local = {k: fixed[k].local for k in commits}
        counted, weights, num_present = self._weighed(finite, voices.weights)

        def where(flags, rows, otherwise):
            return {
                k: jnp.where(
                    self.workers.spread(flags, row),
                    row,
                    of_all(otherwise[k], row) if k in otherwise else 0,
                )
                for k, row in rows.items()
            }

        reduced = self._in_turns if self.reduce == "sequential" else self._at_once
        center, pulled, sent, num_valid = reduced(
            old,
            where(finite, local, {}),
            where(finite, commits, {}),
            counted,
            weights,
            subtree,
        )
        pulled = where(finite, pulled, dict(enumerate(center.leaves)))
        kept = {k: leaves[k].residual for k in sent if leaves[k].residual is not None}
        residual = where(counted, {k: commits[k] - sent[k] for k in kept}, kept)
        changed = [
            Leaf(pulled.get(k, leaf.pulled), residual.get(k, leaf.residual), new)
            for k, (leaf, new) in enumerate(zip(leaves, center.leaves, strict=True))
        ]
        left_out = part.num_left_out + (num_present - num_valid)
        left_out = jnp.maximum(left_out, part.num_left_out)  # a full counter stays full
        return Part(changed, center.outer_state, left_out)

    def _weighed(self, finite: Any, weights: Any) -> tuple[Any, Any, Any]:
        """(which workers count, what each counts, how many are present).

        The weights of those that count have a mean of 1; None: all alike.
        """
        if weights is None:
            return finite, None, self.workers.num_workers
        present = (weights > 0) & (weights < jnp.inf)
        counted = finite & present
        weights = jnp.where(counted, jnp.clip(weights, LIGHTEST, HEAVIEST), 0)
        flags = [weights, counted.astype(jnp.float32), present.astype(jnp.float32)]
        total, num_counted, num_present = self.workers.total(flags)
        mean = total / jnp.maximum(num_counted, 1)
        weights = weights / jnp.where(mean > 0, mean, 1)
        # A share is divided by, to learn what was sent.
        shares = jnp.maximum(weights, jnp.finfo(jnp.float32).tiny)
        weights = jnp.where(counted, shares, 0)
        return counted, weights, num_present.astype(jnp.int32)

    @property
    def keeps_pulled(self) -> bool:
        """Whether workers pull different values, so that the state has to keep them."""
        return self.reduce == "sequential" or self.moving_rate is not None

    def _commit(self, leaf: Leaf, local: Any, accumulated: Any, num_steps: Any) -> Any:
        elastic = self.moving_rate is not None
        start = leaf.center if elastic or leaf.pulled is None else leaf.pulled
        pulled = of_all(start, local)
        commit = make_commit(self.commit, pulled, local, accumulated, num_steps)
        return commit if leaf.residual is None else commit + leaf.residual

    def _at_once(self, old, local, commits, counted, weights, subtree):
        """One outer step against the commits of all workers together.

        Returns (the new center, the rows that workers pull if they differ, the rows of
        commits as they were sent, the number of valid commits).
        """
        pulled = {}
        if self.moving_rate is not None:
            # By the commit, not towards the old center: to read that beside the new one
            # would cost a copy of it, even at steps without an exchange.
            rate = self.moving_rate(self.workers.num_workers)
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
        if self.reduce == "mean":
            divisor = jnp.maximum(num_valid, 1)
            sums = {k: row / divisor.astype(row.dtype) for k, row in sums.items()}
        center = self._moved(old, sums, subtree)
        return self.workers.equal_as(center, old), pulled, sent, num_done

    def _in_turns(self, old, local, commits, counted, weights, subtree):
        """An outer step for each worker, in rank order; returns what `_at_once` does."""
        elastic = self.moving_rate is not None
        rate = self.moving_rate(self.workers.num_workers) if self.moving_rate else 0.0
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
        return self.workers.equal_as(center, old), own, sent, num_done

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


def _times(row: jax.Array, weights: Any) -> jax.Array:
    """A row of each worker times its weight; None: as it is."""
    if weights is None:
        return row
    return row * weights.reshape(weights.shape + (1,) * (row.ndim - weights.ndim))
