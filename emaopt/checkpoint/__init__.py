"""Orbax checkpoints that serve the average: it stands under the parameters' names.

A checkpoint holds the user's own tree, written by Orbax's stock handlers, with the
averages and the raw parameters exchanged: `params/...` holds the averages, the average's
own slot the raw parameters. Any reader of the parameters serves the average; `restore`
exchanges them back and resumes bit for bit.
"""

from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp

from emaopt._beside import check_served
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
from emaopt._types import DTypeLike, Json, Path, PyTree, Report
from emaopt.checkpoint import (
    _checksums,
    _files,
    _record,
    _replacement,
    _restore,
    _sources,
    _trees,
)
from emaopt.checkpoint._adopt import adopt
from emaopt.checkpoint._average_names import average_names
from emaopt.checkpoint._best import Best, best, metrics
from emaopt.checkpoint._combinations import average, combine
from emaopt.checkpoint._convert import convert
from emaopt.checkpoint._description import Description, describe
from emaopt.checkpoint._manager import handler_registry
from emaopt.checkpoint._publish import publish
from emaopt.checkpoint._safetensors import export_safetensors
from emaopt.checkpoint._sweep import Sweep, sweep
from emaopt.checkpoint._synthesis import Synthesis, synthesize
from emaopt.checkpoint._watch import Published, Watch, watch

__all__ = [
    "Best",
    "Description",
    "Published",
    "Sweep",
    "Synthesis",
    "Watch",
    "adopt",
    "average",
    "average_names",
    "best",
    "combine",
    "convert",
    "describe",
    "export_safetensors",
    "handler_registry",
    "load_averaged",
    "metadata",
    "metrics",
    "publish",
    "restore",
    "save",
    "swap_state",
    "sweep",
    "synthesize",
    "watch",
]


