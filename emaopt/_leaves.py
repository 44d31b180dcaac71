"""Leaves of a tree: which can be averaged, in which dtype, on which devices."""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emaopt._jax_internals import traced
from emaopt._types import Leaf, PyTree

# A dtype of JAX's that is none of these is that of PRNG keys.
_KINDS = (jnp.complexfloating, jnp.floating, jnp.integer, jnp.bool_)


def is_array(leaf: object) -> bool:
    """Whether a leaf is an array or a number."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int, complex))


def is_averaged(leaf: Leaf) -> bool:
    """Whether a leaf can be averaged: a floating or complex array or number."""
    return is_array(leaf) and jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def is_masked(node: object) -> bool:
    """Whether a node stands for a leaf that a mask leaves out."""
    return isinstance(node, optax.MaskedNode)


def dtype_of(leaf: Leaf) -> np.dtype:
    """The dtype of an array, or the one that JAX gives to a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype


def opened(tree: PyTree) -> PyTree:
    """The tree with states of NNX modules that JAX takes for leaves (pytree=False)."""
    nnx = sys.modules.get("flax.nnx")  # imported by whoever has a module of it
    if nnx is None:
        return tree
    return jax.tree.map(
        lambda leaf: nnx.state(leaf) if isinstance(leaf, nnx.Pytree) else leaf, tree
    )


def kind_of(leaf: object) -> str | None:
    """What kind of numbers a leaf holds; None if it holds none.

    Of keys of random numbers it is their dtype, which tells their algorithm.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None and isinstance(leaf, (bool, int, float, complex)):
        dtype = jnp.result_type(type(leaf))
    if dtype is None:
        return None
    return next((k.__name__ for k in _KINDS if jnp.issubdtype(dtype, k)), str(dtype))


def is_key(leaf: object) -> bool:
    """Whether a leaf holds keys of random numbers, with a type of their own."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def key_data(leaf: jax.Array) -> jax.Array:
    """The integers of keys of random numbers; other leaves as they are."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """The floating or complex dtype to compute in: float32 for a narrower one."""
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def for_each_leaf(
    what: str,
    entries: PyTree,
    tree: PyTree,
    is_leaf: Callable[[PyTree], bool] | None = None,
) -> list[Leaf]:
    """The entry for each leaf of a tree, from a tree like it or a prefix of it.

    Args:
      what: Opens the error if entries are neither: "f: mask must be like ...".
      entries: A tree like `tree`, or a prefix of it.
      tree: The tree whose leaves need an entry each.
      is_leaf: Whether a container is an entry by itself.
    """
    found: list[Leaf] = []

    def collect(entry: Leaf, part: PyTree) -> Leaf:
        found.extend([entry] * len(jax.tree.leaves(part)))
        return entry  # the containers of entries are made again, and hold no others

    # Collected, and no tree like `tree` made: the user's containers may refuse them.
    try:
        jax.tree.map(collect, entries, tree, is_leaf=is_leaf)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what}: {error}") from None
    return found


def replicated_beside(leaves: list[Leaf]) -> Callable[..., jax.Array]:
    """Returns a function that makes zeros (dtype, shape=()) on the devices of the leaves.

    Zeros on the default device would come back from the first step replicated over the
    parameters' mesh, and the second step would be compiled anew.
    """
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not traced(leaf):
            if isinstance(leaf.sharding, NamedSharding):
                everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
                return lambda dtype, shape=(): jnp.zeros(shape, dtype, device=everywhere)
    return lambda dtype, shape=(): jnp.zeros(shape, dtype)


def rows_beside(param: Leaf, leaf: Leaf) -> Leaf:
    """A leaf with its rows on the devices that have the same rows of a parameter.

    Under jit, the parameter's devices are known only for the Explicit axes of a mesh.
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
    # Only on the same mesh has the leaf other axes to keep.
    rest = here.spec[1:] if here.mesh == there.mesh else ()
    return jax.sharding.reshard(
        leaf, there.update(spec=PartitionSpec(there.spec[0], *rest))
    )
