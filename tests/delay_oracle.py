"""Local updates whose exchange lands late, by their definition.

NumPy, float64, one worker after the other; it shares no code with the library. A worker
remembers where it stood at its last commit, which the library never stores.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Worker:
    local: Any
    base: Any  # progress is counted from here
    slots: dict = field(default_factory=dict)
    gradients: list = field(default_factory=list)  # since the last commit
    healthy: bool = True  # since the last commit


@dataclass
class Commit:
    value: Any
    local: Any  # where the worker stood
    counts: bool
    weight: float


def simulate_late(
    start,
    gradient,
    steps,
    inner,
    outer,
    due,
    *,
    num_workers,
    delay=0,
    mix=0.0,
    commit="delta",
    reduce="mean",
    healthy=lambda worker, step: True,
    weight=lambda worker, step: 1.0,
):
    """The center [T, ...] and the workers' parameters [T, W, ...] after steps 1 ... T.

    Args:
      gradient: (parameters of a worker, worker, step) -> gradient; steps count from 1.
      due: (step, steps since the last commits) -> whether commits are made.
      healthy: False: the worker cannot take the step.
      weight: (worker, step) -> the weight of a commit that is made then.
    """
    center, slots = np.asarray(start, np.float64), {}
    workers = [Worker(center, center) for _ in range(num_workers)]
    flying, since, centers, rows = None, 0, [], []
    for step in range(1, steps + 1):
        since += 1
        for number, worker in enumerate(workers):
            if healthy(number, step):
                g = gradient(worker.local, number, step)
                worker.local = inner(worker.local, g, worker.slots)
                worker.gradients.append(g)
            else:
                worker.healthy = False
                worker.gradients.append(np.zeros_like(center))
        new, now = None, due(step, since)
        if now:
            new = [
                commit_of(commit, worker, since, weight(number, step))
                for number, worker in enumerate(workers)
            ]
            for worker in workers:
                worker.base, worker.gradients, worker.healthy = worker.local, [], True
        landing = flying
        if delay == 0:
            landing, flying, new = new, None, None
        elif not (since >= delay or now):
            landing = None
        if landing is not None:
            center, pulled = apply(center, landing, outer, slots, reduce)
            for number, worker in enumerate(workers):
                fresh = None if new is None else new[number]
                pull(worker, pulled[number], landing[number], fresh, mix)
            flying = None
        flying = flying if new is None else new
        since = 0 if now else since
        centers.append(center)
        rows.append([worker.local for worker in workers])
    return np.stack(centers), np.array(rows)


def commit_of(kind, worker, since, weight):
    value = worker.base - worker.local
    if kind == "mean_delta":
        value = value / since
    if kind == "mean_gradient":
        value = np.mean(worker.gradients, axis=0)
    return Commit(value, worker.local, worker.healthy, weight)


def apply(center, commits, outer, slots, reduce):
    """The center, and what each worker pulls of it."""
    counting = [c for c in commits if c.counts and c.weight > 0]
    total = sum(c.weight for c in counting)
    shares = {id(c): c.weight * len(counting) / total for c in counting}
    if reduce == "sequential":
        pulled = []
        for c in commits:
            if id(c) in shares:
                center = outer(center, shares[id(c)] * c.value, slots)
            pulled.append(center if c.counts else None)
        return center, [center if p is None else p for p in pulled]
    together = sum((shares[id(c)] * c.value for c in counting), np.zeros_like(center))
    if reduce == "mean" and counting:
        together = together / len(counting)
    center = outer(center, together, slots)
    return center, [center] * len(commits)


def pull(worker, center, landed, fresh, mix):
    if not landed.counts:
        worker.local = worker.base = center
    elif mix == "carry":
        moved = center + (worker.local - landed.local)
        # What has been committed anew isn't progress any more.
        worker.base = center if fresh is None else moved
        if fresh is not None:
            fresh.local = moved
        worker.local = moved
    else:
        worker.local = mix * worker.local + (1 - mix) * center
        worker.base = center
    if fresh is not None and not landed.counts:
        fresh.local = center
