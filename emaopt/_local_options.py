"""The general method of local updates, and the options that all methods share."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import optax

from emaopt._local_checks import Period
from emaopt._local_updates import Engine
from emaopt._signatures import takes_options_of
from emaopt._types import AxisName, DTypeLike


class Options(TypedDict, total=False):
    """Arguments of `local_updates` that every method takes."""

    num_workers: int | None
    axis_name: AxisName
    warmup_steps: int
    exchange_dtype: DTypeLike | None
    error_feedback: bool
    num_fragments: int
    per_worker: Sequence[str]
    delay: int
    mix: float | str
    eager: bool


def local_updates(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    *,
    period: Period,
    num_workers: int | None = None,
    axis_name: AxisName = None,
    commit: str = "delta",
    reduce: str = "mean",
    moving_rate: float | Callable[[int], float] | None = None,
    warmup_steps: int = 0,
    exchange_dtype: DTypeLike | None = None,
    error_feedback: bool = False,
    num_fragments: int = 1,
    per_worker: Sequence[str] = (),
    delay: int = 0,
    mix: float | str = 0.0,
    eager: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains workers on their own and lets them exchange progress every `period` steps.

    Every worker w takes steps of `inner` with its own gradients and slots. Every `period`
    steps each worker commits a pseudo-gradient (outer gradient), and the center c (slow
    weights, global parameters) takes a step of `outer` against the reduced commits:

        delta_w = c - θ_w       c := outer(c, mean_w delta_w)       θ_w := c

    The center is in the state, at least in float32 (`get_center`). Workers keep their
    slots and step counters when they pull it. Between exchanges workers do not
    communicate: the collective stands inside a conditional of the compiled step. Only the
    devices of one worker agree at each step on whether the step is finite.

    There are two forms with the same numbers. Stacked: with `num_workers`, parameters and
    gradients carry a leading axis of workers (`stack_workers`), which `jax.jit` shards
    over a mesh, or keeps on one device as a simulation. Mapped: with `axis_name`, the
    update runs inside `jax.shard_map`, `jax.pmap` or `jax.vmap`, and every worker sees
    its own parameters. With neither there is one worker.

    SlowMo (Wang et al., 2020) with a constant inner learning rate is
    `local_updates(inner, optax.sgd(alpha, momentum=beta), period=...)`, with `inner`'s
    slots kept, the only one of SlowMo's options for them. DOWNPOUR with accumulation is
    `reduce="sum"` with `optax.sgd(1.0)`.

    With a `delay` nobody waits for an exchange: the commits of step t are reduced and
    applied at step t + delay, while the workers go on. There they mix:

        mix=α:        θ_w := α θ_w + (1 - α) c
        mix="carry":  θ_w := c + (θ_w - θ_w(t)), the center and the progress since t

    α=0 loses the progress since t; with α > 0 the next commit holds a part of what the
    center has had already. "carry" counts each step once, wherever it is. `local_round`
    reduces the commits apart from the steps, so that communication can pass under them.

    What to watch:
      - A step whose gradients, or the parameters that it leads to, hold a NaN or inf is
        not taken: the worker's parameters and slots stay as they are. The next exchange
        leaves the worker out, with all its progress since the last one, and it pulls the
        center; the state counts both (`num_missed`, `num_left_out`). Without any commit
        the outer optimizer gets zeros; with reduce="sequential" it takes no step. The
        check reads gradients, slots and parameters once more: the program holds `inner`
        twice, and once more for an exchange. An `optax.apply_if_finite` or `zero_nans`
        inside `inner` never acts on a NaN. An update cannot mend parameters that were not
        finite before; `synchronize` can, and `local_round` without delay and mix.
      - Parameters are set through updates: θ + (c - θ) is c up to the last bit. With
        parameters and gradients in 16 bits, the updates are in 16 bits as well, because
        wrappers need that: the error is then up to half a unit in the last place of
        c - θ, and 0 if θ, the parameters before the step, is between c/2 and 2c. The
        center is exact. `synchronize` sets the parameters exactly, and so does
        `local_round` without delay and mix.
      - The mapped form cannot stand in a conditional that each device decides for itself,
        such as that of `optax.apply_if_finite`: workers would wait for each other without
        end, so it raises at trace time. The stacked form can.
      - Do not put this into `optax.MultiSteps`, which runs the update, and an exchange,
        at steps that it throws away. As the inner optimizer,
        `optax.MultiSteps(inner, k).gradient_transformation()`, it accumulates gradients
        before the local steps.
      - Inside shard_map parameters have a leading axis of 1, and so have each worker's
        own leaves of the state (`state_specs`), where parameters share such an axis
        outside. An `inner` that looks at the shape of a leaf, such as muon or a mask of
        `x.ndim > 1`, needs the stacked form. A checkpoint of the mapped form holds the
        center once for each worker.
      - In the stacked form, scalars of `inner`'s state have a row for each worker: set
        `hyperparams["learning_rate"]` to [W] numbers. Workers of an `inner` that draws
        random numbers draw the same ones.

      - Commits land after `delay` steps, but at the latest at the step at which the next
        ones are made. At a step with both, the new ones are made first, and hold what
        the workers did since the ones before; so with delay=period and mix=0 the next
        round begins from a center that lacks the last one. `exchange` decides on commits;
        what is in flight lands also where it is False. Give a leaf a gradient at both
        steps or at neither: without one at the commit alone it hands in zeros, without
        one at the landing alone its commits are dropped.
      - Late commits may want a smaller learning rate of `outer`. With Nesterov's momentum
        of 0.9, runs of benchmarks/overlap.py with delay=period and a number for `mix`
        diverged at 0.4 and above; with "carry" none did.

    Args:
      inner: The optimizer of the local steps.
      outer: The optimizer of the center. `emaopt.averaged(outer, decay)` averages the
        center; the average then moves at exchanges only.
      period: Local steps between exchanges (H, communication interval): a number, or a
        function of the number of local steps so far, () int32. A function may return a
        traced number, so that one compiled program serves all periods.
      num_workers: W, for the stacked form.
      axis_name: The mapped axis or axes over the workers, for the mapped form.
      commit: "delta" = c - θ_w; "mean_delta", the delta / the local steps since the last
        exchange; "mean_gradient" = Σ gradients / these steps.
      reduce: "mean" or "sum" over workers; "sequential": workers take turns in rank
        order, each applies its commit to the center and pulls it right after (a parameter
        server with a lock), for which every device gathers the commits of all workers.
      moving_rate: α in (0, 1]. Elastic: a worker commits α (c - θ_w) and moves by that,
        instead of pulling the center. A function gets W. None: not elastic.
      warmup_steps: The first steps, each of which ends in an exchange (post-local SGD).
      exchange_dtype: The dtype in which commits travel: a floating one narrower than
        float32, unscaled, or int8 or int16, scaled by each leaf's largest value. Floating
        commits are summed in their dtype (XLA widens the sum to float32 on CPU), so each
        is clipped at the dtype's largest number / W, and small ones vanish: float16 and
        float8 need `error_feedback`. Integers are gathered and summed in float32: int8
        takes W-1 bytes for each parameter, an all-reduce 8 (W-1)/W in float32 and half of
        that in bfloat16, so int8 is for 2 or 3 workers. In the stacked form integers are
        gathered as such only under `jax.set_mesh`. Complex leaves stay as they are.
      error_feedback: Add to each commit what the last one lost in `exchange_dtype`.
      num_fragments: F parts of the tree, of like sizes, that take turns: each is
        exchanged every `period` steps, period/F steps after the one before, so that one
        step communicates 1/F as much (Streaming DiLoCo). At most `period`. Each has its
        own outer state, and so its own average in `averaged(outer, decay)`.
      per_worker: Names of extra arguments of `update` with a row for each worker in the
        stacked form: per_worker=["value"] for `update(..., value=losses)`. All other
        arguments go whole to every worker.
      delay: Steps between a commit and its exchange, at most `period`. The commits in
        flight are in the state: one buffer like the workers' parameters, in float32, and
        two for commit="mean_gradient" with mix="carry".
      mix: What workers keep of their own when they pull the center: a share α from 0 to
        1, or "carry". Workers that were left out keep nothing. With delay=0, "carry" is
        0. Neither goes with `moving_rate`.
      eager: Eager updates, with delay=period: at its commit each worker takes a step of
        `outer` at once, with its own commit and the others' of the round before,

            c_w := outer(c_w, D_w(t)/W + (mean D(t-1) - D_w(t-1)/W))       θ_w := c_w

        from a center and with an outer state of its own (two trees more for each worker
        with momentum), which a worker that was left out goes on from, too. The center
        that is read, saved and served takes the means alone, a round late.

    Returns:
      A transformation with a `LocalUpdatesState`. Its update takes extra arguments.
      `exchange`: True forces an exchange of all fragments, False forbids it; it must be
      equal on all workers; without a delay, Python values compile to no conditional.
      `weights`: the weight of each worker's commit of this step, such as its examples or
      tokens: [W], in the mapped form each worker's own number, 0 (absent) or from 1e-30
      to 1e30.
      Traced weights that are negative or not finite count as 0. They are normalized over
      the workers that are neither absent nor left out: a mean is Σ w_i commit_i / Σ w_i;
      "sum" and "sequential" take w_i / mean w. An absent worker is not counted as left
      out, and pulls the center. An elastic worker's own move is not weighted.

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
      Douillard et al., 2025, Streaming DiLoCo, https://arxiv.org/abs/2501.18512 (its τ is
      `delay`, its α `mix`)
      Kale et al., 2025, Eager updates, https://arxiv.org/abs/2502.12996
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
        delay=delay,
        mix=mix,
        eager=eager,
    )


def transformation(
    function: str,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    **arguments: Any,
) -> optax.GradientTransformationExtraArgs:
    """The engine as an Optax transformation; errors name `function`."""
    engine = Engine(function, inner, outer, **arguments)
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)


takes_options = takes_options_of(local_updates, Options)
