"""Checks of arguments; the message names the function, what it got and what it takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


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
        return
    if isinstance(decay, bool) or not isinstance(decay, (float, int, np.number)):
        raise TypeError(
            f"{function}: decay must be a number in [0, 1] or a function t -> β such as "
            f"emaopt.warmup_decay(0.999), got {decay!r}."
        )
    check_number(function, "decay", float(decay), 0, 1)


def _check_function(function: str, decay: Any) -> None:
    """Raises if a decay function does not return a floating scalar."""
    try:
        beta = jax.eval_shape(decay, jax.ShapeDtypeStruct((), np.int32))
    except jax.errors.JAXTypeError:
        return  # written in Python's control flow: right outside of jit
    except TypeError as error:
        raise TypeError(
            f"{function}: decay must be a function of one argument, t, that returns β; "
            f"{decay!r} does not: {error}"
        ) from None
    if getattr(beta, "shape", None) != () or not np.issubdtype(beta.dtype, np.inexact):
        kind = getattr(beta, "dtype", type(beta).__name__)
        raise ValueError(
            f"{function}: decay must return a floating scalar, {decay!r} returns {kind} "
            f"of shape {getattr(beta, 'shape', '')}."
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
    check_number(function, argument, value, low, 2**31 - 1)


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
