"""Trees on their way to disk and back: containers, empty arrays, the swap."""

import sys
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from emaopt._beside import Served, names_beside, put, served_values
from emaopt._names import joined, key_name, own_values, path_leaves
from emaopt._nodes import (
    average_nodes,
    beside_of,
    center_nodes,
    served_nodes,
    swapped_nodes,
)
from emaopt._places import Choice, Place, Ways, located, located_at, placed, shape_of
from emaopt._swap import exchange
from emaopt._types import Json, Leaf, PyTree
from emaopt.checkpoint import _orbax, _record
from emaopt.checkpoint._files import Names, names_of


def served(
    function: str,
    state: PyTree,
    name: Choice,
    params: Ways,
    optional: bool = False,
    beside: Callable[[], Served] = lambda: None,
) -> tuple[PyTree, list[Place]]:
    """The state as it goes to disk, and where the averages stand in it.

    With `optional`, a state without an average comes back as it is. `beside` makes what
    else is served, once it is clear that an average is.
    """
    state = plain(state)
    _refuse_mixed_keys(function, state)
    if optional and not served_nodes(state):
        return state, []
    places = located(function, state, name, params)
    values = served_values(function, state, places, plain(beside()))
    state = state if places[0].swapped else exchange(state, places)
    state = put(state, places[0], values)
    taken: dict[str, Names] = {}
    for names, _ in path_leaves(state):
        if (other := taken.setdefault(".".join(names), names)) != names:
            raise ValueError(
                f"{function}: Orbax would write {'/'.join(other)} and {'/'.join(names)} "
                "to one file, because it joins names with dots. Rename one of them."
            )
    return state, places


def _refuse_mixed_keys(function: str, state: PyTree) -> None:
    """Raises if a node has positions and names for keys.

    Orbax writes such a node, and fails to read it: it sorts the keys of a node.
    """
    kinds: dict[tuple[object, ...], bool] = {}  # whether the keys of a node are positions
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        for i, key in enumerate(path):
            is_position = isinstance(key, jax.tree_util.SequenceKey)
            if kinds.setdefault(path[:i], is_position) != is_position:
                node = joined(tuple(map(key_name, path[:i])))
                raise ValueError(
                    f"{function}: the node at {node} has positions and names for keys, "
                    "which Orbax writes and cannot read. Keep its members in a tuple or "
                    "a dict of their own."
                )


def raw(
    function: str, state: PyTree, params: Ways
) -> tuple[PyTree, list[tuple[Names, Names]]]:
    """The state with its raw parameters, and the swapped pairs (average, parameters)."""
    found = swapped_nodes(state)
    for names, node in found.items():
        if beside_of(node):
            raise ValueError(
                f"{function}: the target is swapped, and has raw values of what else is "
                f"served beside the average at {joined(names)}. Pass the state as it is: "
                "swap_state, called on it once more, gives it back."
            )
    places = [located_at(function, state, names, params) for names in found]
    return exchange(state, places), [(p.average, p.params) for p in places]


def raw_by(state: PyTree, marker: _record.Marker | None) -> PyTree:
    """The tree on disk with averages and raw parameters back in place, by its record."""
    # Where an average's whole item is missing, there is nothing to exchange with.
    nodes = average_nodes(state) | center_nodes(state)
    served = [one for one in marker.served if one.average in nodes] if marker else []
    return exchange(state, [placed(state, one.average, one.params) for one in served])


def marker(function: str, state: PyTree, places: list[Place], **more: object) -> Json:
    """The record of a state as it goes to disk, with further fields."""
    empty = [
        [list(names), list(leaf.shape), str(leaf.dtype)]
        for names, leaf in names_of(state).items()
        if is_empty(leaf)
    ]
    # What else is served is in the state of one, which goes first on record.
    places = sorted(places, key=lambda place: not names_beside(state, place.average))
    beside = names_beside(state, places[0].average)
    return _record.marker(function, places, empty, beside, values_in(state), more)


def values_in(tree: PyTree) -> Json:
    """The entry of a record for leaves of a tree that users call "value"."""
    # In memory Flax's variables have a type; on disk they are dicts as any other. So the
    # record says which leaves called "value" are the user's own.
    own = own_values(tree)
    return values(own, names_of(tree).keys() - {names for names, _ in path_leaves(tree)})


