"""What local updates take: options that can go together, and weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._checks import (
    as_dtype,
    check_axis_name,
    check_callable,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_optimizer,
    check_sequence,
    check_text,
)
from emaopt._commits import check_commit
from emaopt._jax_internals import traced
from emaopt._reductions import REDUCTIONS

LIGHTEST, HEAVIEST = 1e-30, 1e30  # weights: float32 holds their sums and means


def check_engine(engine: Any) -> None:
    """Raises unless the options of an `Engine` can go together."""
    function, period = engine.function, engine.period
    check_optimizer(function, "inner", engine.inner)
    check_optimizer(function, "outer", engine.outer)
    check_commit(function, engine.commit)
    check_choice(function, "reduce", engine.reduce, list(REDUCTIONS))
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
    check_sequence(function, "per_worker", engine.per_worker, "names")
    for name in engine.per_worker:
        check_text(function, "each of per_worker", name)
        if name in ("exchange", "weights"):
            raise ValueError(
                f"{function}: per_worker is for what the inner optimizer gets, which "
                f"{name} is not."
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


def _check_exchange_dtype(engine: Any) -> None:
    function, dtype = engine.function, engine.exchange_dtype
    if dtype is None:
        if engine.error_feedback:
            raise ValueError(
                f"{function}: error_feedback is for an exchange_dtype; without one, "
                "commits lose nothing."
            )
        return
    dtype = as_dtype(function, "exchange_dtype", dtype)
    narrow = False
    if jnp.issubdtype(dtype, jnp.floating):  # also those of 4 and 6 bits, or without sign
        info = jnp.finfo(dtype)
        narrow = info.bits in (8, 16) and float(info.min) < 0
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


def as_weights(function: str, weights: Any, num_workers: int | None) -> Any:
    """The weights of `update` as float32: one for each worker, or the worker's own."""
    if weights is None:
        return None
    shapes = [(), (1,)] if num_workers is None else [(num_workers,)]
    of = "each worker its own number" if num_workers is None else f"{num_workers} numbers"
    if (array := _of_reals(weights)) is None:
        raise TypeError(f"{function}: weights must be {of}, got {weights!r}.")
    if array.shape not in shapes:
        raise ValueError(f"{function}: weights must be {of}, got shape {array.shape}.")
    if not traced(array):
        with jax.ensure_compile_time_eval():  # a constant is one under jit as well
            fits = ((array == 0) | ((array >= LIGHTEST) & (array <= HEAVIEST))).all()
        if not fits:
            raise ValueError(
                f"{function}: weights must be 0 or from {LIGHTEST} to {HEAVIEST}, got "
                f"{weights!r}."
            )
    array = jnp.asarray(array, jnp.float32)
    return array.reshape(() if num_workers is None else -1)


def as_period(function: str, period: Any) -> Any:
    """What a function for the period returned: a real scalar."""
    array = _of_reals(period)
    if array is None or array.shape:
        raise TypeError(
            f"{function}: period must return a number of steps, but returned {period!r}."
        )
    return array


def _of_reals(value: Any) -> Any:
    """An array, traced or in its own dtype; None if it is not of real numbers."""
    on_device = traced(value) or isinstance(value, jax.Array)
    try:  # JAX would wrap integers of 64 bits
        array = jnp.asarray(value) if on_device else np.asarray(value)
    except (TypeError, ValueError):
        return None
    real = jnp.issubdtype(array.dtype, jnp.number) and not jnp.iscomplexobj(array)
    return array if real else None


def as_rate(function: str, moving_rate: Any) -> Callable[[int], float] | None:
    """A function of the number of workers, whose results are checked."""
    if moving_rate is None:
        return None

    def rate(num_workers: int) -> float:
        value: Any = moving_rate(num_workers) if callable(moving_rate) else moving_rate
        check_number(function, "moving_rate", value, 0, 1, above=True)
        return float(value)

    return rate


def keeping_structure(
    function: str, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer; raises if its state after an update has other leaves."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
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
