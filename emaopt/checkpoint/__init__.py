"""Checkpoints that serve the average: Orbax files with the averages under the names.

On disk stands the user's own tree, written through Orbax's stock handlers, in which the
averages and the raw parameters have changed places: `params/...` holds the averages, the
average's own slot the raw parameters. Any reader of the parameters serves the average;
`restore` changes them back and resumes bit for bit.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp

from emaopt._checks import (
    check_callable,
    check_dtype,
    check_flag,
    check_json,
    check_mapping,
    check_text,
)
from emaopt._output import naming
from emaopt._paths import check_readable, check_writable
from emaopt._places import Choice, Ways, check_choices
from emaopt._swap import swap_state
from emaopt.checkpoint import (
    _checksums,
    _files,
    _record,
    _replacement,
    _restore,
    _trees,
)
from emaopt.checkpoint._average_names import average_names
from emaopt.checkpoint._combinations import average, combine
from emaopt.checkpoint._description import Description, describe
from emaopt.checkpoint._manager import handler_registry
from emaopt.checkpoint._safetensors import export_safetensors
from emaopt.checkpoint._synthesis import Synthesis, synthesize

__all__ = [
    "Description",
    "Synthesis",
    "average",
    "average_names",
    "combine",
    "describe",
    "export_safetensors",
    "handler_registry",
    "load_averaged",
    "metadata",
    "restore",
    "save",
    "swap_state",
    "synthesize",
]


def save(
    path: str | os.PathLike,
    state: Any,
    *,
    name: Choice = None,
    params: Ways = None,
    optional: bool = False,
    force: bool = False,
    custom_metadata: dict[str, Any] | None = None,
    checksums: bool = True,
) -> None:
    """Saves a training state with the averages under the parameters' names.

    Returns when the checkpoint is complete on disk. Orbax writes into a temporary
    directory and renames it, so `path` never holds half a checkpoint.

    Args:
      path: Directory to make; local, or any URL that Orbax takes.
      state: The training state: any pytree that holds the parameters and an optimizer
        state with an average of them, or with the center of local updates: a dict, a
        tuple (params, opt_state), a Flax TrainState, an NNX model and its `nnx.Optimizer`
        or the `nnx.state` of them. A center without an average of it stands under the
        names in its own shapes, without the axis of workers.
      name: Which average, if the state holds several: a key on the way to it, or all of
        them joined with "/"; "center" for that of local updates. A tuple of names serves
        several averages of different parameters: ("actor", "critic").
      params: Where the parameters stand, as keys joined with "/": "model/params", "0" in
        a tuple; one for each name, one for all, or a dict {way to an average: way to its
        parameters}. None: the one tree outside of the optimizer state that has the
        average's names and shapes; if there are several, the one called "params" beside
        the optimizer state, else an error that lists them.
      optional: Save a state that holds no average as it is, in place of an error: for
        programs whose configuration may switch it off.
      force: Replace what stands at `path`, whatever it is; of a link, what it leads to.
        Of a CheckpointManager's directory these are all of its steps. It is removed when
        the new checkpoint is complete beside it, as `path`.replacement. A kill at any
        moment leaves one of the two complete, there or as `path`.replaced, which
        `restore` finds. A save by a run that has not restored it keeps it, as
        `path`.kept1, and says so.
      custom_metadata: Further JSON-serializable metadata to write beside the marker.
      checksums: Record a checksum of each array, by which whatever of emaopt reads it
        notices a changed bit; without, most are read as other numbers. But not if it is
        read split over devices in another dtype, or for another number of workers; none
        of an array whose copies on several devices are not alike. Saving and reading each
        go once more through what they save or read; of an array that is split over CPUs
        they hold another copy, of 32 bits.

    Raises:
      ValueError: If the state holds no average, several, or no parameters that it is the
        average of; or if `path` exists and `force` is False.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax, jax.numpy as jnp, optax, tempfile, emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params = {"w": jnp.zeros(2)}
      >>> updates, opt_state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> save(path, {"params": params, "opt_state": opt_state})
      >>> print(load_averaged(path)["w"])
      [-0.5 -0.5]
    """
    check_writable("save", "path", path)
    check_choices("save", name, params)
    check_flag("save", "optional", optional)
    check_flag("save", "force", force)
    check_flag("save", "checksums", checksums)
    check_json("save", "custom_metadata", custom_metadata)
    if _record.KEY in (custom_metadata or {}):
        raise ValueError(
            f"save: custom_metadata[{_record.KEY!r}] is where emaopt keeps its own "
            "record; take another key."
        )
    state, places = _trees.served("save", state, name, params, optional)
    place = _replacement.followed(_files.absolute(path))
    taking_place = _replacement.taking_place(
        "save", place, force=force, report=_restore.log_warning
    )
    with naming(place), taking_place as written:
        marker = {}
        if places:
            stored, more = _trees.without_empty(state), {}
            if checksums:
                more["checksums"] = _checksums.checksums(stored)
            marker, state = _trees.marker("save", state, places, **more), stored
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(
                written, state, custom_metadata={**(custom_metadata or {}), **marker}
            )
            checkpointer.wait_until_finished()  # raises what went wrong


@_replacement.whole
def restore(
    path: str | os.PathLike,
    target: Any,
    *,
    params: Ways = None,
    rename: Mapping[str, str] | None = None,
    keep_missing: bool = False,
    ignore_extra: bool = False,
    report: Callable[[str], Any] = _restore.log_warning,
) -> Any:
    """Restores a training state as it was when it was saved, bit for bit.

    A checkpoint that never had an average restores into a target that has one: the
    average starts anew from the restored parameters. A target without an average takes
    the raw parameters of a checkpoint that has one. Optimizer slots that stand elsewhere
    because the chain got or lost members or wrappers are found by what they are; where
    several are alike, by their names in an `optax.named_chain` or by their places, if
    these tell, else it is an error. What was done of this is reported.

    Local updates restore with another number of workers, or in a run without any, and a
    run without any restores into local updates: all workers start from the center, which
    is the parameters of a run without. Their own slots are dealt out by number: worker w
    takes those of worker w % W, a run without any those of the first. What was added up
    since the last exchange is left out. New local updates take the outer optimizer's
    slots from the target, which must then have arrays.

    Args:
      path: A checkpoint that emaopt wrote, or any that Orbax did: raw parameters come
        back raw, from wherever they stand. Of a CheckpointManager, a step's directory.
      target: A state like the saved one: arrays, or `jax.ShapeDtypeStruct`. Arrays are
        restored to the target's dtypes and shardings, to the default device where it has
        none. Shapes must agree.
      params: Where the parameters of a new average stand in the target, as for `save`,
        if it is not clear.
      rename: Where a part of the saved state belongs in the target, if its place does not
        tell: {"opt_state/1": "opt_state/2"}, keys joined with "/". Also where it stays,
        of two that it could be, or with other fields: {"opt_state/1": "opt_state/1"}.
      keep_missing: Let leaves that the checkpoint lacks keep the target's values, which
        must then be arrays. To start training from a file of parameters alone.
      ignore_extra: Leave out what the target has no place for. With {"params": params}
        as target: the raw parameters alone.
      report: Called with each sentence on what was renamed, seeded, left out or kept; by
        default the warning function of the logger "emaopt".

    Returns:
      A tree like `target`: raw parameters under their names, the average in its slot.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      ValueError: If the target has other names, shapes or kinds of numbers (complex,
        float, integer, bool; integers may be wider, not narrower); the message lists
        them. If two averages or slots could be each other's. If the files are damaged.
        Nothing is half-restored.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax, jax.numpy as jnp, optax, tempfile, emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> state = {"params": jnp.ones(2), "opt_state": tx.init(jnp.zeros(2))}
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> save(path, state)
      >>> print(restore(path, jax.eval_shape(lambda: state))["params"])
      [1. 1.]
    """
    check_readable("restore", "path", path)
    check_choices("restore", None, params)
    check_mapping("restore", "rename", rename, optional=True, of_text=True)
    check_flag("restore", "keep_missing", keep_missing)
    check_flag("restore", "ignore_extra", ignore_extra)
    check_callable("restore", "report", report, 1)
    at = params if isinstance(params, str) else None
    files = _files.open_files("restore", path, at=at)
    _replacement.take_up(_files.absolute(path))
    return _restore.restored(
        files,
        target,
        params=params,
        rename=rename,
        keep_missing=keep_missing,
        ignore_extra=ignore_extra,
        report=report,
    )


@_replacement.whole
def load_averaged(
    path: str | os.PathLike,
    *,
    target: Any = None,
    sharding: Any = None,
    dtype: Any = None,
    name: str | None = None,
    at: str | None = None,
    ignore_extra: bool = False,
) -> Any:
    """Loads the averaged parameters for inference; reads nothing else of the checkpoint.

    Args:
      path: A checkpoint that emaopt wrote, or any of a training state with an average in
        it. Of a CheckpointManager, a step's directory.
      target: Parameters whose containers, shapes and dtypes the result takes (arrays or
        `jax.ShapeDtypeStruct`). None: nested dicts and lists, as on disk.
      sharding: A `jax.sharding.Sharding` for all arrays, or a tree of them like the
        parameters. None: the target's, where it has arrays with one, else the default
        device. Where the checkpoint was written does not matter.
      dtype: Floating dtype to cast floating arrays to. None: the target's, else as saved
        (the accumulator's, float32 for bfloat16 parameters).
      name: Which average, if there are several. None: the one under the names.
      at: Where the parameters stand, as keys joined with "/", if nothing tells it; or
        which of several, or which part of them is wanted: "params/backbone".
      ignore_extra: Let the target have a part of the parameters only; no others are read.

    Returns:
      The parameters: averages, and the raw values of those that were not averaged.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      ValueError: If the checkpoint holds no average, or several, or nothing at `at`, or
        the target has other names or shapes, or the files are damaged.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax, jax.numpy as jnp, optax, tempfile, emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params = {"w": jnp.ones(2)}
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> save(path, (params, tx.init(params)))
      >>> load_averaged(path, dtype=jnp.bfloat16)["w"].dtype
      dtype(bfloat16)
    """
    check_readable("load_averaged", "path", path)
    check_dtype("load_averaged", "dtype", dtype)
    check_text("load_averaged", "name", name, optional=True)
    check_text("load_averaged", "at", at, optional=True)
    check_flag("load_averaged", "ignore_extra", ignore_extra)
    files = _files.open_files("load_averaged", path, at=at, option="at", lazy=True)
    return _restore.averages(files, target, sharding, dtype, name, at, ignore_extra)


def metadata(
    state: Any, *, name: Choice = None, params: Ways = None, optional: bool = False
) -> dict[str, Any]:
    """Returns the record to save with `swap_state(state)`, as Orbax's custom_metadata.

    For writing by other means than `save`, such as Orbax's experimental v1 API:

        v1.save(path, swap_state(state), custom_metadata=metadata(state))
        state = swap_state(v1.load(path, swap_state(state)))  # or restore(path, state)

    `restore` and `load_averaged` then read the checkpoint as one of their own. It has no
    checksums.

    Args:
      state: The training state, swapped or not.
      name, params, optional: As for `save`.

    Returns:
      A JSON-serializable dict with the one key "emaopt"; of a state without an average,
      with `optional`, an empty one.

    Raises:
      ValueError: As for `save`.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, optax, emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params = {"w": jnp.ones(2)}
      >>> print(metadata((params, tx.init(params)))["emaopt"]["average"])
      ['1', 'averaging']
    """
    check_choices("metadata", name, params)
    check_flag("metadata", "optional", optional)
    state, places = _trees.served("metadata", state, name, params, optional)
    return _trees.marker("metadata", state, places) if places else {}
