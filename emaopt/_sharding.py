"""Where an average is: sharded further than its parameters, in host memory."""

import math
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from emaopt._jax_internals import traced, varying
from emaopt._leaves import for_each_leaf
from emaopt._masks import is_function
from emaopt._names import Names, named_leaves
from emaopt._types import Leaf, Placement, PyTree

# What says how the average of one leaf is split.
Entry: TypeAlias = str | Names | PartitionSpec | NamedSharding
AnyMesh: TypeAlias = Mesh | AbstractMesh

LIKE_PARAMS = "like_params"
HOST = "pinned_host"

# Axes of Auto mode that `state_shardings` traces as Explicit ones.
auto_axes: ContextVar[frozenset[str]] = ContextVar("auto_axes", default=frozenset())


class Place(NamedTuple):
    """Where the average of one leaf is, relative to the leaf."""

    splits: tuple[tuple[int, Names], ...]  # of a dimension, along mesh axes
    mesh: Any  # the Mesh or AbstractMesh of these axes; None without splits
    on_host: bool

    def start(self, average: jax.Array) -> jax.Array:
        """A new average, moved to its place from where the parameter is."""
        if traced(average):
            return self.kept(self.part(average))
        sharding = average.sharding
        if self.splits and isinstance(self.mesh, Mesh):
            spec = getattr(sharding, "spec", PartitionSpec())
            average = jax.device_put(
                average, NamedSharding(self.mesh, self._extended(spec))
            )
        elif self.splits:
            # The mesh around is abstract, as for a constant inside of a shard_map.
            average = self.part(average)
        return self.kept(average)

    def part(self, value: jax.Array) -> jax.Array:
        """A value that is whole along the axes, split along them as the average is.

        In the Auto mode of a mesh, the compiler spreads shardings backwards: a constraint
        on the value would split the parameters and their slots too, or gather them at
        every step. So each device takes its part of its own copy, in a `shard_map` over
        these axes alone; along other axes the value stays as it is.
        """
        if not self.splits:
            return value
        axes = {axis for _, names in self.splits for axis in names}
        if axes <= _manual(self.mesh):
            return self._own(value)
        if _are_explicit(self.mesh, axes):
            sharding = jax.typeof(value).sharding
            return jax.sharding.reshard(
                value, sharding.update(spec=self._extended(sharding.spec))
            )
        specs = PartitionSpec(), self._extended(PartitionSpec())
        return self._mapped(self._own, value, axes, *specs)

    def whole(self, value: jax.Array) -> jax.Array:
        """A value that is split along the axes, whole again on all of their devices."""
        if not self.splits:
            return value
        axes = {axis for _, names in self.splits for axis in names}
        if axes <= _manual(self.mesh):
            return self._gathered(value)
        if _are_explicit(self.mesh, axes):
            sharding = jax.typeof(value).sharding
            left = [
                tuple(axis for axis in _names(part) if axis not in axes) or None
                for part in sharding.spec
            ]
            return jax.sharding.reshard(value, sharding.update(spec=PartitionSpec(*left)))
        specs = self._extended(PartitionSpec()), PartitionSpec()
        return self._mapped(self._gathered, value, axes, *specs)

    def fetched(self, average: jax.Array) -> jax.Array:
        """The average in the device's memory, where it can be updated."""
        return _put(average, jax.memory.Space.Device) if self.on_host else average

    def kept(self, average: jax.Array) -> jax.Array:
        """The average in its own memory."""
        return _put(average, jax.memory.Space.Host) if self.on_host else average

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a leaf's average here: inside of shard_map, that of one part."""
        sizes = list(shape)
        for dim, axes in self.splits:
            if set(axes) <= _manual(self.mesh):
                sizes[dim] //= _size(self.mesh, axes)
        return tuple(sizes)

    def _mapped(
        self,
        function: Callable[[jax.Array], jax.Array],
        value: jax.Array,
        axes: set[str],
        in_specs: PartitionSpec,
        out_specs: PartitionSpec,
    ) -> jax.Array:
        """What a function of a device's part makes of a value, over these axes alone."""
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=axes,
            check_vma=False,
        )
        # Outside of jit, JAX refuses a shard_map over some of the axes of a mesh.
        return mapped(value) if traced(value) else jax.jit(mapped)(value)

    def _own(self, value: jax.Array) -> jax.Array:
        """The device's own part of a value, inside of shard_map over the axes."""
        for dim, axes in self.splits:
            size = value.shape[dim] // _size(self.mesh, axes)
            start = lax.axis_index(axes) * size
            value = lax.dynamic_slice_in_dim(value, start, size, dim)
        return value

    def _gathered(self, value: jax.Array) -> jax.Array:
        """The parts of all devices, inside of shard_map over the axes."""
        for dim, axes in self.splits:
            value = lax.all_gather(value, axes, axis=dim, tiled=True)
        return value

    def _extended(self, spec: PartitionSpec) -> PartitionSpec:
        """A spec with the axes of the splits after those that it has."""
        entries = list(spec)
        for dim, axes in self.splits:
            entries += [None] * (dim + 1 - len(entries))
            entries[dim] = (*_names(entries[dim]), *axes)
        return PartitionSpec(*entries)


