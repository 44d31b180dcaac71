"""What a worker hands in after some local steps."""

from typing import Any

import jax
import jax.numpy as jnp

from emaopt._checks import check_choice
from emaopt._leaves import at_least_float32, is_averaged
from emaopt._rounding import rounded_to

COMMITS = ("delta", "mean_delta", "mean_gradient")


def check_commit(function: str, commit: Any) -> None:
    """Raises unless `commit` is one of `COMMITS`."""
    check_choice(function, "commit", commit, COMMITS)


def start_center(leaf: Any) -> Any:
    """A copy of a parameter to be a center: at least float32, never an alias."""
    if not is_averaged(leaf):
        return leaf
    leaf = jnp.asarray(leaf)
    return jnp.array(leaf, dtype=at_least_float32(leaf.dtype), copy=True)


def accumulate(old: jax.Array, gradient: Any, first: Any) -> jax.Array:
    """The sum of the gradients since the last exchange, in the accumulator's dtype.

    None is a gradient of zeros.

    Started anew by a select at the first step after an exchange: a reset in the
    conditional of the exchange would cost a copy of everything at every step.
    """
    kept = jnp.where(first, 0, old)
    return kept if gradient is None else kept + gradient.astype(old.dtype)


def make_commit(
    commit: str, pulled: Any, local: Any, accumulated: Any, num_steps: Any
) -> jax.Array:
    """A worker's commit for one leaf, as a gradient: the center moves against it.

    Args:
      commit: One of `COMMITS`.
      pulled: The center that the worker started from, in the center's dtype.
      local: The worker's parameters now. Delta commits are the difference from `pulled`
        as the worker holds it, rounded to the dtype of `local`: rounding is no progress.
      accumulated: Σ gradients since then; for mean_gradient only.
      num_steps: () int, the local steps since then.
    """
    if commit == "mean_gradient":
        return accumulated / num_steps.astype(accumulated.dtype)
    delta = rounded_to(pulled, local.dtype) - local.astype(pulled.dtype)
    if commit == "mean_delta":
        return delta / num_steps.astype(delta.dtype)
    return delta


def encoded(
    row: jax.Array, dtype: Any, axes: Any, num_parts: int = 1
) -> tuple[jax.Array, Any]:
    """A commit as it travels, and the factor to decode it with (None: none is needed).

    Args:
      row: The commit, or one for each worker.
      dtype: Floating: the commit is clipped to the dtype's range / `num_parts`, and cast.
        Integer: it is rounded to multiples of its largest magnitude / the dtype's largest
        value. None: it stays as it is, as complex ones do.
      axes: The axes of one worker's commit.
      num_parts: How many are going to be added up in a floating dtype.
    """
    if dtype is None or jnp.iscomplexobj(row):
        return row, None
    if not jnp.issubdtype(dtype, jnp.integer):
        limit = float(jnp.finfo(dtype).max) / num_parts
        return jnp.clip(row, -limit, limit).astype(dtype), None
    largest = jnp.max(jnp.abs(row), axis=axes, keepdims=True, initial=0)
    scale = largest / jnp.iinfo(dtype).max
    return jnp.round(row / jnp.where(scale > 0, scale, 1)).astype(dtype), scale


def decoded(code: jax.Array, scale: Any, dtype: Any) -> jax.Array:
    """What a commit amounts to after its travel, in the center's dtype."""
    value = code.astype(dtype)
    return value if scale is None else value * scale.astype(dtype)
