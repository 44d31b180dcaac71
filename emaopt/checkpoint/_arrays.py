"""Arrays in Orbax's files, each opened once: their shapes and dtypes, and their reading.

What Orbax needs to open an array, and the types that it takes for a tree's leaves, are
its own. But its metadata and its restore open every file anew, and its sharding too, one
coroutine for each; with many small arrays that is most of a restore.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from emaopt.checkpoint import _orbax

Part = tuple[tuple[int, int], ...]  # (start, stop) along each axis


class DiskArray:
    """An array on disk: opened when its shape or dtype is asked for, or by `open_all`."""

    def __init__(self, info: Any, whole: bool):
        self._info = info  # what Orbax would read it by
        self._store: Any = None
        self.whole = whole  # whether its numbers are all that there is to it

    @property
    def store(self) -> Any:
        if self._store is None:
            open_all([self])
        return self._store

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.store.dtype.numpy_dtype)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return tuple(self.store.chunk_layout.read_chunk.shape or self.shape)


def open_all(leaves: Iterable[Any]) -> None:
    """Opens arrays together, those among the leaves that are not open."""
    closed = [
        leaf for leaf in leaves if isinstance(leaf, DiskArray) and leaf._store is None
    ]
    opening = _orbax.opened([leaf._info for leaf in closed])
    for leaf, store in zip(closed, opening, strict=True):
        leaf._store = store.result()


def metadata(directory: Any) -> Any:
    """Orbax's metadata of a tree, with `DiskArray` for each array."""

    def kept(infos: Sequence[Any]) -> list[DiskArray]:
        more = _orbax.typed_keys(infos[0].parent_dir) if infos else set()
        return [DiskArray(info, info.name not in more) for info in infos]

    return _orbax.metadata(directory, kept)


def can_read(leaf: Any, plan: Any) -> bool:
    """Whether an array is read here: not of less than a byte an element, and no keys."""
    return (
        isinstance(leaf, DiskArray)
        and leaf.whole
        and isinstance(plan, (jax.ShapeDtypeStruct, np.ndarray))
        and not jnp.issubdtype(plan.dtype, jax.dtypes.extended)
        and all(_has_whole_bytes(dtype) for dtype in (leaf.dtype, plan.dtype))
    )


def _has_whole_bytes(dtype: Any) -> bool:
    return np.dtype(dtype).name.lstrip("u") not in (
        "int1",
        "int2",
        "int4",
        "float4_e2m1fn",
    )


def read(leaves: Iterable[tuple[DiskArray, Any]], limit: int) -> Iterator[Any]:
    """Reads arrays as what each is asked for, with at most `limit` bytes under way.

    An array is read by the parts that this process's devices hold, each part once. What
    is asked for may have other rows than the array: see `index_of`.
    """
    running: deque = deque()
    under_way = 0

    def oldest():
        nonlocal under_way
        size, plan, parts = running.popleft()
        under_way -= size
        return _placed(plan, {part: future.result() for part, future in parts.items()})

    for leaf, plan in leaves:
        size = nbytes_read(leaf, plan)
        while running and under_way + size > limit:
            yield oldest()
        store = leaf.store
        if plan.dtype != leaf.dtype and {plan.dtype, leaf.dtype} <= _CAST:
            store = ts.cast(store, plan.dtype)
        under_way += size
        reading = {
            part: store[index_of(part, plan.shape, leaf.shape)].read()
            for part in set(_parts(plan).values())
        }
        running.append((size, plan, reading))
    while running:
        yield oldest()


# What TensorStore casts as NumPy does; the others are cast afterwards.
_CAST = {np.dtype(name) for name in ("bool", "complex64", "complex128", jnp.bfloat16)}
_CAST |= {np.dtype(f"float{bits}") for bits in (16, 32, 64)}
_CAST |= {np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


def index_of(part: Part, wanted: tuple[int, ...], there: tuple[int, ...]) -> Any:
    """The index in an array on disk of a part of what is wanted of it.

    It may be wanted with other rows, for other workers: [...] as [W, ...] is the array in
    each row; [V, ...] as [W, ...] is row w % V in row w; [W, ...] as [...] the first row.
    """
    slices = tuple(slice(*bounds) for bounds in part)
    if len(wanted) > len(there):
        return slices[1:]
    if len(wanted) < len(there):
        return (0, *slices)
    if wanted != there:
        return (np.arange(*part[0]) % there[0], *slices[1:])
    return slices


def _parts(plan: Any) -> dict[Any, Part]:
    """Which part of an array each device of this process holds; one of all for NumPy."""
    if isinstance(plan, np.ndarray):
        return {None: tuple((0, n) for n in plan.shape)}
    indices = plan.sharding.addressable_devices_indices_map(plan.shape)
    return {
        device: tuple(s.indices(n)[:2] for s, n in zip(index, plan.shape, strict=True))
        for device, index in indices.items()
    }


def nbytes_read(leaf: DiskArray, plan: Any) -> int:
    """The bytes that are read of an array for what is asked for: whole chunks."""
    return sum(_nbytes(leaf, part) for part in set(_parts(plan).values()))


def _nbytes(leaf: DiskArray, part: Part) -> int:
    missing = len(leaf.shape) - len(part)
    bounds = ((0, 1),) * missing + part[max(-missing, 0) :]
    return leaf.dtype.itemsize * math.prod(
        (-(-stop // n) - start // n) * n
        for (start, stop), n in zip(bounds, leaf.chunk_shape, strict=True)
    )


def of_number(number: int, plan: Any) -> Any:
    """A Python integer as the array that is asked for; raises OverflowError if cut."""
    dtype = plan.dtype
    if not isinstance(plan, np.ndarray):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    bounds = jnp.iinfo(dtype)
    if not bounds.min <= number <= bounds.max:
        raise OverflowError(f"{number}, which {dtype} cannot hold.")
    return placed(plan, np.asarray(number, dtype))


def is_cast_whole(leaf: DiskArray, plan: Any) -> bool:
    """Whether this process reads all of an array, as another dtype than was saved."""
    whole = tuple((0, n) for n in leaf.shape)
    return plan.dtype != leaf.dtype and set(_parts(plan).values()) == {whole}


def placed(plan: Any, array: np.ndarray) -> Any:
    """A whole array as what was asked for."""
    return _placed(plan, {part: array for part in _parts(plan).values()})


def _placed(plan: Any, arrays: dict[Part, np.ndarray]) -> Any:
    """The array of its parts, on the devices that the plan names."""
    parts = {
        part: np.broadcast_to(
            array.astype(plan.dtype, copy=False), [stop - start for start, stop in part]
        )
        for part, array in arrays.items()
    }
    if isinstance(plan, np.ndarray):
        (array,) = parts.values()
        return array if array.flags.writeable else array.copy()
    sharding = plan.sharding
    single = jax.sharding.SingleDeviceSharding
    shards = [
        jax.device_put(parts[part], single(device, memory_kind=sharding.memory_kind))
        for device, part in _parts(plan).items()
    ]
    return jax.make_array_from_single_device_arrays(
        plan.shape, sharding, shards, dtype=jax.dtypes.canonicalize_dtype(plan.dtype)
    )