def save(
    path: Path,
    state: PyTree,
    *,
    name: Choice = None,
    params: Ways = None,
    optional: bool = False,
    served: Mapping[str, PyTree] | None = None,
    force: bool = False,
    custom_metadata: Json | None = None,
    checksums: bool = True,
) -> None:
    """Saves a training state with the averages under the parameters' names.

    Returns when the checkpoint is complete on disk. Orbax writes into a temporary
    directory and renames it, so `path` never holds half a checkpoint.

    Args:
      path: Directory to make: local, or any URL that Orbax takes.
      state: The training state: any pytree with the parameters and an optimizer state
        that holds an average (EMA, Polyak average) of them, or the center (slow weights,
        global parameters) of local updates: a dict, a tuple (params, opt_state),
        a Flax TrainState, an NNX model and its `nnx.Optimizer`, or the `nnx.state` of
        both. A center that has no average is saved under the parameters' names in its own
        shapes, without the axis of workers.
      name: Which average to serve, if the state holds several: a key that leads to it, or
        all its keys joined with "/"; "center" for the center of local updates. A tuple of
        names serves several averages of different parameters: ("actor", "critic").
      params: Where the parameters are in the state, as keys joined with "/":
        "model/params", or "0" in a tuple. One string for each name, one for all, or a
        dict {keys of an average: keys of its parameters}. None: the one tree outside of
        the optimizer state that has the average's names and shapes; of several, the one
        called "params" beside the optimizer state, else an error that lists them.
      optional: Save a state without an average as it is, in place of an error: for
        programs whose configuration may switch averaging off.
      served: What else belongs to the averaged weights, as {keys joined with "/": tree},
        such as {"batch_stats": statistics} of `batch_stats.recalibrate`. It stands under
        these names, in all that is there or in a part, and the state's own values go into
        the average's state, from where `restore` brings them back. Shapes and kinds of
        numbers must be those of the state. Left out where the state has no average.
      force: Replace whatever is at `path`: of a link, its target; of a directory of
        CheckpointManager, all its steps. The old content is removed once the new
        checkpoint is complete beside it, as `path`.replacement. After a kill one
        is complete, at `path`, `path`.replacement or `path`.replaced, and `restore` finds
        it. A later save by a run that has not restored such a leftover keeps it as
        `path`.kept1, and logs a warning.
      custom_metadata: Further JSON-serializable metadata to write beside the marker.
      checksums: Record a checksum of each array, by which all readers of emaopt notice a
        changed bit; without, most changed bits are read as other numbers. Not checked:
        arrays that are read split over devices in another dtype, or for another number of
        workers. Not recorded: arrays whose copies on several devices differ. They
        cost one more pass over the arrays, and a copy of each array that is split over
        CPUs, as 32-bit words.

    Raises:
      ValueError: If the state holds no average, several, or no parameters that the
        average is of; or if `path` exists and `force` is False.
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
    check_served("save", served)
    state, places = _trees.served("save", state, name, params, optional, lambda: served)
    place = _replacement.followed(_files.absolute(path))
    taking_place = _replacement.taking_place(
        "save", place, force=force, report=_restore.log_warning
    )
    # `naming` is outside, so that errors of the last renames name the user's path, too.
    with naming(place), taking_place as written:
        marker = {}
        if places:
            # The marker lists the arrays of size 0, so it is made of the state that still
            # has them; checksums are of what is written.
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
    path: Path,
    target: PyTree,
    *,
    params: Ways = None,
    rename: Mapping[str, str] | None = None,
    keep_missing: bool = False,
    ignore_extra: bool = False,
    report: Report = _restore.log_warning,
) -> PyTree:
    """Restores a training state as it was when it was saved, bit for bit.

    A checkpoint without an average restores into a target with one: the average starts
    anew from the restored parameters. A target without an average takes the raw
    parameters. Optimizer slots whose place changed, because the chain got or lost members
    or wrappers, are found by the names of their fields. Two alike slots are told apart by
    their names in an `optax.named_chain`, or by position; if neither decides, `restore`
    raises. All such changes are reported.

    Local updates restore with another number of workers, into a run without local
    updates, and from one. All workers start from the center (slow weights); in a run
    without local updates the parameters take its place. The inner optimizers' slots are
    dealt out by number: worker w of new ones takes those of w modulo the saved number, a
    run without workers those of the first. Sums since the last exchange and commits in
    flight are dropped: call `synchronize` before the save to keep them. New local updates
    take the outer optimizer's slots from the target, which must then have arrays.

    Args:
      path: A checkpoint that emaopt or Orbax alone wrote; raw parameters come back raw,
        wherever they are on disk. Of a CheckpointManager, a step's directory.
      target: A state like the saved one: arrays, or `jax.ShapeDtypeStruct`. Arrays are
        restored to the target's dtypes and shardings, and to the default device where it
        has no sharding. Shapes must agree.
      params: Where the parameters of a new average are in the target, as for `save`.
        Needed if several trees fit.
      rename: Where parts of the saved state belong in the target, if their places do not
        tell, as {"opt_state/1": "opt_state/2"}, keys joined with "/". Also to say that a
        part stays, if two fit or its fields changed: {"opt_state/1": "opt_state/1"}.
      keep_missing: Let leaves that the checkpoint lacks keep the target's values, which
        must then be arrays: to start training from a file of parameters alone.
      ignore_extra: Leave out leaves that the target has no place for. With the target
        {"params": params}: the raw parameters alone.
      report: Called with a sentence on each part that was renamed, seeded, left out or
        kept; by default the warning function of the logger "emaopt".

    Returns:
      A tree like `target`: raw parameters under their names, the average in its slot.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      ValueError: If the target has other names, shapes or kinds of numbers (complex,
        float, integer, bool; integers may be wider, not narrower); the message lists
        them. If two averages or slots could be taken for each other. If the files are
        damaged. Nothing is half-restored.
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
    # One string also says where the parameters are on disk, should the record be lost.
    at = params if isinstance(params, str) else None
    files = _files.open_files("restore", path, at=at)
    # If a save over `path` was cut short, this run goes on from what that left; its next
    # save may then move it back to `path`.
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
    path: Path,
    *,
    target: PyTree | None = None,
    sharding: jax.sharding.Sharding | PyTree | None = None,
    dtype: DTypeLike | None = None,
    name: str | None = None,
    at: str | None = None,
    ignore_extra: bool = False,
) -> PyTree:
    """Loads the averaged parameters (EMA) for inference, and reads nothing else.

    Args:
      path: A checkpoint that emaopt wrote, or any other of a training state with an
        average in it. Of a CheckpointManager, a step's directory.
      target: Parameters whose containers, shapes and dtypes the result takes (arrays or
        `jax.ShapeDtypeStruct`). None: nested dicts and lists, as on disk, with what else
        stands among the parameters, such as the random numbers of an NNX model.
      sharding: A `jax.sharding.Sharding` for all arrays, or a tree of them like the
        parameters. None: the target's, where it has arrays with one, else the default
        device. The shardings of the run that saved do not matter.
      dtype: Floating dtype to cast floating arrays to. None: the target's, else as saved
        (the accumulator's, float32 for bfloat16 parameters).
      name: Which average, if there are several. None: the served one, which is under the
        parameters' names.
      at: Where the parameters are, as keys joined with "/". Needed if nothing else tells;
        also to choose one of several trees, or a part of one: "params/backbone"; and for
        what is served with the average: "batch_stats".
      ignore_extra: Let the target have a part of the parameters; the rest is not read.

    Returns:
      The parameters: averages, and the raw values of those that were not averaged.

    Raises:
      FileNotFoundError: If there is no checkpoint at `path`.
      ValueError: If the checkpoint holds no average, or several, or nothing at `at`; if
        the target has other names or shapes; or if the files are damaged.
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
    files = _sources.open_source("load_averaged", path, at=at, lazy=True)
    return _restore.averages(files, target, sharding, dtype, name, at, ignore_extra)


def metadata(
    state: PyTree, *, name: Choice = None, params: Ways = None, optional: bool = False
) -> Json:
    """Returns the record to save with `swap_state(state)`, as Orbax's custom_metadata.

    For writing by other means than `save`, such as Orbax's experimental v1 API:

        v1.save(path, swap_state(state), custom_metadata=metadata(state))
        state = swap_state(v1.load(path, swap_state(state)))  # or restore(path, state)

    `restore` and `load_averaged` then read the checkpoint as if `save` had written it,
    without checksums. If swap_state was told what else is served, give the swapped state.

    Args:
      state: The training state, swapped or not.
      name, params, optional: As for `save`.

    Returns:
      A JSON-serializable dict with the one key "emaopt"; an empty dict for a state
      without an average, if `optional`.

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
