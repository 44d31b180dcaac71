"""Checkpoints that serve the average: Orbax files with the averages under the names.

On disk stands the user's own tree, written through Orbax's stock handlers, in which the
averages and the raw parameters have changed places: `params/...` holds the averages, the
average's own slot the raw parameters. Any reader of the parameters serves the average;
`restore` changes them back and resumes bit for bit.
"""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from emaopt._names import leaves_with_keys
from emaopt._swapping import exchange, locate, shape_of
from emaopt._swapping import swap_state as swap_state

_MARKER = "emaopt"
_VERSION = 1


def save(
    path: str | os.PathLike,
    state: Any,
    *,
    name: str | None = None,
    force: bool = False,
    custom_metadata: dict[str, Any] | None = None,
) -> None:
    """Saves a training state with the averages under the parameters' names.

    Returns when the checkpoint is complete on disk. Orbax writes into a temporary
    directory and renames it, so `path` never holds half a checkpoint.

    Args:
      path: Directory to make; local, or any URL that Orbax takes.
      state: The training state: any pytree that holds the parameters and an optimizer
        state with an average of them: a dict, a tuple (params, opt_state), a Flax
        TrainState, an NNX model and its `nnx.Optimizer` or the `nnx.state` of them.
      name: Which average, if the state holds several: a key on the way to it.
      force: Replace what stands at `path`. It is removed first, whatever it is.
      custom_metadata: Further JSON-serializable metadata to write beside the marker.

    Raises:
      ValueError: If the state holds no average, several, or no parameters that it is the
        average of; or if `path` exists and `force` is False.

    Example:
      >>> import optax, tempfile, emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params = {"w": jnp.zeros(2)}
      >>> updates, opt_state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> save(path, {"params": params, "opt_state": opt_state})
      >>> print(load_averaged(path)["w"])
      [-0.5 -0.5]
    """
    state = _plain(state)
    where = locate("save", state, name)
    if not where.swapped:
        state = exchange(state, where)
    state, empty = _without_empty_leaves(state)
    marker = {
        "version": _VERSION,
        "params": list(where.params),
        "average": list(where.average),
        "empty": empty,
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            _absolute(path),
            state,
            force=force,
            custom_metadata={**(custom_metadata or {}), _MARKER: marker},
        )


def restore(path: str | os.PathLike, target: Any, *, name: str | None = None) -> Any:
    """Restores a training state as it was when `save` was called, bit for bit.

    Args:
      path: A checkpoint that `save` wrote.
      target: A state like the saved one: arrays, or `jax.ShapeDtypeStruct`. Arrays are
        restored to the target's dtypes and shardings, to the default device where it has
        none. Shapes must agree.
      name: Which average, if the state holds several; the one it was saved with.

    Returns:
      A tree like `target`: raw parameters under their names, the average in its slot.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      ValueError: If the checkpoint was not written by `save`, or the target has other
        names or shapes; the message lists them.

    Example:
      >>> import optax, tempfile, emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> state = {"params": jnp.ones(2), "opt_state": tx.init(jnp.zeros(2))}
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> save(path, state)
      >>> print(restore(path, jax.eval_shape(lambda: state))["params"])
      [1. 1.]
    """
    path = _absolute(path)
    plain = _plain(target)
    where = locate("restore", plain, name)
    swapped = plain if where.swapped else exchange(plain, where)
    with ocp.StandardCheckpointer() as checkpointer:
        on_disk, marker = _metadata("restore", checkpointer, path)
        if marker["average"] != where.average:
            raise ValueError(
                f"restore: {path} was saved with the average at "
                f"{'/'.join(marker['average'])}, the target has it at "
                f"{'/'.join(where.average)}. Give a target like the saved state, and "
                "name= if it holds several averages."
            )
        _check_fit("restore", path, _names(swapped), _names(on_disk) | marker["empty"])
        plan, _ = _without_empty_leaves(jax.tree.map(_abstract, swapped))
        restored = iter(jax.tree.leaves(checkpointer.restore(path, plan)))
    leaves, treedef = jax.tree.flatten(swapped)
    leaves = [_zeros(leaf) if _is_empty(leaf) else next(restored) for leaf in leaves]
    state = jax.tree.unflatten(treedef, leaves)
    if not where.swapped:
        state = swap_state(state, name=name)
    return _fill(target, _names(state))


