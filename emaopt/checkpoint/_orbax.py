"""All that emaopt uses of Orbax beside its documented interface.

These are the names of its files and their content; the handlers of single arrays, which
Orbax lets others replace; a stock handler with two methods replaced. Any release of Orbax
may change these. They are the same in orbax-checkpoint 0.12.0 to 0.12.8;
tests/test_internals.py saves and reads with plain Orbax, and fails where a release
differs.
"""

import contextlib
import json
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from emaopt._names import Names
from emaopt._types import Leaf, PyTree

if TYPE_CHECKING:
    from orbax.checkpoint._src.metadata.tree import TreeMetadata
    from orbax.checkpoint.future import Future

_AHEAD = 1  # batches that are written while one more is begun

# What Orbax would read an array by: name, parent_dir, ts_context, is_ocdbt_checkpoint.
Info: TypeAlias = type_handlers.ParamInfo

UNFINISHED = ".orbax-checkpoint-tmp"  # in a name, until Orbax renames the directory
MARK = "commit_success.txt"  # written last, where Orbax writes in place
STEP, ITEM = "_CHECKPOINT_METADATA", "_METADATA"  # JSON, in the directory of each
BEGUN, COMMITTED = "init_timestamp_nsecs", "commit_timestamp_nsecs"  # in STEP
CUSTOM = "custom_metadata"  # in STEP, and in ITEM of emaopt's
TREE = "tree_metadata"  # in ITEM: the names of all leaves
ARRAYS = "manifest.ocdbt"  # beside ITEM, where there are arrays
METRICS = ("metrics", "metrics")  # an item of a step, and its one file of JSON
WHOLE = ("default", "state", "pytree")  # names that Orbax gives the only item of a step


def is_finalized(path: epath.Path) -> bool:
    """Whether Orbax takes a directory for a finished one, by its own marks."""
    return ocp.utils.is_checkpoint_finalized(path)


def typed_keys(directory: epath.Path) -> set[str]:
    """The names of arrays that Orbax turns into something else: typed PRNG keys."""
    # Their data are stored as plain integers; these files alone name the kind of key.
    found = set()
    for file in directory.glob("array_metadatas/process_*"):
        for entry in json.loads(file.read_text())["array_metadatas"]:
            if entry["array_metadata"].get("ext_metadata"):
                found.add(entry["array_metadata"]["param_name"])
    return found


def is_number(leaf: object) -> bool:
    """Whether a leaf of Orbax's metadata is a Python number."""
    return isinstance(leaf, ocp.metadata.value.ScalarMetadata)


def opened(infos: Sequence[Info]) -> list[ts.Future[ts.TensorStore]]:
    """Starts to open the TensorStores of arrays, all at once, and returns the futures."""

    def spec(info: Info) -> ts.Spec:
        packed = bool(info.is_ocdbt_checkpoint)
        return ts.Spec(type_handlers.get_json_tspec_read(info, packed))

    return [ts.open(spec(info), open=True, context=info.ts_context) for info in infos]


class _Keeping:
    """Returns, as the metadata of arrays, what `kept` makes of their infos."""

    def __init__(self, kept: Callable[[Sequence[Info]], list[Leaf]]):
        super().__init__()
        self._kept = kept

    async def metadata(self, infos: Sequence[Info]) -> list[Leaf]:
        return self._kept(infos)


class _Arrays(_Keeping, type_handlers.ArrayHandler):
    pass


class _NumpyArrays(_Keeping, type_handlers.NumpyHandler):
    pass


def metadata(
    directory: epath.Path, kept: Callable[[Sequence[Info]], list[Leaf]]
) -> "TreeMetadata":
    """Orbax's metadata of a tree, with what `kept` makes of the infos of arrays.

    Orbax itself opens every array for its metadata, and again to read it, one coroutine
    for each array.
    """
    # On disk a leaf has the type string of its handler; that of int is of all scalars.
    kinds: dict[type, type_handlers.TypeHandler] = {
        jax.Array: _Arrays(kept),
        np.ndarray: _NumpyArrays(kept),
    }
    kinds |= {int: type_handlers.ScalarHandler(), str: type_handlers.StringHandler()}
    registry = type_handlers.create_type_handler_registry(*kinds.items())
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        return handler.metadata(directory)
    except ValueError:  # a type that a user registered with Orbax, or damage
        return ocp.PyTreeCheckpointHandler().metadata(directory)


def restored(directory: epath.Path, plan: PyTree) -> PyTree:
    """Reads the leaves of a tree that are not PLACEHOLDER by Orbax's own handlers."""
    args = ocp.args.PyTreeRestore(
        item=plan, restore_args=ocp.checkpoint_utils.construct_restore_args(plan)
    )
    return ocp.PyTreeCheckpointHandler().restore(directory, args=args)


class Pending:
    """A leaf to be written, without its array: names, shape, dtype and chunks."""

    def __init__(
        self,
        names: Names,
        shape: tuple[int, ...],
        dtype: np.dtype,
        chunk: tuple[int, ...] | None = None,
    ):
        self.names, self.shape, self.dtype = names, shape, dtype
        self.chunk = chunk or shape
        self.size = int(np.prod(shape))
        self.nbytes = self.size * dtype.itemsize


