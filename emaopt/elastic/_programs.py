"""What a worker computes on its own devices: its commit, and the center after all."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from emaopt._collectives import in_turn
from emaopt._commits import decoded, encoded, make_commit
from emaopt._fragments import column_of, fragments_of, subtree, tree_of
from emaopt._in_flight import mixed
from emaopt._local_checks import Settings, as_rate, mixes
from emaopt._local_loop import pulled_params
from emaopt._reductions import REDUCTIONS, Center, OfWorkers, Sum
from emaopt._states import LocalUpdatesState
from emaopt._types import PyTree, Scalar
from emaopt._workers import Mapped

_WORD = 0xFFFFFFFF


class Handed(NamedTuple):
    """What a worker hands in, leaf by leaf of those that are exchanged."""

    codes: list[jax.Array]  # the commit as it travels
    scales: list[jax.Array]  # () of integer codes; else []
    residual: list[jax.Array]  # what it will have lost, with error feedback; else []
    valid: jax.Array  # () bool: finite, and no step was missed
    num_steps: jax.Array  # () int32: the steps since the last exchange


class Counts(NamedTuple):
    """What a worker learns of the others' commits."""

    num_counted: Scalar | int  # commits in the sums
    num_left_out: Scalar | int  # that were not finite
    valid: Scalar | bool  # whether its own is one of the sums, or would be with a weight


class _Live(Mapped):
    """One worker, where others are that no collective reaches."""

    def __init__(self, num_workers: int):
        super().__init__(None)
        self._num_workers = num_workers

    @property
    def num_workers(self) -> int:
        return self._num_workers


class Programs:
    """The programs of one optimizer, compiled once for each kind of tree."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.commit = jax.jit(functools.partial(_commit, settings))
        self.coded = jax.jit(functools.partial(_coded, settings))
        self.hand_in = jax.jit(functools.partial(_hand_in, settings))
        self.follow = jax.jit(functools.partial(_follow, settings))
        self._move = jax.jit(functools.partial(_move, settings), static_argnums=0)
        # Compiled for each number of workers that live only if something depends on it.
        outer, rate = settings.outer, settings.moving_rate
        self._counts = callable(rate) or isinstance(outer, OfWorkers)

    def move(
        self,
        num_live: int,
        state: LocalUpdatesState,
        params: PyTree,
        sums: list[jax.Array],
        residual: list[jax.Array],
        counts: Counts,
    ) -> LocalUpdatesState:
        """The state after the exchange.

        Args:
          num_live: How many workers take part.
          state, params: Before the exchange, with what the group shares.
          sums: Of the commits, for each leaf that is exchanged.
          residual: `Handed.residual`.
          counts: How many commits are in the sums.
        """
        num_live = num_live if self._counts else 1
        return self._move(num_live, state, params, sums, residual, counts)


def shared(state: LocalUpdatesState) -> dict[str, PyTree]:
    """What is the same on all workers between exchanges, by field."""
    fields = ("center", "outer_state", "num_left_out")
    return {field: getattr(state, field) for field in fields}


def exchanged(function: str, center: list[Any], num_fragments: int) -> list[int]:
    """The positions of the leaves that are exchanged, in order."""
    return sorted(i for f in fragments_of(function, center, num_fragments) for i in f)


@jax.jit
def fingerprint(tree: PyTree) -> jax.Array:
    """() uint32, another one if the bits of one element change.

    It does not depend on how the leaves are laid out over devices.
    """

    def of(leaf: jax.Array) -> jax.Array:
        bits = _bits(leaf)
        factor, stride = jnp.full(bits.shape, jnp.uint32(1)), 2
        for axis in reversed(range(bits.ndim)):
            index = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            factor += jnp.uint32(stride & _WORD) * index
            stride *= bits.shape[axis]
        # An odd factor: no two values of an element have the same product.
        return jnp.sum(bits * factor, dtype=jnp.uint32)

    total = jnp.uint32(0)
    # In turn: on CPU XLA writes the bits of each leaf to memory.
    for one in in_turn(of, list(map(raw, jax.tree.leaves(tree)))):
        total = total * jnp.uint32(0x9E3779B1) + one
    return total


def raw(leaf: jax.Array) -> jax.Array:
    """The numbers of a leaf that may hold keys of random numbers."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of each element, as one or several uint32."""
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    words = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)


def _commit(
    settings: Settings, state: LocalUpdatesState, params: PyTree
) -> list[jax.Array]:
    """The commits of the leaves that are exchanged, before they are encoded."""
    leaves, treedef = jax.tree.flatten(params)
    column = functools.partial(column_of, treedef)
    center, pulled, residual, sums = map(
        column, (state.center, state.pulled, state.residual, state.accumulated)
    )
    fragments = fragments_of(settings.function, center, settings.num_fragments)
    commits = {}
    for fragment, since in zip(fragments, state.since_exchange, strict=True):
        for i in fragment:
            # Elastic workers are drawn to the center as it is now.
            elastic = settings.moving_rate is not None or pulled[i] is None
            start = center[i] if elastic else pulled[i]
            # Without a step since the exchange the commit is not counted.
            steps = jnp.maximum(since, 1)
            local = jnp.asarray(leaves[i])
            row = make_commit(settings.commit, start, local, sums[i], steps)
            commits[i] = row if residual[i] is None else row + residual[i]
    return [commits[i] for i in sorted(commits)]


