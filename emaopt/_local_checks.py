"""What local updates take: options that can go together, and weights."""

from typing import Any

import jax.numpy as jnp

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
from emaopt._tracing import traced

REDUCTIONS = ("mean", "sum", "sequential")


def check_engine(engine: Any) -> None:
    """Raises unless the options of an `Engine` can go together."""
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
    check_sequence(function, "per_worker", engine.per_worker, "names")
    for name in engine.per_worker:
        check_text(function, "each of per_worker", name)
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


def as_weights(function: str, weights: Any, num_workers: int | None) -> Any:
    """The weights of `update` as float32: one for each worker, or the worker's own."""
    if weights is None:
        return None
    shapes = [(), (1,)] if num_workers is None else [(num_workers,)]
    of = "each worker its own number" if num_workers is None else f"{num_workers} numbers"
    try:
        array = jnp.asarray(weights)
        real = jnp.issubdtype(array.dtype, jnp.number) and not jnp.iscomplexobj(array)
    except (TypeError, ValueError):
        array, real = None, False
    if array is None or not real:
        raise TypeError(f"{function}: weights must be {of}, got {weights!r}.")
    if array.shape not in shapes:
        raise ValueError(f"{function}: weights must be {of}, got shape {array.shape}.")
    if not traced(array) and not (array >= 0).all():
        raise ValueError(f"{function}: weights must be at least 0, got {weights!r}.")
    return array.astype(jnp.float32).reshape(() if num_workers is None else -1)
