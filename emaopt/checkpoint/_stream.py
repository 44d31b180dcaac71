"""Leaf by leaf from files of any format and into Orbax's, in bounded memory.

Small leaves go in batches. A large one goes in pieces that are contiguous in C order,
unless its file has it in one chunk, which is read whole.
"""

import functools
import itertools
import math
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

BATCH = 1 << 23  # bytes that are read and written at once
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


class Piece(NamedTuple):
    """A part of a leaf that is contiguous in C order; of a small leaf, all of it."""

    leaf: int  # the leaf's position
    bounds: tuple[tuple[int, int], ...]  # (start, stop) along each axis
    shape: tuple[int, ...]
    nbytes: int
    is_whole: bool
    is_last: bool  # of its leaf

    @property
    def where(self) -> tuple[slice, ...]:
        return tuple(slice(*one) for one in self.bounds)


def batches(leaves: Sequence[Stored], *others: Sequence[Stored]) -> Iterator[list[Piece]]:
    """The pieces of leaves, batch by batch; a large piece is a batch by itself.

    `others` are the same leaves in further checkpoints, which have the same pieces.
    """
    batch: list[Piece] = []
    size = 0
    for i, alike in enumerate(zip(leaves, *others, strict=True)):
        for piece in _pieces(i, alike):
            if batch and size + piece.nbytes > BATCH:
                yield batch
                batch, size = [], 0
            batch.append(piece)
            size += piece.nbytes
    if batch:
        yield batch


def _pieces(i: int, alike: Sequence[Stored]) -> Iterator[Piece]:
    shape, itemsize = alike[0].shape, alike[0].dtype.itemsize
    if 0 in shape:
        yield Piece(i, tuple((0, n) for n in shape), shape, 0, True, True)
        return
    block = block_of(alike)
    grid = itertools.product(*(range(0, n, k) for n, k in zip(shape, block, strict=True)))
    for start in grid:
        stop = [min(a + k, n) for a, k, n in zip(start, block, shape, strict=True)]
        bounds = tuple(zip(start, stop, strict=True))
        size = tuple(b - a for a, b in zip(start, stop, strict=True))
        nbytes = math.prod(size) * itemsize
        yield Piece(i, bounds, size, nbytes, size == shape, list(stop) == list(shape))


def block_of(alike: Sequence[Stored]) -> tuple[int, ...]:
    """The shape of a leaf's pieces: whole chunks of all files that it is read from."""
    shape, itemsize = alike[0].shape, alike[0].dtype.itemsize
    chunks = {_chunk(leaf) for leaf in alike}
    if alike[0].nbytes <= BATCH or len(chunks) > 1 or None in chunks:
        return shape
    (block,) = chunks
    block = list(block or ())
    # The axis to go along: those behind it are whole in a chunk, those before it 1.
    axis = next(
        (i for i in range(len(block)) if block[i + 1 :] == list(shape[i + 1 :])), None
    )
    if axis is None or any(k > 1 for k in block[:axis]):
        return shape  # a chunk is no stretch of the array
    rows = BATCH // (math.prod(block) * itemsize)
    block[axis] = min(shape[axis], block[axis] * max(1, rows))
    return tuple(block)


def _chunk(leaf: Stored) -> tuple[int, ...] | None:
    there = _on_disk(leaf)
    return there.chunk_shape if isinstance(there, _arrays.DiskArray) else None


def arrays(
    function: str, reads: Iterable[tuple[Sequence[Stored], Sequence[Piece]]]
) -> Iterator[list[np.ndarray]]:
    """Reads pieces of leaves, in turn, while the next ones are read in threads.

    The pieces of a leaf come in order; behind the last one its checksum is compared.
    """
    reads = list(reads)
    sums: dict[tuple[int, Names], _checksums.Running] = {}
    soon = [*(leaves for leaves, _ in reads[1:]), []]

    def begun(i: int) -> list[np.ndarray]:
        for leaf in soon[i]:  # of the next batch, while this one is read
            if isinstance(there := _on_disk(leaf), _arrays.DiskArray):
                there.prepare()
        return read(function, *reads[i])

    found = prefetched(functools.partial(begun, i) for i in range(len(reads)))
    for (leaves, pieces), arrays_ in zip(reads, found, strict=True):
        for leaf, piece, array in zip(leaves, pieces, arrays_, strict=True):
            saved = leaf.files.checksums.get(leaf.names)
            if piece.is_whole or saved is None:
                continue  # `read` compared it
            key = id(leaf.files), leaf.names
            sums.setdefault(key, _checksums.Running()).add(array)
            if piece.is_last and saved != (str(leaf.dtype), sums.pop(key).result()):
                raise _checksums.differing(function, leaf.files.path, [leaf.names])
        yield arrays_


def read(
    function: str, leaves: Sequence[Stored], pieces: Sequence[Piece] = ()
) -> list[np.ndarray]:
    """Reads leaves together, or a piece of each, numbers as arrays.

    It may run in a thread.
    """
    if not leaves:
        return []
    parts = {i: piece for i, piece in enumerate(pieces) if not piece.is_whole}
    with _files.explained(function, leaves[0].files.path):
        reading = {
            i: _on_disk(leaves[i]).reading(piece.where, leaves[i].dtype)
            for i, piece in parts.items()
        }
        found = {i: future.result() for i, future in reading.items()}
    whole = [i for i in range(len(leaves)) if i not in parts]
    found |= dict(zip(whole, _whole(function, [leaves[i] for i in whole]), strict=True))
    return [found[i] for i in range(len(leaves))]


def _whole(function: str, leaves: Sequence[Stored]) -> list[np.ndarray]:
    if not leaves:
        return []
    files = leaves[0].files
    there = [leaf for leaf in leaves if isinstance(_on_disk(leaf), _arrays.DiskArray)]
    plans = [(_on_disk(leaf), np.empty(leaf.shape, leaf.dtype)) for leaf in there]
    with _files.explained(function, files.path):
        found = list(_arrays.read(plans, sum(leaf.nbytes for leaf in there)))
    values = {leaf.names: array for leaf, array in zip(there, found, strict=True)}
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
    pieces: Iterator[list[tuple[Names, Piece, np.ndarray]]],
    record: Json,
    named: Callable[[Names], Names],
    place: Path,
) -> None:
    """Writes a checkpoint of `Pending` leaves, whose pieces come in batches.

    `named` gives their names on disk. An error of the system in writing names
    `place`, where the checkpoint is going to stand.
    """
    custom_metadata: Json = {}
    # Errors in making the arrays are none of `place`, though they pass through Orbax.
    of_arrays: list[BaseException] = []

    def summed() -> Iterator[list[_orbax.Part]]:
        checksums = []
        running: dict[Names, _checksums.Running] = {}
        try:
            for batch in pieces:
                for names, piece, array in batch:
                    running.setdefault(names, _checksums.Running()).add(array)
                    if piece.is_last and _checksums.has_one(array.dtype):
                        total = running.pop(names).result()
                        entry = [list(named(names)), str(array.dtype), total]
                        checksums.append(entry)
                yield [_orbax.Part(n, p.where, p.is_last, x) for n, p, x in batch]
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
