"""Where the workers are: on a leading axis, on a mapped axis, or just one of them.

The only file that asks for collectives. Both forms answer the same few questions, so that
the engine is written once. A row is what one worker has of a leaf.
"""

import functools
from collections.abc import Callable
from typing import Any

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
from emaopt._xla import always, held_until


class _Workers:
    """What both forms have in common."""

    axes: Callable[[Any], tuple[int, ...]]  # of a row
    spread: Callable[[Any, Any], Any]

    def held(self, flags, tree):
        """Rows, to be read when flags of the workers are there, whatever they say."""
        if not traced(tree):
            return tree  # there is no compiler that could change the order
        ready = always(flags)
        return held_until(lambda leaf: self.spread(ready, leaf), tree)

    def choose(self, flags, new, old):
        """The new row for the workers whose flags are on, else the old one."""
        new, old = jnp.asarray(new), jnp.asarray(old)
        old = old if old.dtype == new.dtype else old.astype(new.dtype)
        return jnp.where(self.spread(flags, new), new, old)

    def or_zeros(self, flags, tree):
        """Rows of the workers whose flags are on, zeros for the others."""
        return jax.tree.map(
            lambda row: self.choose(flags, row, np.zeros((), jnp.result_type(row))), tree
        )

    def finite(self, groups, flags):
        """Flags of the workers, off for those with a row that is not finite.

        The rows of a group, of one shape, are read in one go. The groups come in turn on
        CPU: XLA writes a flag for each element there, and would for all at once.
        Elsewhere the flags of a worker on several devices are to travel together.
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

    def check(self, function: str, leaves: list) -> None:
        """Raises unless every leaf has a row for every worker."""
        for leaf in leaves:
            if jnp.shape(leaf)[:1] != (self.num_workers,):
                raise ValueError(
                    f"{function}: with num_workers={self.num_workers} every leaf has a "
                    f"leading axis of {self.num_workers}, but one has shape "
                    f"{jnp.shape(leaf)}. Call emaopt.stack_workers(params, "
                    f"{self.num_workers}) first."
                )

    def first(self, leaf):
        """Any row, where all are equal."""
        leaf = jnp.asarray(leaf)
        sharding = jax.typeof(leaf).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf[0]
        # By an array of indices: a slice along a sharded axis is refused.
        whole = sharding.update(spec=PartitionSpec(None, *sharding.spec[1:]))
        return leaf.at[jnp.zeros(1, jnp.int32)].get(out_sharding=whole)[0]

    def init(self, inner: optax.GradientTransformation, params):
        """The state of every worker, where the worker is."""
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
        # Left to themselves, zeros would all stand on one device.
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

    def step(self, function, inner, updates, state, params, extra_args, per_worker):
        """A step of each worker's optimizer."""
        if not jax.tree.leaves(params):
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

    def zero(self, params, dtype):
        """A scalar zero for each worker, beside its parameters."""
        zeros = jnp.zeros(self.num_workers, dtype)
        leaves = jax.tree.leaves(params)
        return rows_beside(leaves[0], zeros) if leaves else zeros

    def loaded(self, scalars):
        """A worker's own scalars as the update has them."""
        return scalars

    def stored(self, scalars, like):
        """And as the state has them."""
        del like
        return scalars

    def axes(self, leaf):
        """The axes of a row."""
        return tuple(range(1, leaf.ndim))

    def spread(self, value, leaf):
        """A value for each worker in a shape that broadcasts against `leaf`."""
        return value.reshape((-1,) + (1,) * (leaf.ndim - 1))

    def same(self, value):
        """A value for each worker."""
        return jnp.full(self.num_workers, value)

    def total(self, leaves):
        """The sums over the workers."""
        return in_turn(lambda leaf: jnp.sum(leaf, axis=0, dtype=leaf.dtype), leaves)

    def valid(self, finite):
        """[num_workers] flags of all workers, equal everywhere."""
        return self.gather([finite])[0]

    def gather(self, leaves):
        """The rows of all workers, on a leading axis, on every device."""
        context = jax.sharding.get_abstract_mesh()

        def everywhere(leaf):
            sharding = jax.typeof(leaf).sharding
            if AxisType.Explicit in sharding.mesh.axis_types:
                spec = PartitionSpec(None, *sharding.spec[1:])
                return jax.sharding.reshard(leaf, sharding.update(spec=spec))
            if not context.axis_names:
                return leaf  # where it is, is the compiler's choice
            free = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
            return lax.with_sharding_constraint(leaf, PartitionSpec(None, *free))

        return [everywhere(leaf) for leaf in leaves]

    def own(self, leaves):
        """Each worker's row of what stands on a leading axis."""
        return leaves

    def varying(self, tree):
        """For `shard_map` with check_vma: marked as different on each worker."""
        return tree

    def equal_as(self, tree, like):
        """For the same: marked as equal on all workers where `like` is."""
        del like
        return tree


