"""Reads arrays, their shapes and their dtypes from Orbax's files, each opened once.

Orbax itself says how to open an array and what kinds of leaves a tree has. But both its
metadata and its restore open every array's file, and the file of its sharding, one
coroutine for each; with many small arrays that is most of a restore.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath

from emaopt._types import Leaf
from emaopt.checkpoint import _orbax

Part = tuple[tuple[int, int], ...]  # (start, stop) along each axis
# What an array is read as: NumPy's, or one of JAX's with a dtype and a sharding.
Plan: TypeAlias = np.ndarray | jax.ShapeDtypeStruct
Index: TypeAlias = tuple[int | slice | np.ndarray, ...]

_THREADS = 4  # that read arrays of other formats


class DiskArray:
    """An array on disk, opened by `open_all`, or when its shape or dtype is needed."""

    def __init__(self, info: _orbax.Info, whole: bool):
        self._info = info
        self._store: ts.TensorStore | None = None
        self.whole = whole  # False for typed PRNG keys: their kind is stored elsewhere

    @property
    def store(self) -> Any:  # a TensorStore, once this has opened it
        if self._store is None:
            open_all([self])
        return self._store

    @property
    def is_open(self) -> bool:
        return self._store is not None

    def prepare(self) -> None:
        """Begins what has to be done once before any part is read."""

    def reading(
        self, index: Index, dtype: np.dtype
    ) -> ts.Future[np.ndarray] | Future[np.ndarray]:
        """Begins to read a part, perhaps already as `dtype`."""
        store = self.store
        if dtype != self.dtype and {dtype, self.dtype} <= _CAST:
            store = ts.cast(store, dtype)
        return store[index].read()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.store.dtype.numpy_dtype)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        if not self.shape:
            return ()
        return tuple(self.store.chunk_layout.read_chunk.shape or self.shape)


class StoredArray(DiskArray):
    """An array of another program's, in a TensorStore."""

    def __init__(self, store: ts.TensorStore):
        self._store = store
        self.whole = True


class MadeArray(DiskArray):
    """An array of another format, of which a function reads parts.

    TensorStore could call such a function by itself (virtual_chunked), but the process
    then crashed after errors in it.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        read: Callable[[Part], np.ndarray],
        chunk: tuple[int, ...] | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        self._prepare = prepare
        self._shape, self._dtype, self.read = shape, dtype, read
        self._chunk = shape if chunk is None else chunk
        self.whole = True

    @property
    def is_open(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return self._chunk

    def reading(self, index: Index, dtype: np.dtype) -> Future[np.ndarray]:
        return _pool().submit(self._at, index)

    def prepare(self) -> None:
        if self._prepare is not None:
            _pool().submit(self._prepare)  # its error comes again when it is read

    def _at(self, index: Index) -> np.ndarray:
        slices = [one for one in index if isinstance(one, slice)]
        if len(slices) < len(self.shape):  # rows for other workers
            return self.read(tuple((0, n) for n in self.shape))[index]
        bounds = (one.indices(n) for one, n in zip(slices, self.shape, strict=True))
        return self.read(tuple((start, stop) for start, stop, _ in bounds))


OTHERS = (StoredArray, MadeArray)  # what no file of Orbax's holds


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="emaopt-read")


def open_all(leaves: Iterable[Leaf]) -> None:
    """Opens those arrays among the leaves that are not open yet, all at once."""
    closed = [leaf for leaf in leaves if isinstance(leaf, DiskArray) and not leaf.is_open]
    opening = _orbax.opened([leaf._info for leaf in closed])
    for leaf, store in zip(closed, opening, strict=True):
        leaf._store = store.result()


def metadata(directory: epath.Path) -> "_orbax.TreeMetadata":
    """Orbax's metadata of a tree, with a `DiskArray` for each array."""

    def kept(infos: Sequence[_orbax.Info]) -> list[DiskArray]:
        more = _orbax.typed_keys(infos[0].parent_dir) if infos else set()
        return [DiskArray(info, info.name not in more) for info in infos]

    return _orbax.metadata(directory, kept)


def can_read(leaf: Leaf, plan: Leaf) -> bool:
    """Whether `read` can read an array: no typed keys, no elements below a byte."""
    return (
        isinstance(leaf, DiskArray)
        and leaf.whole
        and isinstance(plan, (jax.ShapeDtypeStruct, np.ndarray))
        and not jnp.issubdtype(plan.dtype, jax.dtypes.extended)
        and (
            isinstance(leaf, OTHERS)
            or all(_has_whole_bytes(dtype) for dtype in (leaf.dtype, plan.dtype))
        )
    )


def _has_whole_bytes(dtype: np.dtype) -> bool:
    return np.dtype(dtype).name.lstrip("u") not in (
        "int1",
        "int2",
        "int4",
        "float4_e2m1fn",
    )


def read(leaves: Iterable[tuple[DiskArray, Leaf]], limit: int) -> Iterator[Leaf]:
    """Reads arrays, each as its plan says, with at most `limit` bytes under way.

    An array is read in the parts that this process's devices hold, each part once. The
    plan may have other rows than the array: see `index_of`.
    """
    running: deque[tuple[int, Plan, dict[Part, Any]]] = deque()
    under_way = 0

    def oldest() -> np.ndarray | jax.Array:
        nonlocal under_way
        size, plan, parts = running.popleft()
        under_way -= size
        return _placed(plan, {part: future.result() for part, future in parts.items()})

    for leaf, plan in leaves:
        size = nbytes_read(leaf, plan)
        # Awaited before more is begun. With all arrays under way at once, what they free
        # stays with glibc: 1.5 to 1.8 times a state of 1 GiB was resident.
        while running and under_way + size > limit:
            yield oldest()
        under_way += size
        reading = {
            part: leaf.reading(index_of(part, plan.shape, leaf.shape), plan.dtype)
            for part in set(_parts(plan).values())
        }
        running.append((size, plan, reading))
    while running:
        yield oldest()


