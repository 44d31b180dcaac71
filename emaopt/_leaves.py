"""What a leaf of a tree is: whether it has an average, in which dtype, beside what."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emaopt._jax_internals import traced

_KINDS = (jnp.complexfloating, jnp.floating, jnp.integer, jnp.bool_)


def is_array(leaf: object) -> bool:
    """Whether a leaf is an array or a number."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int, complex))


def is_averaged(leaf: Any) -> bool:
    """Whether a leaf can be averaged: a floating or complex array or number."""
    return is_array(leaf) and jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def is_masked(node: object) -> bool:
    """Whether a node stands for a leaf that a mask leaves out."""
    return isinstance(node, optax.MaskedNode)


def dtype_of(leaf: Any) -> np.dtype:
    """The dtype of an array, or the one that JAX gives to a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype


def kind_of(leaf: object) -> str | None:
    """What kind of numbers a leaf holds; None for what holds none."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and isinstance(leaf, (bool, int, float, complex)):
        dtype = jnp.result_type(type(leaf))
    if dtype is None:
        return None
    return next((k.__name__ for k in _KINDS if jnp.issubdtype(dtype, k)), "key")


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """The floating or complex dtype to compute in: float32 for a narrower one."""
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def for_each_leaf(
    what: str, entries: Any, tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """The entry for each leaf of a tree, from a tree like it or a prefix of it.

    Args:
      what: Opens the error of entries that are neither: "f: mask must be like ...".
      entries: The tree, or the prefix.
      tree: Whose leaves they are for.
      is_leaf: Tells an entry that is a container itself.
    """
    try:
        spread = jax.tree.broadcast(entries, tree, is_leaf=is_leaf)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what}: {error}") from None
    return jax.tree.leaves(spread, is_leaf=is_leaf)


def replicated_beside(leaves: list[Any]) -> Callable[[Any], jax.Array]:
    """Makes scalar zeros on the devices of the leaves.

    Left on the default device, they would come back from the first step replicated over
    the parameters' mesh, and the second step would be compiled anew.
    """
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not traced(leaf):
            if isinstance(leaf.sharding, NamedSharding):
                everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
                return lambda dtype: jnp.zeros((), dtype, device=everywhere)
    return lambda dtype: jnp.zeros((), dtype)


def rows_beside(param: Any, leaf: Any) -> Any:
    """A leaf with its rows where a parameter's are, as far as that is known.

    Of what is traced in the Explicit mode of a mesh alone.
    """
    if not traced((param, leaf)):
        there = getattr(param, "sharding", None)
        if not isinstance(there, NamedSharding) or there.mesh.size == 1:
            return leaf
        rows = PartitionSpec(*there.spec[:1])
        return jax.device_put(leaf, NamedSharding(there.mesh, rows))
    here, there = jax.typeof(leaf).sharding, jax.typeof(param).sharding
    if AxisType.Explicit not in there.mesh.axis_types or not leaf.ndim:
        return leaf
    rest = here.spec[1:] if here.mesh == there.mesh else ()
    return jax.sharding.reshard(
        leaf, there.update(spec=PartitionSpec(there.spec[0], *rest))
    )
