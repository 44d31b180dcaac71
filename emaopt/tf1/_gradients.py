"""Gradients with respect to chosen parameters, as tf.train.Optimizer computed them."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from emaopt._checks import check_callable, check_flag
from emaopt._jax_internals import depends_on_operands
from emaopt._leaves import for_each_leaf, is_array, is_averaged
from emaopt._masks import is_function
from emaopt._names import named_leaves
from emaopt._tree_checks import check_arrays
from emaopt._types import Leaf, PyTree
from emaopt.tf1._gates import GATE_OP, check_gate, gated

# A tree of booleans, a name or names, a function of the tree, or one of (name, leaf).
Variables: TypeAlias = PyTree
# Of (params, *args): the loss, or (loss, aux) with has_aux.
Loss: TypeAlias = Callable[..., PyTree]


def compute_gradients(
    loss: Loss,
    params: PyTree,
    *args: Any,
    var_list: Variables = None,
    gate_gradients: int = GATE_OP,
    grad_loss: ArrayLike | None = None,
    has_aux: bool = False,
) -> tuple[PyTree, PyTree]:
    """Computes the gradients of a loss with respect to some of the parameters.

    A loss that is not a scalar is summed: the gradients are the vector-Jacobian product
    of `grad_loss`, ones by default, with the Jacobian of the loss.

    Args:
      loss: A function (params, *args) -> loss, or (loss, aux) with `has_aux`.
      params: The parameters. Integer leaves have no gradients.
      *args: Passed on to `loss`.
      var_list: Which parameters: None for all; a tree of booleans like `params` or a
        prefix; one name or a sequence of names, as "encoder/kernel" in `by_name`; a
        function of `params` that makes such a tree; or a predicate of (name, leaf).
      gate_gradients: GATE_NONE, GATE_OP (the default) or GATE_GRAPH; see
        `gate_gradients`.
      grad_loss: The cotangent of the loss, in its shape.
      has_aux: Whether `loss` returns auxiliary data as well.

    Returns:
      (value, gradients); with `has_aux`, ((value, aux), gradients). The gradients are a
      tree like `params`, None outside of `var_list` and where no gradient flows: the loss
      does not use the parameter, or only behind `jax.lax.stop_gradient` or integers.
      The gradient of a complex parameter is the direction in which the loss grows, as in
      TensorFlow and as Optax's optimizers take it: the conjugate of `jax.grad`'s.

    Raises:
      TypeError: If `loss` is not a function or returns no floating value.
      ValueError: If there is no variable to optimize, `var_list` names unknown ones,
        `gate_gradients` is none of the three, or `grad_loss` has another shape.

    Example:
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
      >>> value, grads = compute_gradients(
      ...     lambda p: p["a"] * p["b"], params, var_list=["a"]
      ... )
      >>> print(value, grads["a"], grads["b"])
      [3. 8.] [3. 4.] None
    """
    return gradients_of(
        "compute_gradients",
        loss,
        params,
        args,
        var_list,
        gate_gradients,
        grad_loss,
        has_aux,
    )


def gradients_of(
    function: str,
    loss: Loss,
    params: PyTree,
    args: tuple[Any, ...],
    var_list: Variables,
    gate_gradients: int,
    grad_loss: ArrayLike | None,
    has_aux: bool,
) -> tuple[PyTree, PyTree]:
    """`compute_gradients`, with errors that name `function`."""
    if not callable(loss):
        raise TypeError(
            f"{function}: `loss` should be a function of the parameters, got {loss!r}."
        )
    check_callable(function, "loss", loss, 1 + len(args))
    check_arrays(function, "params", params, others=True)
    check_gate(function, gate_gradients)
    check_flag(function, "has_aux", has_aux)
    leaves, treedef = jax.tree.flatten(params)
    chosen = chosen_variables(function, params, var_list)
    chosen = [i for i in chosen if is_averaged(leaves[i])]
    if not chosen:
        raise ValueError(f"{function}: No variables to optimize.")

    # A function of the chosen leaves alone: only these are differentiated.
    def flat_loss(*values: jax.Array) -> tuple[jax.Array, PyTree]:
        filled = list(leaves)
        for i, value in zip(chosen, values, strict=True):
            filled[i] = value
        result = loss(jax.tree.unflatten(treedef, filled), *args)
        value, aux = _with_aux(function, result) if has_aux else (result, None)
        if isinstance(value, (int, float, np.number, np.ndarray)):  # a constant loss
            value = jnp.asarray(value)
        return value, aux

    values = [jnp.asarray(leaves[i]) for i in chosen]
    value, pullback, aux = jax.vjp(flat_loss, *values, has_aux=True)
    _check_loss(function, value, grad_loss)
    if grad_loss is None:
        cotangent = jnp.ones_like(value)
    else:
        cotangent = jnp.asarray(grad_loss, value.dtype)
    gradients = pullback(cotangent)
    # JAX has zeros where no gradient flows; TensorFlow has None, which leaves a parameter
    # and its slots alone. In the program of the pullback such zeros are constants.
    connected = depends_on_operands(jax.make_jaxpr(pullback)(cotangent).jaxpr)
    found: list[jax.Array | None] = [None] * len(leaves)
    for i, gradient, is_connected in zip(chosen, gradients, connected, strict=True):
        if jnp.iscomplexobj(gradient):
            gradient = gradient.conj()
        found[i] = gradient if is_connected else None
    grads = gated(jax.tree.unflatten(treedef, found), gate_gradients)
    return ((value, aux) if has_aux else value), grads


def chosen_variables(function: str, params: PyTree, var_list: Variables) -> list[int]:
    """The positions of the leaves that `var_list` chooses."""
    leaves = named_leaves(params)
    names = ["/".join(keys) for keys, _ in leaves]
    if var_list is None:
        return list(range(len(leaves)))
    # A model that can be called and holds booleans is a tree, not a function.
    if is_function(var_list, params):
        two = _takes_two(var_list)
        check_callable(function, "var_list", var_list, 2 if two else 1)
        if two:
            flags = [
                var_list(name, leaf)
                for name, (_, leaf) in zip(names, leaves, strict=True)
            ]
            return [i for i, flag in enumerate(flags) if flag]
        var_list = var_list(params)
    elif isinstance(var_list, str) or _are_names(var_list):
        wanted = [var_list] if isinstance(var_list, str) else list(var_list)
        if unknown := [name for name in wanted if name not in names]:
            raise ValueError(
                f"{function}: var_list names {', '.join(unknown)}; the variables "
                f"are {', '.join(names)}."
            )
        return [i for i, name in enumerate(names) if name in wanted]
    what = (
        f"{function}: var_list must be a tree of booleans like the parameters or a "
        "prefix of it, names, or a function"
    )
    # What is left is a tree: the one given, or the one that a function made.
    flags = for_each_leaf(what, var_list, params)
    if odd := [flag for flag in flags if not isinstance(flag, (bool, np.bool_))]:
        raise TypeError(
            f"{function}: var_list must hold booleans or names, got {odd[0]!r}."
        )
    return [i for i, flag in enumerate(flags) if flag]


def _takes_two(function: Callable[..., object]) -> bool:
    """Whether a function is a predicate of (name, leaf), not a function of the tree."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some built-in functions have no signature
        return False
    required = [
        p
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 2


def _are_names(var_list: object) -> bool:
    """Whether `var_list` holds names only. Empty, it chooses nothing."""
    if not isinstance(var_list, (list, tuple, set, frozenset)):
        return False
    return not var_list or all(isinstance(name, str) for name in var_list)


def _with_aux(function: str, result: PyTree) -> tuple[Leaf, PyTree]:
    """(loss, aux) of a loss function, or an error."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(
            f"{function}: with has_aux=True the loss must return (value, aux), got "
            f"{result!r}."
        )
    return tuple(result)


def _check_loss(function: str, loss: Leaf, grad_loss: Leaf) -> None:
    """Raises unless the loss is floating, and `grad_loss` real and of its shape."""
    dtype = getattr(loss, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{function}: the loss must be a floating array, got "
            f"{dtype or type(loss).__name__}. With auxiliary data, pass has_aux=True."
        )
    if grad_loss is None:
        return
    if not is_array(grad_loss) or jnp.iscomplexobj(grad_loss):
        raise TypeError(
            f"{function}: grad_loss must be an array of real numbers, got {grad_loss!r}."
        )
    check_arrays(function, "grad_loss", grad_loss)
    if np.shape(grad_loss) != loss.shape:
        raise ValueError(
            f"{function}: grad_loss has shape {np.shape(grad_loss)}, the loss "
            f"{loss.shape}."
        )
