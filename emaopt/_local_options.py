"""The general method of local updates, and the options that it shares with all others."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import jax
import optax

from emaopt._local_updates import Engine
from emaopt._signatures import takes_options_of

Period = int | Callable[[jax.Array], Any]


class Options(TypedDict, total=False):
    """Arguments of `local_updates` that every method takes."""

    num_workers: int | None
    axis_name: Any
    warmup_steps: int
    exchange_dtype: Any
    error_feedback: bool
    num_fragments: int
    per_worker: Sequence[str]


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
    per_worker: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Trains workers on their own and lets them meet every `period` steps.

    Every worker w takes a step of `inner` with its own gradients and slots. Every
    `period` steps the workers commit, and the center c takes a step of `outer`, with the
    reduced commits for a gradient:

        delta_w = c - θ_w       c := outer(c, mean_w delta_w)       θ_w := c

    The center is in the state, at least in float32 (`get_center`). Slots and step
    counters of the workers are kept when they pull it. Between exchanges no worker hears
    of another: the collective stands inside a conditional of the compiled step. The
    devices of one worker agree at each step on whether it is finite.

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
      - A step whose gradients, or the parameters that it leads to, hold a NaN or inf is
        not taken: the worker's parameters and slots stay as they are. At the next
        exchange it is left out, with all that it did since the last, and pulls the
        center; the state counts both (`num_missed`, `num_left_out`). Without any commit
        the outer optimizer gets zeros, in turns nothing. The check reads gradients,
        slots and parameters once more: `inner` stands in the program twice, and once
        more for an exchange. What `optax.apply_if_finite` or `zero_nans` inside would do
        with a NaN does not come to pass. Parameters that were not finite before cannot be
        mended by an update; `local_round` and `synchronize` do it.
      - Parameters are set through updates: θ + (c - θ) is c up to the last bit. With
        parameters and gradients in 16 bits the updates are in 16 bits as well, as
        wrappers around want it: then up to half a unit in the last place of c - θ, and
        exactly if θ, the parameters before the step, is between c/2 and 2c. The center is
        exact; `local_round` and `synchronize` set it exactly.
      - The mapped form has no place in a conditional that each device decides for itself,
        such as that of `optax.apply_if_finite`: an error at trace time, as workers would
        wait for each other without end. The stacked form has.
      - Do not put this into `optax.MultiSteps`, which runs the update, and an exchange,
        at steps that it throws away. As the inner optimizer,
        `optax.MultiSteps(inner, k).gradient_transformation()`, it accumulates gradients
        before the local steps.
      - Inside shard_map parameters have a leading axis of 1, and so has what each worker
        has of the state (`state_specs`), where they share one outside. An `inner` that
        looks at the shape of a leaf, such as muon or a mask of `x.ndim > 1`, belongs into
        the stacked form. A checkpoint of that state holds the center once for each
        worker.
      - In the stacked form scalars of `inner`'s state have a row for each worker: set
        `hyperparams["learning_rate"]` to [W] numbers. Workers of an `inner` that draws
        random numbers draw the same ones.

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
      exchange_dtype: What commits travel in: a floating dtype narrower than float32,
        unscaled, or int8 or int16, scaled by each leaf's largest value. Floating commits
        are summed in their dtype (XLA widens the sum to float32 on CPU), so each is cut
        off at the dtype's largest number / W, and small ones vanish: float16 and float8
        want `error_feedback`. Integers are gathered and summed in
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
      `exchange`: True forces an exchange at this step, False forbids it; the same on all
      workers; as Python values they compile to no conditional. `weights`: what each
      worker's commit counts at an exchange of this step, such as its examples or tokens:
      [W], in the mapped form each worker's own number, 0 (absent) or from 1e-30 to 1e30.
      Traced ones that are negative or not finite count as 0. They are normalized over
      the workers that are neither absent nor left out: a mean is Σ w_i commit_i / Σ w_i,
      a sum and turns take w_i / mean w. Who is absent is not counted as left out, and
      pulls the center. An elastic worker's own move is not weighted.

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
    return transformation(
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


def transformation(
    function: str, inner: Any, outer: Any, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """The engine as Optax takes it; `function` is named in errors."""
    engine = Engine(function, inner, outer, **arguments)
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)


takes_options = takes_options_of(local_updates, Options)
