"""Local updates of one leaf by their definition, and the problem that workers solve.

NumPy, float64, one worker after the other; it shares no code with the library.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import emaopt

# Optimizers are functions (x, g, slots) -> x, which change `slots`.


def sgd(rate, momentum=0.0, nesterov=False):
    def step(x, g, slots):
        slots["m"] = momentum * slots.get("m", 0) + g
        return x - rate * (g + momentum * slots["m"] if nesterov else slots["m"])

    return step


def adam(rate, b1=0.9, b2=0.999, eps=1e-8):
    def step(x, g, slots):
        slots["t"] = slots.get("t", 0) + 1
        slots["m"] = b1 * slots.get("m", 0) + (1 - b1) * g
        slots["v"] = b2 * slots.get("v", 0) + (1 - b2) * g * g
        m, v = slots["m"] / (1 - b1 ** slots["t"]), slots["v"] / (1 - b2 ** slots["t"])
        return x - rate * m / (np.sqrt(v) + eps)

    return step


@dataclass
class Worker:
    local: Any
    pulled: Any
    slots: dict = field(default_factory=dict)
    gradients: list = field(default_factory=list)  # since the last exchange
    healthy: bool = True


COMMITS = {
    "delta": lambda worker, start: start - worker.local,
    "mean_delta": lambda worker, start: (start - worker.local) / len(worker.gradients),
    "mean_gradient": lambda worker, start: np.mean(worker.gradients, axis=0),
}


def simulate(
    start,
    gradient,
    steps,
    inner,
    outer,
    due,
    *,
    num_workers,
    commit="delta",
    reduce="mean",
    rate=None,
    healthy=lambda worker, step: True,
):
    """The center [T, ...] and the workers' parameters [T, W, ...] after steps 1 ... T.

    Args:
      gradient: (parameters of a worker, worker, step) -> gradient; steps count from 1.
      due: (step, local steps since the last exchange) -> whether there is one.
      rate: α of the elastic force, or None.
      healthy: False: the worker's commit is not finite if it is due now.
    """
    center, slots = np.asarray(start, np.float64), {}
    workers = [Worker(center, center) for _ in range(num_workers)]
    centers, rows = [], []
    for step in range(1, steps + 1):
        for number, worker in enumerate(workers):
            g = gradient(worker.local, number, step)
            worker.local = inner(worker.local, g, worker.slots)
            worker.gradients.append(g)
            worker.healthy = healthy(number, step)
        if due(step, len(workers[0].gradients)):
            exchange = in_turns if reduce == "sequential" else at_once
            able = [worker for worker in workers if worker.healthy]
            center = exchange(center, able, outer, slots, COMMITS[commit], reduce, rate)
            for worker in workers:
                worker.gradients = []
                if not worker.healthy:
                    worker.local = worker.pulled = center
        centers.append(center)
        rows.append([worker.local for worker in workers])
    return np.stack(centers), np.array(rows)


def at_once(center, workers, outer, slots, commit, reduce, rate):
    if rate is None:
        commits = [commit(worker, center) for worker in workers]
    else:
        commits = [rate * (center - worker.local) for worker in workers]
    total = sum(commits, np.zeros_like(center))
    if reduce == "mean" and workers:
        total = total / len(workers)
    new = outer(center, total, slots)
    for worker, move in zip(workers, commits, strict=True):
        worker.local = worker.pulled = new if rate is None else worker.local + move
    return new


def in_turns(center, workers, outer, slots, commit, reduce, rate):
    del reduce
    for worker in workers:
        if rate is None:
            center = outer(center, commit(worker, worker.pulled), slots)
            worker.local = worker.pulled = center
        else:
            move = rate * (center - worker.local)
            center = outer(center, move, slots)
            worker.local = worker.local + move
    return center


# A quadratic for each worker, with the noise of the step.

WORKERS = 3
TARGETS = np.random.default_rng(0).normal(size=(WORKERS, 4))
NOISE = np.random.default_rng(1).normal(size=(32, WORKERS, 4))
STARTS = np.random.default_rng(2).normal(size=(9, 4))


def gradient(params, worker, step):
    """Of one worker; `worker` may be a slice of them."""
    return 0.3 * (params - TARGETS[worker]) + NOISE[step, worker]


def gradients(params, step):
    """Of all workers: a tree of leaves [W, 4]."""
    return jax.tree.map(
        lambda p: (0.3 * (p - TARGETS) + jnp.asarray(NOISE)[step]).astype(p.dtype), params
    )


def applied(params, updates):
    """As `optax.apply_updates`; a parameter without an update stays."""
    return jax.tree.map(
        lambda u, p: p if u is None else optax.apply_updates(p, u),
        updates,
        params,
        is_leaf=lambda x: x is None,
    )


def stepper(tx, **options):
    """A compiled step (params, state, grads, **extra arguments) -> (params, state)."""

    def step(params, state, grads, **extra_args):
        updates, state = tx.update(grads, state, params, **extra_args)
        return applied(params, updates), state

    return jax.jit(step, **options)


def train(tx, start, steps, gradients=gradients, extra=lambda step: {}):
    """The center and the workers' parameters after each step: trees [T, ...]; the state.

    Args:
      start: One worker's parameters.
      gradients: (the workers' parameters, step) -> theirs.
      extra: step -> extra arguments.
    """
    params = emaopt.stack_workers(start, WORKERS)
    state, centers, rows = tx.init(params), [], []
    step = stepper(tx)
    for number in range(1, steps + 1):
        params, state = step(params, state, gradients(params, number), **extra(number))
        centers.append(emaopt.get_center(state))
        rows.append(params)
    return *(jax.tree.map(lambda *x: np.stack(x), *t) for t in (centers, rows)), state
