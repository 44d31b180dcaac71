"""What an exchange has to know of an optimizer and its state."""

import functools

import jax
import optax

from emaopt._checks import check_optimizer
from emaopt._local_updates import Engine
from emaopt._reading import find_center, paired
from emaopt._states import LocalUpdatesState
from emaopt._tree_checks import check_arrays
from emaopt._turn import Order, refuse_dropped, update_of
from emaopt._types import PyTree
from emaopt.elastic._programs import Programs, programs_of


def center_of(function: str, params: PyTree, opt_state: PyTree) -> LocalUpdatesState:
    """The state of the local updates, an error unless it is of these parameters."""
    check_arrays(function, "params", params, others=True)
    state = find_center(function, opt_state, None)
    paired(function, state.center, params)
    return state


def programs_for(
    function: str,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
) -> Programs:
    """The programs of an optimizer's local updates, or an error.

    Wrappers hide the optimizer's settings, so it is asked for them.
    """
    check_optimizer(function, "optimizer", optimizer)
    check_arrays(function, "params", params, others=True)
    state = find_center(function, opt_state, None)
    paired(function, state.center, params, stacked=True)
    order = Order(ask=True)
    update = functools.partial(update_of(function, optimizer), exchange=order)
    jax.eval_shape(update, *jax.eval_shape(lambda: (params, opt_state, params)))
    if order.answer is None:
        refuse_dropped(function)
    settings = order.answer
    assert isinstance(settings, Engine)
    named = settings.function
    if settings.num_workers is not None or settings.axis_name is not None:
        form = "num_workers" if settings.num_workers is not None else "axis_name"
        raise ValueError(
            f"{function}: {named} was built with {form}=, for workers in one program. "
            "Here each process is one worker, with the form for one: leave it out."
        )
    if settings.reduce == "sequential":
        raise ValueError(
            f"{function}: {named} has reduce='sequential', but the commits of workers "
            "that may die are added up: use reduce='mean' or 'sum'."
        )
    if settings.delay or settings.eager:
        raise ValueError(
            f"{function}: {named} has delay={settings.delay}, but what is in flight "
            "would be lost with a worker: use delay=0."
        )
    return programs_of(settings)
