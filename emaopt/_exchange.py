"""One exchange: commits, their reduction, the outer step, and what workers pull."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from emaopt._collectives import of_all
from emaopt._commits import make_commit
from emaopt._local_checks import HEAVIEST, LIGHTEST
from emaopt._reductions import REDUCTIONS, Center, Reduced, Reduction, Rows, Subtree
from emaopt._types import DTypeLike, PyTree, Scalar
from emaopt._workers import Mapped, Stacked


class Leaf(NamedTuple):
    """The values of one leaf that an exchange changes."""

    pulled: jax.Array | None  # each worker's pulled center; None: all pull the same
    residual: jax.Array | None  # what the last commits lost in the exchange's dtype
    center: jax.Array


class Part(NamedTuple):
    """The values of one fragment of the tree that an exchange changes."""

    leaves: list[Leaf]  # in flattening order
    outer_state: PyTree
    num_left_out: Scalar  # () int32
    valid: jax.Array | None  # flags: whose commits were valid; None: nobody asks


class Fixed(NamedTuple):
    """The values of one leaf that an exchange only reads: a row for each worker."""

    local: jax.Array | None  # the parameters after the step; None: not exchanged
    accumulated: jax.Array | None  # Σ gradients


class Voices(NamedTuple):
    """Which workers hand in commits, and how much theirs count; shaped as flags are."""

    committing: jax.Array  # bool; the others are left out
    weights: jax.Array | None  # float, 0 for absent workers; None: all count alike


class Votes(NamedTuple):
    """Which commits count, and how much, once they have been checked."""

    valid: jax.Array  # bool: handed in, and finite; the others are left out
    counted: jax.Array  # bool: valid, and the worker is not absent
    weights: jax.Array | None  # float32, a mean of 1 over those that count; None: alike
    num_present: Scalar | int  # workers that are not absent


@dataclass(frozen=True)
class Exchange:
    """Applies the workers' commits to the center and lets the workers pull it.

    The arguments are those of `local_updates`. Rows are the workers' parts of a leaf;
    the keys of dicts are positions in the fragment.
    """

    workers: Stacked | Mapped
    outer: optax.GradientTransformation
    commit: str
    reduce: str
    moving_rate: Callable[[int], float] | None  # of the number of workers
    dtype: DTypeLike | None

    def __call__(
        self,
        part: Part,
        read: Callable[[jax.Array], list[Fixed]],
        num_steps: Scalar,
        voices: Voices,
        subtree: Subtree,
    ) -> Part:
        """Returns the part after the exchange.

        Commits are computed twice from the same values: first to check them and then,
        held back until all are checked, to send them. So each leaf's commits are computed
        when they are sent, and the commits of all leaves are never in memory at once.

        Args:
          part: The values before the exchange.
          read: Returns what the exchange reads of each leaf, held back until its
            argument, flags of the workers, is computed.
          num_steps: () int32, local steps since the last exchange.
          voices: Which workers' commits count, and how much.
          subtree: Makes of a list like the leaves a tree with the parameters' names.
        """
        leaves = part.leaves

        def commits_of(fixed: list[Fixed]) -> Rows:
            return {
                k: self.commit_of(leaves[k], f.local, f.accumulated, num_steps)
                for k, f in enumerate(fixed)
                if f.local is not None
            }

        # First pass: a worker with a commit that is not finite is left out.
        checked = commits_of(read(voices.committing))
        rows = [[row] for row in checked.values()]
        finite = self.workers.finite(rows, voices.committing)
        # Second pass: `finite` depends on all commits, so each is computed anew.
        fixed = read(finite)
        # Elastic workers read their commits twice, so XLA would keep or copy them anyway.
        commits = commits_of(fixed) if self.moving_rate is None else checked
        local = {k: f.local for k, f in enumerate(fixed) if f.local is not None}
        votes = self.weighed(finite, voices)
        return self.move(part, local, commits, votes, subtree)[0]

    def move(
        self, part: Part, local: Rows, commits: Rows, votes: Votes, subtree: Subtree
    ) -> tuple[Part, Reduced]:
        """Reduces commits that have been checked, and moves the center by them.

        `local` holds the workers' parameters, which elastic workers start from. Returns
        the part after the exchange, and what was reduced.
        """
        leaves = part.leaves
        old = Center([leaf.center for leaf in leaves], part.outer_state)
        valid, counted, weights, num_present = votes

        # Rows are selected and not multiplied by the flags, because 0 · NaN is NaN.
        def where(flags: jax.Array, rows: PyTree, otherwise: PyTree) -> Rows:
            return {
                k: jnp.where(
                    self.workers.spread(flags, row),
                    row,
                    of_all(otherwise[k], row) if k in otherwise else 0,
                )
                for k, row in rows.items()
            }

        reduced = self._reduction(
            old,
            where(valid, local, {}),
            where(valid, commits, {}),
            counted,
            weights,
            subtree,
        )
        center, sent = reduced.center, reduced.sent
        pulled = where(valid, reduced.pulled, dict(enumerate(center.leaves)))
        # A worker whose commit did not count has lost nothing new: its residual stays.
        kept = {k: leaves[k].residual for k in sent if leaves[k].residual is not None}
        residual = where(counted, {k: commits[k] - sent[k] for k in kept}, kept)
        changed = [
            Leaf(pulled.get(k, leaf.pulled), residual.get(k, leaf.residual), new)
            for k, (leaf, new) in enumerate(zip(leaves, center.leaves, strict=True))
        ]
        left_out = part.num_left_out + (num_present - reduced.num_valid)
        left_out = jnp.maximum(left_out, part.num_left_out)  # a full counter stays full
        asked = None if part.valid is None else valid
        return Part(changed, center.outer_state, left_out, asked), reduced

    def weighed(self, valid: jax.Array, voices: Voices) -> Votes:
        """The votes of the workers whose commits turned out to be valid."""
        weights = voices.weights
        if weights is None:
            return Votes(valid, valid, None, self.workers.num_workers)
        # Traced weights cannot be refused; NaN compares as false, so it is absent.
        present = (weights > 0) & (weights < jnp.inf)
        counted = valid & present
        weights = jnp.where(counted, jnp.clip(weights, LIGHTEST, HEAVIEST), 0)
        # Of one dtype, so that the three sums share one collective.
        flags = [weights, counted.astype(jnp.float32), present.astype(jnp.float32)]
        total, num_counted, num_present = self.workers.total(flags)
        mean = total / jnp.maximum(num_counted, 1)
        weights = weights / jnp.where(mean > 0, mean, 1)
        # The reduction divides by a share to learn what was sent, so it must not be 0,
        # as 1e-30 / 1e30 is in float32.
        shares = jnp.maximum(weights, jnp.finfo(jnp.float32).tiny)
        weights = jnp.where(counted, shares, 0)
        return Votes(valid, counted, weights, num_present.astype(jnp.int32))

    @property
    def _reduction(self) -> Reduction:
        kind = REDUCTIONS[self.reduce]
        return kind(self.workers, self.outer, self.dtype, self.moving_rate)

    @property
    def keeps_pulled(self) -> bool:
        """Whether workers pull different values, which the state then has to keep."""
        return REDUCTIONS[self.reduce].pulls_differ or self.moving_rate is not None

    def commit_of(
        self,
        leaf: Leaf,
        local: jax.Array,
        accumulated: jax.Array | None,
        num_steps: Scalar,
    ) -> jax.Array:
        """The commit of one leaf, with what the last one lost."""
        elastic = self.moving_rate is not None
        # An elastic worker is drawn to the center as it is now, not as it was pulled.
        start = leaf.center if elastic or leaf.pulled is None else leaf.pulled
        pulled = of_all(start, local)
        commit = make_commit(self.commit, pulled, local, accumulated, num_steps)
        return commit if leaf.residual is None else commit + leaf.residual