class Mapped(_Workers):
    """Every worker runs the program: in `shard_map`, `pmap` or `vmap`; or one alone.

    Where all parameters share a leading axis, as those of all workers do outside of
    `shard_map` and with a length of 1 inside, a worker's own scalars (and whatever else
    of its state is not like parameters) have it too, so that each can have its own.
    """

    def __init__(self, axis_name: Any = None):
        self.axis_name = axis_name

    @property
    def num_workers(self):
        return 1 if self.axis_name is None else lax.psum(1, self.axis_name)

    def check(self, function: str, leaves: list) -> None:
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

    def first(self, leaf):
        return leaf

    def init(self, inner, params):
        own = self._own(inner, params)
        leaves, treedef = jax.tree.flatten(inner.init(params))
        rows = [
            self._rows(leaf, params) if n in own else leaf
            for n, leaf in enumerate(leaves)
        ]
        return self.varying(jax.tree.unflatten(treedef, rows))

    def step(self, function, inner, updates, state, params, extra_args, per_worker):
        del function, per_worker  # all of it is the worker's own
        own = self._own(inner, params)
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

    def _own(self, inner, params) -> dict[int, int]:
        """Which leaves of a state are not like parameters, and their dimensions.

        None of them, where the parameters share no leading axis. What is like them has
        another shape with another length of it.
        """
        if (length := self._length(params)) is None:
            return {}
        some, more = (
            jax.tree.leaves(jax.eval_shape(inner.init, resized(params, n)))
            for n in (length, length + 1)
        )
        pairs = enumerate(zip(some, more, strict=True))
        return {n: one.ndim for n, (one, other) in pairs if one.shape == other.shape}

    def _length(self, params) -> int | None:
        """Of the leading axis of all parameters, if they share one."""
        if self.axis_name is None:
            return None
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
        length = lengths.pop() if len(lengths) == 1 else ()
        return sum(length) or None  # one, or none

    def _rows(self, leaf, params):
        rows = jnp.broadcast_to(leaf, (self._length(params), *jnp.shape(leaf)))
        return rows_beside(jax.tree.leaves(params)[0], rows)

    def zero(self, params, dtype):
        zero = replicated_beside(jax.tree.leaves(params))(dtype)
        rows = zero if self._length(params) is None else self._rows(zero, params)
        return self.varying(rows)

    def loaded(self, scalars):
        return scalars[0] if scalars.ndim else scalars

    def stored(self, scalars, like):
        return jnp.broadcast_to(scalars, like.shape)

    def axes(self, leaf):
        return tuple(range(leaf.ndim))

    def spread(self, value, leaf):
        del leaf
        return value

    def same(self, value):
        return jnp.asarray(value)

    def total(self, leaves):
        if self.axis_name is None:
            return leaves
        return packed(lambda x: lax.psum(x, self.axis_name), leaves)

    def valid(self, finite):
        if self.axis_name is None:
            return finite[None]
        own = jnp.arange(self.num_workers) == lax.axis_index(self.axis_name)
        return lax.psum((own & finite).astype(jnp.int32), self.axis_name) > 0

    def gather(self, leaves):
        if self.axis_name is None:
            return [leaf[None] for leaf in leaves]
        return packed(lambda x: lax.all_gather(x, self.axis_name), leaves)

    def own(self, leaves):
        i = 0 if self.axis_name is None else lax.axis_index(self.axis_name)
        return [lax.dynamic_index_in_dim(leaf, i, keepdims=False) for leaf in leaves]

    def varying(self, tree):
        if not self._is_tracked:
            return tree
        return jax.tree.map(lambda leaf: vary(leaf, self._axes), tree)

    def equal_as(self, tree, like):
        if not self._is_tracked:
            return tree

        def equal(leaf, like):
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
        except NameError:  # `init` may be called outside of it
            return False


def resized(params: Any, length: int) -> Any:
    """The shapes of parameters that share a leading axis, with another length of it."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((length, *jnp.shape(leaf)[1:]), leaf.dtype),
        params,
    )
