"""Leaf by leaf from Orbax's files and into them, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from emaopt._output import of_system
from emaopt._types import Json, Leaf, Path, PyTree
from emaopt.checkpoint import (
    _arrays,
    _checksums,
    _files,
    _orbax,
    _read,
    _record,
)
from emaopt.checkpoint._files import Names

BATCH = 1 << 24  # bytes of small leaves that are read and written at once
_AHEAD = 2  # batches that are read while another is used

T = TypeVar("T")


class Stored(NamedTuple):
    """A leaf on disk."""

    files: _files.Files
    names: Names
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def stored(function: str, files: _files.Files, wanted: Iterable[Names]) -> list[Stored]:
    """Opens the wanted leaves; their arrays are not read."""
    wanted = list(wanted)
    if text := [n for n in wanted if not hasattr(files.saved[n], "dtype")]:
        raise ValueError(
            f"{function}: {files.path} holds text at {_files.listed(text)}, not arrays "
            "alone."
        )
    with _files.explained(function, files.path):
        _arrays.open_all(files.saved[names] for names in wanted)
    leaves = [(names, files.saved[names]) for names in wanted]
    return [
        Stored(files, names, tuple(leaf.shape), np.dtype(leaf.dtype))
        for names, leaf in leaves
    ]


def batches(leaves: Sequence[Stored]) -> Iterator[list[int]]:
    """The positions of leaves, batch by batch; a large leaf is a batch by itself."""
    batch, size = [], 0
    for i, leaf in enumerate(leaves):
        if batch and size + leaf.nbytes > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += leaf.nbytes
    if batch:
        yield batch


def read(function: str, leaves: Sequence[Stored]) -> list[np.ndarray]:
    """Reads leaves together, numbers as arrays. It may run in a thread."""
    files = leaves[0].files
    arrays = [leaf for leaf in leaves if isinstance(_on_disk(leaf), _arrays.DiskArray)]
    plans = [(_on_disk(leaf), np.empty(leaf.shape, leaf.dtype)) for leaf in arrays]
    with _files.explained(function, files.path):
        found = list(_arrays.read(plans, sum(leaf.nbytes for leaf in arrays)))
    values = {leaf.names: array for leaf, array in zip(arrays, found, strict=True)}
    _checksums.check(function, files.path, files.checksums, values)
    # A Python number has no array on disk; Orbax's own handler reads it.
    numbers = {
        leaf.names: (leaf.names, np.zeros((), leaf.dtype).item())
        for leaf in leaves
        if leaf.names not in values
    }
    if numbers:
        values |= _read.read(function, files, numbers)
    return [np.asarray(values[leaf.names], leaf.dtype) for leaf in leaves]


def _on_disk(leaf: Stored) -> Leaf:
    return leaf.files.saved[leaf.names]


def prefetched(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of calls, in turn, while the next calls run in threads."""
    running = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        for call in calls:
            running.append(pool.submit(call))
            if len(running) > _AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def write(
    path: epath.Path,
    tree: PyTree,
    arrays: Iterator[dict[Names, np.ndarray]],
    record: Json,
    prefix: Names,
    place: Path,
) -> None:
    """Writes a checkpoint of `Pending` leaves, whose arrays come in batches.

    On disk, the prefix stands before their names. An error of the system in writing names
    `place`, where the checkpoint is going to stand.
    """
    custom_metadata: Json = {}
    # Errors in making the arrays are none of `place`, though they pass through Orbax.
    of_arrays: list[BaseException] = []

    def summed() -> Iterator[dict[Names, np.ndarray]]:
        checksums = []
        try:
            for batch in arrays:
                named = ((prefix + names, array) for names, array in batch.items())
                checksums += _checksums.of_leaves(named, together=False)
                yield batch
        except BaseException as error:
            of_arrays.append(error)
            raise
        # In time: Orbax writes custom_metadata only after the last array.
        sealed = _record.sealed({**record, "checksums": checksums})
        custom_metadata[_record.RECORD] = sealed

    try:
        with ocp.Checkpointer(_orbax.writer(summed())) as checkpointer:
            checkpointer.save(
                path, args=ocp.args.PyTreeSave(tree), custom_metadata=custom_metadata
            )
    except Exception as error:
        if not of_arrays and (plain := of_system(error, place)):
            raise plain from error
        raise
