"""One exchange: commits, their reduction, the outer step, and what workers pull."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from emaopt._collectives import of_all
from emaopt._commits import make_commit
from emaopt._local_checks import HEAVIEST, LIGHTEST
from emaopt._reductions import REDUCTIONS, Center, Reduction
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

        reduced = self._reduction(
            old,
            where(finite, local, {}),
            where(finite, commits, {}),
            counted,
            weights,
            subtree,
        )
        center, sent = reduced.center, reduced.sent
        pulled = where(finite, reduced.pulled, dict(enumerate(center.leaves)))
        kept = {k: leaves[k].residual for k in sent if leaves[k].residual is not None}
        residual = where(counted, {k: commits[k] - sent[k] for k in kept}, kept)
        changed = [
            Leaf(pulled.get(k, leaf.pulled), residual.get(k, leaf.residual), new)
            for k, (leaf, new) in enumerate(zip(leaves, center.leaves, strict=True))
        ]
        left_out = part.num_left_out + (num_present - reduced.num_valid)
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
    def _reduction(self) -> Reduction:
        kind = REDUCTIONS[self.reduce]
        return kind(
            self.workers, self.outer, self.dtype, self.moving_rate, self.reduce == "mean"
        )

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