# Dtypes that TensorStore casts as NumPy does; `_placed` casts the others after reading.
_CAST = {np.dtype(name) for name in ("bool", "complex64", "complex128", jnp.bfloat16)}
_CAST |= {np.dtype(f"float{bits}") for bits in (16, 32, 64)}
_CAST |= {np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


def index_of(part: Part, wanted: tuple[int, ...], there: tuple[int, ...]) -> Index:
    """The index into an array on disk, of shape `there`, for a part of shape `wanted`.

    The shapes differ where rows are for another number of workers: [...] read as [W, ...]
    is the array in each row; [V, ...] as [W, ...] is row w % V in row w; [W, ...] as
    [...] is the first row.
    """
    slices = tuple(slice(*bounds) for bounds in part)
    # The array without rows is read once; `_placed` broadcasts it over the part's rows.
    if len(wanted) > len(there):
        return slices[1:]
    if len(wanted) < len(there):
        return (0, *slices)
    if wanted != there:
        return (np.arange(*part[0]) % there[0], *slices[1:])
    return slices


def _parts(plan: Leaf) -> dict[Any, Part]:  # by jax.Device, or None for NumPy's
    """The part of an array that each device of this process holds; NumPy holds all."""
    if isinstance(plan, np.ndarray):
        return {None: tuple((0, n) for n in plan.shape)}
    indices = plan.sharding.addressable_devices_indices_map(plan.shape)
    return {
        device: tuple(s.indices(n)[:2] for s, n in zip(index, plan.shape, strict=True))
        for device, index in indices.items()
    }


def nbytes_read(leaf: DiskArray, plan: Plan) -> int:
    """The bytes of an array that are read for a plan: whole chunks."""
    return sum(_nbytes(leaf, part) for part in set(_parts(plan).values()))


def _nbytes(leaf: DiskArray, part: Part) -> int:
    # A part has an axis less than the array where one worker's row is read, and an axis
    # more where one array goes to all workers: then its first bounds are no axis on disk.
    missing = len(leaf.shape) - len(part)
    bounds = ((0, 1),) * missing + part[max(-missing, 0) :]
    return leaf.dtype.itemsize * math.prod(
        (-(-stop // n) - start // n) * n
        for (start, stop), n in zip(bounds, leaf.chunk_shape, strict=True)
    )


def of_number(number: int, plan: Plan) -> np.ndarray | jax.Array:
    """A Python integer as the array of a plan, or OverflowError if it does not fit."""
    dtype = plan.dtype
    # Without x64, JAX makes int32 of int64 in silence: the bounds are those of int32.
    if not isinstance(plan, np.ndarray):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    bounds = jnp.iinfo(dtype)
    if not bounds.min <= number <= bounds.max:
        raise OverflowError(f"{number}, which {dtype} cannot hold.")
    return placed(plan, np.asarray(number, dtype))


def is_cast_whole(leaf: DiskArray, plan: Plan) -> bool:
    """Whether this process reads all of an array, in another dtype than it was saved."""
    if plan.dtype == leaf.dtype or plan.shape != leaf.shape:
        return False
    whole = tuple((0, n) for n in leaf.shape)
    alone = isinstance(plan, np.ndarray) or plan.sharding.is_fully_addressable
    return alone or set(_parts(plan).values()) == {whole}


def placed(plan: Plan, array: np.ndarray) -> np.ndarray | jax.Array:
    """A whole array in the dtype of a plan, on the devices that it names."""
    parts = set(_parts(plan).values())
    # With "...", because an index () would make a scalar of an array without axes.
    return _placed(plan, {p: array[(*(slice(*one) for one in p), ...)] for p in parts})


def _placed(plan: Plan, arrays: dict[Part, np.ndarray]) -> np.ndarray | jax.Array:
    """An array made of its parts, on the devices that the plan names."""

    def fitted(part: Part, array: np.ndarray) -> np.ndarray:
        shape = tuple(stop - start for start, stop in part)
        array = array.astype(plan.dtype, copy=False)
        return array if array.shape == shape else np.broadcast_to(array, shape)

    parts = {part: fitted(part, array) for part, array in arrays.items()}
    if isinstance(plan, np.ndarray):
        (array,) = parts.values()
        # Read as it is, it is the caller's own array. With rows for other workers it is a
        # view of one row that `broadcast_to` made, which cannot be written to.
        return array if array.flags.writeable else array.copy()
    # Parts go straight to their devices, so that no device holds the whole array, and the
    # parts of other processes are not needed.
    sharding = plan.sharding
    single = jax.sharding.SingleDeviceSharding
    shards = [
        jax.device_put(parts[part], single(device, memory_kind=sharding.memory_kind))
        for device, part in _parts(plan).items()
    ]
    return jax.make_array_from_single_device_arrays(
        plan.shape, sharding, shards, dtype=jax.dtypes.canonicalize_dtype(plan.dtype)
    )
