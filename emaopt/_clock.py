"""Time that is counted in something else than steps: examples, tokens, any unit.

A decay is a function of t, which counts steps. On a clock, t counts units of time, and a
step that takes n of them keeps what n steps of one unit would keep, Πβ over these. So the
profile of an average depends on time alone, and not on how it was cut into steps.

References:
  Busbridge et al., 2023, How to scale your EMA, definition 1.2,
  https://arxiv.org/abs/2307.13813 (the same for a constant decay: β^κ)
"""

import keyword
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._checks import check_number, check_text, check_vector
from emaopt._decay_type import Array, Decay, log_kept_of
from emaopt._jax_internals import traced
from emaopt._types import DecayLike, Leaf

# What `update` takes or passes on under these names, and what a clock is not.
_TAKEN = ("updates", "tree", "state", "params", "num_updates", "steps", "value", "grad")
_TAKEN += ("value_fn", "exchange", "weights")

_LOW = 12  # bits of an int32 that go into the second of two floating-point numbers


class Span(NamedTuple):
    """The time that a step takes: rounded to a float, and exactly as a sum of two."""

    length: Array  # () float
    parts: Sequence[Array] | np.ndarray  # two of () float


def check_clock(function: str, clock: object, decay: DecayLike) -> None:
    """Raises unless `clock` is None, or names a time that the decay is a function of."""
    check_text(function, "clock", clock, optional=True)
    if clock is None:
        return
    name = str(clock)
    if not name.isidentifier() or keyword.iskeyword(name) or name in _TAKEN:
        raise ValueError(
            f"{function}: clock must be a name by which update can be told the time, as "
            f"'examples' or 'tokens', got {clock!r}."
        )
    check_of_time(function, f"clock={clock!r}", decay)


def check_of_time(function: str, what: str, decay: DecayLike) -> None:
    """Raises unless a decay may be one of time, and has a closed form of Πβ."""
    if log_kept_of(decay) is None or not getattr(decay, "of_time", True):
        raise ValueError(
            f"{function}: {what} needs a decay that is a function of time: a "
            "number, half_life_decay, uniform_decay, polynomial_decay or power_decay; "
            f"got {decay!r}."
        )


def span(function: str, clock: str, given: Mapping[str, object], dtype: np.dtype) -> Span:
    """The time of this step, from the arguments of `update`, or an error."""
    value: Any = given.get(clock)
    if value is None:
        raise ValueError(
            f"{function}: clock={clock!r}, but update was called without the time: give "
            f"it {clock}=n, as tx.update(grads, state, params, {clock}=n), with the "
            f"{clock} that the step takes. Flax's TrainState.apply_gradients and an "
            "optax.MultiSteps inside of another wrapper pass nothing on: docs/clocks.md "
            "says what to do."
        )
    if traced(value):
        return _of_tracer(function, clock, value, dtype)
    if isinstance(value, (jax.Array, np.ndarray)):
        _check_scalar(function, clock, value)
        value = value.item()
    check_number(function, clock, value, 0)
    try:
        number = float(value)  # exact up to 2^53
    except OverflowError:
        number = np.inf
    if not number <= float(jnp.finfo(dtype).max):
        raise ValueError(f"{function}: {clock} must be finite in {dtype}, got {value!r}.")
    return Span(np.asarray(number, dtype), split(number, dtype))


def split(number: float, dtype: np.dtype) -> np.ndarray:
    """A number as the sum of two, [2], as a state's `elapsed` holds it."""
    high = float(dtype.type(number))
    return np.asarray([high, number - high], dtype)


def _check_scalar(function: str, clock: str, value: Leaf) -> bool:
    """Raises unless an array is a real scalar; whether it is a whole number."""
    whole = jnp.issubdtype(value.dtype, jnp.integer)
    if value.shape or not (whole or jnp.issubdtype(value.dtype, jnp.floating)):
        raise TypeError(
            f"{function}: {clock} must be a number or a scalar, got {value!r}."
        )
    return whole


