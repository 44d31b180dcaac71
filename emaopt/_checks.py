"""Checks of arguments; the message names the function, what it got and what it takes."""

import inspect
import json
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._jax_internals import traced
from emaopt._types import DTypeLike, Leaf, Scalar

MAX_COUNT = 2**31 - 1  # counters are int32
_ROUNDING = 1e-6  # a β in float32 may pass its bounds by as much


def check_decay(function: str, decay: object) -> None:
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


def _check_function(function: str, decay: Callable[..., Leaf]) -> None:
    """Raises unless a decay function returns a floating scalar, at t = 1 in [0, 1]."""
    try:
        beta = jax.eval_shape(decay, jax.ShapeDtypeStruct((), np.int32))
    except jax.errors.JAXTypeError:
        # Python's control flow on t fails in a trace only; outside of jit it is right.
        beta = None
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
    # Decays of this package keep to their range. Others are tried at t = 1, with a value
    # even if the transformation is built inside of a trace.
    if not hasattr(decay, "one_minus"):
        with jax.ensure_compile_time_eval():
            check_beta(function, decay, decay(jnp.int32(1)), " at t = 1")


def _is_floating_scalar(beta: Leaf) -> bool:
    return getattr(beta, "shape", None) == () and np.issubdtype(beta.dtype, np.inexact)


def check_beta(
    function: str, decay: object, beta: Scalar | float, where: str = ""
) -> None:
    """Raises if the value of β is known and out of [0, 1] by more than its rounding."""
    if traced(beta):
        return
    if not -_ROUNDING <= float(beta) <= 1 + _ROUNDING:
        raise ValueError(
            f"{function}: decay must stay in [0, 1], {decay!r} is {float(beta):.6g}"
            f"{where}."
        )


def check_number(
    function: str,
    argument: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
) -> None:
    """Raises unless low <= value <= high (low < value with `above`)."""
    if isinstance(value, bool) or not isinstance(value, (float, int, np.number)):
        raise TypeError(f"{function}: {argument} must be a number, got {value!r}.")
    # Negated, so that a NaN, which no comparison holds for, is refused.
    if not (low < value if above else low <= value) or not value <= high:
        bounds = f"{'greater than' if above else 'at least'} {low}"
        if high < math.inf:
            bounds = f"in {'(' if above else '['}{low}, {high}]"
        raise ValueError(f"{function}: {argument} must be {bounds}, got {value!r}.")


def check_integer(
    function: str, argument: str, value: object, low: int, most: int = MAX_COUNT
) -> None:
    """Raises unless `value` is a whole number from `low` to `most`."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{function}: {argument} must be a Python number, got {value!r}. Under "
            f"optax.inject_hyperparams, name it in static_args."
        )
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: {argument} must be a whole number, got {value!r}.")
    # Twice: the message names the upper bound only where that is what was passed.
    check_number(function, argument, value, low)
    check_number(function, argument, value, low, most)


def checked_count(function: str, argument: str, count: Leaf) -> Scalar | int:
    """The count: an int if its value is known, or an error; a traced one is clipped.

    A traced count cannot be refused. Below 0 it would give a β out of [0, 1].
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
    if traced(count):
        traced_count: jax.Array = jnp.asarray(count)
        # The bound must fit the count's own dtype, which may be as narrow as int8.
        most = min(MAX_COUNT, jnp.iinfo(traced_count.dtype).max)
        return jnp.clip(traced_count, 0, most).astype(jnp.int32)
    check_integer(function, argument, int(count), 0)
    return int(count)


