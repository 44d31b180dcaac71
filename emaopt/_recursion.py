"""The one recursion behind every average."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from emaopt._checks import (
    check_beta,
    check_decay,
    check_flag,
    check_integer,
    checked_accumulator,
    checked_count,
)
from emaopt._clock import check_clock, check_same_clock, newest_by_time, span
from emaopt._conditional import once_if
from emaopt._decay_type import Decay, one_minus
from emaopt._jax_internals import traced
from emaopt._leaves import (
    at_least_float32,
    is_array,
    is_averaged,
    is_masked,
    kind_of,
    replicated_beside,
)
from emaopt._masks import check_mask, chosen_by
from emaopt._rounding import rounded_product, rounded_stochastically, rounded_to
from emaopt._sharding import Place, check_placement, places
from emaopt._states import AVERAGE, AverageState, check_own_state
from emaopt._tree_checks import check_arrays
from emaopt._types import Count, DecayLike, DTypeLike, Leaf, Mask, Placement, PyTree
from emaopt._xla import unknown_one


class Averager(NamedTuple):
    """A pair of pure functions, as `average_tree` returns it."""

    init: Callable[[PyTree], AverageState]
    update: Callable[..., AverageState]


class Placed(NamedTuple):
    """Values that are where the average is, beside what `Recursion.check` found."""

    values: Sequence[Leaf]
    entries: list[Leaf]
    where: list[Place]


class Update(Protocol):
    """An average's update, by the leaves of a tree or by values that are in place."""

    def __call__(
        self,
        tree: PyTree,
        state: PyTree,
        num_updates: Count | None,
        time: Mapping[str, object],
        placed: Placed | None = None,
    ) -> AverageState: ...


class Recursion(NamedTuple):
    """The functions of an average: an `Averager`, and where the leaves of it are."""

    init: Callable[[PyTree], AverageState]
    update: Update
    places: Callable[[PyTree], list[Place]]
    # (a tree, a state) -> the average's leaves in the order of the tree's, their places
    check: Callable[[PyTree, AverageState], tuple[list[Leaf], list[Place]]]


def make_averager(function: str, decay: DecayLike, **options: Any) -> Averager:
    """The recursion as `average_tree` returns it."""
    recursion = make_recursion(function, decay, **options)
    clock = options["clock"]

    def update(
        tree: PyTree, state: PyTree, num_updates: Count | None = None, **time: object
    ) -> AverageState:
        if odd := time.keys() - {clock}:
            takes = "takes no such argument" if clock is None else f"takes {clock}"
            raise TypeError(f"{function}: update was given {', '.join(odd)}; it {takes}.")
        return recursion.update(tree, state, num_updates, time)

    return Averager(recursion.init, update)