def _of_tracer(function: str, clock: str, value: Leaf, dtype: np.dtype) -> Span:
    whole = _check_scalar(function, clock, value)
    # A time below 0 cannot be refused here. A NaN shows in the average.
    value = jnp.maximum(value, 0)
    if not whole:
        return Span(value.astype(dtype), (value.astype(dtype), jnp.zeros((), dtype)))
    mask = min((1 << _LOW) - 1, jnp.iinfo(value.dtype).max)
    low = value & jnp.asarray(mask, value.dtype)
    parts = (value - low).astype(dtype), low.astype(dtype)
    return Span(value.astype(dtype), parts)


def advanced(elapsed: jax.Array, step: Span) -> jax.Array:
    """The time after a step: [2], whose sum is exact up to 2^47 units in float32.

    A float32 alone would stop at 2^24 units. Each addition keeps the rounding error of
    the sum, which is a float itself.

    References:
      Knuth, The art of computer programming, vol. 2, §4.2.2, theorem B
    """
    high, low = elapsed[0], elapsed[1]
    for part in step.parts:
        total = high + part
        kept = total - high
        low = low + ((high - (total - kept)) + (part - kept))
        high = total
    total = high + low
    return jnp.stack([total, low - (total - high)])


def newest_by_time(
    decay: DecayLike,
    start: int,
    s: jax.Array,
    step: Span,
    elapsed: dict[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """1 - β of the step s, which takes time, and the time after it, which `start` begins.

    Every decay of an average with a clock has a closed form of Πβ.
    """
    ((clock, before),) = elapsed.items()
    log_kept: Any = log_kept_of(decay)
    # A decay has no value for no time at all, from 0 on.
    still = step.length == 0
    newest = -jnp.expm1(log_kept(jnp, before[0], jnp.where(still, 1.0, step.length)))
    if start and _begins_with_a_copy(decay):
        newest = jnp.where(s == start, 1.0, newest)  # as at t = 0 of steps
    newest = jnp.where(still, 0.0, newest)
    after = jnp.where(s > start, advanced(before, step), before)
    return newest.astype(before.dtype), {clock: after}


def by_time(function: str, decay: DecayLike, start: int, units: np.ndarray) -> np.ndarray:
    """1 - β of every step, float64 [T], of steps that take time [T]."""
    check_of_time(function, "units", decay)
    log_kept: Any = log_kept_of(decay)
    steps = np.arange(1, units.size + 1)
    after = np.cumsum(np.where(steps > start, units, 0.0))
    before = np.append(0.0, after)[:-1]
    with np.errstate(all="ignore"):  # of the choice that `where` leaves
        newest = -np.expm1(log_kept(np, before, units))
    if start and _begins_with_a_copy(decay):
        newest = np.where(steps == start, 1.0, newest)
    return np.where(units == 0, 0.0, newest)


def checked_units(function: str, units: Any, num_steps: int) -> np.ndarray:
    """The time that each step takes, float64 [T], or an error."""
    found = check_vector(function, "units", units) if np.size(units) else np.zeros(0)
    if found.size != num_steps or np.any(found < 0):
        raise ValueError(
            f"{function}: units must be the time of each step, {num_steps} numbers of at "
            f"least 0, got {found.size} from {found.min(initial=0)}."
        )
    return found


def _begins_with_a_copy(decay: DecayLike) -> bool:
    return isinstance(decay, Decay) and bool(decay.one_minus(np.zeros(1))[0] == 1)


def check_same_clock(
    function: str, clock: str | None, elapsed: dict[str, jax.Array] | None
) -> None:
    """Raises unless a state was made with the same clock."""
    made = next(iter(elapsed or {}), None)
    if made != clock:
        raise ValueError(
            f"{function}: clock={clock!r}, but the state was made with clock={made!r}. "
            "It cannot change in mid-run; make a new state."
        )


def time_of(elapsed: Leaf) -> float:
    """The time in a state's `elapsed`, [2], as a Python number."""
    return float(np.sum(np.asarray(elapsed, np.float64)))
