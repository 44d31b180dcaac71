"""Types of arguments, states and results, by name.

Type checkers cannot look into a pytree: `PyTree` says that any containers will do, and
the docstring says what the leaves are. Unions with it, such as `Mask`, only tell readers.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

# Any containers that JAX knows (dicts, lists, NamedTuples, modules), or one leaf alone.
PyTree: TypeAlias = Any
# One leaf: an array, a number, a ShapeDtypeStruct, a sharding, or metadata of an array.
Leaf: TypeAlias = Any
# An array of shape (): int32, or floating where the comment beside it says so.
Scalar: TypeAlias = jax.Array

# Real numbers [n], such as the coefficients of a combination.
Vector: TypeAlias = ArrayLike | Sequence[float]
# What names a dtype: jnp.bfloat16, "bfloat16", np.dtype("float32").
DTypeLike: TypeAlias = str | type[Any] | np.dtype[Any]
# A number of updates, which may be traced.
Count: TypeAlias = int | np.integer[Any] | np.ndarray | jax.Array
# β itself, or a function t -> β of a JAX array. Decays of emaopt also take NumPy arrays.
DecayLike: TypeAlias = float | jax.Array | Callable[[Any], ArrayLike]
# A tree of booleans like the parameters or a prefix of it, or a function that makes one
# from the parameters.
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree]
# How an average is split: mesh axes or a spec, a tree of these like the parameters or a
# prefix of it, or a function that makes one from the parameters.
Placement: TypeAlias = (
    str
    | tuple[str, ...]
    | PartitionSpec
    | NamedSharding
    | PyTree
    | Callable[[PyTree], PyTree]
)
# The name of a mapped axis, or a tuple of such names.
AxisName: TypeAlias = Hashable

# What a user gives as a path; opened ones are `epath.Path`s.
Path: TypeAlias = str | os.PathLike[str]
# Called with a sentence that says what was done.
Report: TypeAlias = Callable[[str], object]
# A dict that JSON can hold, such as the custom_metadata of a checkpoint.
Json: TypeAlias = dict[str, Any]
