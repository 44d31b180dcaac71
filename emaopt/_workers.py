"""Where the workers are: on a leading axis, on a mapped axis, or just one of them.

No other file asks for collectives. Both forms have the same methods, so the engine is
written once. A row is one worker's part of a leaf.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emaopt._collectives import all_finite, in_turn, packed
from emaopt._conditional import vary
from emaopt._jax_internals import traced, varying
from emaopt._leaves import is_masked, replicated_beside, rows_beside
from emaopt._types import AxisName, DTypeLike, Leaf, PyTree
from emaopt._xla import always, held_until

Inner: TypeAlias = optax.GradientTransformationExtraArgs


class _Workers:
    """Methods that both forms share."""

    axes: Callable[[jax.Array], tuple[int, ...]]  # of a row
    spread: Callable[[jax.Array, jax.Array], jax.Array]

    def held(self, flags: jax.Array, tree: PyTree) -> PyTree:
        """Rows, to be read only when the workers' flags are computed, on or off."""
        if not traced(tree):
            return tree  # there is no compiler that could change the order
        ready = always(flags)
        return held_until(lambda leaf: self.spread(ready, leaf), tree)

    def choose(self, flags: jax.Array, new: Leaf, old: Leaf) -> jax.Array:
        """The new row for the workers whose flags are on, else the old one."""
        new, old = jnp.asarray(new), jnp.asarray(old)
        # An inner optimizer may have widened the slot.
        old = old if old.dtype == new.dtype else old.astype(new.dtype)
        return jnp.where(self.spread(flags, new), new, old)

    def or_zeros(self, flags: jax.Array, tree: PyTree) -> PyTree:
        """Rows of the workers whose flags are on, zeros for the others."""
        return jax.tree.map(
            lambda row: self.choose(flags, row, np.zeros((), jnp.result_type(row))), tree
        )

    def finite(self, groups: list[list[Leaf]], flags: jax.Array) -> jax.Array:
        """Flags of the workers, off for those with a row that is not finite.

        The rows of a group, of one shape, are read in one pass. On CPU groups come in
        turn: XLA writes a flag for each element there, and else would for all at once.
        Elsewhere the flags of a worker on several devices can travel together.
        """

        def finite(held, groups, flags):
            for rows in groups:
                flags &= all_finite(held(flags, rows), self.axes(rows[0]))
            return flags

        groups = jax.tree.map(jnp.asarray, groups)
        one_by_one = functools.partial(finite, self.held)
        if not traced((groups, flags)):
            return one_by_one(groups, flags)
        together = functools.partial(finite, lambda flags, rows: rows)
        return lax.platform_dependent(groups, flags, cpu=one_by_one, default=together)


