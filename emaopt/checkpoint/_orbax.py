"""What is asked of Orbax beside its documented interface: here, and nowhere else.

The names of its files and what stands in them; the handlers of single arrays, which it
lets others replace; a stock handler with two methods of ours. Any release of Orbax may
change these. Seen alike in orbax-checkpoint 0.12.0 to 0.12.8; tests/test_internals.py
saves and reads with plain Orbax, and fails where a release differs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from emaopt._names import Names

UNFINISHED = ".orbax-checkpoint-tmp"  # in a name, until Orbax renames the directory
MARK = "commit_success.txt"  # is there, once it has finished what it writes in place
STEP, ITEM = "_CHECKPOINT_METADATA", "_METADATA"  # what it writes of each, as JSON
BEGUN, COMMITTED = "init_timestamp_nsecs", "commit_timestamp_nsecs"  # in STEP
CUSTOM = "custom_metadata"  # in STEP, and in ITEM of emaopt's
TREE = "tree_metadata"  # in ITEM: the names of all leaves
ARRAYS = "manifest.ocdbt"  # beside ITEM, where there are arrays
WHOLE = ("default", "state", "pytree")  # what it calls the only item of a step


def is_finalized(path: Any) -> bool:
    """Whether Orbax takes a directory for one that is finished, by its own marks."""
    return ocp.utils.is_checkpoint_finalized(path)


def typed_keys(directory: Any) -> set[str]:
    """The names of arrays of which Orbax makes something else: typed PRNG keys."""
    found = set()
    for file in directory.glob("array_metadatas/process_*"):
        for entry in json.loads(file.read_text())["array_metadatas"]:
            if entry["array_metadata"].get("ext_metadata"):
                found.add(entry["array_metadata"]["param_name"])
    return found


def is_number(leaf: Any) -> bool:
    """Whether a leaf of its metadata is a Python number."""
    return isinstance(leaf, ocp.metadata.value.ScalarMetadata)


def opened(infos: Sequence[Any]) -> list[Any]:
    """Futures of the TensorStores that arrays are read by, all under way at once."""
    return [
        ts.open(
            ts.Spec(type_handlers.get_json_tspec_read(info, info.is_ocdbt_checkpoint)),
            open=True,
            context=info.ts_context,
        )
        for info in infos
    ]


class _Arrays(type_handlers.ArrayHandler):
    """Gives for the metadata of arrays what is made of their infos."""

    def __init__(self, kept: Callable[[Sequence[Any]], list[Any]]):
        super().__init__()
        self._kept = kept

    async def metadata(self, infos: Sequence[Any]) -> Any:
        return self._kept(infos)


class _NumpyArrays(type_handlers.NumpyHandler):
    """The same, of what was saved as NumPy arrays."""

    def __init__(self, kept: Callable[[Sequence[Any]], list[Any]]):
        super().__init__()
        self._kept = kept

    async def metadata(self, infos: Sequence[Any]) -> Any:
        return self._kept(infos)


def metadata(directory: Any, kept: Callable[[Sequence[Any]], list[Any]]) -> Any:
    """Its metadata of a tree, with what `kept` makes of the infos of arrays.

    Orbax itself opens every array for its metadata, and again to read it, one coroutine
    for each. An info is what it would read an array by: name, parent_dir, ts_context and
    is_ocdbt_checkpoint.
    """
    kinds: dict[type, Any] = {jax.Array: _Arrays(kept), np.ndarray: _NumpyArrays(kept)}
    kinds |= {int: type_handlers.ScalarHandler(), str: type_handlers.StringHandler()}
    registry = type_handlers.create_type_handler_registry(*kinds.items())
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        return handler.metadata(directory)
    except ValueError:  # a type that somebody registered, or it is damaged
        return ocp.PyTreeCheckpointHandler().metadata(directory)


def restored(directory: Any, plan: Any) -> Any:
    """The leaves of a tree that are not PLACEHOLDER, as its own handlers read them."""
    args = ocp.args.PyTreeRestore(
        item=plan, restore_args=ocp.checkpoint_utils.construct_restore_args(plan)
    )
    return ocp.PyTreeCheckpointHandler().restore(directory, args=args)


class Pending:
    """A leaf that is to be written, without its array."""

    def __init__(self, names: Names, shape: tuple[int, ...], dtype: np.dtype):
        self.names, self.shape, self.dtype = names, shape, dtype
        self.size = int(np.prod(shape))
        self.nbytes = self.size * dtype.itemsize


def writer(arrays: Iterator[dict[Names, np.ndarray]]) -> ocp.PyTreeCheckpointHandler:
    """A handler that saves a tree of `Pending`, whose arrays come in batches.

    Orbax saves whole trees, but it writes each leaf by a handler of its type, and takes
    other handlers for other types. What this one writes are its files of NumPy arrays.
    """
    # It warns of a registry that lacks jax.Array.
    stock = jax.Array, type_handlers.ArrayHandler()
    ours: tuple[type, Any] = Pending, _Writing(arrays)
    registry = type_handlers.create_type_handler_registry(stock, ours)
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _Writing(type_handlers.NumpyHandler):
    """Writes a batch while the next one is made, and no more."""

    def __init__(self, arrays: Iterator[dict[Names, np.ndarray]]):
        super().__init__()
        self._arrays = arrays

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        where = {value.names: i for i, value in enumerate(values)}
        futures: Any = []
        for batch in self._arrays:
            for future in futures:
                future.result()
            rows = [where[names] for names in batch]
            futures = await super().serialize(
                list(batch.values()), [infos[i] for i in rows], [args[i] for i in rows]
            )
        return futures


def replace_methods(
    handler: ocp.StandardCheckpointHandler,
    *,
    async_save: Callable[..., Any],
    restore: Callable[..., Any],
) -> None:
    """Lets a stock handler save and restore by other methods.

    In place of a subclass: Orbax writes the handler's type into the checkpoint and looks
    it up again to restore, and a type of ours would keep readers without emaopt out.
    """
    for name, method in (("async_save", async_save), ("restore", restore)):
        setattr(handler, name, method)
