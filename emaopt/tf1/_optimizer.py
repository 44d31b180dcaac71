"""What tf.train.Optimizer had on every optimizer, for any Optax transformation."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from emaopt._checks import check_flag, check_optimizer
from emaopt._leaves import is_array
from emaopt._names import named_leaves
from emaopt._types import Leaf, PyTree
from emaopt.tf1._gates import GATE_OP
from emaopt.tf1._gradients import Loss, Variables, chosen_variables, gradients_of
from emaopt.tf1._rows import densified, is_sparse, row_step
from emaopt.tf1._slots import marked


def apply_gradients(
    optimizer: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    *,
    touched_rows_only: bool = False,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """Applies gradients, and leaves parameters without one and their slots alone.

    Args:
      optimizer: Any Optax transformation.
      grads: A tree like `params`. Where it has None, the parameter, its slots and its
        average keep their values; an average with `zero_init` stays at zero. It may hold
        a `jax.experimental.sparse.BCOO` with one sparse dimension, as for the rows of an
        embedding: duplicate rows are summed.
      opt_state: The optimizer's state.
      params: The parameters.
      touched_rows_only: Whether parameters with sparse gradients, and their slots, move
        only in the rows that the gradient has. The cost then grows with these rows and
        not with the table, if `params` and `opt_state` are donated and returned in the
        same order. For optimizers of each element by itself, such as sgd, momentum
        and Adam; not with a norm over the tree. False: as if the gradient were dense.
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
    return _applied(
        "apply_gradients",
        optimizer,
        grads,
        opt_state,
        params,
        touched_rows_only,
        extra_args,
    )


def _applied(
    function: str,
    optimizer: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    touched_rows_only: bool,
    extra_args: Mapping[str, Any],
) -> tuple[PyTree, PyTree]:
    """`apply_gradients`, with errors that name `function`."""
    check_optimizer(function, "optimizer", optimizer)
    check_flag(function, "touched_rows_only", touched_rows_only)
    leaves, treedef = jax.tree.flatten(params)
    gradients = _checked_gradients(function, grads, params, leaves, treedef)
    tx = optax.with_extra_args_support(optimizer)
    filled = [
        jnp.zeros_like(p) if g is None else g
        for p, g in zip(leaves, gradients, strict=True)
    ]
    try:
        if touched_rows_only and any(map(is_sparse, filled)):
            new_params, new_state = row_step(tx, filled, opt_state, params, extra_args)
        else:
            dense = jax.tree.unflatten(treedef, map(densified, filled))
            updates, new_state = tx.update(dense, opt_state, params, **extra_args)
            new_params = optax.apply_updates(params, updates)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        _refuse_other_state(function, tx, opt_state, params, error)
        raise
    without = [g is None for g in gradients]
    if not any(without):
        return new_params, new_state

    # A zero gradient is not the same: momentum or weight decay would move the parameter.
    def keep(still: bool, old: Leaf, new: Leaf) -> Leaf:
        return old if still else new

    stills = jax.tree.unflatten(treedef, without)
    new_params = jax.tree.map(keep, stills, params, new_params)
    stills = marked(opt_state, params, without, False)
    new_state = jax.tree.map(keep, stills, opt_state, new_state)
    return new_params, new_state


