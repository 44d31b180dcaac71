"""The states of averages and of local updates, and what `swap` turns them into."""

from typing import NamedTuple, TypeVar

import jax

from emaopt._types import PyTree, Scalar

T = TypeVar("T")


WEIGHT = "weight"  # the clock of `schedule_free`
BESIDE = "beside"  # the field of swapped states for what else is served


class AverageState(NamedTuple):
    """State of an average; read it with `get_average`, exchange it with `swap`.

    num_updates: the updates so far, s. num_skipped: those left out by skip_nonfinite.
    weight: the total weight of the iterates, None without debias. pending: 1 - Πβ since
    the average last moved (every). elapsed: the time on the clock, by its name, a sum of
    two numbers; None without a clock. average: the average (EMA, Polyak average), always
    readable.
    """

    num_updates: Scalar  # () int32, s: the updates so far, skipped ones included
    num_skipped: Scalar  # () int32, updates left out for a NaN or inf (skip_nonfinite)
    weight: Scalar | None  # () float, W: total weight of iterates; None without debias
    pending: Scalar  # () float, 1 - Πβ over the steps since the average last moved
    elapsed: dict[str, jax.Array] | None  # {clock: [2] float}, whose sum is the time
    average: PyTree  # like the parameters, in accumulator_dtype; MaskedNode if masked


class SwappedState(NamedTuple):
    """What `swap` leaves in an `AverageState`'s place while the average is in use.

    The first field has another name, so that neither an update nor a restore can take one
    state for the other.
    """

    swapped_at: Scalar  # () int32, num_updates
    num_skipped: Scalar  # () int32
    weight: Scalar | None  # () float; None without debias
    pending: Scalar  # () float
    elapsed: dict[str, jax.Array] | None  # {clock: [2] float}; None without a clock
    beside: PyTree  # raw values of what else is served (`served=`), by name; else None
    average: PyTree  # the raw parameters, while the average is in their place


class AveragedState(NamedTuple):
    """State of `averaged`: that of the optimizer, and the `AverageState` beside it."""

    inner_state: PyTree  # of the wrapped optimizer
    averaging: AverageState | SwappedState  # the latter while the average is in use


class PrimalAveragingState(NamedTuple):
    """State of `primal_averaging`: the parameters y lie between its z and its x."""

    inner_state: PyTree  # of the wrapped optimizer
    base: PyTree  # z, at least float32; MaskedNode where masked; None if y = z
    averaging: AverageState | SwappedState  # of x; the latter while x is in use


class ScheduleFreeState(NamedTuple):
    """State of `schedule_free`."""

    primal: PyTree  # a PrimalAveragingState
    largest: Scalar | None  # () float, the largest learning rate; None if constant


class InFlight(NamedTuple):
    """Commits that wait for their exchange (`delay`); tuples have one entry a fragment.

    Each worker's own fields have a leading axis: [W] in the stacked form, [1] inside
    `jax.shard_map`.
    """

    num_steps: tuple[Scalar, ...]  # () int32, local steps committed; 0: none in flight
    num_present: tuple[Scalar, ...]  # () int32, workers that were not absent
    valid: tuple[jax.Array, ...]  # bool: the commit is finite, and no step was missed
    pulled: tuple[jax.Array, ...]  # bool: the worker has pulled the center since
    weights: tuple[jax.Array, ...]  # float32, mean 1 over commits that count; else 0
    sums: PyTree  # Σ progress, or gradients, like the parameters, in the center's dtypes
    progress: PyTree  # beside sums of gradients for mix="carry", else None
    eager: tuple[PyTree, ...] | None  # each worker's outer state, None without `eager`


