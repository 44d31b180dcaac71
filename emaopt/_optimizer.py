"""What tf.train.Optimizer had on every optimizer, for any Optax transformation."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._checks import check_optimizer
from emaopt._gates import GATE_OP, check_gate, gated
from emaopt._masks import is_function
from emaopt._names import named_leaves
from emaopt._recursion import is_array, is_averaged
from emaopt._rows import densified, is_sparse, row_step
from emaopt._slots import marked


def compute_gradients(
    loss: Callable[..., Any],
    params: Any,
    *args: Any,
    var_list: Any = None,
    gate_gradients: int = GATE_OP,
    grad_loss: Any = None,
    has_aux: bool = False,
) -> tuple[Any, Any]:
    """Computes the gradients of a loss with respect to some of the parameters.

    A loss that is no scalar is summed: the gradients are the product of its Jacobian with
    `grad_loss`, ones by default.

    Args:
      loss: A function (params, *args) -> loss, or (loss, aux) with `has_aux`.
      params: The parameters. Integer leaves have no gradients.
      *args: Passed on to `loss`.
      var_list: Which parameters: None for all; a tree of booleans like `params` or a
        prefix; names as in `by_name`, "encoder/kernel", one or a sequence; a function of
        `params` that makes such a tree; or a predicate of (name, leaf).
      gate_gradients: GATE_NONE, GATE_OP or GATE_GRAPH; see `gate_gradients`.
      grad_loss: The cotangent of the loss, in its shape.
      has_aux: Whether `loss` returns auxiliary data too.

    Returns:
      (value, gradients); with `has_aux`, ((value, aux), gradients). The gradients are a
      tree like `params`, None outside of `var_list` and where none flows from the loss to
      a parameter: it is not used, or behind `jax.lax.stop_gradient` or integers only.
      Of a complex parameter, the direction in which the loss grows, as in TensorFlow: the
      conjugate of what `jax.grad` returns, which is what Optax's optimizers take.

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
    if not callable(loss):
        raise TypeError(
            "compute_gradients: `loss` should be a function of the parameters, got "
            f"{loss!r}."
        )
    check_gate("compute_gradients", gate_gradients)
    leaves, treedef = jax.tree.flatten(params)
    chosen = _chosen(params, var_list)
    chosen = [i for i in chosen if is_averaged(leaves[i])]
    if not chosen:
        raise ValueError("compute_gradients: No variables to optimize.")

    def flat_loss(*values):
        filled = list(leaves)
        for i, value in zip(chosen, values, strict=True):
            filled[i] = value
        result = loss(jax.tree.unflatten(treedef, filled), *args)
        value, aux = _with_aux(result) if has_aux else (result, None)
        if isinstance(value, (int, float, np.number, np.ndarray)):  # a constant
            value = jnp.asarray(value)
        return value, aux

    values = [jnp.asarray(leaves[i]) for i in chosen]
    value, pullback, aux = jax.vjp(flat_loss, *values, has_aux=True)
    _check_loss(value, grad_loss)
    if grad_loss is None:
        cotangent = jnp.ones_like(value)
    else:
        cotangent = jnp.asarray(grad_loss, value.dtype)
    gradients = pullback(cotangent)
    connected = _reached(jax.make_jaxpr(pullback)(cotangent).jaxpr)
    found: list[Any] = [None] * len(leaves)
    for i, gradient, is_connected in zip(chosen, gradients, connected, strict=True):
        if jnp.iscomplexobj(gradient):
            gradient = gradient.conj()
        found[i] = gradient if is_connected else None
    grads = gated(jax.tree.unflatten(treedef, found), gate_gradients)
    return ((value, aux) if has_aux else value), grads