def load_averaged(
    path: str | os.PathLike,
    *,
    target: Any = None,
    sharding: Any = None,
    dtype: Any = None,
) -> Any:
    """Loads the averaged parameters for inference; reads nothing else of the checkpoint.

    Args:
      path: A checkpoint that `save` wrote.
      target: Parameters whose containers, shapes and dtypes the result takes (arrays or
        `jax.ShapeDtypeStruct`). None: nested dicts and lists, as on disk.
      sharding: A `jax.sharding.Sharding` for all arrays, or a tree of them like the
        parameters. None: the target's, where it has arrays with one, else the default
        device. Where the checkpoint was written does not matter.
      dtype: Floating dtype to cast floating arrays to. None: the target's, else as saved
        (the accumulator's, float32 for bfloat16 parameters).

    Returns:
      The parameters: averages, and the raw values of those that were not averaged.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      ValueError: If the checkpoint was not written by `save`, or the target has other
        names or shapes.

    Example:
      >>> import optax, tempfile, emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params = {"w": jnp.ones(2)}
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> save(path, (params, tx.init(params)))
      >>> load_averaged(path, dtype=jnp.bfloat16)["w"].dtype
      dtype(bfloat16)
    """
    path = _absolute(path)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        on_disk, marker = _metadata("load_averaged", checkpointer, path)
        prefix = marker["params"]
        saved = {
            names[len(prefix) :]: leaf
            for names, leaf in (_names(on_disk) | marker["empty"]).items()
            if names[: len(prefix)] == prefix
        }
        wanted = _wanted(path, saved, target, sharding, dtype)
        plan = [
            wanted.get(names[len(prefix) :], ocp.PLACEHOLDER)
            if names[: len(prefix)] == prefix
            else ocp.PLACEHOLDER
            for names in _names(on_disk)
        ]
        plan = jax.tree.unflatten(jax.tree.structure(on_disk), plan)
        restored = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item=plan, restore_args=ocp.checkpoint_utils.construct_restore_args(plan)
            ),
        )
    for names in marker["empty"]:
        if names[: len(prefix)] == prefix:
            zeros = _zeros(wanted[names[len(prefix) :]])
            _put(restored, names, zeros)
    params = _subtree(restored, prefix)
    if target is None:
        return params
    return _fill(target, _names(params))


def _absolute(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    return path if "://" in path else os.path.abspath(path)


def _metadata(function: str, checkpointer: Any, path: str) -> tuple[Any, dict[str, Any]]:
    """The tree of shapes and dtypes on disk, and our marker."""
    if "://" not in path and not os.path.exists(path):
        raise FileNotFoundError(
            f"{function}: there is no checkpoint at {path}. Give the directory that "
            "emaopt.checkpoint.save made."
        )
    metadata = checkpointer.metadata(path)
    if metadata.item_metadata is None:
        raise ValueError(
            f"{function}: {path} is not a complete Orbax checkpoint: its metadata is "
            "missing. Give the directory that emaopt.checkpoint.save made."
        )
    marker = metadata.custom_metadata.get(_MARKER)
    if marker is None:
        raise ValueError(
            f"{function}: {path} was not written by emaopt.checkpoint.save: nothing says "
            "that its parameters are averages. Restore it with "
            "orbax.checkpoint.StandardCheckpointer."
        )
    if marker["version"] > _VERSION:
        raise ValueError(
            f"{function}: {path} was written by a newer emaopt (format "
            f"{marker['version']}, this one reads up to {_VERSION}). Upgrade emaopt."
        )
    empty = {
        tuple(names): jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for names, shape, dtype in marker["empty"]
    }
    return metadata.item_metadata.tree, {
        "params": tuple(marker["params"]),
        "average": tuple(marker["average"]),
        "empty": empty,
    }


def _wanted(path: str, saved: dict, target: Any, sharding: Any, dtype: Any) -> dict:
    """What to load each parameter as: its shape, dtype and sharding, by name."""
    like = {} if target is None else _names(target)
    if target is not None:
        _check_fit("load_averaged", path, like, saved)
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        shardings = _names(sharding)
        if odd := sorted(saved.keys() ^ shardings.keys()):
            raise ValueError(
                "load_averaged: sharding must be a jax.sharding.Sharding or a tree of "
                f"them like the parameters; they differ at {_listed(odd)}."
            )
    else:
        shardings = dict.fromkeys(saved, sharding)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def want(names, leaf):
        here = like.get(names)
        kind = getattr(here, "dtype", leaf.dtype)
        if dtype is not None and jnp.issubdtype(kind, jnp.floating):
            kind = jnp.dtype(dtype)
        place = shardings[names] or getattr(here, "sharding", None) or default
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=place)

    return {names: want(names, leaf) for names, leaf in saved.items()}


