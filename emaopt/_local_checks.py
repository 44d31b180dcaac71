"""Checks of local updates: options that can go together, weights, periods and rates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from emaopt._checks import (
    as_dtype,
    check_axis_name,
    check_callable,
    check_choice,
    check_flag,
    check_given,
    check_integer,
    check_number,
    check_optimizer,
    check_sequence,
    check_text,
)
from emaopt._commits import check_commit
from emaopt._jax_internals import inside_conditional, traced
from emaopt._reductions import REDUCTIONS
from emaopt._states import CENTER, InFlight, LocalUpdatesState, check_own_state
from emaopt._tree_checks import check_arrays
from emaopt._types import AxisName, DTypeLike, PyTree

Period: TypeAlias = int | Callable[[jax.Array], ArrayLike]
CARRY = "carry"  # a value of `mix`
LIGHTEST, HEAVIEST = 1e-30, 1e30  # weights: float32 holds their sums and means


@dataclass(frozen=True)
class Settings:
    """The arguments of `local_updates`; an error unless they can go together."""

    function: str  # named in errors
    inner: optax.GradientTransformation
    outer: optax.GradientTransformation
    period: Period
    num_workers: int | None = None
    axis_name: AxisName = None
    commit: str = "delta"
    reduce: str = "mean"
    moving_rate: float | Callable[[int], float] | None = None
    warmup_steps: int = 0
    exchange_dtype: DTypeLike | None = None
    error_feedback: bool = False
    num_fragments: int = 1
    per_worker: Sequence[str] = ()
    delay: int = 0
    mix: float | str = 0.0
    eager: bool = False

    def __post_init__(self) -> None:
        _check_settings(self)
        object.__setattr__(self, "per_worker", tuple(self.per_worker))


def _check_settings(settings: Settings) -> None:
    """Raises unless each option is valid and all can go together."""
    function, period = settings.function, settings.period
    check_optimizer(function, "inner", settings.inner)
    check_optimizer(function, "outer", settings.outer)
    check_commit(function, settings.commit)
    check_choice(function, "reduce", settings.reduce, list(REDUCTIONS))
    if callable(period):
        check_callable(function, "period", period, 1)
    else:
        check_integer(function, "period", period, 1)
    check_integer(function, "warmup_steps", settings.warmup_steps, 0)
    check_integer(function, "num_fragments", settings.num_fragments, 1)
    check_flag(function, "error_feedback", settings.error_feedback)
    if settings.axis_name is not None:
        check_axis_name(function, "axis_name", settings.axis_name)
    if settings.num_workers is not None and settings.axis_name is not None:
        raise ValueError(
            f"{function}: give num_workers= for parameters with an axis of workers "
            "or axis_name= inside shard_map, pmap or vmap, not both; got num_workers="
            f"{settings.num_workers!r}, axis_name={settings.axis_name!r}."
        )
    if settings.num_workers is not None:
        check_integer(function, "num_workers", settings.num_workers, 1)
    if settings.moving_rate is not None:
        if callable(settings.moving_rate):
            check_callable(function, "moving_rate", settings.moving_rate, 1)
        else:
            check_number(function, "moving_rate", settings.moving_rate, 0, 1, above=True)
        if settings.commit != "delta":
            raise ValueError(
                f"{function}: moving_rate is for commit='delta', got {settings.commit!r}."
            )
    check_sequence(function, "per_worker", settings.per_worker, "names")
    for name in settings.per_worker:
        check_text(function, "each of per_worker", name)
        if name in ("exchange", "weights"):
            raise ValueError(
                f"{function}: per_worker is for what the inner optimizer gets, which "
                f"{name} is not."
            )
    _check_exchange_dtype(settings)
    _check_delay(settings)
    _check_eager(settings)
    if callable(period) and settings.num_fragments > 1:
        raise ValueError(
            f"{function}: with num_fragments={settings.num_fragments} the fragments take "
            "turns, so period must be a whole number, not a function."
        )
    if not callable(period) and settings.num_fragments > period:
        raise ValueError(
            f"{function}: num_fragments={settings.num_fragments} fragments cannot take "
            f"turns in period={period} steps; several would share a step."
        )


def _check_exchange_dtype(settings: Settings) -> None:
    """Raises unless commits can travel in the dtype with the other options."""
    function, dtype = settings.function, settings.exchange_dtype
    if dtype is None:
        if settings.error_feedback:
            raise ValueError(
                f"{function}: error_feedback is for an exchange_dtype; without one, "
                "commits lose nothing."
            )
        return
    dtype = as_dtype(function, "exchange_dtype", dtype)
    narrow = False
    if jnp.issubdtype(dtype, jnp.floating):  # not those of 4 or 6 bits, or without sign
        info = jnp.finfo(dtype)
        narrow = info.bits in (8, 16) and float(info.min) < 0
    if not narrow and dtype not in (jnp.int8, jnp.int16):
        raise ValueError(
            f"{function}: exchange_dtype must be bfloat16, float16, a float8, int8 or "
            f"int16, got {dtype}."
        )
    if settings.moving_rate is not None and (
        settings.error_feedback or REDUCTIONS[settings.reduce].pulls_differ
    ):
        # In turns, parameters travel in place of commits.
        raise ValueError(
            f"{function}: with moving_rate, exchange_dtype goes neither with "
            "error_feedback nor with a reduction in turns, as reduce='sequential': "
            "workers move by what they commit."
        )


def _check_delay(settings: Settings) -> None:
    """Raises unless commits can land that late, and workers can mix with the center."""
    function, period = settings.function, settings.period
    delay, mix = settings.delay, settings.mix
    check_integer(function, "delay", delay, 0)
    if isinstance(mix, str):
        if mix != CARRY:
            raise ValueError(
                f"{function}: mix must be a number from 0 to 1 or {CARRY!r}, got {mix!r}."
            )
    else:
        check_number(function, "mix", mix, 0, 1)
    if settings.moving_rate is not None and (delay or mix != 0):
        raise ValueError(
            f"{function}: elastic workers do not pull the center, but move by what they "
            f"commit, so neither delay nor mix is for them; got delay={delay!r}, "
            f"mix={mix!r}."
        )
    if not callable(period) and delay > period:
        raise ValueError(
            f"{function}: delay must be at most period={period}, the step at which the "
            f"next commit is made, got {delay!r}."
        )


def _check_eager(settings: Settings) -> None:
    """Raises unless workers can apply their own commits at once."""
    function, eager = settings.function, settings.eager
    check_flag(function, "eager", eager)
    wanted = {"delay": settings.period, "mix": 0, "reduce": "mean"}
    given = {name: getattr(settings, name) for name in wanted}
    if eager and (given != wanted or callable(settings.period)):
        raise ValueError(
            f"{function}: eager workers apply the others' commits at their next one, "
            "each to a center of its own, so it goes with delay=period, mix=0 and "
            f"reduce='mean'; got period={settings.period!r}, "
            + ", ".join(f"{name}={value!r}" for name, value in given.items())
            + "."
        )


def mixes(settings: Settings) -> bool:
    """Whether workers keep a part of their own when they pull the center."""
    if settings.mix == CARRY:  # without a delay there is no progress since the commit
        return settings.delay > 0
    return settings.mix != 0


def keeps_both(settings: Settings) -> bool:
    """Whether progress is in flight beside sums of gradients, which do not tell it."""
    carries = settings.delay > 0 and settings.mix == CARRY
    return carries and settings.commit == "mean_gradient"


def check_in_flight(settings: Settings, state: LocalUpdatesState) -> None:
    """Raises unless the state holds what is in flight as these settings have it."""
    there = isinstance(state.in_flight, InFlight)
    both = there and state.in_flight.progress is not None
    eager = there and state.in_flight.eager is not None
    # The field is also what tells `local_round` of workers that mix without a delay.
    given = (there, both, eager, there or state.in_flight is not None)
    late = settings.delay > 0
    if given != (late, keeps_both(settings), settings.eager, late or mixes(settings)):
        raise ValueError(
            f"{settings.function}: delay={settings.delay!r}, mix={settings.mix!r}, "
            f"eager={settings.eager!r} are not those that made this state, whose field "
            "in_flight has another form. Land commits in flight with "
            "emaopt.synchronize, and go on from init's state for the parameters."
        )


def as_weights(
    function: str, weights: object, num_workers: int | None
) -> jax.Array | None:
    """The weights of `update` as float32: one for each worker, or the worker's own."""
    if weights is None:
        return None
    shapes = [(), (1,)] if num_workers is None else [(num_workers,)]
    of = "each worker its own number" if num_workers is None else f"{num_workers} numbers"
    if (array := _of_reals(weights)) is None:
        raise TypeError(f"{function}: weights must be {of}, got {weights!r}.")
    if array.shape not in shapes:
        raise ValueError(f"{function}: weights must be {of}, got shape {array.shape}.")
    # Traced weights have no values to check: the exchange takes bad ones for 0.
    if not traced(array):
        # Under jit the comparison of constants would be traced, and have no truth value.
        with jax.ensure_compile_time_eval():
            fits = ((array == 0) | ((array >= LIGHTEST) & (array <= HEAVIEST))).all()
        if not fits:
            raise ValueError(
                f"{function}: weights must be 0 or from {LIGHTEST} to {HEAVIEST}, got "
                f"{weights!r}."
            )
    array = jnp.asarray(array, jnp.float32)
    return array.reshape(() if num_workers is None else -1)