def apply_gradients(
    optimizer: optax.GradientTransformation,
    grads: Any,
    opt_state: Any,
    params: Any,
    *,
    touched_rows_only: bool = False,
    **extra_args: Any,
) -> tuple[Any, Any]:
    """Applies gradients; parameters without one are left alone, and their slots.

    Args:
      optimizer: Any Optax transformation.
      grads: A tree like `params`. None: the parameter, its slots and its average stay as
        they are, at zero if `zero_init` had it start there. A
        `jax.experimental.sparse.BCOO` with one sparse dimension, as of the rows of an
        embedding: duplicate rows are summed.
      opt_state: The optimizer's state.
      params: The parameters.
      touched_rows_only: Whether parameters with sparse gradients, and their slots, move
        in the rows that the gradient has only. The cost then grows with these rows, and
        not with the table, if `params` and `opt_state` are donated, in the order in which
        they are returned. Right for optimizers that treat every element alike. False: as
        if the gradient were dense.
      **extra_args: Passed on to the optimizer's `update`.

    Returns:
      (params, opt_state).

    Raises:
      ValueError: If there are no parameters, no gradients, or shapes or structures that
        differ.
      TypeError: If a gradient is no array.

    Example:
      >>> tx = optax.sgd(1.0, momentum=0.9)
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> grads = {"a": jnp.ones(2), "b": None}
      >>> params, state = apply_gradients(tx, grads, tx.init(params), params)
      >>> print(params["a"], params["b"])
      [0. 0.] [1. 1.]
    """
    check_optimizer("apply_gradients", "optimizer", optimizer)
    leaves, treedef = jax.tree.flatten(params)
    gradients = _checked_gradients(grads, params, leaves, treedef)
    tx = optax.with_extra_args_support(optimizer)
    filled = [
        jnp.zeros_like(p) if g is None else g
        for p, g in zip(leaves, gradients, strict=True)
    ]
    if touched_rows_only and any(map(is_sparse, filled)):
        new_params, new_state = row_step(tx, filled, opt_state, params, extra_args)
    else:
        dense = jax.tree.unflatten(treedef, map(densified, filled))
        updates, new_state = tx.update(dense, opt_state, params, **extra_args)
        new_params = optax.apply_updates(params, updates)
    without = [g is None for g in gradients]
    if not any(without):
        return new_params, new_state

    def keep(still, old, new):
        return old if still else new

    stills = jax.tree.unflatten(treedef, without)
    new_params = jax.tree.map(keep, stills, params, new_params)
    stills = marked(opt_state, params, without, False)
    new_state = jax.tree.map(keep, stills, opt_state, new_state)
    return new_params, new_state


def minimize(
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
    opt_state: Any,
    params: Any,
    *args: Any,
    var_list: Any = None,
    gate_gradients: int = GATE_OP,
    grad_loss: Any = None,
    has_aux: bool = False,
    **extra_args: Any,
) -> tuple[Any, Any, Any]:
    """Takes a step: `compute_gradients`, then `apply_gradients`.

    The optimizer gets the extra arguments value, grad and value_fn, which line searches
    and `optax.contrib.reduce_on_plateau` take and others pass over.

    Args:
      optimizer: Any Optax transformation.
      loss, params, *args, var_list, gate_gradients, grad_loss, has_aux: As in
        `compute_gradients`.
      opt_state: The optimizer's state.
      **extra_args: Further arguments of the optimizer's `update`.

    Returns:
      (value, params, opt_state); with `has_aux`, ((value, aux), params, opt_state).

    Raises:
      ValueError: As `compute_gradients` and `apply_gradients`, and if the loss depends on
        none of the variables.

    Example:
      >>> tx = optax.sgd(3.0)
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
      >>> loss = lambda p: jnp.sum(5 * p["a"] + 3 * p["b"])
      >>> value, params, state = minimize(tx, loss, tx.init(params), params)
      >>> print(value, params["a"], params["b"])
      36.0 [-14. -13.] [-6. -5.]
    """
    check_optimizer("minimize", "optimizer", optimizer)
    value, grads = compute_gradients(
        loss,
        params,
        *args,
        var_list=var_list,
        gate_gradients=gate_gradients,
        grad_loss=grad_loss,
        has_aux=has_aux,
    )
    if not jax.tree.leaves(grads):
        names = ["/".join(keys) for keys, _ in named_leaves(params)]
        names = [names[i] for i in _chosen(params, var_list)]
        raise ValueError(
            "minimize: No gradients provided for any variable: the loss depends on none "
            f"of {', '.join(names)}."
        )

    def value_fn(params):
        result = loss(params, *args)
        result = result[0] if has_aux else result
        weight = jnp.ones_like(result) if grad_loss is None else grad_loss
        return jnp.sum(result * weight)

    plain = value[0] if has_aux else value
    weight = jnp.ones_like(plain) if grad_loss is None else grad_loss
    leaves, treedef = jax.tree.flatten(params)
    whole = [
        jnp.zeros_like(p) if g is None else g
        for p, g in zip(leaves, treedef.flatten_up_to(grads), strict=True)
    ]
    ours = {
        "value": jnp.sum(plain * weight),
        "grad": jax.tree.unflatten(treedef, whole),
        "value_fn": value_fn,
    }
    params, opt_state = apply_gradients(
        optimizer, grads, opt_state, params, **_taken(optimizer, ours), **extra_args
    )
    return value, params, opt_state