class Part(NamedTuple):
    """A part of a leaf, to be written to its place."""

    names: Names  # of the leaf
    where: tuple[slice, ...]
    is_last: bool
    array: np.ndarray


def writer(parts: Iterator[list[Part]]) -> ocp.PyTreeCheckpointHandler:
    """A handler that saves a tree of `Pending`, whose arrays come in batches of parts.

    Orbax saves whole trees, but it writes each leaf by the handler of its type, and takes
    handlers for further types. The files are those that Orbax writes of NumPy arrays.
    """
    # Orbax warns of a registry without jax.Array, though no leaf here is one.
    stock = jax.Array, type_handlers.ArrayHandler()
    ours: tuple[type, type_handlers.TypeHandler] = Pending, _Writing(parts)
    registry = type_handlers.create_type_handler_registry(stock, ours)
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _Writing(type_handlers.NumpyHandler):
    """Writes two batches while the next one is computed, and never more at once.

    Orbax' own way of writing takes whole arrays, and copies each. TensorStore would wait
    for the disk at every part, which doubled the time of a conversion; here a thread of
    its own does, beside the writing.
    """

    def __init__(self, parts: Iterator[list[Part]]):
        super().__init__()
        self._parts = parts

    async def serialize(
        self, values: Sequence[Leaf], infos: Sequence[Info], args: Any = None
    ) -> "Sequence[Future]":
        where = {value.names: i for i, value in enumerate(values)}
        stores: dict[Names, ts.TensorStore] = {}
        writing: deque[list[ts.WriteFutures]] = deque()
        for info in infos:
            await info.await_path_creation()
        disk = _Disk(info.parent_dir for info in infos)
        for batch in self._parts:
            if jax.process_index() != 0:
                continue  # as in Orbax' own handler: all processes have the same arrays
            rows = {part.names: where[part.names] for part in batch}
            opening = {
                names: _created(values[i], infos[i], args[i] if args else None)
                for names, i in rows.items()
                if names not in stores
            }
            stores |= {names: future.result() for names, future in opening.items()}
            while len(writing) > _AHEAD:
                for future in writing.popleft():
                    future.result()
                disk.sync_beside()
            begun = [
                stores[part.names][part.where].write(
                    part.array, can_reference_source_data_indefinitely=True
                )
                for part in batch
            ]
            writing.append(begun)
            for part in batch:
                if part.is_last:
                    del stores[part.names]
        for futures in writing:
            for future in futures:
                future.result()
        disk.sync()
        return []


class _Disk:
    """Brings the files below some directories to the disk."""

    def __init__(self, directories: Iterable[epath.Path]):
        self._directories = set(directories)
        self._written: set[str] = set()
        self._thread: Thread | None = None
        self._errors: list[OSError] = []

    def sync_beside(self) -> None:
        """Begins with the files that are new, in a thread."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._sync_new, daemon=True)
            self._thread.start()

    def sync(self) -> None:
        """Waits until all files are on the disk."""
        if self._thread is not None:
            self._thread.join()
        if self._errors:
            raise self._errors[0]
        # What had come there by itself costs nothing; an index may have been replaced.
        for folder, files in self._found():
            for file in files:
                _sync(file)
            _sync(folder)

    def _sync_new(self) -> None:
        try:
            for _, files in self._found():
                for file in set(files) - self._written:
                    with contextlib.suppress(FileNotFoundError):  # it was renamed
                        _sync(file)
                        self._written.add(file)
        except OSError as error:
            self._errors.append(error)

    def _found(self) -> Iterator[tuple[str, list[str]]]:
        for directory in self._directories:
            for folder, _, files in os.walk(directory):  # of a store's URL, nothing
                yield folder, [os.path.join(folder, file) for file in files]


def _sync(path: str) -> None:
    opened_file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened_file)
    finally:
        os.close(opened_file)


def _created(leaf: Pending, info: Info, args: Any) -> ts.Future[ts.TensorStore]:
    """Starts to open the TensorStore of a leaf that is going to be written."""
    spec = type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=bool(info.is_ocdbt_checkpoint),
        global_shape=leaf.shape,
        local_shape=leaf.chunk,  # of which Orbax makes the chunks
        dtype=leaf.dtype,
        process_index=0 if info.is_ocdbt_checkpoint else None,
        arg=args,
    )
    # Orbax 0.12.0 leaves these two to its callers. A reader of Orbax's takes a chunk that
    # is not there for a loss, also where all of it is zero.
    dtype, whole = ts.dtype(leaf.dtype), {"store_data_equal_to_fill_value": True}
    lazily = {"context": {"file_io_sync": False}}  # `_Disk` does that
    return ts.open(
        ts.Spec({**spec, **whole, **lazily}),
        create=True,
        open=True,
        dtype=dtype,
        context=info.ts_context,
    )


def replace_methods(
    handler: ocp.StandardCheckpointHandler,
    *,
    async_save: "Callable[..., Awaitable[list[Future] | None]]",
    restore: Callable[..., PyTree],
) -> None:
    """Replaces the two methods by which a stock handler saves and restores.

    A subclass would not do. Orbax writes the handler's type into the checkpoint and looks
    it up to restore, so a type of emaopt's would keep readers without emaopt out.
    """
    for name, method in (("async_save", async_save), ("restore", restore)):
        setattr(handler, name, method)