class Stacked(_Workers):
    """Parameters and gradients carry a leading axis of workers; `jit` may shard it."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers

    def check(self, function: str, leaves: list[Leaf]) -> None:
        """Raises unless every leaf has a row for every worker."""
        for leaf in leaves:
            if jnp.shape(leaf)[:1] != (self.num_workers,):
                raise ValueError(
                    f"{function}: with num_workers={self.num_workers} every leaf has a "
                    f"leading axis of {self.num_workers}, but one has shape "
                    f"{jnp.shape(leaf)}. Call emaopt.stack_workers(params, "
                    f"{self.num_workers}) first."
                )

    def first(self, leaf: Leaf) -> jax.Array:
        """The first row, which stands for all where they are equal."""
        leaf = jnp.asarray(leaf)
        sharding = jax.typeof(leaf).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf[0]
        # In Explicit mode JAX refuses a slice along a sharded axis, not a gather.
        whole = sharding.update(spec=PartitionSpec(None, *sharding.spec[1:]))
        return leaf.at[jnp.zeros(1, jnp.int32)].get(out_sharding=whole)[0]

    def init(self, inner: optax.GradientTransformation, params: PyTree) -> PyTree:
        """The inner optimizer's state for every worker, where the worker's rows are."""
        if not jax.tree.leaves(params):  # an empty tree, or optax.tree.map_params' own
            return inner.init(params)
        init = jax.vmap(inner.init)
        shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), params)
        first = next(iter(jax.tree.leaves(shardings)), None)
        if traced(params):
            return jax.tree.map(
                functools.partial(rows_beside, jax.tree.leaves(params)[0]), init(params)
            )
        if not isinstance(first, NamedSharding) or first.mesh.size == 1:
            return init(params)
        # Nothing ties zeros to the parameters: they would all be on one device.
        rows = NamedSharding(first.mesh, PartitionSpec(*first.spec[:1]))
        everywhere = optax.tree.map_params(
            inner,
            lambda slot, sharding: slot if is_masked(slot) else sharding,
            jax.eval_shape(init, params),
            shardings,
            transform_non_params=lambda leaf: rows,
            is_leaf=is_masked,
        )
        return jax.jit(init, out_shardings=everywhere)(params)

    def step(
        self,
        function: str,
        inner: Inner,
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra_args: Mapping[str, PyTree],
        per_worker: Collection[str],
    ) -> tuple[PyTree, PyTree]:
        """A step of each worker's optimizer."""
        if not jax.tree.leaves(params):  # vmap refuses arguments without arrays
            return inner.update(updates, state, params, **extra_args)
        if missing := set(per_worker) - set(extra_args):
            raise TypeError(
                f"{function}: per_worker declares {sorted(missing)}, but update got the "
                f"extra arguments {sorted(extra_args)}."
            )
        rows = {k: v for k, v in extra_args.items() if k in per_worker}
        for name, tree in rows.items():
            for leaf in jax.tree.leaves(tree):
                if jnp.shape(leaf)[:1] != (self.num_workers,):
                    raise ValueError(
                        f"{function}: {name} is one of per_worker, so it has a leading "
                        f"axis of num_workers={self.num_workers}; got shape "
                        f"{jnp.shape(leaf)}."
                    )
        common = {k: v for k, v in extra_args.items() if k not in rows}
        return jax.vmap(
            lambda updates, state, params, rows: inner.update(
                updates, state, params, **rows, **common
            )
        )(updates, state, params, rows)

    def zero(self, params: PyTree, dtype: DTypeLike) -> jax.Array:
        """A scalar zero for each worker, on the devices of its parameters."""
        zeros = jnp.zeros(self.num_workers, dtype)
        leaves = jax.tree.leaves(params)
        return rows_beside(leaves[0], zeros) if leaves else zeros

    def loaded(self, scalars: jax.Array) -> jax.Array:
        """A worker's own scalars, from their shape in the state to that in the update."""
        return scalars

    def stored(self, scalars: jax.Array, like: jax.Array) -> jax.Array:
        """A worker's own scalars, back in their shape in the state."""
        del like
        return scalars

    def axes(self, leaf: jax.Array) -> tuple[int, ...]:
        """The axes of a row."""
        return tuple(range(1, leaf.ndim))

    def spread(self, value: jax.Array, leaf: jax.Array) -> jax.Array:
        """A value for each worker in a shape that broadcasts against `leaf`."""
        return value.reshape((-1,) + (1,) * (leaf.ndim - 1))

    def same(self, value: bool) -> jax.Array:
        """The same value for each worker."""
        return jnp.full(self.num_workers, value)

    def total(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """The sums over the workers."""
        return in_turn(lambda leaf: jnp.sum(leaf, axis=0, dtype=leaf.dtype), leaves)

    def valid(self, finite: jax.Array) -> jax.Array:
        """[num_workers] flags of all workers, equal everywhere."""
        return self.gather([finite])[0]

    def gather(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """The rows of all workers, on a leading axis, on every device."""
        context = jax.sharding.get_abstract_mesh()

        def everywhere(leaf: jax.Array) -> jax.Array:
            sharding = jax.typeof(leaf).sharding
            if AxisType.Explicit in sharding.mesh.axis_types:
                spec = PartitionSpec(None, *sharding.spec[1:])
                return jax.sharding.reshard(leaf, sharding.update(spec=spec))
            if not context.axis_names:
                return leaf  # without a mesh the compiler chooses its place
            # Only the axis of workers is gathered; parameters may be sharded over others.
            free = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
            return lax.with_sharding_constraint(leaf, PartitionSpec(None, *free))

        return [everywhere(leaf) for leaf in leaves]

    def own(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """Each worker's own row, from the rows of all on a leading axis."""
        return leaves

    def varying(self, tree: PyTree) -> PyTree:
        """Marked for `shard_map` with check_vma as different on each worker."""
        return tree

    def equal_as(self, tree: PyTree, like: PyTree) -> PyTree:
        """Marked for the same as equal on all workers where `like` is."""
        del like
        return tree


class Mapped(_Workers):
    """Every worker runs the program, in `shard_map`, `pmap` or `vmap`; or there is one.

    Outside of `shard_map` the parameters of all workers have a leading axis, of length 1
    inside. Where all parameters share one, a worker's own scalars, and other leaves of
    its state that are not like parameters, have it as well: each worker keeps its own.
    """

    def __init__(self, axis_name: AxisName = None):
        self.axis_name = axis_name

    @property
    def num_workers(self) -> int:
        return 1 if self.axis_name is None else lax.psum(1, self.axis_name)

    def check(self, function: str, leaves: list[Leaf]) -> None:
        """Raises unless the axis is mapped here."""
        del leaves
        if self.axis_name is None:
            return
        try:
            lax.axis_index(self.axis_name)
        except NameError:
            raise ValueError(
                f"{function}: the axis {self.axis_name!r} is not mapped here. Call it "
                "inside jax.shard_map, jax.pmap or jax.vmap with this axis name, or use "
                "num_workers= for parameters with a leading axis."
            ) from None

    def first(self, leaf: Leaf) -> Leaf:
        return leaf

    def init(self, inner: optax.GradientTransformation, params: PyTree) -> PyTree:
        own = self._own(inner, params)
        leaves, treedef = jax.tree.flatten(inner.init(params))
        rows = [
            self._rows(leaf, params) if n in own else leaf
            for n, leaf in enumerate(leaves)
        ]
        return self.varying(jax.tree.unflatten(treedef, rows))

    def step(
        self, function, inner: Inner, updates, state, params, extra_args, per_worker
    ) -> tuple[PyTree, PyTree]:
        del function, per_worker  # all arguments are the worker's own
        own = self._own(inner, params)
        # Slots like parameters keep their axis: removing and restoring it copies them.
        leaves, treedef = jax.tree.flatten(state)
        lengths = {
            n: len(leaf)
            for n, leaf in enumerate(leaves)
            if n in own and jnp.ndim(leaf) > own[n]
        }
        one = [leaf[0] if n in lengths else leaf for n, leaf in enumerate(leaves)]
        steps, after = inner.update(
            updates, jax.tree.unflatten(treedef, one), params, **extra_args
        )
        leaves, treedef = jax.tree.flatten(after)
        rows = [
            jnp.broadcast_to(leaf, (lengths[n], *leaf.shape)) if n in lengths else leaf
            for n, leaf in enumerate(leaves)
        ]
        return steps, jax.tree.unflatten(treedef, rows)

    def _own(self, inner: optax.GradientTransformation, params: PyTree) -> dict[int, int]:
        """{number of a leaf: its dimensions} of a state's leaves not like parameters.

        Empty where the parameters share no leading axis. A leaf is like parameters if its
        shape changes with the length of that axis.
        """
        if (length := self._length(params)) is None:
            return {}
        some, more = (
            jax.tree.leaves(jax.eval_shape(inner.init, resized(params, n)))
            for n in (length, length + 1)
        )
        pairs = enumerate(zip(some, more, strict=True))
        return {n: one.ndim for n, (one, other) in pairs if one.shape == other.shape}

    def _length(self, params: PyTree) -> int | None:
        """The length of the leading axis of all parameters, if they share one."""
        if self.axis_name is None:
            return None
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
        length = lengths.pop() if len(lengths) == 1 else ()
        return sum(length) or None  # one number, or none

    def _rows(self, leaf: Leaf, params: PyTree) -> jax.Array:
        rows = jnp.broadcast_to(leaf, (self._length(params), *jnp.shape(leaf)))
        return rows_beside(jax.tree.leaves(params)[0], rows)

    def zero(self, params: PyTree, dtype: DTypeLike) -> jax.Array:
        zero = replicated_beside(jax.tree.leaves(params))(dtype)
        rows = zero if self._length(params) is None else self._rows(zero, params)
        return self.varying(rows)

    def loaded(self, scalars: jax.Array) -> jax.Array:
        return scalars[0] if scalars.ndim else scalars

    def stored(self, scalars: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.broadcast_to(scalars, like.shape)

    def axes(self, leaf: jax.Array) -> tuple[int, ...]:
        return tuple(range(leaf.ndim))

    def spread(self, value: jax.Array, leaf: jax.Array) -> jax.Array:
        del leaf
        return value

    def same(self, value: bool) -> jax.Array:
        return jnp.asarray(value)

    def total(self, leaves: list[jax.Array]) -> list[jax.Array]:
        if self.axis_name is None:
            return leaves
        return packed(lambda x: lax.psum(x, self.axis_name), leaves)

    def valid(self, finite: jax.Array) -> jax.Array:
        if self.axis_name is None:
            return finite[None]
        # Not an all_gather: check_vma takes its result for one that varies.
        own = jnp.arange(self.num_workers) == lax.axis_index(self.axis_name)
        return lax.psum((own & finite).astype(jnp.int32), self.axis_name) > 0

    def gather(self, leaves: list[jax.Array]) -> list[jax.Array]:
        if self.axis_name is None:
            return [leaf[None] for leaf in leaves]
        return packed(lambda x: lax.all_gather(x, self.axis_name), leaves)

    def own(self, leaves: list[jax.Array]) -> list[jax.Array]:
        i = 0 if self.axis_name is None else lax.axis_index(self.axis_name)
        return [lax.dynamic_index_in_dim(leaf, i, keepdims=False) for leaf in leaves]

    def varying(self, tree: PyTree) -> PyTree:
        if not self._is_tracked:
            return tree
        return jax.tree.map(lambda leaf: vary(leaf, self._axes), tree)

    def equal_as(self, tree: PyTree, like: PyTree) -> PyTree:
        if not self._is_tracked:
            return tree

        def equal(leaf: jax.Array, like: jax.Array) -> jax.Array:
            # All workers computed the same value; pmax says so to check_vma.
            axes = tuple(sorted((varying(leaf) - varying(like)) & self._axes))
            return lax.pmax(leaf, axes) if axes else leaf

        return jax.tree.map(equal, tree, like)

    @property
    def _axes(self) -> frozenset:
        names = self.axis_name
        return frozenset(names if isinstance(names, tuple) else (names,))

    @property
    def _is_tracked(self) -> bool:
        """Whether the axis is one of a `shard_map` with check_vma."""
        if self.axis_name is None:
            return False
        try:
            return bool(varying(lax.axis_index(self.axis_name)))
        except NameError:  # `init` may be called outside of the shard_map
            return False


def resized(params: PyTree, length: int) -> PyTree:
    """The shapes of parameters that share a leading axis, with a length of `length`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((length, *jnp.shape(leaf)[1:]), leaf.dtype),
        params,
    )
