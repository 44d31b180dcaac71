"""Linear combinations of trees of weights, on the host."""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._checks import check_iterable, check_vector
from emaopt._tree_checks import check_arrays
from emaopt._types import Leaf, PyTree, Vector

_BLOCK = 1 << 15  # elements at a time


def combine(trees: Iterable[PyTree], coefficients: Vector) -> PyTree:
    """Returns Σ_i c_i tree_i, summed in float64 on the host.

    The trees are in memory; `checkpoint.combine` sums checkpoints, leaf by leaf.

    Args:
      trees: Trees of arrays, alike; of an iterator, one tree is held at a time.
      coefficients: float [n]. The values of a tree whose coefficient is 0 are not read,
        so that its NaN do not matter.

    Returns:
      A tree of NumPy arrays in the leaves' dtypes. Leaves that are not floating (step
      counters, keys) are the last tree's.

    Raises:
      ValueError: If the trees differ in structure, shapes or dtypes, or are not n.
      TypeError: If an argument is of another kind.

    Example:
      >>> print(combine([{"w": np.zeros(2)}, {"w": np.ones(2)}], [0.25, 0.75]))
      {'w': array([0.75, 0.75])}
    """
    check_iterable("combine", "trees", trees, "trees of arrays")
    coefficients = check_vector("combine", "coefficients", coefficients)
    sums, like, last = [], None, None
    for tree, coefficient in _pairs(trees, coefficients):
        leaves, treedef = jax.tree.flatten(tree)
        check_arrays("combine", "trees", leaves)
        kinds = treedef, [(np.shape(x), _dtype(x)) for x in leaves]
        if like is None:
            like, sums = kinds, [weighted_sum(*kind) for kind in kinds[1]]
        if kinds != like:
            raise ValueError(f"combine: the trees differ: {like} and {kinds}.")
        for total, leaf in zip(sums, leaves, strict=True):
            add(total, leaf, coefficient)
        last = leaves
    if like is None or last is None:
        raise ValueError("combine: give at least one tree.")
    done = [
        leaf if total is None else total.astype(dtype).reshape(shape)
        for total, leaf, (shape, dtype) in zip(sums, last, like[1], strict=True)
    ]
    return jax.tree.unflatten(like[0], done)


def _pairs(
    trees: Iterable[PyTree], coefficients: np.ndarray
) -> Iterator[tuple[PyTree, float]]:
    """Each tree with its coefficient; raises if there are more or fewer trees."""
    count = 0
    for tree in trees:
        if count == coefficients.size:
            raise ValueError(f"combine: more trees than {count} coefficients.")
        yield tree, coefficients[count]
        count += 1
    if 0 < count < coefficients.size:
        raise ValueError(f"combine: {count} trees for {coefficients.size} coefficients.")


def _dtype(leaf: Leaf) -> np.dtype:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def weighted_sum(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """Zeros to `add` leaves to, flat, float64 or complex128; None if not inexact."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    wide = np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64
    return np.zeros(int(np.prod(shape)), wide)


def add(total: np.ndarray | None, leaf: Leaf, coefficient: float) -> None:
    """Adds a leaf times its coefficient in place, with a buffer of one block."""
    # 0 · NaN is NaN: a leaf that weighs 0 must not be added at all.
    if total is None or coefficient == 0:
        return
    flat = np.asarray(leaf).reshape(-1)
    # In one go, the cast to double precision would make a copy of the whole leaf.
    for i in range(0, flat.size, _BLOCK):
        part = slice(i, i + _BLOCK)
        total[part] += coefficient * flat[part].astype(total.dtype)