def check_placement(function: str, sharding: Placement, memory_kind: object) -> None:
    """Raises unless the arguments can say where an average is."""
    if not (
        memory_kind is None or (isinstance(memory_kind, str) and memory_kind == HOST)
    ):
        raise ValueError(
            f"{function}: memory_kind must be None, as the parameters', or {HOST!r}, "
            f"got {memory_kind!r}."
        )
    if memory_kind is not None and jax.__version_info__ < (0, 10):
        raise ValueError(
            f"{function}: memory_kind={memory_kind!r} needs jax 0.10 or newer, this is "
            f"{jax.__version__}: older ones lose the memory of a result, or abort."
        )
    if not is_function(sharding):
        _check_entries(function, sharding)


def _check_entries(function: str, entries: PyTree) -> None:
    """Raises unless each leaf is one way to split an average."""
    # To JAX, None is no leaf, and would be overlooked.
    for entry in jax.tree.leaves(entries, is_leaf=lambda x: x is None or _is_entry(x)):
        if not _is_entry(entry):
            raise TypeError(
                f"{function}: sharding must be {LIKE_PARAMS!r}, the name of a mesh axis "
                "or a tuple of names, a PartitionSpec, a NamedSharding, a tree of these "
                "like the parameters or a prefix of it, or a function from the "
                f"parameters to one, got {type(entry).__name__}."
            )
        if isinstance(entry, NamedSharding) and entry.memory_kind == HOST:
            raise ValueError(
                f"{function}: the memory of the sharding is not looked at: give "
                f"memory_kind={HOST!r} itself."
            )


def places(
    function: str, sharding: Placement, memory_kind: object, tree: PyTree, leaves: list
) -> list[Place]:
    """The place of each leaf's average, in flattening order."""
    on_host = memory_kind is not None
    if (isinstance(sharding, str) and sharding == LIKE_PARAMS) or not leaves:
        return [Place((), None, on_host)] * len(leaves)
    entries: PyTree = sharding
    if is_function(entries, tree):
        entries = entries(tree)
    if callable(sharding):  # others were checked when they were given
        _check_entries(function, entries)
    what = (
        f"{function}: sharding must be like the parameters or a prefix of them, with "
        f"{LIKE_PARAMS!r} for what is not to be split"
    )
    entries = for_each_leaf(what, entries, tree, _is_entry)
    names = ["/".join(keys) for keys, _ in named_leaves(tree)]
    return [
        _place(function, entry, leaf, name)._replace(on_host=on_host)
        for entry, leaf, name in zip(entries, leaves, names, strict=True)
    ]


def _place(function: str, entry: Entry, leaf: Leaf, name: str) -> Place:
    """The place of one leaf's average on the mesh; beside the leaf if nothing divides."""
    nowhere = Place((), None, False)
    shape = getattr(leaf, "shape", ())
    if (isinstance(entry, str) and entry == LIKE_PARAMS) or 0 in shape or not shape:
        return nowhere
    mesh = _mesh_of(function, entry, leaf)
    spec = entry.spec if isinstance(entry, NamedSharding) else entry
    named = _checked_axes(function, entry, spec, mesh)
    there = _sharding_of(leaf)
    own = [_names(part) for part in getattr(there, "spec", ())]
    own += [()] * (len(shape) - len(own))
    taken = {axis for part in own for axis in part}
    if not taken <= set(mesh.axis_names):
        raise ValueError(
            f"{function}: sharding={entry!r}, but {name} is sharded over another mesh, "
            f"as {there.spec}."
        )
    # A traced program cannot see how the compiler shards along Auto axes. What is split
    # must not depend on it, or a compiled update would disagree with init.
    compilers = not _are_explicit(mesh, named) or bool(named & auto_axes.get())

    def divides(dim: int, axes: Names) -> bool:
        parts = _size(mesh, axes) * (1 if compilers else _size(mesh, own[dim]))
        return shape[dim] % parts == 0

    if isinstance(spec, PartitionSpec):
        splits = [(dim, _names(part)) for dim, part in enumerate(spec) if part]
    else:
        splits = [(d, _names(entry)) for d in range(len(shape))]
        splits = [split for split in splits if divides(*split)][:1]
    if not all(dim < len(shape) and divides(dim, axes) for dim, axes in splits):
        return nowhere
    for dim, axes in splits:
        # An axis splits once. In a dimension that the compiler has split, the parameter
        # would be gathered at every step.
        if taken & named or (own[dim] and compilers):
            raise ValueError(
                f"{function}: the average of {name} cannot be split along "
                f"{', '.join(axes)} in dimension {dim}: the parameter is sharded "
                f"already, as {there.spec}. Give sharding as a tree, for this leaf with "
                "another PartitionSpec, which names the axes to add and no others, or "
                f"with {LIKE_PARAMS!r}."
            )
        if traced(leaf) and varying(leaf) & set(axes):
            raise ValueError(
                f"{function}: the average of {name} cannot be split along "
                f"{', '.join(axes)} in here: each device has another value of the "
                f"parameter. Give sharding={LIKE_PARAMS!r} for it."
            )
    return Place(tuple(splits), mesh, False)