def _taken(optimizer: Any, extra_args: dict[str, Any]) -> dict[str, Any]:
    """Those of the extra arguments that the optimizer's update has a place for."""
    takes = inspect.signature(optimizer.update).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        return extra_args
    names = {parameter.name for parameter in takes}
    return {name: value for name, value in extra_args.items() if name in names}


def _chosen(params: Any, var_list: Any) -> list[int]:
    """The positions of the leaves that `var_list` chooses."""
    leaves = named_leaves(params)
    names = ["/".join(keys) for keys, _ in leaves]
    if var_list is None:
        return list(range(len(leaves)))
    if is_function(var_list, params):
        if _takes_two(var_list):
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
                f"compute_gradients: var_list names {', '.join(unknown)}; the variables "
                f"are {', '.join(names)}."
            )
        return [i for i, name in enumerate(names) if name in wanted]
    try:
        flags = jax.tree.leaves(
            jax.tree.map(
                lambda flag, tree: jax.tree.map(lambda _: flag, tree), var_list, params
            )
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "compute_gradients: var_list must be a tree of booleans like the parameters "
            f"or a prefix of it, names, or a function: {error}"
        ) from None
    if odd := [flag for flag in flags if not isinstance(flag, (bool, np.bool_))]:
        raise TypeError(
            f"compute_gradients: var_list must hold booleans or names, got {odd[0]!r}."
        )
    return [i for i, flag in enumerate(flags) if flag]


def _takes_two(function: Callable) -> bool:
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 2


def _are_names(var_list: Any) -> bool:
    if not isinstance(var_list, (list, tuple, set, frozenset)):
        return False
    return not var_list or all(isinstance(name, str) for name in var_list)


def _with_aux(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(
            "compute_gradients: with has_aux=True the loss must return (value, aux), got "
            f"{result!r}."
        )
    return tuple(result)


def _check_loss(loss: Any, grad_loss: Any) -> None:
    dtype = getattr(loss, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "compute_gradients: the loss must be a floating array, got "
            f"{dtype or type(loss).__name__}. With auxiliary data, pass has_aux=True."
        )
    if grad_loss is not None and np.shape(grad_loss) != loss.shape:
        raise ValueError(
            f"compute_gradients: grad_loss has shape {np.shape(grad_loss)}, the loss "
            f"{loss.shape}."
        )


def _reached(jaxpr: Any) -> list[bool]:
    """Which outputs of a program depend on its inputs; the others are constants."""
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(x, "val") and x in reached for x in equation.invars):
            reached.update(equation.outvars)
    return [not hasattr(x, "val") and x in reached for x in jaxpr.outvars]


def _checked_gradients(
    grads: Any, params: Any, leaves: list[Any], treedef: Any
) -> list[Any]:
    """The gradients in the parameters' order, as arrays."""
    names = ["/".join(keys) for keys, _ in named_leaves(params)]
    if not leaves:
        raise ValueError("apply_gradients: No variables provided.")
    try:
        found = treedef.flatten_up_to(grads)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"apply_gradients: the gradients must be a tree like the parameters: {error}"
        ) from None
    if all(gradient is None for gradient in found):
        raise ValueError(
            "apply_gradients: No gradients provided for any variable: "
            f"{', '.join(names)}."
        )
    checked: list[Any] = []
    gradient: Any
    for name, leaf, gradient in zip(names, leaves, found, strict=True):
        if not is_array(leaf):
            raise TypeError(
                f"apply_gradients: the parameter {name} must be an array, got {leaf!r}. "
                "Keep what is none apart, as eqx.partition(model, eqx.is_array) does."
            )
        if gradient is not None and not is_sparse(gradient):
            if not isinstance(gradient, (jax.Array, np.ndarray, np.number, float, int)):
                raise TypeError(
                    f"apply_gradients: the gradient of {name} must be an array, a BCOO "
                    f"or None, got {gradient!r}."
                )
            gradient = jnp.asarray(gradient)
        if gradient is not None and gradient.shape != np.shape(leaf):
            raise ValueError(
                f"apply_gradients: {name} has shape {np.shape(leaf)}, its gradient "
                f"{gradient.shape}."
            )
        sparse: Any = gradient if is_sparse(gradient) else None
        if sparse is not None and (sparse.n_batch, sparse.n_sparse) != (0, 1):
            raise ValueError(
                f"apply_gradients: the sparse gradient of {name} must have rows for its "
                f"entries (n_batch=0, n_sparse=1), got {gradient!r}."
            )
        checked.append(gradient)
    return checked
