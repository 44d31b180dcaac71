"""What averages and local updates keep, and what `swap` makes of it."""

from typing import Any, NamedTuple


class AverageState(NamedTuple):
    """State of an average; read it with `get_average`, exchange it with `swap`.

    num_updates: the updates so far, s. num_skipped: those left out by skip_nonfinite.
    weight: what the iterates weigh before de-biasing, None without it. pending: 1 - Πβ
    since the average last moved (every). average: the average, always readable.
    """

    num_updates: Any  # () int32, s: the updates so far, skipped ones included
    num_skipped: Any  # () int32, updates left out for a NaN or inf (skip_nonfinite)
    weight: Any  # () float, W: what the iterates weigh in all; None without debias
    pending: Any  # () float, 1 - Πβ over the steps since the average last moved (every)
    average: Any  # like the parameters, in the accumulator's dtype; MaskedNode if masked


class SwappedState(NamedTuple):
    """What `swap` leaves in an `AverageState`'s place while the average is in use.

    The fields are the same but for the name of the first, so that neither an update nor
    a restore can take one state for the other.
    """

    swapped_at: Any  # () int32, num_updates
    num_skipped: Any  # () int32
    weight: Any  # () float
    pending: Any  # () float
    average: Any  # like the parameters: here stand the raw parameters


class LocalUpdatesState(NamedTuple):
    """State of local updates; read the center with `get_center`.

    What is each worker's own has a leading axis: [W] stacked, [1] inside `jax.shard_map`.
    """

    num_steps: Any  # () int32, local steps, taken by a worker or not
    num_left_out: Any  # () int32, Σ over exchanges and fragments of workers left out
    num_missed: Any  # int32, each worker's: steps not taken for a NaN or inf
    since_exchange: Any  # tuple of () int32 for each fragment, local steps
    has_missed: Any  # tuple of bool for each fragment, each worker's: one since then
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
    num_missed: Any
    since_exchange: Any
    has_missed: Any
    inner_state: Any
    outer_state: Any
    accumulated: Any
    pulled: Any
    residual: Any
    center: Any  # here stand the workers' parameters


class Kind(NamedTuple):
    """A kind of state that holds the parameters to be served, in its last field."""

    name: str  # in a sentence
    state: type[Any]
    swapped: type[Any]  # what `swap` makes of it
    mark: str  # a field that tells it in a mapping, where its type is lost

    @property
    def field(self) -> str:
        """The field with what is served: "average" or "center"."""
        return self.state._fields[-1]


AVERAGE = Kind("an AverageState", AverageState, SwappedState, "pending")
CENTER = Kind(
    "a LocalUpdatesState",
    LocalUpdatesState,
    SwappedLocalUpdatesState,
    "since_exchange",
)
KINDS = (AVERAGE, CENTER)


def check_own_state(function: str, state: object, kind: Kind) -> None:
    """Raises unless a state is the one that an update goes on with."""
    if isinstance(state, kind.swapped):
        raise TypeError(
            f"{function}: this state is swapped: the parameters are the {kind.field}, "
            "and training on would lose the raw ones. Call params, opt_state = "
            "emaopt.swap(params, opt_state) to swap back first."
        )
    if not isinstance(state, kind.state):
        raise TypeError(
            f"{function}: the state must be {kind.name} as init makes it, got "
            f"{type(state).__name__}."
        )