def minimize(
    optimizer: optax.GradientTransformation,
    loss: Loss,
    opt_state: PyTree,
    params: PyTree,
    *args: Any,
    var_list: Variables = None,
    gate_gradients: int = GATE_OP,
    grad_loss: ArrayLike | None = None,
    has_aux: bool = False,
    **extra_args: Any,
) -> tuple[PyTree, PyTree, PyTree]:
    """Takes a step: `compute_gradients`, then `apply_gradients`.

    The optimizer gets the extra arguments value, grad and value_fn, which line searches
    and `optax.contrib.reduce_on_plateau` use and other optimizers ignore.

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
      TypeError: If an argument is of another kind.

    Example:
      >>> tx = optax.sgd(3.0)
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
      >>> loss = lambda p: jnp.sum(5 * p["a"] + 3 * p["b"])
      >>> value, params, state = minimize(tx, loss, tx.init(params), params)
      >>> print(value, params["a"], params["b"])
      36.0 [-14. -13.] [-6. -5.]
    """
    check_optimizer("minimize", "optimizer", optimizer)
    value, grads = gradients_of(
        "minimize", loss, params, args, var_list, gate_gradients, grad_loss, has_aux
    )
    if not jax.tree.leaves(grads):
        names = ["/".join(keys) for keys, _ in named_leaves(params)]
        names = [names[i] for i in chosen_variables("minimize", params, var_list)]
        raise ValueError(
            "minimize: No gradients provided for any variable: the loss depends on none "
            f"of {', '.join(names)}."
        )

    # A line search needs a scalar function whose gradient is `grads`: the loss weighted
    # by its cotangent.
    def value_fn(params: PyTree) -> jax.Array:
        result = loss(params, *args)
        result = result[0] if has_aux else result
        weight = jnp.ones_like(result) if grad_loss is None else grad_loss
        return jnp.sum(result * weight)

    plain = value[0] if has_aux else value
    weight = jnp.ones_like(plain) if grad_loss is None else grad_loss
    # Line searches compute with the gradient as a whole and take no None.
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
    ours = _taken(optimizer, ours)
    if both := sorted(ours.keys() & extra_args.keys()):
        raise TypeError(f"minimize: the optimizer gets {', '.join(both)} from here.")
    params, opt_state = _applied(
        "minimize", optimizer, grads, opt_state, params, False, ours | extra_args
    )
    return value, params, opt_state


def _taken(
    optimizer: optax.GradientTransformation, extra_args: dict[str, Any]
) -> dict[str, Any]:
    """The extra arguments that the optimizer's `update` accepts."""
    takes = inspect.signature(optimizer.update).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        return extra_args
    names = {parameter.name for parameter in takes}
    return {name: value for name, value in extra_args.items() if name in names}


def _refuse_other_state(
    function: str,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    error: Exception,
) -> None:
    """Raises if an update failed because the state is not this optimizer's.

    It is called after a failure only: a new state to compare with takes time to trace.
    """
    try:
        want = jax.tree.structure(jax.eval_shape(optimizer.init, params))
    except Exception:
        return  # the first error says what is wrong
    if (have := jax.tree.structure(opt_state)) != want:
        raise ValueError(
            f"{function}: opt_state must be the state of this optimizer and these "
            f"parameters, {want}, got {have}."
        ) from error


def _checked_gradients(
    function: str,
    grads: PyTree,
    params: PyTree,
    leaves: Sequence[Leaf],
    treedef: Any,  # a PyTreeDef, which has no type
) -> list[Leaf]:
    """The gradients in the parameters' order: arrays, BCOOs and None."""
    names = ["/".join(keys) for keys, _ in named_leaves(params)]
    if not leaves:
        raise ValueError(f"{function}: No variables provided.")
    try:
        found = treedef.flatten_up_to(grads)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{function}: the gradients must be a tree like the parameters: {error}"
        ) from None
    if all(gradient is None for gradient in found):
        raise ValueError(
            f"{function}: No gradients provided for any variable: {', '.join(names)}."
        )
    checked: list[Leaf] = []
    gradient: Leaf
    for name, leaf, gradient in zip(names, leaves, found, strict=True):
        if not is_array(leaf):
            raise TypeError(
                f"{function}: the parameter {name} must be an array, got {leaf!r}. "
                "Keep what is none apart, as eqx.partition(model, eqx.is_array) does."
            )
        if gradient is not None and not is_sparse(gradient):
            if not isinstance(gradient, (jax.Array, np.ndarray, np.number, float, int)):
                raise TypeError(
                    f"{function}: the gradient of {name} must be an array, a BCOO "
                    f"or None, got {gradient!r}."
                )
            gradient = jnp.asarray(gradient)
        if gradient is not None and gradient.shape != np.shape(leaf):
            raise ValueError(
                f"{function}: {name} has shape {np.shape(leaf)}, its gradient "
                f"{gradient.shape}."
            )
        sparse: Leaf = gradient if is_sparse(gradient) else None
        if sparse is not None and (sparse.n_batch, sparse.n_sparse) != (0, 1):
            raise ValueError(
                f"{function}: the sparse gradient of {name} must have rows for its "
                f"entries (n_batch=0, n_sparse=1), got {gradient!r}."
            )
        checked.append(gradient)
    return checked
