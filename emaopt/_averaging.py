"""How an average is kept: of any tree, last in a chain, or around an optimizer."""

from typing import TypedDict, Unpack

import jax
import optax

from emaopt._checks import check_flag, check_given, check_integer, check_optimizer
from emaopt._leaves import is_averaged
from emaopt._recursion import Averager, make_averager, make_recursion
from emaopt._rounding import lead, settled
from emaopt._sharding import LIKE_PARAMS
from emaopt._signatures import takes_options_of
from emaopt._states import AveragedState, refuse_primal_averaging
from emaopt._tree_checks import refuse_unlike
from emaopt._types import Count, DecayLike, DTypeLike, Mask, Placement, PyTree


class Options(TypedDict, total=False):
    """Arguments of `average_params` that every way of averaging takes."""

    every: int
    start: int
    mask: Mask
    accumulator_dtype: DTypeLike | None
    debias: bool
    zero_init: bool
    skip_nonfinite: bool
    stochastic_rounding: bool
    sharding: Placement
    memory_kind: str | None
    clock: str | None


def average_params(
    decay: DecayLike,
    *,
    every: int = 1,
    start: int = 0,
    mask: Mask = None,
    accumulator_dtype: DTypeLike | None = None,
    debias: bool = False,
    zero_init: bool = False,
    skip_nonfinite: bool = False,
    stochastic_rounding: bool = False,
    sharding: Placement = "like_params",
    memory_kind: str | None = None,
    clock: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages the parameters; the updates pass through with their values unchanged.

    Let θ_s be the parameters after the s-th update, s = 1, 2, 3, ..., exactly as
    `optax.apply_updates` returns them. The average (an EMA, or a Polyak average with
    `uniform_decay`) starts as a copy of θ_0 and

        a_s = a_{s-1} + (1 - β_t) (θ_s - a_{s-1}),     t = s - start,

    so that it always is a weighted sum of iterates: `decay_weights` returns the weights.
    Every operation is rounded by itself, in float32 at least, under jit as in NumPy.
    1 - β is computed in float64 for a number, from the formula for a decay of this
    package (warmup_decay: in float32, as TensorFlow does), and in β's dtype for any other
    function.

    What to watch: θ_s is read as `params + updates`, so this belongs last in an
    `optax.chain`; whatever follows it is not averaged. `averaged(chain)` avoids this.
    θ_s is exact where `optax.apply_updates` is compiled with the update, in one jit. If
    the update is compiled alone, XLA may fuse its last product with the sum (FMA): θ_s is
    then off by up to a unit in the last place of the parameter and one of its update.
    Inside of a conditional (`lax.cond`, and wrappers that use one) the updates are
    rounded before both sums; elsewhere the updates are returned as the same objects.
    Wrappers that call the chain decide when the average moves:
      optax.MultiSteps: inside, once per emitted step (though MultiSteps computes it, and
        discards it, at every mini-step); outside, at every mini-step.
      optax.apply_if_finite, optax.MultiSteps(should_skip_update_fn=...): inside, not on
        rejected steps; outside, on them too, with unchanged parameters.
      optax.contrib.schedule_free: inside, the average is of its base iterates z, which
        nobody serves; outside, of y. `schedule_free_eval_params` is an average already.
      optax.lookahead: inside, of the fast weights before they synchronise.
      optax.contrib.mechanize: inside, of iterates that are never the parameters, since
        it scales the sum of all steps of its inner optimizer; outside, of the parameters.
      optax.flatten, optax.contrib.split_real_and_imaginary: inside, of parameters in
        another form, which `get_average` cannot read; outside, of the parameters.
      optax.inject_hyperparams: around `average_params`, it takes any function for a
        schedule of its own count, which is 0 at the first update, where t is 1: decays
        come a step late, `start` is not subtracted, and a mask is called with the count.
        Give static_args=("decay", "every", "start", "mask", "sharding"). To change a
        number `decay` in mid-run, leave "decay" out of them and give
        hyperparam_dtype=jnp.float32. Or inject the optimizer alone, and chain.

    Args:
      decay: β in [0, 1], or a function of t (int32 scalar, may be traced) such as
        `warmup_decay(0.999)`. `tx.update(..., num_updates=n)` replaces t by the whole
        number n. A β out of [0, 1] is refused where its value is known (at t = 1 when
        built, and outside of jit). A traced β is clipped to [0, 1], a traced n to 0 and
        above.
      every: Move the average on every k-th step only (when (s - start) % k == 0), by the
        product of the decays since the last move: the window keeps its length in steps.
        The steps between cost no pass over the parameters. Default 1.
      start: For s < start the average is a copy of the parameters; the step s = start is
        the first to average, with decay(0). s counts from init or `reset_average`, not
        from a global step. Default 0.
      mask: A tree of booleans like the parameters or a prefix of it, or a function from
        the parameters to one (`by_name`). False leaves are not averaged and cost
        nothing. A callable model with booleans for leaves is a tree, as for
        `optax.masked`. Every update must get the same mask as init; `change_mask` changes
        it in mid-run. Default: all leaves are averaged.
      accumulator_dtype: Real dtype of the average. Default: the parameter's own, and
        float32 for narrower ones; complex parameters take the complex dtype of that
        width. In bfloat16 a decay above 0.996 rounds every step away; a constant one is
        refused, a schedule that gets there is not.
      debias: Forget the copy that the average starts from: W is 0 at first, then W_t =
        β_t W_{t-1} + (1 - β_t), and the step is (1 - β_t)/W_t. Default False.
      zero_init: Start from zeros in place of a copy, as
        tfm.optimization.ExponentialMovingAverage does. Default False.
      skip_nonfinite: Leave the average as it is when an averaged leaf holds a NaN or inf,
        and count the update in the state's `num_skipped`. By default a NaN propagates.
        Not for sharded parameters inside of shard_map, where each device sees its own
        part only.
      stochastic_rounding: For accumulator_dtype=jnp.bfloat16: round up or down at random,
        so that an average in 2 bytes follows any decay without bias. Its noise is about
        sqrt(|θ - a| ulp / 2), whatever the decay. The bits depend only on the element's
        index (inside of shard_map, in the device's part) and the update's number: they
        are the same on all replicas and after a restart. Default False.
      sharding: How the average is split (ZeRO), along mesh axes over which the parameters
        are replicated. An axis or a tuple of axes: each device holds 1/N of the average
        and updates it without communication; the first dimension that N divides is split.
        A PartitionSpec names axes that the parameter does not use, in the dimensions to
        split; a NamedSharding also gives the mesh, which otherwise is that of
        `jax.set_mesh`. To treat leaves differently, give a tree of these like the
        parameters or a prefix of it (a tuple of names is no tree), or a function from the
        parameters to one. Leaves that N does not divide, or that lack the dimension, are
        sharded like their parameters, as all are by default, "like_params". Inside of
        `jax.shard_map` over the axes, the average has the shape of the device's part, and
        must be read outside; the parameters must be equal along the axes, which only
        check_vma checks.
      memory_kind: "pinned_host" keeps the average in the host's memory and brings it to
        the device for each update, a few arrays at a time. Best with `every`, but XLA
        cannot compile the two together for GPUs. Needs jax 0.10. Default: the parameters'
        memory.
      clock: What t counts in place of steps: "examples", "tokens", or any name. Each
        update is then told how many its step takes, as
        `tx.update(grads, state, params, tokens=n)`, n at least 0, a number or a scalar
        that may be traced; and a half-life is one of tokens. A step of n units keeps what
        n steps of one unit would keep, Πβ over them: β^n for a constant, (τ - n)/τ for
        uniform_decay at the time τ. So batches may change in size. For a constant,
        half_life_decay, uniform_decay, polynomial_decay and power_decay; others are
        refused, and so is `num_updates`. `every` and `start` count steps; the time begins
        behind the step `start`. It is exact up to 10^14 units, in float32 too, and stands
        in the state's `elapsed`. Inside of `optax.MultiSteps`, give an emitted step the
        units of all of its mini-steps. Default: steps.

    Returns:
      A transformation whose state is an `AverageState`. Floating and complex leaves are
      averaged; integer, boolean and PRNG-key leaves hold the newest value; None stays
      None. The state shares no buffer with the parameters: both may be donated.

    Raises:
      ValueError, TypeError: If an argument is out of its range, and from `update` if
        `params` is missing, the time of the clock is, the mask, `debias` or the clock
        differs from that at `init`, or the state is swapped.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.chain(optax.sgd(1.0), average_params(0.5))
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates), state[-1].average)
      [-1. -1.] [-0.5 -0.5]

    References:
      TensorFlow, tf.contrib.opt.MovingAverageOptimizer,
      https://www.tensorflow.org/versions/r1.15/api_docs/python/tf/contrib/opt/MovingAverageOptimizer
    """
    averager = make_recursion(
        "average_params",
        decay,
        every=every,
        start=start,
        mask=mask,
        accumulator_dtype=accumulator_dtype,
        debias=debias,
        zero_init=zero_init,
        skip_nonfinite=skip_nonfinite,
        stochastic_rounding=stochastic_rounding,
        sharding=sharding,
        memory_kind=memory_kind,
        clock=clock,
    )

    def init(params: PyTree) -> PyTree:
        return averager.init(params)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        num_updates: Count | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, PyTree]:
        check_given("average_params", "averages the parameters", params)
        try:
            # This sum must have the bits of the one that the caller makes.
            updates = settled(updates)
            seen = optax.apply_updates(params, updates)
        except (TypeError, ValueError) as error:
            refuse_unlike("average_params", params, error, updates=updates)
            raise
        return updates, averager.update(seen, state, num_updates, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


_takes_options = takes_options_of(average_params, Options)


@_takes_options
def average_tree(decay: DecayLike, **options: Unpack[Options]) -> Averager:
    """Averages any pytree: statistics, target networks, metrics.

    The same recursion and options as `average_params`, for values that no optimizer
    returns: `update` takes the values themselves, not updates to parameters.

    Args:
      decay: β in [0, 1] or a function t -> β.
      **options: As in `average_params`.

    Returns:
      An `Averager` with two pure functions:
        init(tree) -> AverageState
        update(tree, state, num_updates=None) -> AverageState, whose field `average` is
        the average; `num_updates` replaces t. With `clock`, update also takes the time,
        by the clock's name.

    Raises:
      ValueError, TypeError: If an argument is out of its range, and from `update` if the
        structure of the tree or the mask or `debias` differs from that at `init`, or the
        state is swapped.

    Example:
      >>> averager = average_tree(0.5)
      >>> state = averager.init({"loss": 4.0})
      >>> state = averager.update({"loss": 2.0}, state)
      >>> print(state.average["loss"])
      3.0
    """
    return make_averager("average_tree", decay, **options)


@_takes_options
def averaged(
    optimizer: optax.GradientTransformation,
    decay: DecayLike,
    *,
    sequential: bool = True,
    overwrite_every: int | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it averages the parameters that it makes.

    The same average (EMA, Polyak average) as that of
    `optax.chain(optimizer, average_params(decay))`, but nothing can come between the
    optimizer and its average, and there are two options more.

    Args:
      optimizer: Any Optax transformation. Extra arguments of `update` are passed to it.
      decay: β in [0, 1] or a function t -> β.
      sequential: Average the parameters after the step (True, the default) or those
        before it (False).
      overwrite_every: k: after every k-th step the parameters are set to the average
        (Switch EMA). The updates then lead from the parameters to the average, exactly up
        to the rounding of `optax.apply_updates`; not from a parameter that is infinite.
        None, the default: never. A multiple of `every`. Not together with `sharding` and
        `memory_kind`.
      **options: As in `average_params`.

    Returns:
      A transformation whose state is an `AveragedState(inner_state, averaging)`.

    Raises:
      ValueError, TypeError: If an argument is out of its range, and from `update` if
        `params` or the time is missing, the mask, `debias` or the clock differs from that
        at `init`, or the state is swapped.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = averaged(optax.sgd(1.0), 0.5)
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(state.averaging.average)
      [-0.5 -0.5]

    References:
      Li et al., 2024, Switch EMA: a free lunch for better flatness and sharpness,
      https://arxiv.org/abs/2402.09240 (`overwrite_every`)
    """
    check_optimizer("averaged", "optimizer", optimizer)
    check_flag("averaged", "sequential", sequential)
    averager = make_recursion("averaged", decay, **options)
    if overwrite_every is not None:
        _check_overwriting(overwrite_every, **options)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        inner_state = inner.init(params)
        if overwrite_every is not None:
            refuse_primal_averaging("averaged: overwrite_every", inner_state)
        return AveragedState(inner_state, averager.init(params))

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        num_updates: Count | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, PyTree]:
        check_given("averaged", "averages the parameters", params)
        if not isinstance(state, AveragedState):
            raise TypeError(
                "averaged: the state must be an AveragedState as init makes it, got "
                f"{type(state).__name__}."
            )
        if num_updates is not None:
            extra_args["num_updates"] = num_updates
        try:
            updates, inner_state = inner.update(
                updates, state.inner_state, params, **extra_args
            )
            seen = params
            if sequential:
                # Overwriting returns a choice of two updates, which the caller's sum
                # takes rounded, unless XLA hoists the choice. So they are rounded here.
                updates = settled(updates, selected=overwrite_every is not None)
                seen = optax.apply_updates(params, updates)
        except (TypeError, ValueError, AttributeError) as error:
            refuse_unlike("averaged", params, error, updates=updates)
            raise
        averaging = averager.update(seen, state.averaging, num_updates, extra_args)
        if overwrite_every is not None:
            due = averaging.num_updates % overwrite_every == 0
            updates = _lead_to(averaging.average, params, updates, due)
        return updates, AveragedState(inner_state, averaging)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_overwriting(
    period: int,
    *,
    every: int,
    sharding: Placement,
    memory_kind: str | None,
    **others: object,
) -> None:
    """Raises unless the parameters can be set to the average every so many steps."""
    del others
    check_integer("averaged", "overwrite_every", period, 1)
    if period % every:
        raise ValueError(
            f"averaged: overwrite_every={period} must be a multiple of every={every}: "
            "between its moves the average is an old one."
        )
    alike = isinstance(sharding, str) and sharding == LIKE_PARAMS
    if not alike or memory_kind:
        raise ValueError(
            "averaged: overwrite_every needs the average where the parameters are: "
            "leave sharding and memory_kind out."
        )


def _lead_to(average: PyTree, params: PyTree, updates: PyTree, due: jax.Array) -> PyTree:
    """Updates that set the parameters to the average where `due`, the given ones else."""
    leaves, treedef = jax.tree.flatten(params)
    leads = [
        lead(p, a, u, due) if is_averaged(a) else u
        for p, u, a in zip(
            leaves,
            treedef.flatten_up_to(updates),
            treedef.flatten_up_to(average),
            strict=True,
        )
    ]
    return jax.tree.unflatten(treedef, leads)
