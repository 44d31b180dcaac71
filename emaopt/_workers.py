"""Where the workers are: on a leading axis, on a mapped axis, or just one of them.

The only file with collectives. Both forms answer the same few questions, so that the
engine is written once. A row is what one worker has of a leaf.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from emaopt._conditional import vary, varying

# Leaves up to this size share a collective: it then costs less than copying them.
_SMALL = 2**20  # bytes


class Stacked:
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
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params))
        if traced:
            return jax.tree.map(
                functools.partial(_beside, jax.tree.leaves(params)[0]), init(params)
            )
        if not isinstance(first, NamedSharding) or first.mesh.size == 1:
            return init(params)
        # Left to themselves, zeros would all stand on one device.
        rows = NamedSharding(first.mesh, PartitionSpec(*first.spec[:1]))
        everywhere = optax.tree.map_params(
            inner,
            lambda slot, sharding: slot if _is_masked(slot) else sharding,
            jax.eval_shape(init, params),
            shardings,
            transform_non_params=lambda leaf: rows,
            is_leaf=_is_masked,
        )
        return jax.jit(init, out_shardings=everywhere)(params)

    def each(self, f: Callable, *args, **extra_args):
        """f for every worker. Extra arguments without a row for each are for all."""
        if not jax.tree.leaves(args[0]):
            return f(*args, **extra_args)

        def has_rows(argument):
            leaves = jax.tree.leaves(argument)
            return bool(leaves) and all(
                hasattr(leaf, "shape") and leaf.shape[:1] == (self.num_workers,)
                for leaf in leaves
            )

        rows = {k: v for k, v in extra_args.items() if has_rows(v)}
        common = {k: v for k, v in extra_args.items() if k not in rows}
        return jax.vmap(lambda args, rows: f(*args, **rows, **common))(args, rows)

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
        return _in_turn(lambda leaf: jnp.sum(leaf, axis=0, dtype=leaf.dtype), leaves)

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


class Mapped:
    """Every worker runs the program: in `shard_map`, `pmap` or `vmap`; or one alone."""

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
        return inner.init(params)

    def each(self, f, *args, **extra_args):
        return f(*args, **extra_args)

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
        return _packed(lambda x: lax.psum(x, self.axis_name), leaves)

    def valid(self, finite):
        if self.axis_name is None:
            return finite[None]
        own = jnp.arange(self.num_workers) == lax.axis_index(self.axis_name)
        return lax.psum((own & finite).astype(jnp.int32), self.axis_name) > 0

    def gather(self, leaves):
        if self.axis_name is None:
            return [leaf[None] for leaf in leaves]
        return _packed(lambda x: lax.all_gather(x, self.axis_name), leaves)

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
        return bool(varying(lax.axis_index(self.axis_name)))


def _beside(param: Any, leaf: Any) -> Any:
    """A leaf with its rows where a parameter's are, in the Explicit mode of a mesh."""
    here, there = jax.typeof(leaf).sharding, jax.typeof(param).sharding
    if AxisType.Explicit not in there.mesh.axis_types or not leaf.ndim:
        return leaf
    rest = here.spec[1:] if here.mesh == there.mesh else ()
    return jax.sharding.reshard(
        leaf, there.update(spec=PartitionSpec(there.spec[0], *rest))
    )


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _packed(collective: Callable, leaves: list) -> list:
    """One collective for the small leaves of each dtype, and one for each large leaf.

    One flat vector is faster than a collective for each leaf, but it is a copy.
    """
    packs: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        packs.setdefault(leaf.dtype if _is_small(leaf) else i, []).append(i)

    def operand(pack):
        if len(pack) == 1:
            return leaves[pack[0]]
        return jnp.concatenate([leaves[i].ravel() for i in pack])

    done = list(leaves)
    results = _in_turn(collective, [operand(pack) for pack in packs.values()])
    for pack, result in zip(packs.values(), results, strict=True):
        if len(pack) == 1:
            done[pack[0]] = result
            continue
        start = 0
        for i in pack:
            end = start + math.prod(leaves[i].shape)
            part = result[..., start:end]
            done[i] = part.reshape(part.shape[:-1] + leaves[i].shape)
            start = end
    return done


def _in_turn(reduction: Callable, operands: list) -> list:
    """The results of a reduction; on CPU the large ones one after the other.

    There XLA combines all collectives that do not wait for each other, and keeps the
    operands and results of all of them at once: fresh pages at every exchange, which cost
    more than the sums. An `optimization_barrier` is gone before it combines.
    """
    results = list(operands)
    before = []
    for i in _small_first(operands):
        operand = operands[i] if _is_small(operands[i]) else after(operands[i], before)
        results[i] = reduction(operand)
        before = [results[i]]
    return results


def _small_first(leaves: list) -> list[int]:
    return sorted(range(len(leaves)), key=lambda i: not _is_small(leaves[i]))


def _is_small(leaf: jax.Array) -> bool:
    return leaf.size * leaf.dtype.itemsize <= _SMALL


def after(leaf: jax.Array, results: list) -> jax.Array:
    """The leaf, to be read when results of `total` or `gather` are there; on CPU.

    They come in turn, so the last one is waited for. Without effect where its elements
    cannot be read: along a sharded axis of an Explicit mesh, or on each worker its own.
    """
    for i in _small_first(results)[-1:]:
        whole = results[i].size and not any(jax.typeof(results[i]).sharding.spec)
        if whole and varying(results[i]) <= varying(leaf):
            return lax.platform_dependent(
                leaf, results[i], cpu=_held_until_there, default=lambda leaf, _: leaf
            )
    return leaf


def _held_until_there(leaf: jax.Array, result: jax.Array) -> jax.Array:
    first = jnp.real(result[(0,) * result.ndim])
    return held_until(lambda _: ~(first < -jnp.inf), leaf)


def of_all(value: jax.Array, rows: jax.Array) -> jax.Array:
    """A value that is that of all workers, in a shape that broadcasts against `rows`.

    Explicit: some users let JAX refuse what broadcasts by itself.
    """
    return jnp.expand_dims(value, tuple(range(jnp.ndim(rows) - jnp.ndim(value))))


def held_until(true: Callable[[Any], Any], tree: Any) -> Any:
    """The tree, to be read when true(leaf) is there: a value that always is true."""

    def held(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.number):
            return leaf
        return jnp.where(true(leaf), leaf, jnp.zeros_like(leaf))

    return jax.tree.map(held, tree)