def as_period(function: str, period: object) -> jax.Array | np.ndarray:
    """The result of a function for the period; raises unless it is a real scalar."""
    array = _of_reals(period)
    if array is None or array.shape:
        raise TypeError(
            f"{function}: period must return a number of steps, but returned {period!r}."
        )
    return array


def _of_reals(value: PyTree) -> jax.Array | np.ndarray | None:
    """The value as an array in its own dtype; None if it is not of real numbers."""
    on_device = traced(value) or isinstance(value, jax.Array)
    # NumPy keeps integers of 64 bits, which JAX would wrap to 32.
    try:
        array = jnp.asarray(value) if on_device else np.asarray(value)
    except (TypeError, ValueError):
        return None
    real = jnp.issubdtype(array.dtype, jnp.number) and not jnp.iscomplexobj(array)
    return array if real else None


def as_rate(
    function: str, moving_rate: float | Callable[[int], float] | None
) -> Callable[[int], float] | None:
    """α as a function of the number of workers, which checks its result."""
    if moving_rate is None:
        return None

    # In the mapped form the number of workers is known inside of the map only.
    def rate(num_workers: int) -> float:
        value = moving_rate(num_workers) if callable(moving_rate) else moving_rate
        check_number(function, "moving_rate", value, 0, 1, above=True)
        return float(value)

    return rate