def check_optimizer(function: str, argument: str, optimizer: object) -> None:
    """Raises unless `optimizer` is an Optax transformation."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"{function}: {argument} must be an optax.GradientTransformation such as "
            f"optax.adam(1e-3), got {optimizer!r}. Of an optax.MultiSteps, give "
            "its gradient_transformation()."
        )


def check_given(function: str, does: str, params: object) -> None:
    """Raises if `update` was called without the parameters."""
    if params is None:
        raise ValueError(
            f"{function} {does}, but update was called without them: call "
            "tx.update(grads, state, params)."
        )


def check_flag(function: str, argument: str, value: object) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{function}: {argument} must be True or False, got {value!r}.")


def check_text(
    function: str, argument: str, value: object, *, optional: bool = False
) -> None:
    """Raises unless `value` is a string; or None, if `optional`."""
    if not (isinstance(value, str) or (optional and value is None)):
        what = "a string or None" if optional else "a string"
        raise TypeError(f"{function}: {argument} must be {what}, got {value!r}.")


def check_choice(
    function: str, argument: str, value: object, choices: Sequence[str | None]
) -> None:
    """Raises unless `value` is one of the strings, or None if that is among them."""
    if not isinstance(value, (str, type(None))) or value not in choices:
        *some, last = map(repr, choices)
        raise ValueError(
            f"{function}: {argument} must be {', '.join(some)} or {last}, got {value!r}."
        )


def check_callable(
    function: str,
    argument: str,
    value: object,
    takes: int | None = None,
    *,
    optional: bool = False,
) -> None:
    """Raises unless `value` is a function of that many arguments; or None, if `optional`.

    Some functions, such as built-in ones, do not tell how many they take, and pass.
    """
    if optional and value is None:
        return
    many = "" if takes is None else f" of {takes} argument{'s' * (takes != 1)}"
    if not callable(value):
        raise TypeError(
            f"{function}: {argument} must be a function{many}, got {value!r}."
        )
    if takes is not None:
        try:
            signature = inspect.signature(value)
        except (ValueError, TypeError):
            return
        try:
            signature.bind(*[None] * takes)
        except TypeError as error:
            raise TypeError(
                f"{function}: {argument} must be a function{many}; {value!r} is not: "
                f"{error}."
            ) from None


def check_axis_name(function: str, argument: str, value: object) -> None:
    """Raises unless `value` can be a mapped axis, or a tuple of several."""
    names = value if isinstance(value, tuple) and value else (value,)
    # JAX takes any hashable object for an axis name. These are mistakes.
    never = (bool, float, complex, np.generic, bytes, tuple)
    for name in names:
        hashable = isinstance(name, Hashable) and not callable(name)
        if not hashable or isinstance(name, never) or name in ("", None):
            raise TypeError(
                f"{function}: {argument} must be the name of a mapped axis or a tuple of "
                f"names, got {value!r}."
            )


def check_mapping(
    function: str,
    argument: str,
    value: Any,
    *,
    optional: bool = False,
    of_text: bool = False,
) -> None:
    """Raises unless `value` is a dict or another mapping; or None, if `optional`."""
    if optional and value is None:
        return
    fits = isinstance(value, Mapping)
    if fits and of_text:
        fits = all(isinstance(part, str) for pair in value.items() for part in pair)
    if not fits:
        what = "a dict of strings" if of_text else "a dict"
        raise TypeError(f"{function}: {argument} must be {what}, got {value!r}.")


def check_json(function: str, argument: str, value: object) -> None:
    """Raises unless `value` is a dict that JSON can hold, or None."""
    check_mapping(function, argument, value, optional=True)
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function}: {argument} must fit into JSON: {error}.") from None


def check_dtype(function: str, argument: str, value: object) -> np.dtype | None:
    """The floating dtype that `value` says, or None for None; else an error."""
    if value is None:
        return None
    dtype = as_dtype(function, argument, value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{function}: {argument} must be floating, got {dtype}.")
    return dtype


def as_dtype(function: str, argument: str, value: object) -> np.dtype:
    """The dtype that `value` says, or an error."""
    # NumPy makes dtypes of None and of lists of pairs, too, and parses strings: a bad one
    # may be a SyntaxError.
    try:
        if isinstance(value, (str, type, np.dtype)):
            return jnp.dtype(value)
    except (TypeError, ValueError, SyntaxError):
        pass  # raised below
    raise TypeError(f"{function}: {argument} must be a dtype, got {value!r}.")


def check_vector(function: str, argument: str, value: object) -> np.ndarray:
    """The finite numbers [n] that `value` holds, n at least 1, or an error."""
    return check_real(function, argument, value, "a vector of numbers", (1,))


def check_real(
    function: str,
    argument: str,
    value: object,
    what: str,
    ndims: Collection[int] = (),
    *,
    finite: bool = True,
) -> np.ndarray:
    """Real numbers as float64, of one of the ranks, or an error that asks for `what`."""
    found: Any = None
    try:
        found = np.asarray(value)
        # To NumPy, bfloat16 and most kinds of float8 are "V".
        fits = found.dtype.kind in "iuf" or jnp.issubdtype(found.dtype, jnp.floating)
        fits = fits and found.size > 0 and (not ndims or found.ndim in ndims)
        found = found.astype(np.float64) if fits else found
    except (TypeError, ValueError):  # ragged, say
        fits = False
    if not fits:
        raise TypeError(f"{function}: {argument} must be {what}, got {value!r}.")
    if finite and not np.isfinite(found).all():
        raise ValueError(f"{function}: {argument} must be finite, got {value!r}.")
    return found


def check_iterable(function: str, argument: str, value: object, of: str) -> None:
    """Raises unless `value` can be iterated over, and is no text, dict or scalar."""
    one = isinstance(value, (str, bytes, Mapping)) or getattr(value, "ndim", 1) == 0
    if one or isinstance(value, type) or not hasattr(value, "__iter__"):
        raise TypeError(
            f"{function}: {argument} must be a sequence of {of}, got {value!r}."
        )


def check_sequence(function: str, argument: str, value: object, of: str) -> None:
    """Raises unless `value` is iterable, has a length and can be read more than once."""
    check_iterable(function, argument, value, of)
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise TypeError(
            f"{function}: {argument} must be a sequence of {of}, got {value!r}."
        )


def checked_accumulator(
    function: str, dtype: DTypeLike, decay: float | None, every: int, stochastic: bool
) -> np.dtype:
    """The accumulator's dtype, or an error if the average could not move in it."""
    dtype = as_dtype(function, "accumulator_dtype", dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{function}: accumulator_dtype must be a real floating dtype, got {dtype}."
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{function}: accumulator_dtype={dtype} needs jax_enable_x64, which is off."
        )
    if not (stochastic or decay is None):
        step = 1 - decay**every
        half_ulp = float(jnp.finfo(dtype).eps) / 2
        if 0 < step < half_ulp:
            raise ValueError(
                f"{function}: an average in {dtype} would not move: one step takes "
                f"1 - {decay}{f'**{every}' if every > 1 else ''} = {step:.2g} of the "
                f"difference, less than half a unit in the last place, {half_ulp:.2g} of "
                "the value, and is rounded away. Use accumulator_dtype=jnp.float32 (the "
                "default), stochastic_rounding=True, a smaller decay or a larger `every`."
            )
    return dtype
