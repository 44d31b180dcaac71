"""Local steps, a commit, an outer step: the engine of every local-update method."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._checks import (
    as_dtype,
    check_arrays,
    check_axis_name,
    check_callable,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_optimizer,
    refuse_unlike,
)
from emaopt._commits import accumulate, check_commit, start_center
from emaopt._conditional import once_if
from emaopt._exchange import Exchange, Fixed, Leaf, Part
from emaopt._recursion import is_array, is_averaged, replicated_beside
from emaopt._rounding import applied, lead
from emaopt._workers import Mapped, Stacked, held_until, of_all

REDUCTIONS = ("mean", "sum", "sequential")


class LocalUpdatesState(NamedTuple):
    """State of local updates; read the center with `get_center`."""

    num_steps: Any  # () int32, the local steps of each worker
    num_left_out: Any  # () int32, commits of all workers left out for a NaN or inf
    since_exchange: Any  # tuple of () int32 for each fragment, local steps
    inner_state: Any  # of the inner optimizer, each worker's
    outer_state: Any  # tuple of the outer optimizer's states for each fragment
    accumulated: Any  # Σ gradients since the exchange, None but for mean_gradient
    pulled: Any  # the center as each worker pulled it, None but for sequential deltas
    residual: Any  # what commits lost in exchange_dtype, None without error_feedback
    center: Any  # like one worker's parameters, at least float32


class SwappedLocalUpdatesState(NamedTuple):
    """What `swap` leaves in a `LocalUpdatesState`'s place while the center is in use.

    The fields are the same but for the name of the first, so that neither an update nor
    a restore can take one state for the other.
    """

    swapped_at: Any  # () int32, num_steps
    num_left_out: Any
    since_exchange: Any
    inner_state: Any
    outer_state: Any
    accumulated: Any
    pulled: Any
    residual: Any
    center: Any  # here stand the workers' parameters


@dataclass(frozen=True)
class Engine:
    """Steps of `inner` on every worker, and commits of them that `outer` applies.

    The arguments are those of `local_updates`.
    """

    function: str  # for errors
    inner: optax.GradientTransformation
    outer: optax.GradientTransformation
    period: Any
    num_workers: int | None = None
    axis_name: Any = None
    commit: str = "delta"
    reduce: str = "mean"
    moving_rate: float | None = None
    warmup_steps: int = 0
    exchange_dtype: Any = None
    error_feedback: bool = False
    num_fragments: int = 1

    def __post_init__(self):
        _check(self)

    @property
    def workers(self) -> Any:
        if self.num_workers is None:
            return Mapped(self.axis_name)
        return Stacked(self.num_workers)

    @property
    def _exchange(self) -> Exchange:
        return Exchange(
            self.workers,
            self.outer,
            self.commit,
            self.reduce,
            self.moving_rate,
            self.exchange_dtype,
        )

    def init(self, params: Any) -> LocalUpdatesState:
        check_arrays(self.function, "params", params, others=True)
        leaves, treedef = jax.tree.flatten(params)
        if self.num_workers is not None:
            self.workers.check(self.function, leaves)
        center = [start_center(self.workers.first(leaf)) for leaf in leaves]
        fragments = fragments_of(self.function, center, self.num_fragments)
        zero = replicated_beside(leaves)

        def rows(start: Callable) -> Any:
            """Like the parameters, in the center's dtypes."""
            return jax.tree.map(
                lambda x: start(start_center(x)) if is_averaged(x) else x, params
            )

        return LocalUpdatesState(
            num_steps=zero(jnp.int32),
            num_left_out=zero(jnp.int32),
            since_exchange=tuple(zero(jnp.int32) for _ in fragments),
            inner_state=self.workers.init(self.inner, params),
            outer_state=tuple(
                self.outer.init(_subtree(treedef, f, [center[i] for i in f]))
                for f in fragments
            ),
            accumulated=rows(jnp.zeros_like) if self.commit == "mean_gradient" else None,
            pulled=rows(jnp.asarray) if self._exchange.keeps_pulled else None,
            residual=rows(jnp.zeros_like) if self.error_feedback else None,
            center=jax.tree.unflatten(treedef, center),
        )

    def update(
        self, updates, state, params=None, *, exchange=None, **extra_args
    ) -> tuple[Any, Any]:
        _check_call(self.function, state, params, exchange)
        if isinstance(exchange, np.bool_):
            exchange = bool(exchange)
        leaves, treedef = jax.tree.flatten(params)
        self.workers.check(self.function, leaves)
        inner = optax.with_extra_args_support(self.inner)

        def column(tree) -> list[Any]:
            """The leaves in the parameters' order, None where there are none."""
            return [None] * len(leaves) if tree is None else treedef.flatten_up_to(tree)

        def local_step(updates, inner_state, params):
            """A step of every worker."""
            steps, inner_state = self.workers.each(
                inner.update, updates, inner_state, params, **extra_args
            )
            return column(steps), inner_state

        check_arrays(self.function, "updates", updates)
        try:
            gradients = column(updates)
            if self.num_workers is not None:
                self.workers.check(self.function, [g for g in gradients if is_array(g)])
        except (TypeError, ValueError) as error:
            refuse_unlike(self.function, params, error, updates=updates)
            raise
        sums = column(state.accumulated)
        state_columns = map(column, (state.pulled, state.residual, state.center))
        changing = list(map(Leaf, *state_columns))
        num_steps = optax.safe_increment(state.num_steps)
        num_left_out, inner_state = state.num_left_out, state.inner_state
        since_exchange, outer_states = [], []
        dues: list[Any] = [False] * len(leaves)
        fragments = fragments_of(self.function, column(state.center), self.num_fragments)
        for number, fragment in enumerate(fragments):
            since = state.since_exchange[number]
            for i in fragment:
                if state.accumulated is not None:
                    sums[i] = accumulate(sums[i], gradients[i], since == 0)
            since = optax.safe_increment(since)
            due = self._due(number, num_steps, since) if exchange is None else exchange

            def exchanged(changing, fixed, fragment=fragment):
                inner_state, before = changing
                sums, since = fixed

                def read(held):
                    own = held(params)
                    steps, _ = local_step(held(updates), held(inner_state), own)
                    own = column(own)
                    return [
                        Fixed(
                            None if gradients[i] is None else applied(own[i], steps[i]), s
                        )
                        for i, s in zip(fragment, held(sums), strict=True)
                    ]

                subtree = functools.partial(_subtree, treedef, fragment)
                after = self._exchange(before, read, since, subtree)
                # The local step comes again, after the exchange and from the same state,
                # whose slots it overwrites in place. What passes a conditional unchanged
                # goes around it: without an order between the two, the compiler would
                # copy the slots at every step.
                known = after.num_left_out >= 0
                return held_until(lambda _: known, inner_state), after

            before = Part(
                [changing[i] for i in fragment], state.outer_state[number], num_left_out
            )
            operands = ((inner_state, before), ([sums[i] for i in fragment], since))
            if isinstance(due, bool):
                inner_state, after = exchanged(*operands) if due else operands[0]
            else:
                inner_state, after = once_if(due, exchanged, *operands)
            for i, leaf in zip(fragment, after.leaves, strict=True):
                changing[i], dues[i] = leaf, due
            num_left_out = after.num_left_out
            outer_states.append(after.outer_state)
            since_exchange.append(jnp.where(due, 0, since))

        steps, inner_state = local_step(updates, inner_state, params)
        for i, (leaf, due) in enumerate(zip(changing, dues, strict=True)):
            if due is not False and gradients[i] is not None:
                target = leaf.center if leaf.pulled is None else leaf.pulled
                steps[i] = lead(leaves[i], of_all(target, leaves[i]), steps[i], due)

        def tree(column, like):
            return None if like is None else jax.tree.unflatten(treedef, column)

        return jax.tree.unflatten(treedef, steps), LocalUpdatesState(
            num_steps=num_steps,
            num_left_out=num_left_out,
            since_exchange=tuple(since_exchange),
            inner_state=inner_state,
            outer_state=tuple(outer_states),
            accumulated=tree(sums, state.accumulated),
            pulled=tree([leaf.pulled for leaf in changing], state.pulled),
            residual=tree([leaf.residual for leaf in changing], state.residual),
            center=tree([leaf.center for leaf in changing], state.center),
        )

    def _due(self, number: int, num_steps: Any, since: Any) -> Any:
        """Whether a fragment is exchanged after this step."""
        if callable(self.period):
            due = since >= self.period(num_steps)
        else:  # the fragments take turns
            offset = number * self.period // self.num_fragments
            due = (num_steps + offset) % self.period == 0
        return due | (num_steps <= self.warmup_steps)


