"""The local-update methods by name: each is the engine with a commit and an outer step.

method            commit          reduce   outer step
local_sgd         delta           mean     sgd(1)
diloco            delta           mean     sgd(0.7, momentum=0.9, nesterov=True)
block_momentum    delta           mean     block momentum
lookahead         delta           -        sgd(slow_step_size)
agn, "tf"         mean_gradient   mean     the inner optimizer, with slots of its own
agn, "paper"      mean_delta      mean     sgd(1)
easgd             moving_rate     sum      sgd(1)
"""

from collections.abc import Callable, Iterable
from typing import Any, Unpack

import jax
import optax

from emaopt._checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_optimizer,
)
from emaopt._local_options import Options, Period, takes_options
from emaopt._local_updates import Engine


def local_updates(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    *,
    period: Period,
    num_workers: int | None = None,
    axis_name: Any = None,
    commit: str = "delta",
    reduce: str = "mean",
    moving_rate: float | Callable[[int], float] | None = None,
    warmup_steps: int = 0,
    exchange_dtype: Any = None,
    error_feedback: bool = False,
    num_fragments: int = 1,
    per_worker: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Trains workers on their own and lets them meet every `period` steps.

    Every worker w takes a step of `inner` with its own gradients and slots. Every
    `period` steps the workers commit, and the center c takes a step of `outer`, with the
    reduced commits for a gradient:

        delta_w = c - θ_w       c := outer(c, mean_w delta_w)       θ_w := c

    The center is in the state, at least in float32 (`get_center`). Slots and step
    counters of the workers are kept when they pull it. Between exchanges nothing is
    communicated: the collective stands inside a conditional of the compiled step.

    Two forms, the same numbers: stacked and mapped. With `num_workers`, parameters and
    gradients carry a leading axis of workers (`stack_workers`), which `jax.jit` shards
    over a mesh, or keeps on one device as a simulation. With `axis_name`, the update runs
    inside `jax.shard_map`, `jax.pmap` or `jax.vmap`, and every worker sees its own. With
    neither there is one worker.

    SlowMo (Wang et al., 2020) with a constant inner learning rate is
    `local_updates(inner, optax.sgd(alpha, momentum=beta), period=...)`, here without its
    options for `inner`'s slots: they are kept. DOWNPOUR with accumulation is
    `reduce="sum"` with `optax.sgd(1.0)`.

    What to watch:
      - A step whose gradients or updates hold a NaN or inf is not taken: the worker's
        parameters and slots stay as they are. At the next exchange it is left out and
        pulls the center; the state counts both (`num_missed`, `num_left_out`). Without
        any commit the outer optimizer gets zeros. The check reads the gradients and
        slots once more. What `optax.apply_if_finite` or `zero_nans` inside would do with
        a NaN does not come to pass.
      - Parameters are set through updates: θ + (c - θ) is c up to the last bit. With
        parameters and gradients in 16 bits the updates are in 16 bits as well, as
        wrappers around want it: then up to half a unit in the last place of c - θ, and
        exactly if θ is between c/2 and 2c. The center is exact; `local_round` and
        `synchronize` set it exactly.
      - The mapped form has no place in a conditional that each device decides for itself,
        such as that of `optax.apply_if_finite`: an error at trace time, as workers would
        wait for each other without end. The stacked form has.
      - Do not put this into `optax.MultiSteps`, which runs the update, and an exchange,
        at steps that it throws away. As the inner optimizer,
        `optax.MultiSteps(inner, k).gradient_transformation()`, it accumulates gradients
        before the local steps.
      - Inside shard_map parameters have a leading axis of 1, and so has what each worker
        has of the state (`state_specs`), where they share one outside. An `inner` that
        looks at the shape of a leaf, such as muon, belongs into the stacked form.

    Args:
      inner: The optimizer of the local steps.
      outer: The optimizer of the center. `emaopt.averaged(outer, decay)` averages the
        center; the average then moves at exchanges only.
      period: Local steps between exchanges: a number, or a function of the number of
        local steps so far, () int32. A function may return a traced number, so that one
        compiled program serves all periods.
      num_workers: W, for the stacked form.
      axis_name: The mapped axis or axes over the workers, for the mapped form.
      commit: "delta" = c - θ_w; "mean_delta", that / the local steps since the exchange;
        "mean_gradient" = Σ gradients / these steps.
      reduce: "mean" or "sum" over workers; "sequential": workers take turns in rank
        order, each applies its commit to the center and pulls it right after (a parameter
        server with a lock). The last gathers the commits of all workers everywhere.
      moving_rate: α in (0, 1]. Elastic: a worker commits α (c - θ_w) and moves by that,
        instead of pulling the center. A function gets W. None: not elastic.
      warmup_steps: The first steps, each of which ends in an exchange (post-local SGD).
      exchange_dtype: What commits travel in: a floating dtype narrower than float32, or
        int8, scaled by each leaf's largest value. Floating commits are summed in their
        dtype (XLA widens the sum to float32 on CPU). int8 ones are gathered and summed in
        float32: W-1 bytes for each parameter, against 8 (W-1)/W of an all-reduce in
        float32 and half of that in bfloat16: int8 is for 2 or 3 workers. In the stacked
        form it needs `jax.set_mesh` to be gathered as such. Complex leaves stay as they
        are.
      error_feedback: Add to each commit what the last one lost in `exchange_dtype`.
      num_fragments: F parts of the tree, of like sizes, that take turns: each is
        exchanged every `period` steps, period/F steps after another, so that one step
        communicates 1/F as much (Streaming DiLoCo). At most `period`; each has an outer
        state of its own, and so an average of its own in `averaged(outer, decay)`.
      per_worker: Names of extra arguments of `update` of which, in the stacked form, each
        worker gets its row: per_worker=["value"] for `update(..., value=losses)`. All
        others go whole to every worker.

    Returns:
      A transformation with a `LocalUpdatesState`. Its update takes extra arguments.
      `exchange`: True forces an exchange at this step, False forbids it; as Python values
      they compile to no conditional. `weights`: what each worker's commit counts at an
      exchange of this step, such as its examples or tokens, from 0 (absent) on: [W], in
      the mapped form each worker's own number. They are normalized over the workers that
      are not left out: a mean is Σ w_i commit_i / Σ w_i, a sum and turns take
      w_i / mean w. An elastic worker's own move is not weighted.

    Raises:
      ValueError, TypeError: If an argument is out of its range; from `init` and `update`
        if leaves lack the axis of workers, the axis is not mapped, or the state is
        swapped.

    Example:
      >>> import emaopt, jax.numpy as jnp
      >>> tx = local_updates(optax.sgd(0.5), optax.sgd(1.0), period=1, num_workers=2)
      >>> params = emaopt.stack_workers(jnp.zeros(1), 2)
      >>> updates, state = tx.update(jnp.array([[1.0], [3.0]]), tx.init(params), params)
      >>> print(emaopt.get_center(state), optax.apply_updates(params, updates).ravel())
      [-1.] [-1. -1.]

    References:
      Stich, 2019, Local SGD converges fast and communicates little,
      https://arxiv.org/abs/1805.09767
      Lin et al., 2020, Don't use large mini-batches, use local SGD,
      https://arxiv.org/abs/1808.07217 (post-local SGD)
      Wang et al., 2020, SlowMo, https://arxiv.org/abs/1910.00643
      Douillard et al., 2025, Streaming DiLoCo, https://arxiv.org/abs/2501.18512
    """
    return _transformation(
        "local_updates",
        inner,
        outer,
        period=period,
        num_workers=num_workers,
        axis_name=axis_name,
        commit=commit,
        reduce=reduce,
        moving_rate=moving_rate,
        warmup_steps=warmup_steps,
        exchange_dtype=exchange_dtype,
        error_feedback=error_feedback,
        num_fragments=num_fragments,
        per_worker=per_worker,
    )


@takes_options
def local_sgd(
    inner: optax.GradientTransformation, *, period: Period, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    """Averages the workers' parameters every `period` steps.

    Args:
      inner: The optimizer of the local steps.
      period, **options: As in `local_updates`. With `warmup_steps` it is post-local SGD.

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
    return _transformation("local_sgd", inner, optax.sgd(1.0), period=period, **options)


@takes_options
def diloco(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    *,
    period: Period = 500,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """DiLoCo: hundreds of local steps, then a step of an outer optimizer.

    What to watch: the default outer optimizer is tuned for long runs. With some tens of
    exchanges a smaller outer learning rate does better: notebooks/3-local-updates.ipynb.
    A schedule in `outer` counts exchanges.

    Args:
      inner: The optimizer of the local steps; AdamW in the paper.
      outer: The optimizer of the center; None, the default, is that of the paper,
        optax.sgd(0.7, momentum=0.9, nesterov=True).
      period, **options: As in `local_updates`. With `num_fragments` it is streaming
        DiLoCo, without its overlap of communication with computation.

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
    return _transformation("diloco", inner, outer, period=period, **options)


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

    "tf", as tf.contrib.opt.AGNOptimizer: a worker commits the mean of its gradients,
    taken along its own path, and the same optimizer, with slots of its own, applies that
    to the center. "paper", as its author wrote it: a worker commits the mean of its
    updates, which is added to the center. For plain SGD they agree.

    What to watch: in "tf" the center's optimizer counts exchanges, so a schedule in it
    runs `communication_period` times slower there; give `center_optimizer` one in
    exchanges. And Adam takes no notice of the scale of its gradient: with it at the
    center, the division by the number of steps changes next to nothing.

    Args:
      optimizer: The optimizer of the local steps and, in "tf", of the center.
      communication_period: Local steps between exchanges, λ; `period` elsewhere.
      variant: "tf" or "paper".
      center_optimizer: Another optimizer for the center; default `optimizer` in "tf",
        optax.sgd(1.0) in "paper".
      reduce: "mean" over workers; "sum", as the commits of asynchronous workers add up;
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
    return _transformation(
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
    """Elastic averaging: an elastic force between each worker and the center.

    Every `period` steps, with d_w = θ_w - c:

        θ_w := θ_w - α d_w       c := c + α Σ_w d_w

    Args:
      inner: The optimizer of the local steps; with momentum it is EAMSGD.
      period, **options: As in `local_updates`.
      moving_rate: α in (0, 1]; default 0.9 / (period · num_workers), as in
        tf.contrib.opt.ElasticAverageOptimizer.
      reduce: "sum", all at once; "sequential", one worker after the other.

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
    rate: Any = moving_rate
    if moving_rate is None:
        if callable(period):
            raise ValueError(
                "easgd: with a function for period there is no default of moving_rate; "
                "give moving_rate=, such as 0.9 / (longest period * workers)."
            )
        check_integer("easgd", "period", period, 1)
        rate = lambda num_workers: 0.9 / (period * num_workers)  # noqa: E731
    return _transformation(
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

    With that, the center is where workers start from, ahead of the filtered model by η Δ.

    Args:
      inner: The optimizer of the local steps.
      period, **options: As in `local_updates`.
      block_momentum: η in [0, 1); default 1 - 1 / num_workers.
      block_learning_rate: ζ > 0.
      nesterov: Whether workers start from where the momentum will take the center.

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

    def update(updates, state, params=None):
        del params
        eta = block_momentum
        if eta is None:
            eta = 1 - 1 / engine.workers.num_workers
        scaled = jax.tree.map(lambda x: block_learning_rate * x, updates)
        moves, state = optax.trace(eta, nesterov).update(scaled, state)
        return jax.tree.map(lambda x: -x, moves), state

    outer = optax.GradientTransformation(optax.trace(0.0).init, update)
    engine = Engine(function, inner, outer, period, **options)
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)


def lookahead(
    inner: optax.GradientTransformation,
    *,
    period: Period = 5,
    slow_step_size: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Lookahead: k steps forward, then a part of the way back, with one worker.

    Every `period` steps: c := c + α (θ - c), θ := c. The parameters keep their shapes and
    names, unlike in `optax.lookahead`; the slow weights are in the state (`get_center`).

    Args:
      inner: The optimizer of the fast weights.
      period: Fast steps for one slow step, k.
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
    return _transformation("lookahead", inner, outer, period=period)


def _transformation(
    function: str, inner: Any, outer: Any, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    engine = Engine(function, inner, outer, **arguments)
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)
