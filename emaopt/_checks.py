"""Checks of arguments; the message names the function, what it got and what it takes."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

MAX_COUNT = 2**31 - 1  # counters are int32
_ROUNDING = 1e-6  # by which a β of float32 may pass its bounds


def check_decay(function: str, decay: Any) -> None:
    """Raises unless `decay` is a number in [0, 1] or a function of t."""
    if callable(decay):
        _check_function(function, decay)
        return
    if isinstance(decay, jax.Array):
        if decay.ndim:
            raise ValueError(f"{function}: decay must be a scalar, got {decay!r}.")
        if jnp.issubdtype(decay.dtype, jnp.inexact) and decay.dtype.itemsize < 4:
            raise ValueError(
                f"{function}: decay is an array of {decay.dtype}, in which 0.999 is "
                f"{np.array(0.999, decay.dtype)}. Of optax.inject_hyperparams, which "
                "takes the parameters' dtype, give hyperparam_dtype=jnp.float32."
            )
        check_beta(function, decay, decay)
        return
    if isinstance(decay, bool) or not isinstance(decay, (float, int, np.number)):
        raise TypeError(
            f"{function}: decay must be a number in [0, 1] or a function t -> β such as "
            f"emaopt.warmup_decay(0.999), got {decay!r}."
        )
    check_number(function, "decay", float(decay), 0, 1)


def _check_function(function: str, decay: Any) -> None:
    """Raises unless a decay function returns a floating scalar, at t = 1 in [0, 1]."""
    try:
        beta = jax.eval_shape(decay, jax.ShapeDtypeStruct((), np.int32))
    except jax.errors.JAXTypeError:
        beta = None  # written in Python's control flow: right outside of jit
    except TypeError as error:
        raise TypeError(
            f"{function}: decay must be a function of one argument, t, that returns β; "
            f"{decay!r} does not: {error}"
        ) from None
    if beta is not None and not _is_floating_scalar(beta):
        kind = getattr(beta, "dtype", type(beta).__name__)
        raise ValueError(
            f"{function}: decay must return a floating scalar, {decay!r} returns {kind} "
            f"of shape {getattr(beta, 'shape', '')}."
        )
    if not hasattr(decay, "one_minus"):  # this package's own keep to their range
        with jax.ensure_compile_time_eval():  # also where a program is traced around it
            check_beta(function, decay, decay(jnp.int32(1)), " at t = 1")


def _is_floating_scalar(beta: Any) -> bool:
    return getattr(beta, "shape", None) == () and np.issubdtype(beta.dtype, np.inexact)


def check_beta(function: str, decay: Any, beta: Any, where: str = "") -> None:
    """Raises if a β that is known now is out of [0, 1], by more than its rounding."""
    if isinstance(beta, jax.core.Tracer):
        return
    if not -_ROUNDING <= float(beta) <= 1 + _ROUNDING:
        raise ValueError(
            f"{function}: decay must stay in [0, 1], {decay!r} is {float(beta):.6g}"
            f"{where}."
        )


def check_number(
    function: str,
    argument: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
) -> None:
    """Raises unless low <= value <= high (low < value with `above`)."""
    if isinstance(value, bool) or not isinstance(value, (float, int, np.number)):
        raise TypeError(f"{function}: {argument} must be a number, got {value!r}.")
    if not (low < value if above else low <= value) or not value <= high:
        bounds = f"{'greater than' if above else 'at least'} {low}"
        if high < math.inf:
            bounds = f"in {'(' if above else '['}{low}, {high}]"
        raise ValueError(f"{function}: {argument} must be {bounds}, got {value!r}.")


def check_integer(function: str, argument: str, value: Any, low: int) -> None:
    """Raises unless `value` is a whole number, at least `low`, that int32 holds."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{function}: {argument} must be a Python number, got {value!r}. Under "
            f"optax.inject_hyperparams, name it in static_args."
        )
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: {argument} must be a whole number, got {value!r}.")
    check_number(function, argument, value, low)
    check_number(function, argument, value, low, MAX_COUNT)


def checked_count(function: str, argument: str, count: Any) -> Any:
    """The count: an int where it is known, or an error; a traced one within its range.

    A traced count cannot be refused. Below 0 it would make a β out of [0, 1].
    """
    array = isinstance(count, (jax.Array, np.ndarray))
    whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
    if array and not count.shape:
        whole = jnp.issubdtype(count.dtype, jnp.integer)
    if not whole:
        raise TypeError(
            f"{function}: {argument} must be a whole number or an integer scalar, got "
            f"{count!r}."
        )
    if isinstance(count, jax.core.Tracer):
        most = min(MAX_COUNT, jnp.iinfo(count.dtype).max)
        return jnp.clip(count, 0, most).astype(jnp.int32)
    check_integer(function, argument, int(count), 0)
    return int(count)


def check_optimizer(function: str, argument: str, optimizer: Any) -> None:
    """Raises unless `optimizer` is an Optax transformation."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"{function}: {argument} must be an optax.GradientTransformation such as "
            f"optax.adam(1e-3), got {optimizer!r}. Of an optax.MultiSteps, give "
            "its gradient_transformation()."
        )


def check_flag(function: str, argument: str, value: Any) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{function}: {argument} must be True or False, got {value!r}.")
