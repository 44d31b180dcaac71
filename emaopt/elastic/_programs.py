"""What a worker computes on its own devices: its commit, and the center after all."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from emaopt._collectives import in_turn
from emaopt._commits import decoded, encoded
from emaopt._exchange import Exchange, Leaf, Part, Votes
from emaopt._fragments import (
    Column,
    column_of,
    fragments_of,
    leaves_of,
    subtree,
    tree_of,
)
from emaopt._in_flight import mixed
from emaopt._leaves import key_data
from emaopt._local_checks import mixes
from emaopt._local_loop import pulled_params
from emaopt._local_updates import Engine
from emaopt._reductions import Mean, OfWorkers, Reduction, Rows, Sum
from emaopt._rounding import hashed
from emaopt._states import LocalUpdatesState
from emaopt._types import PyTree, Scalar
from emaopt._workers import Mapped

_WORD = 0xFFFFFFFF


class Handed(NamedTuple):
    """What a worker hands in, leaf by leaf of those that are exchanged."""

    codes: list[jax.Array]  # the commit as it travels
    scales: jax.Array | None  # [leaves] float32, of integer codes; 1 where there is none
    valid: jax.Array  # () bool: finite, and no step was missed
    num_steps: jax.Array  # () int32: the steps since the last exchange


class Counts(NamedTuple):
    """What a worker learns of the commits."""

    num_counted: Scalar | int  # commits in the sums
    num_left_out: Scalar | int  # that were not finite
    counted: Scalar | bool  # whether its own is in the sums
    valid: Scalar | bool  # or would be, with a weight


class _Live(Mapped):
    """One worker, where others are that no collective reaches."""

    def __init__(self, num_workers: int):
        super().__init__(None)
        self._num_workers = num_workers

    @property
    def num_workers(self) -> int:
        return self._num_workers


@dataclass(frozen=True)
class _Collected(Sum):
    """A reduction of commits that have been added up already."""

    sums: Rows  # of the commits, as they were before `rate`
    num_counted: Scalar | int

    def _added(self, commits, counted, weights) -> tuple[Rows, Rows, Scalar]:
        sent, sums = {}, {}
        for k, row in commits.items():
            code, scale = encoded(row, self.dtype, self.workers.axes(row))
            sent[k] = decoded(code, scale, row.dtype)
            sums[k] = self.sums[k].astype(row.dtype)
            if self.rate is not None:
                sums[k] *= self.rate(self.workers.num_workers)
        return sent, sums, jnp.asarray(self.num_counted, jnp.int32)


@dataclass(frozen=True)
class _CollectedMean(_Collected, Mean):
    """The mean of such commits."""


_REDUCTIONS = {"mean": _CollectedMean, "sum": _Collected}


@dataclass(frozen=True)
class _Elsewhere(Exchange):
    """An exchange of which the sums come from elsewhere."""

    sums: Rows
    num_counted: Scalar | int

    @property
    def _reduction(self) -> Reduction:
        kind = _REDUCTIONS[self.reduce]
        own = self.workers, self.outer, self.dtype, self.moving_rate
        return kind(*own, self.sums, self.num_counted)


class Programs:
    """The programs of one optimizer, compiled once for each kind of tree."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.commit = jax.jit(functools.partial(_commit, engine))
        self.coded = jax.jit(functools.partial(_coded, engine.exchange))
        self.hand_in = jax.jit(functools.partial(_hand_in, engine))
        self.follow = jax.jit(functools.partial(_follow, engine))
        self._move = jax.jit(functools.partial(_move, engine), static_argnums=0)
        # Compiled for each number of workers that live only if something depends on it.
        self._counts = callable(engine.moving_rate) or isinstance(engine.outer, OfWorkers)

    def move(
        self,
        num_live: int,
        state: LocalUpdatesState,
        params: PyTree,
        sums: list[jax.Array],
        counts: Counts,
    ) -> LocalUpdatesState:
        """The state after the exchange.

        Args:
          num_live: How many workers take part.
          state, params: Before the exchange, with what the group shares.
          sums: Of the commits, for each leaf that is exchanged.
          counts: How many commits are in the sums.
        """
        return self._move(num_live if self._counts else 1, state, params, sums, counts)


@functools.lru_cache(maxsize=8)
def programs_of(engine: Engine) -> Programs:
    """The programs of an optimizer, the same for each call."""
    return Programs(engine)


def shared(state: LocalUpdatesState) -> dict[str, PyTree]:
    """What is the same on all workers between exchanges, by field."""
    fields = ("center", "outer_state", "num_left_out")
    return {field: getattr(state, field) for field in fields}


def exchanged(engine: Engine, center: Column) -> list[int]:
    """The positions of the leaves that are exchanged, in order."""
    fragments = fragments_of(engine.function, center, engine.num_fragments)
    return sorted(i for fragment in fragments for i in fragment)