def make_recursion(
    function: str,
    decay: DecayLike,
    *,
    every: int,
    start: int,
    mask: Mask,
    accumulator_dtype: DTypeLike | None,
    debias: bool,
    zero_init: bool,
    skip_nonfinite: bool,
    stochastic_rounding: bool,
    sharding: Placement,
    memory_kind: str | None,
    clock: str | None,
) -> Recursion:
    """The recursion behind all averages, with the options of `average_params`."""
    check_decay(function, decay)
    check_clock(function, clock, decay)
    check_integer(function, "every", every, 1)
    check_integer(function, "start", start, 0)
    check_flag(function, "debias", debias)
    check_flag(function, "zero_init", zero_init)
    check_flag(function, "skip_nonfinite", skip_nonfinite)
    check_flag(function, "stochastic_rounding", stochastic_rounding)
    if isinstance(mask, (int, float, str)) and not isinstance(mask, bool):
        raise TypeError(
            f"{function}: mask must be a tree of booleans or a function that makes one, "
            f"got {mask!r}."
        )
    if not callable(mask):
        for flag in jax.tree.leaves(mask):
            # Arrays pass: optax.inject_hyperparams makes them, as chosen_by says in full.
            if not isinstance(flag, (bool, np.bool_, jax.Array)):
                raise TypeError(f"{function}: mask must hold booleans, got {flag!r}.")
    if accumulator_dtype is not None:
        accumulator_dtype = checked_accumulator(
            function,
            accumulator_dtype,
            None if clock else _constant(decay),
            every,
            stochastic_rounding,
        )
    if stochastic_rounding and accumulator_dtype != jnp.bfloat16:
        raise ValueError(
            f"{function}: stochastic_rounding is for accumulator_dtype=jnp.bfloat16, got "
            f"{accumulator_dtype}."
        )
    check_placement(function, sharding, memory_kind)
    constant = None if clock else _constant(decay)
    # Whether a move may be an exact copy, which costs a select in each leaf's kernel:
    # 1 - Πβ is 1 in float32 if Πβ < 6e-8. A move skipped for a NaN adds factors to Πβ.
    may_copy = start > 0 or debias or (skip_nonfinite and every > 1)
    may_copy = may_copy or constant is None or constant**every < 1e-6

    def init(tree: PyTree) -> AverageState:
        check_arrays(function, "params", tree, others=True)
        leaves, treedef = jax.tree.flatten(tree)
        chosen = chosen_by(function, mask, tree, len(leaves))
        where = places(function, sharding, memory_kind, tree, leaves)

        def placed(leaf: Leaf, place: Place) -> Leaf:
            entry = _start(leaf, accumulator_dtype, zero_init)
            return place.start(entry) if is_averaged(entry) else entry

        entries = [
            placed(leaf, place) if keep else optax.MaskedNode()
            for leaf, place, keep in zip(leaves, where, chosen, strict=True)
        ]
        zero = replicated_beside(leaves)
        return AverageState(
            num_updates=zero(jnp.int32),
            num_skipped=zero(jnp.int32),
            weight=zero(float) if debias else None,
            pending=zero(float),
            elapsed={clock: zero(float, (2,))} if clock else None,
            average=jax.tree.unflatten(treedef, entries),
        )

    def check(tree: PyTree, state: AverageState) -> tuple[list[Leaf], list[Place]]:
        check_own_state(function, state, AVERAGE)
        check_same_clock(function, clock, state.elapsed)
        if debias != (state.weight is not None):
            raise ValueError(
                f"{function}: debias={debias}, but the state was made with "
                f"debias={not debias}. It cannot change in mid-run; make a new state."
            )
        check_arrays(function, "params", tree, others=True)
        leaves, treedef = jax.tree.flatten(tree)
        where = places(function, sharding, memory_kind, tree, leaves)
        return _entries(function, leaves, treedef, state.average, where), where

    def update(tree, state, num_updates, time, placed=None):
        entries, where = check(tree, state) if placed is None else placed[1:]
        leaves, treedef = jax.tree.flatten(tree)
        kept = [not is_masked(entry) for entry in entries]
        check_mask(function, mask, tree, kept, [*map(is_averaged, leaves)])
        moving = [i for i, entry in enumerate(entries) if is_averaged(entry)]
        where = [where[i] for i in moving]
        old = [entries[i] for i in moving]
        values = leaves if placed is None else placed.values
        new = [jnp.asarray(values[i]) for i in moving]

        # All of this is scalar: how far the average moves, and whether it moves now. The
        # counter stays at the largest int32 and does not wrap to negative numbers.
        s: Any = optax.safe_increment(state.num_updates)
        t: Any = jnp.maximum(s - start, 0)
        if num_updates is not None:
            if clock:
                raise ValueError(
                    f"{function}: num_updates says what t is, and so does clock="
                    f"{clock!r}: leave one of them out."
                )
            count = checked_count(function, "num_updates", num_updates)
            t = jnp.asarray(count, jnp.int32)
        copying = s < start
        if clock:
            step_time = span(function, clock, time, state.pending.dtype)
            newest, elapsed = newest_by_time(decay, start, s, step_time, state.elapsed)
        else:
            newest = jnp.asarray(one_minus(decay, t), state.pending.dtype)
            elapsed = None
            if constant is None and not isinstance(decay, Decay):
                # A function of the user's, or a hyperparameter that changes in mid-run. A
                # known value out of [0, 1] is refused, a traced one clipped; a NaN shows.
                if not traced(newest) and not jnp.isnan(newest):
                    check_beta(function, decay, 1 - newest, f" at t = {t}")
                newest = jnp.clip(newest, 0, 1)
        # p = 1 - Πβ and W are averages of ones that start from 0, by the same recursion:
        # p + (1 - β)(1 - p) = 1 - β(1 - p), and W with p in place of 1 - β.
        pending = move_to(state.pending, 1.0, newest, copying)
        # Without debias, p is divided by a 1 that XLA cannot see: it computes a quotient
        # once, but repeats cheaper scalars in the kernel of each leaf.
        weight, divisor = state.weight, unknown_one(s, pending.dtype)
        if debias:
            weight = move_to(weight, 1.0, pending)
            # While every β is 1, p and W are 0, where 0 / 0 would be a NaN.
            divisor = jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)
        step = pending / divisor
        # A step of 1 must copy by a select: a + (q - a) is q up to a rounding only.
        copying = copying | (step == 1) if may_copy else None

        def move(
            before: tuple[list[jax.Array], ArrayLike], new: list[jax.Array]
        ) -> tuple[list[jax.Array], jax.Array]:
            old, _ = before
            # Rounded in here, so that a conditional takes the parameters that the step
            # returns anyway. Rounded before it, 16-bit ones are written to memory twice.
            if placed is None:
                new = [rounded_to(q, q.dtype) for q in new]
            finite = jnp.bool_(True)
            if skip_nonfinite:
                # q - q is 0, or NaN where q is not finite. Unlike jnp.isfinite, it fuses
                # with its reduction on CPU.
                for q in new:
                    finite &= jnp.sum(q - q) == 0
            moved = []
            for i, (place, a, q) in enumerate(zip(where, old, new, strict=True)):
                if place.on_host and i >= 2:
                    # Each waits for the last but one, else all averages would be brought
                    # to the device at once.
                    a, moved[i - 2] = lax.optimization_barrier((a, moved[i - 2]))
                a = place.fetched(a)
                q = place.part(q) if placed is None else place.fetched(q)
                m = move_to(a, q, step, copying)
                if stochastic_rounding:
                    m = rounded_stochastically(m, s)
                m = m.astype(a.dtype)
                if skip_nonfinite:
                    m = jnp.where(finite, m, a)
                moved.append(place.kept(m))
            return moved, finite

        if every == 1:
            due = jnp.bool_(True)
            moved, finite = move((old, True), new)
        else:
            # The averages alone: around the whole optimizer step it would break donation.
            due = (s < start) | ((s - start) % every == 0)
            # The averages are in host memory already, but inside jit their type may not
            # say so; both branches of the conditional need the same type.
            old = [place.kept(a) for place, a in zip(where, old, strict=True)]
            moved, finite = once_if(due, move, (old, jnp.bool_(True)), new)

        for i, entry in enumerate(entries):
            if not is_averaged(entry) and not is_masked(entry):
                entries[i] = _newest(leaves[i])
        for i, leaf in zip(moving, moved, strict=True):
            entries[i] = leaf
        # W stays 0 before `start`: nothing from before is to weigh anything afterwards.
        if debias:
            weight = jnp.where(due & finite & (s >= start), weight, state.weight)
        # A move empties p; one that is skipped for a NaN leaves it as it was.
        pending = jnp.where(finite, jnp.where(due, 0.0, pending), state.pending)
        return AverageState(
            num_updates=s,
            num_skipped=state.num_skipped + (~finite).astype(jnp.int32),
            weight=weight,
            pending=pending.astype(state.pending.dtype),
            elapsed=elapsed,
            average=jax.tree.unflatten(treedef, entries),
        )

    def places_of(tree: PyTree) -> list[Place]:
        return places(function, sharding, memory_kind, tree, jax.tree.leaves(tree))

    return Recursion(init, update, places_of, check)