def _hand_in(settings: Settings, state: LocalUpdatesState, params: PyTree) -> Handed:
    rows = _commit(settings, state, params)
    pairs = _coded(settings, rows)
    lost = [
        row - decoded(code, scale, row.dtype)
        for row, (code, scale) in zip(rows, pairs, strict=True)
    ]
    missed = jnp.any(jnp.stack(state.has_missed))
    return Handed(
        codes=[code for code, _ in pairs],
        scales=[scale.reshape(()) for _, scale in pairs if scale is not None],
        residual=[] if state.residual is None else lost,
        valid=Mapped().finite([[row] for row in rows], ~missed),
        num_steps=jnp.max(jnp.stack(state.since_exchange)),
    )


def _coded(
    settings: Settings, rows: list[jax.Array]
) -> list[tuple[jax.Array, jax.Array | None]]:
    """Commits as they travel, and the factors that decode them, if they need any."""
    axes = Mapped().axes
    return [encoded(row, settings.exchange_dtype, axes(row)) for row in rows]


def _move(
    settings: Settings,
    num_live: int,
    state: LocalUpdatesState,
    params: PyTree,
    sums: list[jax.Array],
    residual: list[jax.Array],
    counts: Counts,
) -> LocalUpdatesState:
    # The memory of the sums is used again. Past a barrier no output can be one of them.
    sums = lax.optimization_barrier(sums)
    leaves, treedef = jax.tree.flatten(params)
    column = functools.partial(column_of, treedef)
    center, pulled, kept = map(column, (state.center, state.pulled, state.residual))
    fragments = fragments_of(settings.function, center, settings.num_fragments)
    positions = exchanged(settings.function, center, settings.num_fragments)
    workers, valid = _Live(num_live), jnp.asarray(counts.valid)
    kind = REDUCTIONS[settings.reduce]
    assert issubclass(kind, Sum)
    reduction = kind(workers, settings.outer, None, None)
    rate = as_rate(settings.function, settings.moving_rate)
    factor = None if rate is None else rate(num_live)
    total = {
        i: row.astype(center[i].dtype) if factor is None else factor * row
        for i, row in zip(positions, sums, strict=True)
    }
    for i, row in zip(positions, residual, strict=False):
        kept[i] = jnp.where(valid, row, kept[i])
    outer_state = []
    for fragment, old_state in zip(fragments, state.outer_state, strict=True):
        old = Center([center[i] for i in fragment], old_state)
        rows = {k: total[i] for k, i in enumerate(fragment)}
        moved = reduction.moved(
            old,
            reduction.scaled(rows, jnp.asarray(counts.num_counted)),
            functools.partial(subtree, treedef, fragment),
        )
        outer_state.append(moved.outer_state)
        for i, leaf in zip(fragment, moved.leaves, strict=True):
            if factor is not None:
                # The worker moves by its commit, from where both were.
                local = jnp.asarray(leaves[i])
                own = make_commit("delta", center[i], local, None, jnp.int32(1))
                own = local.astype(own.dtype) + factor * own
                pulled[i] = jnp.where(valid, own, leaf)
            center[i] = leaf
    tree = functools.partial(tree_of, treedef)
    left_out = state.num_left_out + counts.num_left_out * len(fragments)
    return state._replace(
        num_left_out=jnp.maximum(left_out, state.num_left_out),  # full, it stays full
        since_exchange=jax.tree.map(jnp.zeros_like, state.since_exchange),
        has_missed=jax.tree.map(jnp.zeros_like, state.has_missed),
        outer_state=tuple(outer_state),
        pulled=tree(pulled, state.pulled),
        residual=tree(kept, state.residual),
        center=tree(center, state.center),
    )


def _follow(
    settings: Settings,
    state: LocalUpdatesState,
    params: PyTree,
    valid: Scalar | bool,
) -> PyTree:
    """The parameters that a worker goes on from, of the state after the exchange."""
    if not mixes(settings):
        return pulled_params(state, params)
    leaves, treedef = jax.tree.flatten(params)
    center = column_of(treedef, state.center)
    for i in exchanged(settings.function, center, settings.num_fragments):
        local, valid = jnp.asarray(leaves[i]), jnp.asarray(valid)
        own = mixed(Mapped(), settings.mix, center[i], local, valid, None)
        leaves[i] = own.astype(local.dtype)
    return jax.tree.unflatten(treedef, leaves)