class LocalUpdatesState(NamedTuple):
    """State of local updates; read the center with `get_center`.

    The fields that each worker has for itself have a leading axis: [W] in the stacked
    form, [1] inside `jax.shard_map`.
    """

    num_steps: Scalar  # () int32, local steps, taken by a worker or not
    num_left_out: Scalar  # () int32, Σ over exchanges and fragments of workers left out
    num_missed: jax.Array  # int32, each worker's: steps not taken for a NaN or inf
    since_exchange: tuple[Scalar, ...]  # per fragment, () int32: local steps since then
    has_missed: tuple[jax.Array, ...]  # per fragment, bool: a step was missed since
    inner_state: PyTree  # of the inner optimizer, each worker's
    outer_state: tuple[PyTree, ...]  # per fragment: state of the outer optimizer
    accumulated: PyTree  # Σ gradients since the exchange, None without mean_gradient
    pulled: PyTree  # the center that each worker pulled: sequential, elastic, else None
    residual: PyTree  # what commits lost in exchange_dtype, None without error_feedback
    in_flight: PyTree  # InFlight with a delay; EmptyState with mix alone, else None
    center: PyTree  # slow weights: like one worker's parameters, at least float32


class SwappedLocalUpdatesState(NamedTuple):
    """What `swap` leaves in a `LocalUpdatesState`'s place while the center is in use.

    The first field has another name, so that neither an update nor a restore can take one
    state for the other.
    """

    swapped_at: Scalar  # () int32, num_steps
    num_left_out: Scalar
    num_missed: jax.Array
    since_exchange: tuple[Scalar, ...]
    has_missed: tuple[jax.Array, ...]
    inner_state: PyTree
    outer_state: tuple[PyTree, ...]
    accumulated: PyTree
    pulled: PyTree
    residual: PyTree
    in_flight: PyTree
    beside: PyTree  # as in `SwappedState`
    center: PyTree  # the workers' parameters, while the center is in their place


class Kind(NamedTuple):
    """A kind of state that holds the parameters to be served, in its last field."""

    name: str  # in a sentence
    state: type[PyTree]
    swapped: type[PyTree]  # what `swap` makes of it
    mark: str  # a field that shows the kind in a mapping, where the type is lost
    raw: str  # the parameters that it has while it is swapped, in a sentence

    @property
    def field(self) -> str:
        """The field that readers of a checkpoint are served: "average" or "center"."""
        return self.state._fields[-1]


AVERAGE = Kind("an AverageState", AverageState, SwappedState, "pending", "the raw ones")
CENTER = Kind(
    "a LocalUpdatesState",
    LocalUpdatesState,
    SwappedLocalUpdatesState,
    "since_exchange",
    "the workers'",
)
KINDS = (AVERAGE, CENTER)


def _states_in(tree: PyTree, kind: type[T]) -> list[T]:
    def is_one(node: object) -> bool:
        return isinstance(node, kind)

    return [*filter(is_one, jax.tree.leaves(tree, is_leaf=is_one))]


def refuse_primal_averaging(function: str, state: PyTree) -> None:
    """Raises if an optimizer whose parameters others set is one that makes them anew."""
    if any(one.base is not None for one in _states_in(state, PrimalAveragingState)):
        raise ValueError(
            f"{function}: an optimizer in here is primal_averaging, gpa or "
            "schedule_free, which makes the parameters anew from its own state at each "
            "step: what else sets them is undone. With one worker, it does what local "
            "updates do."
        )


def refuse_clocks(function: str, state: PyTree) -> None:
    """Raises if an average in the state of an outer optimizer has a clock."""
    for one in _states_in(state, AverageState):
        if one.elapsed:
            raise ValueError(
                f"{function}: an average of the outer optimizer has clock="
                f"{next(iter(one.elapsed))!r}, but an exchange takes no time that it "
                "could be told. Leave the clock out: it then counts exchanges."
            )


def check_own_state(function: str, state: object, kind: Kind) -> None:
    """Raises unless a state is the one that an update goes on with."""
    if isinstance(state, kind.swapped):
        raise TypeError(
            f"{function}: this state is swapped: the parameters are the {kind.field}, "
            f"and training on would lose {kind.raw}. Call params, opt_state = "
            "emaopt.swap(params, opt_state) to swap back first."
        )
    if not isinstance(state, kind.state):
        raise TypeError(
            f"{function}: the state must be {kind.name} as init makes it, got "
            f"{type(state).__name__}."
        )
