"""Local-update methods by name: each is the engine with a commit and an outer optimizer.

method            commit          reduce   outer optimizer
local_sgd         delta           mean     sgd(1)
diloco            delta           mean     sgd(0.7, momentum=0.9, nesterov=True)
block_momentum    delta           mean     block momentum
lookahead         delta           -        sgd(slow_step_size)
agn, "tf"         mean_gradient   mean     the inner optimizer, with slots of its own
agn, "paper"      mean_delta      mean     sgd(1)
easgd             moving_rate     sum      sgd(1)
"""

from typing import Unpack

import jax
import optax

from emaopt._checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_optimizer,
)
from emaopt._local_options import Options, Period, takes_options, transformation
from emaopt._reductions import OfWorkers
from emaopt._types import PyTree


@takes_options
def local_sgd(
    inner: optax.GradientTransformation, *, period: Period, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    """Averages the workers' parameters every `period` steps (local SGD).

    Args:
      inner: The optimizer of the local steps.
      period, **options: As in `local_updates`: num_workers, axis_name, warmup_steps,
        exchange_dtype, error_feedback, num_fragments, per_worker, delay, mix, eager. With
        `warmup_steps` it is post-local SGD.

    Returns:
      A transformation with a `LocalUpdatesState`.

    Raises:
      ValueError, TypeError: As `local_updates`.

    Example:
      >>> import emaopt, jax.numpy as jnp
      >>> tx = local_sgd(optax.sgd(1.0), period=1, num_workers=2)
      >>> params = emaopt.stack_workers(jnp.zeros(1), 2)
      >>> _, state = tx.update(jnp.array([[1.0], [3.0]]), tx.init(params), params)
      >>> print(emaopt.get_center(state))
      [-2.]

    References:
      Stich, 2019, https://arxiv.org/abs/1805.09767; Lin et al., 2020,
      https://arxiv.org/abs/1808.07217
    """
    return transformation("local_sgd", inner, optax.sgd(1.0), period=period, **options)


@takes_options
def diloco(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    *,
    period: Period = 500,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """DiLoCo: hundreds of local steps, then a step of an outer optimizer.

    What to watch: the default outer optimizer is tuned for long runs. With a few dozen
    exchanges, a smaller outer learning rate does better: notebooks/3-local-updates.ipynb.
    A schedule in `outer` counts exchanges.

    Args:
      inner: The optimizer of the local steps; AdamW in the paper.
      outer: The optimizer of the center. Default None: the paper's,
        optax.sgd(0.7, momentum=0.9, nesterov=True).
      period, **options: As in `local_sgd`. With `num_fragments`, `delay` and mix=0.5 it
        is Streaming DiLoCo.

    Returns:
      A transformation with a `LocalUpdatesState`.

    Raises:
      ValueError, TypeError: As `local_updates`.

    Example:
      >>> import emaopt, jax.numpy as jnp
      >>> tx = diloco(optax.adamw(1e-3), period=500, num_workers=8)
      >>> state = tx.init(emaopt.stack_workers({"w": jnp.zeros(3)}, 8))
      >>> print(emaopt.get_center(state)["w"].shape)
      (3,)

    References:
      Douillard et al., 2023, DiLoCo: distributed low-communication training of language
      models, https://arxiv.org/abs/2311.08105
    """
    if outer is None:
        outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    return transformation("diloco", inner, outer, period=period, **options)


@takes_options
def agn(
    optimizer: optax.GradientTransformation,
    communication_period: Period = 10,
    *,
    variant: str = "tf",
    center_optimizer: optax.GradientTransformation | None = None,
    reduce: str = "mean",
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Accumulated gradient normalization: commits divided by the number of local steps.

    Variant "tf" is tf.contrib.opt.AGNOptimizer: a worker commits the mean of the
    gradients along its own path, and the same optimizer, with slots for the center,
    applies it. Variant "paper" follows the paper: a worker commits the mean of its
    updates, which is added to the center. For plain SGD the variants agree.

    What to watch: in "tf" the center's optimizer counts exchanges, so its schedules run
    `communication_period` times slower than in local steps; give `center_optimizer` a
    schedule in exchanges. Adam ignores the scale of its gradient: with Adam at the
    center, the division by the number of steps changes almost nothing.

    Args:
      optimizer: The optimizer of the local steps and, in "tf", of the center.
      communication_period: Local steps between exchanges, λ; elsewhere called `period`.
      variant: "tf" or "paper".
      center_optimizer: The optimizer of the center. Default None: `optimizer` in "tf",
        optax.sgd(1.0) in "paper".
      reduce: "mean" over workers; "sum", as commits of asynchronous workers add up;
        or "sequential", a parameter server whose workers push in rank order.
      **options: As in `local_updates`.

    Returns:
      A transformation with a `LocalUpdatesState`.

    Raises:
      ValueError, TypeError: As `local_updates`, and for another `variant`.

    Example:
      >>> import emaopt, jax.numpy as jnp
      >>> tx = agn(optax.sgd(1.0), 2, num_workers=2)
      >>> params, grads = emaopt.stack_workers(jnp.zeros(1), 2), jnp.array([[1.0], [3.0]])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(emaopt.get_center(state))
      [-2.]

    References:
      Hermans, Spanakis and Möckel, 2017, Accumulated gradient normalization, ACML,
      https://arxiv.org/abs/1710.02368
    """
    check_optimizer("agn", "optimizer", optimizer)
    if center_optimizer is not None:
        check_optimizer("agn", "center_optimizer", center_optimizer)
    if not callable(communication_period):
        check_integer("agn", "communication_period", communication_period, 1)
    check_choice("agn", "variant", variant, ("tf", "paper"))
    default = optimizer if variant == "tf" else optax.sgd(1.0)
    return transformation(
        "agn",
        optimizer,
        default if center_optimizer is None else center_optimizer,
        period=communication_period,
        commit="mean_gradient" if variant == "tf" else "mean_delta",
        reduce=reduce,
        **options,
    )


@takes_options
def easgd(
    inner: optax.GradientTransformation,
    *,
    period: Period,
    moving_rate: float | None = None,
    reduce: str = "sum",
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Elastic averaging SGD: an elastic force between each worker and the center.

    Every `period` steps, with d_w = θ_w - c:

        θ_w := θ_w - α d_w       c := c + α Σ_w d_w

    Args:
      inner: The optimizer of the local steps; with momentum it is EAMSGD.
      period, **options: As in `local_sgd`, but for delay, mix and eager: workers move by
        what they commit.
      moving_rate: α in (0, 1]. Default 0.9 / (period · num_workers), as in
        tf.contrib.opt.ElasticAverageOptimizer.
      reduce: "sum": all workers at once; "sequential": one worker after the other.

    Returns:
      A transformation with a `LocalUpdatesState`.

    Raises:
      ValueError, TypeError: As `local_updates`, and if `period` is a function and
        `moving_rate` None.

    Example:
      >>> import emaopt, jax.numpy as jnp
      >>> tx = easgd(optax.sgd(1.0), period=1, moving_rate=0.25, num_workers=2)
      >>> params = emaopt.stack_workers(jnp.zeros(1), 2)
      >>> updates, state = tx.update(jnp.array([[1.0], [3.0]]), tx.init(params), params)
      >>> print(emaopt.get_center(state), optax.apply_updates(params, updates).ravel())
      [-1.] [-0.75 -2.25]

    References:
      Zhang, Choromanska and LeCun, 2015, Deep learning with elastic averaging SGD,
      https://arxiv.org/abs/1412.6651
    """
    rate = moving_rate
    if rate is None:
        if callable(period):
            raise ValueError(
                "easgd: with a function for period there is no default of moving_rate; "
                "give moving_rate=, such as 0.9 / (longest period * workers)."
            )
        check_integer("easgd", "period", period, 1)

        # In the mapped form the number of workers is known inside of the map only.
        def default(num_workers: int) -> float:
            return 0.9 / (period * num_workers)

        rate = default

    return transformation(
        "easgd",
        inner,
        optax.sgd(1.0),
        period=period,
        moving_rate=rate,
        reduce=reduce,
        **options,
    )


@takes_options
def block_momentum(
    inner: optax.GradientTransformation,
    *,
    period: Period,
    block_momentum: float | None = None,
    block_learning_rate: float = 1.0,
    nesterov: bool = True,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Blockwise model-update filtering (BMUF): momentum over blocks of local steps.

    Every `period` steps, with G = mean_w θ_w - c:

        Δ := η Δ + ζ G       c := c + Δ;  with Nesterov's momentum c := c + ζ G + η Δ

    With Nesterov's momentum the center is the workers' start, ahead of the filtered model
    by η Δ.

    Args:
      inner: The optimizer of the local steps.
      period, **options: As in `local_sgd`.
      block_momentum: η in [0, 1); default 1 - 1 / num_workers.
      block_learning_rate: ζ > 0.
      nesterov: Whether workers start where the momentum will take the center.

    Returns:
      A transformation with a `LocalUpdatesState`.

    Raises:
      ValueError, TypeError: As `local_updates`.

    Example:
      >>> import emaopt, jax.numpy as jnp
      >>> tx = block_momentum(optax.sgd(1.0), period=1, num_workers=2)
      >>> params = emaopt.stack_workers(jnp.zeros(1), 2)
      >>> _, state = tx.update(jnp.array([[1.0], [3.0]]), tx.init(params), params)
      >>> print(emaopt.get_center(state))
      [-3.]

    References:
      Chen and Huo, 2016, Scalable training of deep learning machines by incremental block
      training with intra-block parallel optimization and blockwise model-update
      filtering, ICASSP
    """
    function = "block_momentum"
    if block_momentum is not None:
        check_number(function, "block_momentum", block_momentum, 0, 1)
        if block_momentum == 1:
            raise ValueError(f"{function}: block_momentum must be in [0, 1), got 1.")
    check_number(function, "block_learning_rate", block_learning_rate, 0, above=True)
    check_flag(function, "nesterov", nesterov)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, num_workers: int = 1
    ) -> tuple[PyTree, PyTree]:
        del params
        eta = 1 - 1 / num_workers if block_momentum is None else block_momentum
        scaled = jax.tree.map(lambda x: float(block_learning_rate) * x, updates)
        moves, state = optax.trace(float(eta), nesterov).update(scaled, state)
        return jax.tree.map(lambda x: -x, moves), state

    # The state of optax.trace does not depend on η, so any decay will do for `init`.
    outer = OfWorkers(optax.trace(0.0).init, update)
    return transformation(function, inner, outer, period=period, **options)


def lookahead(
    inner: optax.GradientTransformation,
    *,
    period: Period = 5,
    slow_step_size: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Lookahead: k steps forward, then part of the way back, with one worker.

    Every `period` steps: c := c + α (θ - c), θ := c. The parameters keep their shapes and
    names, unlike in `optax.lookahead`; the slow weights are in the state (`get_center`).

    Args:
      inner: The optimizer of the fast weights.
      period: k, the fast steps for each slow step.
      slow_step_size: α in (0, 1].

    Returns:
      A transformation with a `LocalUpdatesState`.

    Raises:
      ValueError, TypeError: As `local_updates`.

    Example:
      >>> import emaopt, jax.numpy as jnp
      >>> tx = lookahead(optax.sgd(1.0), period=1)
      >>> _, state = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), jnp.zeros(1))
      >>> print(emaopt.get_center(state))
      [-0.5]

    References:
      Zhang et al., 2019, Lookahead optimizer: k steps forward, 1 step back,
      https://arxiv.org/abs/1907.08610
    """
    check_number("lookahead", "slow_step_size", slow_step_size, 0, 1, above=True)
    outer = optax.sgd(slow_step_size)
    return transformation("lookahead", inner, outer, period=period)


def snoo(
    inner: optax.GradientTransformation,
    *,
    period: Period,
    learning_rate: float = 0.7,
    momentum: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """SNOO: DiLoCo with one worker, Nesterov momentum on the progress of K steps.

    Every `period` steps, with the progress d = c - θ since the last time:
    m := μ m + d, c := c - η (μ m + d), θ := c. It is `lookahead` with momentum.

    Args:
      inner: The optimizer of the fast weights.
      period: K, the fast steps for each slow step.
      learning_rate: η > 0. Default 0.7, as in `diloco`.
      momentum: μ in [0, 1]. Default 0.9, as in `diloco`.

    Returns:
      A transformation with a `LocalUpdatesState`.

    Raises:
      ValueError, TypeError: As `local_updates`.

    Example:
      >>> import emaopt, jax.numpy as jnp
      >>> tx = snoo(optax.sgd(1.0), period=1, learning_rate=0.5, momentum=0.5)
      >>> _, state = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), jnp.zeros(1))
      >>> print(emaopt.get_center(state))
      [-0.75]

    References:
      Kallusky et al., 2025, SNOO: step-K Nesterov outer optimizer,
      https://arxiv.org/abs/2510.15830
    """
    check_number("snoo", "learning_rate", learning_rate, 0, above=True)
    check_number("snoo", "momentum", momentum, 0, 1)
    outer = optax.sgd(learning_rate, momentum=momentum, nesterov=True)
    return transformation("snoo", inner, outer, period=period)
