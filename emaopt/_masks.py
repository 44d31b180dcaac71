"""Masks: which leaves of a tree are chosen, and whether they still are."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from emaopt._leaves import for_each_leaf
from emaopt._names import leaves_with_keys

# Whether the tree holds some rows of its leaves only, and a mask may be one of shapes.
_of_rows: ContextVar[bool] = ContextVar("_of_rows", default=False)


def is_function(argument: Any, tree: Any = None) -> bool:
    """Whether an argument is a function of a tree, in place of a tree like it.

    A model that can be called, with a flag for each of its leaves, is a tree. As Optax
    tells a mask, what can be called is a function if all of its leaves can. Where it has
    none, or is a `jax.tree_util.Partial`, whose leaves are arguments, it is one unless
    the tree is of that kind, too.
    """
    if not callable(argument) or isinstance(argument, Mesh):  # which decorates functions
        return False
    leaves = jax.tree.leaves(argument)
    if leaves and not isinstance(argument, partial):
        return all(map(callable, leaves))
    return type(argument) is not type(tree) or jax.tree_util.all_leaves([argument])


def chosen_by(function: str, mask: Any, tree: Any, num_leaves: int) -> list[bool]:
    """Whether each leaf is averaged, in flattening order."""
    # Without leaves: an empty tree, or what optax.tree.map_params puts in its place.
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
    """Says that what is updated are some rows of the parameters, and not all of them."""
    token = _of_rows.set(True)
    try:
        yield
    finally:
        _of_rows.reset(token)


def check_mask(
    function: str, mask: Any, tree: Any, kept: list[bool], averaged: list[bool]
) -> None:
    """Raises if the mask is not the one that the state was made with.

    Args:
      function, mask, tree: As for `chosen_by`.
      kept: Whether the state has an average, for each leaf.
      averaged: Whether there is any to have: an integer leaf has none.
    """
    if _of_rows.get():
        return
    try:
        chosen = chosen_by(function, mask, tree, len(kept))
    except jax.errors.JAXTypeError:
        return  # a function of the values: known outside of jit, where init was called
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