def _names(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves by name, the same in memory and on disk.

    On disk a Flax variable is a dict with the key "value".
    """
    return {
        names[:-1] if names[-1:] == ("value",) else names: leaf
        for names, leaf in leaves_with_keys(tree)
    }


def _fill(target: Any, values: dict[tuple[str, ...], Any]) -> Any:
    """A tree with the target's containers and the values by name."""
    return jax.tree.unflatten(
        jax.tree.structure(target), [values[names] for names in _names(target)]
    )


def _plain(state: Any) -> Any:
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


def _subtree(tree: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        if isinstance(tree, (list, tuple)):
            tree = tree[int(name)]
        else:
            tree = {str(key): child for key, child in tree.items()}[name]
    return tree


def _put(tree: Any, names: tuple[str, ...], value: Any) -> None:
    """Sets a leaf of nested dicts and lists."""
    parent = _subtree(tree, names[:-1])
    parent[int(names[-1]) if isinstance(parent, list) else names[-1]] = value


def _is_empty(leaf: Any) -> bool:
    return 0 in (shape_of(leaf) or ())


def _without_empty_leaves(tree: Any) -> tuple[Any, list]:
    """Orbax stores no array of size 0: None takes its place, its shape goes on record."""
    empty = [
        [list(names), list(leaf.shape), str(leaf.dtype)]
        for names, leaf in _names(tree).items()
        if _is_empty(leaf)
    ]
    return jax.tree.map(lambda leaf: None if _is_empty(leaf) else leaf, tree), empty


def _zeros(like: Any) -> Any:
    return jnp.zeros(like.shape, like.dtype, device=getattr(like, "sharding", None))


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _check_fit(function: str, path: str, wanted: dict, saved: dict) -> None:
    """Raises unless names and shapes agree, and says which do not."""
    complaints = []
    if missing := sorted(wanted.keys() - saved.keys()):
        complaints.append(f"it lacks {_listed(missing)}")
    if extra := sorted(saved.keys() - wanted.keys()):
        complaints.append(f"it also holds {_listed(extra)}")
    for names in sorted(wanted.keys() & saved.keys()):
        here, there = wanted[names], saved[names]
        if jnp.issubdtype(getattr(here, "dtype", jnp.float32), jax.dtypes.prng_key):
            continue  # stored as the integers that it is made of
        if shape_of(here) is not None and tuple(shape_of(here)) != tuple(shape_of(there)):
            complaints.append(
                f"{'/'.join(names)} has shape {tuple(shape_of(there))} there and "
                f"{tuple(shape_of(here))} in the target"
            )
    if complaints:
        raise ValueError(
            f"{function}: {path} does not fit the target: {'; '.join(complaints)}. Give "
            "a target with the names and shapes that were saved."
        )


def _listed(paths: list[tuple[str, ...]]) -> str:
    names = ["/".join(path) for path in paths]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