def move_to(
    old: Leaf, new: ArrayLike, step: ArrayLike, copying: jax.Array | None = None
) -> jax.Array:
    """Returns old + step (new - old), or `new` itself where `copying`, if it is given.

    In old's dtype, or float32 if that is narrower. Every operation is rounded by itself:
    the bits are the same in and out of jit.
    """
    old = jnp.asarray(old)
    dtype = at_least_float32(old.dtype)
    a, q = old.astype(dtype), jnp.asarray(new).astype(dtype)
    # The real dtype of that width, also for complex leaves.
    step = jnp.asarray(step, jnp.finfo(dtype).dtype)
    moved = a + rounded_product(step, q - a)
    return moved if copying is None else jnp.where(copying, q, moved)


def _constant(decay: DecayLike) -> float | None:
    """The decay if it is a number whose value is known now, else None."""
    return None if callable(decay) or isinstance(decay, jax.Array) else float(decay)


def _start(leaf: Leaf, accumulator_dtype: DTypeLike | None, zero_init: bool) -> Leaf:
    """The average before the first update: a copy, never an alias."""
    if not is_averaged(leaf):
        return _newest(leaf)
    leaf = jnp.asarray(leaf)
    real = accumulator_dtype or at_least_float32(jnp.finfo(leaf.dtype).dtype)
    dtype = jnp.result_type(real, jnp.complex64) if jnp.iscomplexobj(leaf) else real
    if zero_init:
        # These zeros depend on the leaf, and so take its sharding under jit, where those
        # of zeros_like are replicated. A product with 0 would let a NaN in.
        return jnp.where(jnp.isnan(leaf), 0, jnp.zeros_like(leaf)).astype(dtype)
    return jnp.array(leaf, dtype=dtype, copy=True)


def _newest(leaf: Leaf) -> Leaf:
    """A leaf without an average as the state holds it: a copy, if it is an array."""
    if not is_array(leaf):
        return leaf
    # Not dtype_of: JAX warns of 64 bits that it is asked for and has not.
    return jnp.array(leaf, dtype=jnp.asarray(leaf).dtype, copy=True)


def _entries(
    function: str,
    leaves: list[Leaf],
    treedef: Any,
    average: PyTree,
    where: list[Place],
) -> list[Leaf]:
    """The average's leaves (MaskedNode where masked) in the order of the tree's."""
    try:
        entries = treedef.flatten_up_to(average)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{function}: the parameters have another structure than the ones that init "
            f"was called with: {error}"
        ) from None
    for leaf, entry, place in zip(leaves, entries, where, strict=True):
        if is_masked(entry):
            continue
        # Inside of shard_map, the average of a split leaf has the shape of one part.
        if _kind(leaf, place.shape(np.shape(leaf))) != _kind(entry, np.shape(entry)):
            raise ValueError(
                f"{function}: a leaf was {_kind(entry, np.shape(entry))} at init and is "
                f"{_kind(leaf, np.shape(leaf))} now."
            )
    return entries


def _kind(leaf: Leaf, shape: tuple[int, ...]) -> str:
    """The properties of a leaf that must not change after init, in words."""
    if not is_array(leaf):
        return "no array"
    return f"{kind_of(leaf)} of shape {shape}"
