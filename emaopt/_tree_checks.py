"""Checks of trees: arrays that JAX can compute with, and trees that are alike."""

import jax
import numpy as np

from emaopt._types import PyTree


def check_state(function: str, argument: str, state: PyTree) -> None:
    """Raises if `state` is no optimizer's state, but None or a single leaf."""
    if state is None or jax.tree_util.all_leaves([state]):
        raise TypeError(
            f"{function}: {argument} must be an optimizer's state, got {state!r}."
        )
    check_arrays(function, argument, state, others=True)


def check_arrays(
    function: str, argument: str, tree: PyTree, *, others: bool = False
) -> None:
    """Raises unless all leaves are arrays or numbers that JAX can compute with.

    With `others`, leaves that are no arrays pass: parameters may hold them, such as the
    functions in an Equinox model.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, int) and not _fits(leaf):
            raise ValueError(f"{function}: {argument} holds {leaf}, too large for JAX.")
        if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, float, int, complex)):
            continue
        if isinstance(leaf, (np.ndarray, np.generic)):
            # Objects, bytes, text and times: JAX has no arrays of these.
            if leaf.dtype.kind not in "OSUMm":
                continue
        elif others or (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            continue
        raise TypeError(f"{function}: {argument} must hold arrays, got {leaf!r}.")


def _fits(number: int) -> bool:
    """Whether an integer fits into JAX's widest, int32 unless jax_enable_x64 is on."""
    bounds = np.iinfo(jax.dtypes.canonicalize_dtype(np.int64))
    return int(bounds.min) <= number <= int(bounds.max)


def unlike(tree: PyTree, other: PyTree) -> str | None:
    """How a tree of arrays differs from another, in words; None if it does not."""
    have, want = jax.tree.structure(tree), jax.tree.structure(other)
    if have != want:
        return f"{have}, not {want}"
    with_path = jax.tree_util.tree_flatten_with_path(tree)[0]
    for (path, leaf), wanted in zip(with_path, jax.tree.leaves(other), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the leaf"
        number = isinstance(leaf, (float, int, complex, np.generic))
        if not (number or hasattr(leaf, "dtype")) or (
            getattr(getattr(leaf, "dtype", None), "kind", "f") in "OSUMm"
        ):
            return f"{name} is {leaf!r}, no array"
        if np.shape(leaf) != np.shape(wanted):
            return f"{name} has shape {np.shape(leaf)}, not {np.shape(wanted)}"
    return None


def refuse_unlike(
    function: str, params: PyTree, error: Exception, **trees: PyTree
) -> None:
    """Raises if one of the trees is not like `params`, which may have caused the error.

    Called after the error only: comparing the trees takes as long as a small update.
    """
    for argument, tree in trees.items():
        if (what := unlike(tree, params)) is not None:
            raise ValueError(
                f"{function}: {argument} must be a tree like the parameters, got {what}."
            ) from error
