"""Sparse gradients of the rows of a table (BCOO): made dense, or applied row by row."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emaopt._masks import rows_alone
from emaopt._types import Leaf, PyTree
from emaopt.tf1._slots import marked


def is_sparse(leaf: object) -> bool:
    """Whether a leaf is a BCOO."""
    # Whoever has a BCOO has imported its module; emaopt does not import it for the test.
    sparse = sys.modules.get("jax.experimental.sparse")
    return sparse is not None and isinstance(leaf, sparse.BCOO)


def densified(gradient: Leaf) -> Leaf:
    """A sparse gradient as a dense array, duplicate rows summed; others as they are."""
    return gradient.todense() if is_sparse(gradient) else gradient


class _Rows:
    """The rows of a parameter that a step moves, or None for all. A leaf to JAX."""

    def __init__(self, index: jax.Array | None, shape: tuple[int, ...]):
        self.index, self.shape = index, shape

    def gather(self, leaf: Leaf) -> Leaf:
        # A slot with another shape than its parameter has no such rows, and moves whole.
        if self.index is None or leaf.shape != self.shape:
            return leaf
        # `_summed` fills up with an index past the end: a copy of the last row moves, and
        # `scatter` drops it.
        return leaf.at[self.index].get(mode="clip")

    def scatter(self, old: Leaf, new: Leaf) -> Leaf:
        if self.index is None or old.shape != self.shape:
            return new
        return old.at[self.index].set(new.astype(old.dtype), mode="drop")


def row_step(
    tx: optax.GradientTransformationExtraArgs,
    gradients: list[Leaf],
    opt_state: PyTree,
    params: PyTree,
    extra_args: Mapping[str, Any],
) -> tuple[PyTree, PyTree]:
    """A step of the rows that sparse gradients touch, and of parameters with dense ones.

    The rows of the parameters and of their slots are gathered, updated as if they were
    parameters of their own, and put back.
    """
    treedef = jax.tree.structure(params)
    rows, values = map(list, zip(*map(_summed, gradients), strict=True))
    moving = (
        jax.tree.unflatten(treedef, rows),
        marked(opt_state, params, rows, _Rows(None, ())),
    )
    whole = (params, opt_state)
    few_params, few_state = jax.tree.map(
        lambda rows, leaf: rows.gather(leaf), moving, whole
    )
    # A mask that is a function of shapes may choose otherwise for these few rows.
    with rows_alone():
        updates, few_state = tx.update(
            jax.tree.unflatten(treedef, values), few_state, few_params, **extra_args
        )
    new = (optax.apply_updates(few_params, updates), few_state)
    return jax.tree.map(lambda rows, old, new: rows.scatter(old, new), moving, whole, new)


def _summed(gradient: Leaf) -> tuple[_Rows, Leaf]:
    """The rows that a gradient touches, each once, and the sums of their entries.

    Under jit their number must be known, so it is that of the entries; places to spare
    get an index past the end.
    """
    if not is_sparse(gradient):
        return _Rows(None, ()), gradient
    size = gradient.nse
    rows, entry = jnp.unique(
        gradient.indices[:, 0],
        size=size,
        fill_value=gradient.shape[0],
        return_inverse=True,
    )
    sums = jax.ops.segment_sum(gradient.data, entry.reshape(-1), num_segments=size)
    return _Rows(rows, gradient.shape), sums