def _checked_axes(function: str, entry: Entry, spec: Entry, mesh: AnyMesh) -> set[str]:
    """The axes that an entry names, or an error if the mesh lacks one."""
    parts = list(spec) if isinstance(spec, PartitionSpec) else [spec]
    named = [axis for part in parts for axis in _names(part)]
    for axis in named:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"{function}: sharding={entry!r}, but the axes of the mesh are "
                f"{', '.join(mesh.axis_names)} (and {LIKE_PARAMS!r} splits nothing)."
            )
    if len(set(named)) < len(named):
        raise ValueError(f"{function}: sharding={entry!r} names an axis twice.")
    if 0 < len(_manual(mesh) & set(named)) < len(named):
        raise ValueError(
            f"{function}: sharding={entry!r}, but the shard_map around is over "
            f"{', '.join(sorted(_manual(mesh)))}: it must be over all these axes or none."
        )
    return set(named)


def _mesh_of(function: str, entry: Entry, leaf: Leaf) -> AnyMesh:
    """The mesh with the axes: that of the program around, or the one that is given."""
    around = jax.sharding.get_abstract_mesh()
    given = entry.mesh if isinstance(entry, NamedSharding) else None
    is_traced = traced(leaf)
    same = given is None or given.axis_names == around.axis_names
    if _manual(around) or (is_traced and around.axis_names and same):
        return around
    own = None if is_traced else getattr(_sharding_of(leaf), "mesh", None)
    mesh = given or own or (around if around.axis_names else None)
    if mesh is None:
        raise ValueError(
            f"{function}: sharding={entry!r} names axes, but no mesh is in use here. "
            "Call it under jax.set_mesh(mesh), or give sharding=NamedSharding(mesh, "
            "PartitionSpec(...))."
        )
    return mesh


def _sharding_of(leaf: Leaf) -> Any:
    """The sharding of a leaf, as far as it can be known here, or None."""
    if traced(leaf):
        return jax.typeof(leaf).sharding
    return getattr(leaf, "sharding", None)


def _size(mesh: AnyMesh, axes: Names) -> int:
    """How many parts an array is split into along the axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def _manual(mesh: AnyMesh) -> set[str]:
    """The axes along which the program is that of one device, as in shard_map."""
    return set(getattr(mesh, "manual_axes", ()))


def _are_explicit(mesh: AnyMesh, axes: Iterable[str]) -> bool:
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return all(kinds[axis] == AxisType.Explicit for axis in axes)


def _names(part: Any) -> Names:
    """The axes in an entry of a PartitionSpec."""
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)


def _is_entry(node: object) -> bool:
    # Other tuples are containers: NamedTuples, and those that hold more than names.
    if isinstance(node, tuple) and type(node) is tuple:
        return bool(node) and all(isinstance(name, str) for name in node)
    return isinstance(node, (str, PartitionSpec, NamedSharding))


def _put(average: jax.Array, space: Any) -> jax.Array:
    """The average in another memory, with the sharding that it has."""
    if traced(average):
        there = jax.typeof(average).memory_space == space
        return average if there else jax.device_put(average, space)
    kind = HOST if space == jax.memory.Space.Host else "device"
    return jax.device_put(average, average.sharding.with_memory_kind(kind))


def near(average: Leaf, param: Leaf) -> Leaf:
    """An average moved to its parameter's place, as far as their types tell under jit.

    A center's average lacks the parameters' axis of workers: only its memory is changed.
    """
    if not isinstance(average, jax.Array) or not isinstance(param, jax.Array):
        return average
    in_trace = traced((average, param))
    if average.shape != param.shape:
        on_host = not in_trace and average.sharding.memory_kind == HOST
        return _put(average, jax.memory.Space.Device) if in_trace or on_host else average
    if in_trace:
        average = _put(average, jax.typeof(param).memory_space)
        there = jax.typeof(param).sharding
        known = there.mesh.axis_names and jax.typeof(average).sharding != there
        return jax.sharding.reshard(average, there) if known else average
    if average.sharding == param.sharding:
        return average
    return jax.device_put(average, param.sharding)
