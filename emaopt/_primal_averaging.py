"""Optimizers whose gradient is taken near an average of their iterates."""

from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp
import optax

from emaopt._averaging import Options, average_params
from emaopt._checks import check_callable, check_number
from emaopt._decays import uniform_decay
from emaopt._primal_step import Step
from emaopt._signatures import takes_options_of
from emaopt._states import WEIGHT, ScheduleFreeState
from emaopt._types import Count, DecayLike, DTypeLike, PyTree


@takes_options_of(average_params, Options)
def primal_averaging(
    optimizer: optax.GradientTransformation,
    decay: DecayLike,
    *,
    interpolation: float = 0.7,
    inner_params: str = "z",
    inner_dtype: DTypeLike | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it steps z, and the gradient is taken near z's average.

    Three sequences, all equal at first; c is `interpolation`:

        z_s = z_{s-1} + the optimizer's update for the gradient at y_{s-1}
        x_s = β_t x_{s-1} + (1 - β_t) z_s
        y_s = c x_s + (1 - c) z_s

    The parameters are y: gradients are taken there. x is the average, read and used as
    any other: `get_average`, `swap`, checkpoints that serve it. By the choice of β and c
    this is GPA (`gpa`), schedule-free learning (`schedule_free`), or primal averaging
    with any decay. With c = 0 it is `averaged(optimizer, decay)`, bit for bit. With c > 0
    training itself depends on the decay: x is no by-product, and no decay of the learning
    rate is needed.

    What to watch: y is computed anew from x and z at every step. Whatever else changes
    the parameters is undone by the next step: what follows this in an `optax.chain`,
    `optax.lookahead` around it, weights that are loaded into the parameters alone. So it
    is the outermost wrapper, but for those that skip or collect whole steps
    (`optax.MultiSteps`, `optax.apply_if_finite`). Local updates refuse it as their inner
    optimizer. Turn the optimizer's own momentum off for schedule-free learning, which has
    c in place of it; GPA keeps it.

    Args:
      optimizer: Any Optax transformation. Extra arguments of `update` are passed to it.
      decay: β in [0, 1] or a function t -> β.
      interpolation: c in [0, 1]. Default 0.7.
      inner_params: Which parameters the optimizer is given, for weight decay and the
        like: "z", as in GPA, or "y", as in schedule-free learning. Default "z".
      inner_dtype: The dtype of the gradients and parameters that the optimizer is given,
        and so of its slots. Default: the parameters' own. For parameters in bfloat16,
        jnp.float32 keeps Adam's second moment from freezing.
      **options: As in `average_params`, but for `zero_init`: the three begin alike. With
        `sharding`, z is split as x is; y is gathered at every step, and z where the
        optimizer reads it. `memory_kind` is that of both.

    Returns:
      A transformation whose state is a `PrimalAveragingState(inner_state, base,
      averaging)`: beside the optimizer's own, z and x, in float32 at least, so that
      parameters in bfloat16 do not stop moving. Leaves that are not averaged take the
      optimizer's plain steps, and have neither.

    Raises:
      ValueError, TypeError: If an argument is out of its range, and from `update` as that
        of `average_params`.

    Example:
      >>> tx = primal_averaging(optax.sgd(1.0), 0.5, interpolation=0.5)
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(state.base, state.averaging.average, optax.apply_updates(params, updates))
      [-1. -1.] [-0.5 -0.5] [-0.75 -0.75]

    References:
      Defazio et al., 2025, Smoothing DiLoCo with primal averaging for faster training of
      LLMs, https://arxiv.org/abs/2512.17131
      Defazio et al., 2024, The road less scheduled, https://arxiv.org/abs/2405.15682
    """
    name = "primal_averaging"
    how = interpolation, inner_params, inner_dtype
    return _transformation(Step(name, optimizer, decay, *how, **options))


def _transformation(step: Step) -> optax.GradientTransformationExtraArgs:
    """The step, told the time by the arguments of `update`."""

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        num_updates: Count | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, PyTree]:
        return step.update(updates, state, params, num_updates, extra_args, extra_args)

    return optax.GradientTransformationExtraArgs(step.init, update)


@takes_options_of(average_params, Options)
def gpa(
    optimizer: optax.GradientTransformation,
    decay: DecayLike = 0.9967,
    *,
    interpolation: float = 0.7,
    inner_dtype: DTypeLike | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Generalized primal averaging: one loop in place of single-worker DiLoCo's two.

    `primal_averaging` with a constant decay. In place of DiLoCo with H local steps and
    outer momentum 0.9, take β = 0.9^(1/H): 0.9934, 0.9967, 0.9984 for H = 16, 32, 64.
    The learning rate has its usual schedule, and weight decay acts on z.

        tx = emaopt.gpa(optax.adamw(schedule, b1=0.9, weight_decay=0.1))

    Args:
      optimizer: AdamW in the paper, with its momentum.
      decay: β, μ_x in the paper. Default 0.9967.
      interpolation: c, μ_y in the paper. Default 0.7.
      inner_dtype, **options: As in `primal_averaging`.

    Returns:
      A transformation whose state is a `PrimalAveragingState`.

    Raises:
      ValueError, TypeError: As `primal_averaging`.

    Example:
      >>> tx = gpa(optax.sgd(1.0), 0.5)
      >>> params = jnp.zeros(1)
      >>> updates, state = tx.update(jnp.ones(1), tx.init(params), params)
      >>> print(state.averaging.average, updates)
      [-0.5] [-0.65]

    References:
      Defazio et al., 2025, Smoothing DiLoCo with primal averaging for faster training of
      LLMs, algorithm 1 and table 4, https://arxiv.org/abs/2512.17131
    """
    how = interpolation, "z", inner_dtype
    return _transformation(Step("gpa", optimizer, decay, *how, **options))


@takes_options_of(average_params, Options)
def schedule_free(
    optimizer: optax.GradientTransformation,
    learning_rate: float | Callable[[Any], Any] | None = None,
    *,
    interpolation: float = 0.9,
    power: float = 0.0,
    learning_rate_power: float = 2.0,
    inner_params: str = "y",
    inner_dtype: DTypeLike | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Schedule-free learning: no decay of the learning rate, no length known in advance.

    `primal_averaging` whose x is the mean of all z_s with weights

        w_s = s^power · (max_{i <= s} learning_rate(i - 1))^learning_rate_power.

    Equal weights for a constant learning rate; less for the steps of a warm-up. Take the
    optimizer without momentum, which c replaces, and a schedule with a warm-up alone:

        schedule = optax.warmup_constant_schedule(0.0, 3e-3, 1000)
        tx = emaopt.schedule_free(optax.adamw(schedule, b1=0.0), schedule)

    Args:
      optimizer: SGD or AdamW in the paper.
      learning_rate: That of `optimizer`, a number or a schedule. None: constant.
      interpolation: c, β_1 in the paper. Default 0.9.
      power: r in the authors' code, at least 0. Default 0.
      learning_rate_power: At least 0. Default 2.
      inner_params: As in `primal_averaging`. Default "y": weight decay acts there.
      inner_dtype, **options: As in `primal_averaging`, but for `clock`: the weights are
        the clock, and the state's `elapsed` is their sum, which does not stop growing in
        float32.

    Returns:
      A transformation whose state is a `ScheduleFreeState`.

    Raises:
      ValueError, TypeError: As `primal_averaging`, or if `clock` is given.

    Example:
      >>> tx = schedule_free(optax.sgd(1.0), interpolation=0.5)
      >>> params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.ones(1), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(state.primal.averaging.average, params)
      [-2.] [-2.5]

    References:
      Defazio et al., 2024, The road less scheduled, https://arxiv.org/abs/2405.15682
    """
    name = "schedule_free"
    check_number(name, "power", power, 0)
    check_number(name, "learning_rate_power", learning_rate_power, 0)
    if callable(learning_rate):
        check_callable(name, "learning_rate", learning_rate, 1)
    elif learning_rate is not None:
        check_number(name, "learning_rate", learning_rate, 0)
    given: dict[str, Any] = {**options}
    if given.pop("clock") is not None:
        raise ValueError(
            f"{name}: clock must be left out: the weights of the iterates are the clock."
        )
    schedule = learning_rate if callable(learning_rate) else None
    how = interpolation, inner_params, inner_dtype
    step = Step(name, optimizer, uniform_decay(), *how, clock=WEIGHT, **given)

    def init(params: PyTree) -> PyTree:
        primal = step.init(params)
        zero = jnp.zeros_like(primal.averaging.pending)  # on the parameters' devices
        return ScheduleFreeState(primal, zero if schedule else None)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        num_updates: Count | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, PyTree]:
        if num_updates is not None:
            raise ValueError(
                f"{name}: num_updates has no meaning here: all z are weighed by their "
                "number and the learning rate."
            )
        if not isinstance(state, ScheduleFreeState):
            raise TypeError(
                f"{name}: the state must be a ScheduleFreeState as init makes it, got "
                f"{type(state).__name__}."
            )
        if (schedule is None) != (state.largest is None):
            raise ValueError(
                f"{name}: learning_rate is {'no' if schedule is None else 'a'} schedule, "
                "and was otherwise when the state was made. It cannot change in mid-run."
            )
        count = state.primal.averaging[0]
        largest, weight = state.largest, 1.0
        if schedule is not None and largest is not None:
            rate = jnp.asarray(schedule(count))
            if rate.shape or not jnp.issubdtype(rate.dtype, jnp.floating):
                raise TypeError(
                    f"{name}: learning_rate must return a floating scalar, {schedule!r} "
                    f"returns {rate.dtype} of shape {rate.shape}."
                )
            largest = jnp.maximum(largest, rate.astype(largest.dtype))
            weight = largest**learning_rate_power
        if power:
            weight *= (optax.safe_increment(count) * 1.0) ** power
        time = {WEIGHT: weight}
        updates, primal = step.update(
            updates, state.primal, params, None, time, extra_args
        )
        return updates, ScheduleFreeState(primal, largest)

    return optax.GradientTransformationExtraArgs(init, update)
