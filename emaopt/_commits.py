"""The commits that workers hand in: pseudo-gradients of some local steps."""

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._checks import check_choice
from emaopt._leaves import at_least_float32, is_averaged
from emaopt._rounding import rounded_to
from emaopt._types import DTypeLike, Leaf, Scalar

COMMITS = ("delta", "mean_delta", "mean_gradient")


def check_commit(function: str, commit: object) -> None:
    """Raises unless `commit` is one of `COMMITS`."""
    check_choice(function, "commit", commit, COMMITS)


def start_center(leaf: Leaf) -> Leaf:
    """A copy of a parameter to start a center from: at least float32, never an alias."""
    # Parameters and state may both be donated, so they must not share a buffer.
    if not is_averaged(leaf):
        return leaf.copy() if isinstance(leaf, jax.Array) else leaf
    leaf = jnp.asarray(leaf)
    return jnp.array(leaf, dtype=at_least_float32(leaf.dtype), copy=True)


def accumulate(old: jax.Array, gradient: jax.Array | None, first: Scalar) -> jax.Array:
    """The sum of the gradients since the last exchange, in the accumulator's dtype.

    None is a gradient of zeros. `first`: whether this is the first step of the sum.
    """
    # A select starts the sum anew. A reset in the conditional of the exchange would make
    # XLA copy the accumulators at every step.
    kept = jnp.where(first, 0, old)
    return kept if gradient is None else kept + gradient.astype(old.dtype)


def make_commit(
    commit: str,
    pulled: Leaf,
    local: jax.Array,
    accumulated: Leaf,
    num_steps: Scalar,
) -> jax.Array:
    """A worker's commit for one leaf: a pseudo-gradient, against which the center moves.

    Args:
      commit: One of `COMMITS`.
      pulled: The center that the worker started from, in the center's dtype; not read
        for mean_gradient, and may be None there.
      local: The worker's parameters now.
      accumulated: Σ gradients since the pull; for mean_gradient, else None.
      num_steps: () int, the local steps since the pull.
    """
    if commit == "mean_gradient":
        return accumulated / num_steps.astype(accumulated.dtype)
    # The worker holds `pulled` in the dtype of `local`: that rounding is no progress.
    delta = rounded_to(pulled, local.dtype) - local.astype(pulled.dtype)
    if commit == "mean_delta":
        return delta / num_steps.astype(delta.dtype)
    return delta


def encoded(
    row: jax.Array, dtype: DTypeLike | None, axes: tuple[int, ...], num_parts: int = 1
) -> tuple[jax.Array, jax.Array | None]:
    """A commit as it travels, and the factor that decodes it (None: none is needed).

    Args:
      row: The commit, or one for each worker.
      dtype: Floating: the commit is clipped to the dtype's range / `num_parts`, and cast.
        Integer: it is rounded to multiples of its largest magnitude / the dtype's largest
        value. None: it stays as it is. Complex commits always do.
      axes: The axes of one worker's commit.
      num_parts: How many commits are going to be added up in a floating dtype.
    """
    if dtype is None or jnp.iscomplexobj(row):
        return row, None
    if not jnp.issubdtype(dtype, jnp.integer):
        # A sum of `num_parts` commits at the limit still fits the dtype.
        limit = float(jnp.finfo(dtype).max) / num_parts
        return jnp.clip(row, -limit, limit).astype(dtype), None
    # `initial` is for leaves without elements; a leaf of zeros is divided by 1, not by 0.
    largest = jnp.max(jnp.abs(row), axis=axes, keepdims=True, initial=0)
    scale = largest / jnp.iinfo(dtype).max
    return jnp.round(row / jnp.where(scale > 0, scale, 1)).astype(dtype), scale


def decoded(code: jax.Array, scale: jax.Array | None, dtype: np.dtype) -> jax.Array:
    """The value of a commit after its travel, in the center's dtype."""
    value = code.astype(dtype)
    return value if scale is None else value * scale.astype(dtype)
