"""Gradients of some rows of a table, as BCOO arrays: made dense, or row by row."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emaopt._masks import rows_alone
from emaopt.tf1._slots import marked


def is_sparse(leaf: Any) -> bool:
    sparse = sys.modules.get("jax.experimental.sparse")  # who has one has imported it
    return sparse is not None and isinstance(leaf, sparse.BCOO)


def densified(gradient: Any) -> Any:
    """The dense array of a sparse gradient, duplicate rows summed."""
    return gradient.todense() if is_sparse(gradient) else gradient


class _Rows:
    """The rows of a parameter that move, or None for all. A leaf of a tree."""

    def __init__(self, index: jax.Array | None, shape: tuple[int, ...]):
        self.index, self.shape = index, shape

    def gather(self, leaf: Any) -> Any:
        if self.index is None or leaf.shape != self.shape:
            return leaf
        return leaf.at[self.index].get(mode="clip")

    def scatter(self, old: Any, new: Any) -> Any:
        if self.index is None or old.shape != self.shape:
            return new
        return old.at[self.index].set(new.astype(old.dtype), mode="drop")


def row_step(
    tx: optax.GradientTransformationExtraArgs,
    gradients: list[Any],
    opt_state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """A step of the rows that sparse gradients touch, and of all of the dense ones.

    The rows of the parameters and of their slots are gathered, moved as if they were
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
    with rows_alone():
        updates, few_state = tx.update(
            jax.tree.unflatten(treedef, values), few_state, few_params, **extra_args
        )
    new = (optax.apply_updates(few_params, updates), few_state)
    return jax.tree.map(lambda rows, old, new: rows.scatter(old, new), moving, whole, new)


def _summed(gradient: Any) -> tuple[_Rows, Any]:
    """The rows that a gradient touches, each once, and their sums.

    As many as there are entries; an index past the end stands for those to spare.
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