def fragments_of(function: str, center: list, num_fragments: int) -> list[list[int]]:
    """The positions of the leaves that are exchanged together, in parts of like sizes."""
    fragments: list[list[int]] = [[] for _ in range(num_fragments)]
    sizes = [0] * num_fragments
    moving = [i for i, leaf in enumerate(center) if is_averaged(leaf)]
    if 1 < num_fragments > len(moving) and center:
        raise ValueError(
            f"{function}: num_fragments={num_fragments}, but there are only "
            f"{len(moving)} leaves; a fragment is one leaf or more."
        )
    for i in sorted(moving, key=lambda i: -center[i].size):
        smallest = sizes.index(min(sizes))
        fragments[smallest].append(i)
        sizes[smallest] += center[i].size
    return [sorted(fragment) for fragment in fragments]


def _subtree(treedef: Any, positions: list[int], leaves: list) -> Any:
    """A tree with the parameters' names and MaskedNode in place of other leaves."""
    nodes: list[Any] = [optax.MaskedNode()] * treedef.num_leaves
    for i, leaf in zip(positions, leaves, strict=True):
        nodes[i] = leaf
    return jax.tree.unflatten(treedef, nodes)


def _check(engine: Engine) -> None:
    function, period = engine.function, engine.period
    check_optimizer(function, "inner", engine.inner)
    check_optimizer(function, "outer", engine.outer)
    check_commit(function, engine.commit)
    check_choice(function, "reduce", engine.reduce, REDUCTIONS)
    if callable(period):
        check_callable(function, "period", period, 1)
    else:
        check_integer(function, "period", period, 1)
    check_integer(function, "warmup_steps", engine.warmup_steps, 0)
    check_integer(function, "num_fragments", engine.num_fragments, 1)
    check_flag(function, "error_feedback", engine.error_feedback)
    if engine.axis_name is not None:
        check_axis_name(function, "axis_name", engine.axis_name)
    if engine.num_workers is not None and engine.axis_name is not None:
        raise ValueError(
            f"{function}: give num_workers= for parameters with an axis of workers "
            "or axis_name= inside shard_map, pmap or vmap, not both; got num_workers="
            f"{engine.num_workers!r}, axis_name={engine.axis_name!r}."
        )
    if engine.num_workers is not None:
        check_integer(function, "num_workers", engine.num_workers, 1)
    if engine.moving_rate is not None:
        if callable(engine.moving_rate):
            check_callable(function, "moving_rate", engine.moving_rate, 1)
        else:
            check_number(function, "moving_rate", engine.moving_rate, 0, 1, above=True)
        if engine.commit != "delta":
            raise ValueError(
                f"{function}: moving_rate is for commit='delta', got {engine.commit!r}."
            )
    _check_exchange_dtype(engine)
    if callable(period) and engine.num_fragments > 1:
        raise ValueError(
            f"{function}: with num_fragments={engine.num_fragments} the fragments take "
            "turns, so period must be a whole number, not a function."
        )
    if not callable(period) and engine.num_fragments > period:
        raise ValueError(
            f"{function}: num_fragments={engine.num_fragments} fragments cannot take "
            f"turns in period={period} steps; several would share a step."
        )


