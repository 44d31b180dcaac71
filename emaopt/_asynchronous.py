"""Asynchronous workers around a parameter server, replayed on one device."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from emaopt._checks import (
    check_callable,
    check_flag,
    check_integer,
    check_number,
    check_optimizer,
)
from emaopt._commits import accumulate, check_commit, make_commit, start_center
from emaopt._jax_internals import traced
from emaopt._rounding import applied
from emaopt._tree_checks import check_arrays
from emaopt._types import PyTree, Scalar

Staleness: TypeAlias = Callable[[jax.Array], ArrayLike]  # τ -> factor on a commit


class AsyncTrace(NamedTuple):
    """Result of `simulate_async`; index 0 of a tree is before the first event.

    center: leaves [E+1, ...]. local: the workers' parameters, leaves [E+1, W, ...], or
    None. pushed: [E], whether the event ended in a push. staleness: [E], the pushes of
    others since the worker's last pull.
    """

    center: PyTree  # leaves [E+1, ...], float32 at least
    local: PyTree  # leaves [E+1, W, ...] in the parameters' dtypes, or None
    pushed: jax.Array  # [E] bool, whether the event ended in a push
    staleness: jax.Array  # [E] int32, pushes by others since the worker's last pull


class _Server(NamedTuple):
    """State that the workers share: the parameter server."""

    center: PyTree  # like the parameters, float32 at least
    outer_state: PyTree  # of the outer optimizer
    num_pushes: Scalar  # () int32, of all workers


class _Worker(NamedTuple):
    """State of one worker; in the scan, of all workers with a leading axis of W."""

    local: PyTree  # like the parameters
    inner_state: PyTree  # of the inner optimizer, kept across pulls
    pulled: PyTree  # the center at the last pull, or None where no commit needs it
    accumulated: PyTree  # sum of the gradients since the last push, or None
    num_steps: Scalar  # () int32, never reset
    seen_pushes: Scalar  # () int32, the server's `num_pushes` at the last pull


def simulate_async(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None,
    params: PyTree,
    grad_fn: Callable[[PyTree, jax.Array, jax.Array], PyTree],
    schedule: ArrayLike | Sequence[int],
    *,
    period: int,
    commit: str = "delta",
    num_workers: int,
    moving_rate: float | None = None,
    staleness: Staleness | None = None,
    keep_local: bool = True,
) -> AsyncTrace:
    """Replays asynchronous workers around a parameter server, one event at a time.

    All workers and the center start from `params`. Event e is one step of the worker
    w = schedule[e]:

        g = grad_fn(local_w, w, e)
        local_w moves by `inner` with g;     n_w = n_w + 1

    and if n_w is a multiple of `period`, the worker pushes a commit (a pseudo-gradient)
    and pulls the center:

        commit "delta":          c = pulled_w - local_w
        commit "mean_delta":     c = (pulled_w - local_w) / period
        commit "mean_gradient":  c = Σ g / period, the gradients since the last push
        center moves by `outer` with staleness(τ) c as its gradient
        local_w = pulled_w = center

    where pulled_w is the center that w pulled last and τ, its staleness, counts the
    pushes of the other workers since then. Between its own pushes a worker sees nothing
    of the others. The methods by name, with sgd = optax.sgd(1.0):

        DOWNPOUR, asynchronous local SGD   outer=sgd
        AGN, Hermans et al.                outer=sgd, commit="mean_delta"
        AGN, tf.contrib.opt.AGNOptimizer   outer=inner, commit="mean_gradient"
        DynSGD                             outer=sgd, staleness=lambda tau: 1 / (1 + tau)
        EASGD                              outer=None, moving_rate=α

    EASGD pulls nothing. At a push, with d = local_w - center for the center as it is now,
    both move: local_w = local_w - α d and center = center + α d.

    What to watch: the order of the events is an input and the only clock; the same
    schedule gives the same run. The trace holds the center after each event and, with
    `keep_local`, the parameters of all workers: W times as much.

    Args:
      inner: The workers' optimizer. Each worker has slots of its own and keeps them
        across pulls.
      outer: The center's optimizer, with one state for all pushes. None with
        `moving_rate`.
      params: Any tree of floating arrays.
      grad_fn: A function (params, worker, event) -> gradients like `params`. Worker and
        event are int32 scalars, traced; let them choose the batch.
      schedule: [E] whole numbers in [0, num_workers), the worker of each event; an array
        or a list, concrete or traced. A traced one cannot be checked: numbers outside of
        the range go to the nearest worker.
      period: Steps of a worker between its pushes, 1 or more.
      commit: "delta", "mean_delta" or "mean_gradient". Default "delta".
      num_workers: W, 1 or more.
      moving_rate: α in (0, 1] for EASGD. Default None: no EASGD.
      staleness: A function of τ (int32 scalar, traced) that returns the factor on the
        commit. Default None: no factor.
      keep_local: Whether to record the workers' parameters as well. Default True.

    Returns:
      An `AsyncTrace(center, local, pushed, staleness)`. Index e of `center` and `local`
      is after e events, index e of `pushed` and `staleness` belongs to event e.

    Raises:
      ValueError, TypeError: If an argument is out of its range, if `moving_rate` comes
        with an outer optimizer, another commit or `staleness`, or if the gradients of
        `grad_fn` have another structure than the parameters.

    Example:
      Two workers take turns, and each pushes after two steps of its own:

      >>> trace = simulate_async(
      ...     optax.sgd(1.0),
      ...     optax.sgd(1.0),
      ...     jnp.zeros(()),
      ...     lambda params, worker, event: -jnp.ones(()),
      ...     [0, 1, 0, 1],
      ...     period=2,
      ...     num_workers=2,
      ... )
      >>> print(trace.center, trace.pushed, trace.staleness)
      [0. 0. 0. 2. 4.] [False False  True  True] [0 0 0 1]

    References:
      Dean et al., 2012, Large scale distributed deep networks (DOWNPOUR),
      https://papers.nips.cc/paper/4687-large-scale-distributed-deep-networks
      Hermans, Spanakis and Möckel, 2017, Accumulated gradient normalization,
      https://arxiv.org/abs/1710.02368
      TensorFlow, tf.contrib.opt.AGNOptimizer,
      https://www.tensorflow.org/versions/r1.15/api_docs/python/tf/contrib/opt/AGNOptimizer
      Jiang, Cui, Zhang and Yu, 2017, Heterogeneity-aware distributed parameter servers
      (DynSGD), https://doi.org/10.1145/3035918.3035933
      Zhang, Choromanska and LeCun, 2015, Deep learning with elastic averaging SGD,
      algorithm 1, https://arxiv.org/abs/1412.6651
    """
    check_optimizer("simulate_async", "inner", inner)
    check_integer("simulate_async", "period", period, 1)
    check_integer("simulate_async", "num_workers", num_workers, 1)
    check_commit("simulate_async", commit)
    check_flag("simulate_async", "keep_local", keep_local)
    _check_functions(grad_fn, staleness)
    schedule = _check_schedule(schedule, num_workers)
    if moving_rate is None:
        check_optimizer("simulate_async", "outer", outer)
        rate = None
    else:
        _check_elastic(moving_rate, outer=outer, commit=commit, staleness=staleness)
        rate = float(moving_rate)
    inner = optax.with_extra_args_support(inner)
    outer = optax.with_extra_args_support(optax.identity() if outer is None else outer)
    summed = commit == "mean_gradient"
    zero = jnp.zeros((), jnp.int32)
    params = _check_params(params)
    center = jax.tree.map(start_center, params)
    server = _Server(center, outer.init(center), num_pushes=zero)
    worker = _Worker(
        local=params,
        inner_state=inner.init(params),
        pulled=None if summed or moving_rate is not None else center,
        accumulated=jax.tree.map(jnp.zeros_like, center) if summed else None,
        num_steps=zero,
        seen_pushes=zero,
    )

    def train(worker: _Worker, index: jax.Array, event: jax.Array) -> _Worker:
        grads = grad_fn(worker.local, index, event)
        if jax.tree.structure(grads) != jax.tree.structure(params):
            raise ValueError(
                "simulate_async: grad_fn must return gradients like the parameters, "
                f"{jax.tree.structure(params)}, it returned {jax.tree.structure(grads)}."
            )
        updates, inner_state = inner.update(grads, worker.inner_state, worker.local)
        accumulated = worker.accumulated
        if summed:
            first = worker.num_steps % period == 0
            accumulated = jax.tree.map(
                lambda old, g: accumulate(old, g, first), accumulated, grads
            )
        return worker._replace(
            local=applied(worker.local, updates),
            inner_state=inner_state,
            accumulated=accumulated,
            num_steps=worker.num_steps + 1,
        )

    def make_commits(worker: _Worker, tau: jax.Array) -> PyTree:
        # `other` is the sum of the gradients, or the center that was pulled.
        def one(local: jax.Array, other: jax.Array) -> jax.Array:
            pulled, accumulated = (None, other) if summed else (other, None)
            value = make_commit(commit, pulled, local, accumulated, jnp.int32(period))
            return value * factor.astype(value.dtype)

        factor = jnp.float32(1) if staleness is None else _factor(staleness, tau)
        others = worker.accumulated if summed else worker.pulled
        return jax.tree.map(one, worker.local, others)

    def exchange(server: _Server, worker: _Worker) -> tuple[_Server, _Worker]:
        center, outer_state, num_pushes = server
        if rate is None:
            commits = make_commits(worker, num_pushes - worker.seen_pushes)
            updates, outer_state = outer.update(commits, outer_state, center)
            center = optax.apply_updates(center, updates)
            local = jax.tree.map(lambda p, c: c.astype(p.dtype), worker.local, center)
        else:
            moves = jax.tree.map(
                lambda p, c: rate * (p.astype(c.dtype) - c),
                worker.local,
                center,
            )
            center = jax.tree.map(jnp.add, center, moves)
            local = jax.tree.map(
                lambda p, d: (p.astype(d.dtype) - d).astype(p.dtype), worker.local, moves
            )
        # The worker has seen its own push, which adds nothing to its staleness.
        return _Server(center, outer_state, num_pushes + 1), worker._replace(
            local=local,
            pulled=None if worker.pulled is None else center,
            seen_pushes=num_pushes + 1,
        )

    def keep(server: _Server, worker: _Worker) -> tuple[_Server, _Worker]:
        # Without the barrier the slots bypass the conditional. XLA then computes them
        # twice, to read and to store them, and copies those of all workers at each event.
        return lax.optimization_barrier((server, worker))

    def step(
        carry: tuple[_Server, _Worker], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[_Server, _Worker], AsyncTrace]:
        server, workers = carry
        index, event = inputs
        worker = jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), workers
        )
        worker = train(worker, index, event)
        # Before the exchange, which counts this push.
        tau = server.num_pushes - worker.seen_pushes
        pushed = worker.num_steps % period == 0
        server, worker = lax.cond(pushed, exchange, keep, server, worker)
        workers = jax.tree.map(
            lambda x, new: lax.dynamic_update_index_in_dim(x, new, index, 0),
            workers,
            worker,
        )
        local = workers.local if keep_local else None
        return (server, workers), AsyncTrace(server.center, local, pushed, tau)

    workers = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_workers, *jnp.shape(x))), worker
    )
    events = jnp.arange(schedule.size, dtype=jnp.int32)
    trace = lax.scan(step, (server, workers), (schedule, events))[1]
    center, local = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]),
        (center, workers.local if keep_local else None),
        (trace.center, trace.local),
    )
    return trace._replace(center=center, local=local)


def _factor(staleness: Staleness, tau: jax.Array) -> jax.Array:
    """The factor on a commit of staleness τ; raises unless it is a real scalar."""
    factor = jnp.asarray(staleness(tau))
    if factor.shape or not jnp.isrealobj(factor):
        raise ValueError(
            "simulate_async: staleness must return a real scalar, it returned "
            f"{factor.dtype} of shape {factor.shape}."
        )
    return factor


def _check_functions(grad_fn: object, staleness: object) -> None:
    """Raises unless both are functions; `staleness` may be None."""
    check_callable("simulate_async", "grad_fn", grad_fn, 3)
    if staleness is not None and not callable(staleness):
        raise TypeError(
            "simulate_async: staleness must be a function of τ that returns the factor "
            f"on a commit such as lambda tau: 1 / (1 + tau), got {staleness!r}."
        )
    check_callable("simulate_async", "staleness", staleness, 1, optional=True)


def _check_elastic(moving_rate: object, **others: object) -> None:
    """Raises unless α is in (0, 1] and the arguments of other methods are default."""
    check_number("simulate_async", "moving_rate", moving_rate, 0, 1, above=True)
    for name, default in {"outer": None, "commit": "delta", "staleness": None}.items():
        if others[name] != default:
            raise ValueError(
                f"simulate_async: with moving_rate (EASGD) {name} must be {default!r}, "
                f"the default, got {others[name]!r}."
            )


def _check_params(params: PyTree) -> PyTree:
    """The parameters as arrays; raises unless all are floating or complex."""
    check_arrays("simulate_async", "params", params)
    params = jax.tree.map(jnp.asarray, params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                "simulate_async: params must be a tree of floating arrays, but "
                f"params{jax.tree_util.keystr(path)} is {leaf.dtype}."
            )
    return params


def _check_schedule(schedule: PyTree, num_workers: int) -> jax.Array:
    """The schedule as int32 [E]; raises unless each number is that of a worker."""
    workers = schedule if traced(schedule) else np.asarray(schedule)
    empty = workers.shape == (0,)  # NumPy makes [] floating
    if workers.ndim != 1 or not (empty or jnp.issubdtype(workers.dtype, jnp.integer)):
        raise ValueError(
            "simulate_async: schedule must be a 1-D array of whole numbers, the worker "
            f"of each event, got {workers.dtype} of shape {workers.shape}."
        )
    if not traced(schedule) and not empty:
        low, high = workers.min(), workers.max()
        if low < 0 or high >= num_workers:
            raise ValueError(
                f"simulate_async: schedule must hold workers in [0, {num_workers}), got "
                f"numbers from {low} to {high}."
            )
    return jnp.clip(workers, 0, num_workers - 1).astype(jnp.int32)
