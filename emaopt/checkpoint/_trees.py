"""Trees on their way to disk and back: containers, empty arrays, the swap."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from emaopt._nodes import swapped_nodes
from emaopt._swapping import Where, exchange, locate, shape_of
from emaopt.checkpoint import _files
from emaopt.checkpoint._files import Names, names_of


def served(function: str, state: Any, name: str | None) -> tuple[Any, Where]:
    """The state as it goes to disk, and where the average stands in it."""
    state = plain(state)
    where = locate(function, state, name)
    taken: dict[str, Names] = {}
    for names in names_of(state):
        if (other := taken.setdefault(".".join(names), names)) != names:
            raise ValueError(
                f"{function}: Orbax would write {'/'.join(other)} and {'/'.join(names)} "
                "to one file, because it joins names with dots. Rename one of them."
            )
    return (state if where.swapped else exchange(state, where)), where


def raw(state: Any) -> tuple[Any, Names | None]:
    """The state with its raw parameters, and the average that they were swapped with."""
    for names in swapped_nodes(state):
        return exchange(state, locate("restore", state, None, names)), names
    return state, None


def marker(state: Any, where: Where) -> dict[str, Any]:
    empty = [
        [list(names), list(leaf.shape), str(leaf.dtype)]
        for names, leaf in names_of(state).items()
        if is_empty(leaf)
    ]
    return _files.write_marker(where.params, where.average, where.field, empty)


def without_empty(state: Any) -> Any:
    """Orbax stores no array of size 0: None takes its place, the marker has its shape."""
    return jax.tree.map(lambda leaf: None if is_empty(leaf) else leaf, state)


def fill(target: Any, values: dict[Names, Any]) -> Any:
    """A tree with the target's containers and the values by name."""
    return jax.tree.unflatten(
        jax.tree.structure(target), [values[names] for names in names_of(target)]
    )


def plain(state: Any) -> Any:
    """NNX modules replaced by their `nnx.state`: Orbax cannot read modules back."""
    nnx = sys.modules.get("flax.nnx")  # who has a module has imported it
    if nnx is None:
        return state

    def is_module(node):
        return isinstance(node, nnx.Pytree)

    return jax.tree.map(
        lambda node: nnx.state(node) if is_module(node) else node,
        state,
        is_leaf=is_module,
    )


def is_empty(leaf: Any) -> bool:
    return 0 in (shape_of(leaf) or ())


def as_plan(leaf: Any, fallback: Any = None) -> Any:
    """What to ask Orbax for, to get something like the leaf."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
            sharding = None  # of a traced value: it tells no devices
        sharding = sharding or fallback or default_sharding()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def as_array(leaf: Any) -> Any:
    """A leaf of Orbax's metadata as what it describes."""
    if isinstance(leaf, ocp.metadata.value.ScalarMetadata):
        return np.zeros((), leaf.dtype).item()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def as_target(value: Any, leaf: Any) -> Any:
    return type(leaf)(value) if isinstance(leaf, np.generic) else value


def default_sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def zeros(like: Any) -> Any:
    return jnp.zeros(like.shape, like.dtype, device=getattr(like, "sharding", None))


def copy_like(value: Any, like: Any) -> Any:
    """A copy of a parameter for its average, in the average's dtype and place."""
    copied = jnp.array(value, dtype=like.dtype, copy=True)
    sharding = getattr(like, "sharding", None)
    return copied if sharding is None else jax.device_put(copied, sharding)