def values(own: Collection[Names], lost: Collection[Names]) -> Json:
    """The entry of a record for leaves that users call "value", of those that lost it.

    True stands for all of them, a list for some; if there are none, there is no entry.
    """
    if not own:
        return {}
    return {"values": True if len(own) == len(lost) else [list(n) for n in sorted(own)]}


def without_empty(state: PyTree) -> PyTree:
    """The state with None for arrays of size 0, which Orbax does not store.

    The marker has their shapes.
    """
    return jax.tree.map(lambda leaf: None if is_empty(leaf) else leaf, state)


def fill(target: PyTree, values: dict[Names, Leaf]) -> PyTree:
    """A tree with the target's containers and the values by name."""
    return jax.tree.unflatten(
        jax.tree.structure(target), [values[names] for names in names_of(target)]
    )


def plain(state: PyTree) -> PyTree:
    """The state with NNX modules as their `nnx.state`: Orbax cannot read modules back."""
    nnx = sys.modules.get("flax.nnx")  # imported by whoever has a module of it
    if nnx is None:
        return state

    def is_module(node: object) -> bool:
        return isinstance(node, nnx.Pytree)

    return jax.tree.map(
        lambda node: nnx.state(node) if is_module(node) else node,
        state,
        is_leaf=is_module,
    )


def is_empty(leaf: Leaf) -> bool:
    """Whether a leaf is an array of size 0."""
    return 0 in (shape_of(leaf) or ())


def as_plan(leaf: Leaf, fallback: jax.sharding.Sharding | None = None) -> Leaf:
    """What to ask Orbax for, to get a value like the leaf."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
            sharding = None  # that of a traced value, which has no devices
        sharding = sharding or fallback or default_sharding()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def as_told(leaf: Leaf, told: Leaf) -> Leaf:
    """A leaf of a target with the dtype and sharding that Orbax's RestoreArgs ask for."""
    if told is None or not hasattr(leaf, "shape"):
        return leaf
    dtype = getattr(told, "dtype", None) or leaf.dtype
    if told.restore_type is np.ndarray:
        return np.empty(leaf.shape, dtype)
    sharding = getattr(told, "sharding", None) or getattr(leaf, "sharding", None)
    if from_file := getattr(sharding, "to_jax_sharding", None):
        sharding = from_file()
    if (mesh := getattr(told, "mesh", None)) is not None:
        sharding = jax.sharding.NamedSharding(mesh, told.mesh_axes)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def as_array(leaf: Leaf) -> Leaf:
    """A leaf like the one that Orbax's metadata describes."""
    if _orbax.is_number(leaf):
        return np.zeros((), leaf.dtype).item()
    if not hasattr(leaf, "dtype"):
        return ""  # text has no metadata
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            return np.empty(leaf.shape, leaf.dtype)  # without x64, JAX cuts 64 bits to 32
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def as_target(value: Leaf, leaf: Leaf) -> Leaf:
    """The value as a scalar of NumPy's where the target's leaf is one."""
    return type(leaf)(value) if isinstance(leaf, np.generic) else value


def check_kinds(
    function: str,
    path: epath.Path,
    values: dict[Names, Leaf],
    targets: dict[Names, Leaf],
) -> None:
    """Raises if a value that was read differs from the target in shape or dtype."""
    for names, leaf in targets.items():
        value, dtype = values[names], getattr(leaf, "dtype", None)
        if value is leaf or dtype is None:
            continue
        # Without x64 a value may have the 32 bits that JAX cuts the target's 64 to.
        if not jnp.issubdtype(dtype, jax.dtypes.extended):
            dtype = jax.dtypes.canonicalize_dtype(dtype)
        there = getattr(value, "dtype", None)
        if there not in (dtype, leaf.dtype) or shape_of(value) != shape_of(leaf):
            what = f"{there} of shape {shape_of(value)}" if there else repr(value)
            raise ValueError(
                f"{function}: {path} has {what} at {'/'.join(names)}, the target "
                f"{leaf.dtype} of shape {shape_of(leaf)}."
            )


def default_sharding() -> jax.sharding.Sharding:
    """The sharding of an array on the first device of this process."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def zeros(like: Leaf) -> np.ndarray | jax.Array:
    """An array of zeros with the shape, dtype and sharding of another one."""
    if isinstance(like, np.ndarray):
        return np.zeros(like.shape, like.dtype)
    return jnp.zeros(like.shape, like.dtype, device=getattr(like, "sharding", None))
