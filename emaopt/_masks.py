"""Masks: which leaves of a tree are chosen, and whether they still are."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from emaopt._leaves import for_each_leaf
from emaopt._names import leaves_with_keys
from emaopt._types import Mask, PyTree

# Whether an update is given some rows of each leaf only. A mask that is a function of
# shapes then chooses other leaves than at init.
_of_rows: ContextVar[bool] = ContextVar("_of_rows", default=False)


def is_function(argument: object, tree: PyTree = None) -> bool:
    """Whether an argument is a function of a tree, in place of a tree like it.

    A callable model with a flag at each leaf is a tree. As for `optax.masked`, a callable
    is a function if all of its leaves are callable. A callable without leaves, or a
    `jax.tree_util.Partial`, whose leaves are its arguments, is a function unless the tree
    is of the same type.
    """
    # A Mesh is callable, as a decorator of functions.
    if not callable(argument) or isinstance(argument, Mesh):
        return False
    leaves = jax.tree.leaves(argument)
    # jax.tree_util.Partial is a subclass of functools.partial, which is a leaf itself.
    if leaves and not isinstance(argument, partial):
        return all(map(callable, leaves))
    return type(argument) is not type(tree) or jax.tree_util.all_leaves([argument])


def chosen_by(function: str, mask: Mask, tree: PyTree, num_leaves: int) -> list[bool]:
    """Whether the mask chooses each leaf, in flattening order."""
    # No leaves: an empty tree, or the placeholder that optax.tree.map_params gives to
    # init. A mask would not have its structure.
    if mask is None or num_leaves == 0:
        return [True] * num_leaves
    flags = mask(tree) if is_function(mask, tree) else mask
    what = f"{function}: mask must be like the parameters or a prefix of them"
    flags = for_each_leaf(what, flags, tree)
    for flag in flags:
        if not isinstance(flag, (bool, np.bool_)):
            injected = (
                " Of optax.inject_hyperparams, which takes functions for schedules, name "
                "mask in static_args."
            )
            raise TypeError(
                f"{function}: mask must hold booleans, got {flag!r}."
                f"{injected if isinstance(flag, jax.Array) else ''}"
            )
    return [bool(flag) for flag in flags]


@contextmanager
def rows_alone() -> Iterator[None]:
    """Says that updates inside are given some rows of the parameters, and not all."""
    token = _of_rows.set(True)
    try:
        yield
    finally:
        _of_rows.reset(token)


def check_mask(
    function: str, mask: Mask, tree: PyTree, kept: list[bool], averaged: list[bool]
) -> None:
    """Raises if the mask is not the one that the state was made with.

    Args:
      function, mask, tree: As for `chosen_by`.
      kept: Whether the state has an average, for each leaf.
      averaged: Whether each leaf can be averaged: an integer leaf cannot.
    """
    if _of_rows.get():
        return
    try:
        chosen = chosen_by(function, mask, tree, len(kept))
    except jax.errors.JAXTypeError:
        return  # a function of values, which are known outside of jit alone, as at init
    differs = [
        counts and now != then
        for now, then, counts in zip(chosen, kept, averaged, strict=True)
    ]
    if not any(differs):
        return
    names = ["/".join(keys) or "the leaf" for keys, _ in leaves_with_keys(tree)]
    listed = list(zip(names, chosen, differs, strict=True))
    grown = [name for name, now, other in listed if other and now]
    shrunk = [name for name, now, other in listed if other and not now]
    said = [
        f"{what} {', '.join(names[:10])}"
        + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        for what, names in (("averages", grown), ("leaves out", shrunk))
        if names
    ]
    raise ValueError(
        f"{function}: the mask is not the one that the state was made with: now it "
        f"{' and it '.join(said)}. It cannot change in mid-run by itself. To keep the "
        "average of what stays, call opt_state = emaopt.change_mask(opt_state, params, "
        "optimizer) with the new optimizer first. (A mask that is a function of shapes "
        "must say the same inside of jax.vmap and jax.shard_map as at init; the tree "
        "that it makes does.)"
    )