@jax.jit
def fingerprint(tree: PyTree) -> jax.Array:
    """() uint32, almost surely another one if any bit of the tree is another one.

    It does not depend on how the leaves are laid out over devices.
    """

    def of(leaf: jax.Array) -> jax.Array:
        bits = _bits(leaf)
        index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
        for axis in reversed(range(bits.ndim)):
            along = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            index += jnp.uint32(stride & _WORD) * along
            stride *= bits.shape[axis]
        # Mixed before they are added: else equal or opposite elements would cancel.
        return jnp.sum(hashed(bits ^ hashed(index)), dtype=jnp.uint32)

    total = jnp.uint32(0)
    # In turn: on CPU XLA writes the bits of each leaf to memory.
    for one in in_turn(of, list(map(key_data, jax.tree.leaves(tree)))):
        total = hashed(total + one)
    return total


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of each element, as one or several uint32."""
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    words = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)


class _Piece(NamedTuple):
    """One fragment before an exchange."""

    positions: list[int]
    leaves: list[Leaf]
    local: Rows  # the worker's parameters
    commits: Rows


def _pieces(engine: Engine, state: LocalUpdatesState, params: PyTree) -> list[_Piece]:
    leaves, treedef = jax.tree.flatten(params)
    changing = leaves_of(treedef, state)
    sums = column_of(treedef, state.accumulated)
    center = [leaf.center for leaf in changing]
    fragments = fragments_of(engine.function, center, engine.num_fragments)
    exchange, pieces = engine.exchange, []
    for fragment, since in zip(fragments, state.since_exchange, strict=True):
        # Without a step since the exchange the commit is not counted.
        steps = jnp.maximum(since, 1)
        local = {k: jnp.asarray(leaves[i]) for k, i in enumerate(fragment)}
        commits = {
            k: exchange.commit_of(changing[i], local[k], sums[i], steps)
            for k, i in enumerate(fragment)
        }
        pieces.append(_Piece(fragment, [changing[i] for i in fragment], local, commits))
    return pieces


def _commit(engine: Engine, state: LocalUpdatesState, params: PyTree) -> list[jax.Array]:
    """The commits of the leaves that are exchanged, before they are encoded."""
    commits = {
        i: piece.commits[k]
        for piece in _pieces(engine, state, params)
        for k, i in enumerate(piece.positions)
    }
    return [commits[i] for i in sorted(commits)]


def _coded(
    exchange: Exchange, rows: list[jax.Array]
) -> tuple[list[jax.Array], jax.Array | None]:
    """(the commits as they travel, the factors that decode them, None for floats)."""
    pairs = [encoded(row, exchange.dtype, exchange.workers.axes(row)) for row in rows]
    codes = [code for code, _ in pairs]
    if exchange.dtype is None or not jnp.issubdtype(exchange.dtype, jnp.integer):
        return codes, None
    scales = [1.0 if scale is None else scale.reshape(()) for _, scale in pairs]
    return codes, jnp.array(scales, jnp.float32)


def _hand_in(engine: Engine, state: LocalUpdatesState, params: PyTree) -> Handed:
    rows = _commit(engine, state, params)
    codes, scales = _coded(engine.exchange, rows)
    missed = jnp.any(jnp.stack(state.has_missed))
    return Handed(
        codes=codes,
        scales=scales,
        valid=engine.workers.finite([[row] for row in rows], ~missed),
        num_steps=jnp.max(jnp.stack(state.since_exchange)),
    )


def _move(
    engine: Engine,
    num_live: int,
    state: LocalUpdatesState,
    params: PyTree,
    sums: list[jax.Array],
    counts: Counts,
) -> LocalUpdatesState:
    # The memory of the sums is used again. Past a barrier no output can be one of them.
    sums = lax.optimization_barrier(sums)
    treedef = jax.tree.structure(params)
    changed = leaves_of(treedef, state)
    positions = exchanged(engine, [leaf.center for leaf in changed])
    by_position = dict(zip(positions, sums, strict=True))
    valid, counted = jnp.asarray(counts.valid), jnp.asarray(counts.counted)
    num_present = jnp.asarray(counts.num_counted + counts.num_left_out)
    num_left_out, outer_state = state.num_left_out, []
    exchange, pieces = engine.exchange, _pieces(engine, state, params)
    for piece, before in zip(pieces, state.outer_state, strict=True):
        landing = _Elsewhere(
            _Live(num_live),
            exchange.outer,
            exchange.commit,
            exchange.reduce,
            exchange.moving_rate,
            exchange.dtype,
            sums={k: by_position[i] for k, i in enumerate(piece.positions)},
            num_counted=counts.num_counted,
        )
        part, _ = landing.move(
            Part(piece.leaves, before, num_left_out, None),
            piece.local,
            piece.commits,
            Votes(valid, counted, None, num_present),
            functools.partial(subtree, treedef, piece.positions),
        )
        num_left_out = part.num_left_out
        outer_state.append(part.outer_state)
        for i, leaf in zip(piece.positions, part.leaves, strict=True):
            changed[i] = leaf
    pulled = [leaf.pulled for leaf in changed]
    residual = [leaf.residual for leaf in changed]
    center = [leaf.center for leaf in changed]
    tree = functools.partial(tree_of, treedef)
    return state._replace(
        num_left_out=num_left_out,
        since_exchange=jax.tree.map(jnp.zeros_like, state.since_exchange),
        has_missed=jax.tree.map(jnp.zeros_like, state.has_missed),
        outer_state=tuple(outer_state),
        pulled=tree(pulled, state.pulled),
        residual=tree(residual, state.residual),
        center=tree(center, state.center),
    )


def _follow(
    engine: Engine,
    state: LocalUpdatesState,
    params: PyTree,
    valid: Scalar | bool,
) -> PyTree:
    """The parameters that a worker goes on from, of the state after the exchange."""
    if not mixes(engine):
        return pulled_params(state, params)
    leaves, treedef = jax.tree.flatten(params)
    center = column_of(treedef, state.center)
    for i in exchanged(engine, center):
        local, valid = jnp.asarray(leaves[i]), jnp.asarray(valid)
        own = mixed(engine.workers, engine.mix, center[i], local, valid, None)
        leaves[i] = own.astype(local.dtype)
    return jax.tree.unflatten(treedef, leaves)