def _check_exchange_dtype(engine: Engine) -> None:
    function, dtype = engine.function, engine.exchange_dtype
    if dtype is None:
        if engine.error_feedback:
            raise ValueError(
                f"{function}: error_feedback is for an exchange_dtype; without one, "
                "commits lose nothing."
            )
        return
    dtype = as_dtype(function, "exchange_dtype", dtype)
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    if not narrow and dtype not in (jnp.int8, jnp.int16):
        raise ValueError(
            f"{function}: exchange_dtype must be bfloat16, float16, a float8, int8 or "
            f"int16, got {dtype}."
        )
    if engine.moving_rate is not None and (
        engine.error_feedback or engine.reduce == "sequential"
    ):
        raise ValueError(
            f"{function}: with moving_rate, exchange_dtype goes neither with "
            "error_feedback nor with reduce='sequential': workers move by what they "
            "commit."
        )


def _check_call(function: str, state: Any, params: Any, exchange: Any) -> None:
    if params is None:
        raise ValueError(
            f"{function} moves the parameters between the workers and the center, but "
            "update was called without them: call tx.update(grads, state, params)."
        )
    if isinstance(state, SwappedLocalUpdatesState):
        raise TypeError(
            f"{function}: this state is swapped: the parameters are the center, and "
            "training on would lose the workers'. Call params, opt_state = "
            "emaopt.swap(params, opt_state) to swap back first."
        )
    if not isinstance(state, LocalUpdatesState):
        raise TypeError(
            f"{function}: the state must be a LocalUpdatesState as init makes it, got "
            f"{type(state).__name__}."
        )
    is_flag = exchange is None or isinstance(exchange, (bool, np.bool_))
    if not is_flag and not (
        isinstance(exchange, (jax.Array, np.ndarray))
        and (exchange.dtype, exchange.shape) == (jnp.bool_, ())
    ):
        raise TypeError(
            f"{function}: exchange must be True, False, a boolean scalar or None, got "
            f"{exchange!r}."
        )
    check_arrays(function, "params", params, others=True)
