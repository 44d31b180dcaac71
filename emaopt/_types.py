"""Types of arguments, states and results, by name.

A pytree has no type that a checker could look into: `PyTree` says that any containers
will do, and the docstring says what stands at the leaves.
"""

import os
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

# Any containers that JAX knows: dicts, lists, NamedTuples, modules; or one leaf alone.
PyTree: TypeAlias = Any
# What stands at one leaf: an array, a number, a ShapeDtypeStruct, or metadata of one.
Leaf: TypeAlias = Any
# () int32, or floating where the comment beside it says so.
Scalar: TypeAlias = jax.Array

# β itself, or a function t -> β, of an array of JAX's; our own decays take NumPy's, too.
DecayLike: TypeAlias = float | Callable[[Any], ArrayLike]
# Booleans: a tree like the parameters or a prefix of it, or what makes one of them.
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree]
# Where an average is: mesh axes, a tree of these, or what makes one of the parameters.
Placement: TypeAlias = (
    str
    | tuple[str, ...]
    | PartitionSpec
    | NamedSharding
    | PyTree
    | Callable[[PyTree], PyTree]
)
# The name of a mapped axis, or a tuple of names.
AxisName: TypeAlias = Hashable

Path: TypeAlias = str | os.PathLike[str]
# Takes a sentence on what was done.
Report: TypeAlias = Callable[[str], object]
# What JSON can hold, as custom_metadata of a checkpoint.
Json: TypeAlias = dict[str, Any]