def keeping_structure(
    function: str, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer; raises if an update changes the structure of its state."""
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        steps, after = inner.update(updates, state, params, **extra_args)
        have, want = map(jax.tree.structure, (after, state))
        if have != want:
            raise TypeError(
                f"{function}: the inner optimizer's update makes of a state like {want} "
                f"one like {have}. A worker that cannot take a step keeps the old one, "
                "so both must be alike."
            )
        return steps, after

    return optax.GradientTransformationExtraArgs(inner.init, update)


def refuse_branch(function: str, value: jax.Array) -> None:
    """Raises in a conditional that each device decides for itself."""
    if inside_conditional(value, mapped=True):
        raise ValueError(
            f"{function}: with axis_name= update stands in a branch of a conditional, "
            "such as that of optax.apply_if_finite. Workers that take another branch "
            "would be waited for without end. Put the wrapper into the inner optimizer; "
            "steps that are not finite are left out without one. In a lax.cond of your "
            "own, without a delay, pass exchange=False there and exchange=True outside."
        )


def check_call(function: str, state: object, params: PyTree, exchange: object) -> None:
    """Raises unless `update` is called with parameters, its own state and a flag."""
    does = "moves the parameters between the workers and the center"
    check_given(function, does, params)
    check_own_state(function, state, CENTER)
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
