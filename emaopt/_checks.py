"""Checks of arguments; the message names the function, what it got and what it takes."""

import inspect
import json
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._jax_internals import traced

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
    if traced(count):
        traced_count: jax.Array = jnp.asarray(count)
        most = min(MAX_COUNT, jnp.iinfo(traced_count.dtype).max)
        return jnp.clip(traced_count, 0, most).astype(jnp.int32)
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


def check_text(
    function: str, argument: str, value: Any, *, optional: bool = False
) -> None:
    """Raises unless `value` is a string; or None, where that is a choice too."""
    if not (isinstance(value, str) or (optional and value is None)):
        what = "a string or None" if optional else "a string"
        raise TypeError(f"{function}: {argument} must be {what}, got {value!r}.")


def check_choice(function: str, argument: str, value: Any, choices: Sequence) -> None:
    """Raises unless `value` is one of the strings, or None if that is among them."""
    if not isinstance(value, (str, type(None))) or value not in choices:
        *some, last = map(repr, choices)
        raise ValueError(
            f"{function}: {argument} must be {', '.join(some)} or {last}, got {value!r}."
        )


def check_callable(
    function: str,
    argument: str,
    value: Any,
    takes: int | None = None,
    *,
    optional: bool = False,
) -> None:
    """Raises unless `value` is a function that takes so many arguments, or None.

    Not every function tells how many it takes; what one says by itself is left to it.
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


def check_axis_name(function: str, argument: str, value: Any) -> None:
    """Raises unless `value` can be a mapped axis, or a tuple of several."""
    names = value if isinstance(value, tuple) and value else (value,)
    never = (bool, float, complex, np.generic, bytes, tuple)
    for name in names:
        hashable = isinstance(name, Hashable) and not callable(name)
        if not hashable or isinstance(name, never) or name in ("", None):
            raise TypeError(
                f"{function}: {argument} must be the name of a mapped axis or a tuple of "
                f"names, got {value!r}."
            )


def check_state(function: str, argument: str, state: Any) -> None:
    """Raises if `state` is no optimizer's state: an array, say, or what is no tree."""
    if state is None or jax.tree_util.all_leaves([state]):
        raise TypeError(
            f"{function}: {argument} must be an optimizer's state, got {state!r}."
        )
    check_arrays(function, argument, state, others=True)


def check_mapping(
    function: str,
    argument: str,
    value: Any,
    *,
    optional: bool = False,
    of_text: bool = False,
) -> None:
    """Raises unless `value` is a dict or another mapping; or None, where it may be."""
    if optional and value is None:
        return
    fits = isinstance(value, Mapping)
    if fits and of_text:
        fits = all(isinstance(part, str) for pair in value.items() for part in pair)
    if not fits:
        what = "a dict of strings" if of_text else "a dict"
        raise TypeError(f"{function}: {argument} must be {what}, got {value!r}.")


def check_json(function: str, argument: str, value: Any) -> None:
    """Raises unless `value` is a dict that JSON can hold, or None."""
    check_mapping(function, argument, value, optional=True)
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function}: {argument} must fit into JSON: {error}.") from None


def check_dtype(function: str, argument: str, value: Any) -> Any:
    """The floating dtype that `value` is, or None; an error if it is another thing."""
    if value is None:
        return None
    dtype = as_dtype(function, argument, value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{function}: {argument} must be floating, got {dtype}.")
    return dtype


def as_dtype(function: str, argument: str, value: Any) -> np.dtype:
    """The dtype that `value` is, or an error."""
    # NumPy makes one of much else: of None, of the type int, of lists of pairs.
    try:
        if isinstance(value, (str, type, np.dtype)):
            return jnp.dtype(value)
    except (TypeError, ValueError, SyntaxError):
        pass  # said below
    raise TypeError(f"{function}: {argument} must be a dtype, got {value!r}.")


def check_vector(function: str, argument: str, value: Any) -> np.ndarray:
    """The finite numbers [n] that `value` holds, n at least 1, or an error."""
    return check_real(function, argument, value, "a vector of numbers", (1,))


def check_real(
    function: str,
    argument: str,
    value: Any,
    what: str,
    ndims: Collection[int] = (),
    *,
    finite: bool = True,
) -> np.ndarray:
    """Real numbers as float64, of one of the ranks; an error says `what` is due."""
    found: Any = None
    try:
        found = np.asarray(value)
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


def check_iterable(function: str, argument: str, value: Any, of: str) -> None:
    """Raises unless `value` holds several of what it is to be `of`: no text, no dict."""
    one = isinstance(value, (str, bytes, Mapping)) or getattr(value, "ndim", 1) == 0
    if one or isinstance(value, type) or not hasattr(value, "__iter__"):
        raise TypeError(
            f"{function}: {argument} must be a sequence of {of}, got {value!r}."
        )


def check_sequence(function: str, argument: str, value: Any, of: str) -> None:
    """The same, of what has a length and is there as often as it is asked for."""
    check_iterable(function, argument, value, of)
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise TypeError(
            f"{function}: {argument} must be a sequence of {of}, got {value!r}."
        )


def check_arrays(
    function: str, argument: str, tree: Any, *, others: bool = False
) -> None:
    """Raises unless all leaves are arrays or numbers of JAX's; or `others` than NumPy's.

    Parameters may hold what is no array, such as the functions in an Equinox model.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, int) and not _fits(leaf):
            raise ValueError(f"{function}: {argument} holds {leaf}, too large for JAX.")
        if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, float, int, complex)):
            continue
        if isinstance(leaf, (np.ndarray, np.generic)):
            if leaf.dtype.kind not in "OSUMm":
                continue
        elif others or (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            continue
        raise TypeError(f"{function}: {argument} must hold arrays, got {leaf!r}.")


def _fits(number: int) -> bool:
    """Whether JAX, as a rule of 32 bits, can make an array of an integer."""
    bounds = np.iinfo(jax.dtypes.canonicalize_dtype(np.int64))
    return int(bounds.min) <= number <= int(bounds.max)


def unlike(tree: Any, other: Any) -> str | None:
    """In which way a tree of arrays is not like another, in words; None if it is."""
    have, want = jax.tree.structure(tree), jax.tree.structure(other)
    if have != want:
        return f"{have}, not {want}"
    with_path = jax.tree_util.tree_flatten_with_path(tree)[0]
    for (path, leaf), wanted in zip(with_path, jax.tree.leaves(other), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the leaf"
        number = isinstance(leaf, (float, int, complex, np.generic))
        if not (number or hasattr(leaf, "dtype")) or (
            getattr(getattr(leaf, "dtype", None), "kind", "f") in "OSUMm"
        ):
            return f"{name} is {leaf!r}, no array"
        if np.shape(leaf) != np.shape(wanted):
            return f"{name} has shape {np.shape(leaf)}, not {np.shape(wanted)}"
    return None


def refuse_unlike(function: str, params: Any, error: Exception, **trees: Any) -> None:
    """Raises if one of the trees, in which something went wrong, is not like `params`.

    Asked afterwards, for it takes as long as a small update.
    """
    for argument, tree in trees.items():
        if (what := unlike(tree, params)) is not None:
            raise ValueError(
                f"{function}: {argument} must be a tree like the parameters, got {what}."
            ) from error
