"""Eager updates against their definition: an own commit at once, others a round late."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from local_oracle import NOISE, STARTS, WORKERS, adam, gradient, gradients, sgd, train

import emaopt

pytestmark = pytest.mark.quick(2)

PERIOD, STEPS = 3, 14
OUTER = {
    "nesterov": (optax.sgd(0.7, 0.9, nesterov=True), sgd(0.7, 0.9, nesterov=True)),
    "adam": (optax.adam(0.2), adam(0.2)),
}
COMMITS = {
    "delta": lambda start, local, grads: start - local,
    "mean_delta": lambda start, local, grads: (start - local) / len(grads),
    "mean_gradient": lambda start, local, grads: np.mean(grads, axis=0),
}


def eager(outer=OUTER["nesterov"][0], **options):
    options = {"num_workers": WORKERS, "delay": PERIOD, "eager": True} | options
    return emaopt.local_updates(optax.sgd(0.1, 0.9), outer, period=PERIOD, **options)


def simulated(start, outer, commit, due, healthy=lambda worker, step: True, weight=None):
    """The shared center [T, ...] and the workers' parameters [T, W, ...], in float64.

    With weights the shares of the mean are Σ w_i D_i / Σ w_i, and an own commit counts
    w_i / (mean w · W).
    """
    inner, weight = sgd(0.1, 0.9), weight or (lambda worker, step: 1.0)
    center, slots = np.asarray(start, np.float64), {}
    local, own = [center] * WORKERS, [center] * WORKERS
    inner_slots = [{} for _ in range(WORKERS)]
    outer_slots = [{} for _ in range(WORKERS)]
    grads, able = [[] for _ in range(WORKERS)], [True] * WORKERS
    last, centers, rows = None, [], []
    for step in range(1, STEPS + 1):
        for i in range(WORKERS):
            if healthy(i, step):
                g = gradient(local[i], i, step)
                local[i] = inner(local[i], g, inner_slots[i])
            else:
                g, able[i] = np.zeros_like(center), False
            grads[i].append(g)
        if due(step):
            each = [COMMITS[commit](own[i], local[i], grads[i]) for i in range(WORKERS)]
            weights = [weight(i, step) if able[i] else 0.0 for i in range(WORKERS)]
            counting = sum(w > 0 for w in weights)
            scale = sum(weights) / max(counting, 1) or 1.0
            weights = [w / scale for w in weights]
            others = [np.zeros_like(center)] * WORKERS
            if last is not None:
                of_each, count = last
                mean = sum(of_each) / count
                others = [mean - x / count for x in of_each]
                center = outer(center, mean, slots)
            own_part = [w * x for w, x in zip(weights, each, strict=True)]
            last = own_part, max(counting, 1)
            for i in range(WORKERS):
                estimate = own_part[i] / WORKERS + others[i]
                local[i] = own[i] = outer(own[i], estimate, outer_slots[i])
            grads, able = [[] for _ in range(WORKERS)], [True] * WORKERS
        centers.append(center)
        rows.append(list(local))
    return np.stack(centers), np.array(rows)


def every(step):
    return step % PERIOD == 0


def assert_close(actual, expected, **options):
    options = {"rtol": 1e-10, "atol": 1e-12} | options
    for value, right in zip(actual, expected, strict=True):
        np.testing.assert_allclose(value, right, **options)


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize("outer", OUTER)
def test_eager_workers_are_the_simulated_ones(outer, commit):
    with jax.enable_x64(True):
        tx = eager(OUTER[outer][0], commit=commit)
        *actual, _ = train(tx, jnp.asarray(STARTS[0]), STEPS)
    assert_close(actual, simulated(STARTS[0], OUTER[outer][1], commit, every))


def test_each_fragment_is_eager_on_its_own():
    with jax.enable_x64(True):
        start = {"a": jnp.asarray(STARTS[0]), "b": jnp.asarray(STARTS[1])}
        centers, rows, _ = train(eager(num_fragments=2), start, STEPS)
    for offset, name in enumerate(start):

        def due(step, offset=offset):
            return (step + offset * PERIOD // 2) % PERIOD == 0

        right = simulated(STARTS[offset], OUTER["nesterov"][1], "delta", due)
        assert_close((centers[name], rows[name]), right)


def test_a_commit_that_is_forced_lands_the_one_before():
    forced = [2, 3, 7, 12]
    with jax.enable_x64(True):
        *actual, _ = train(
            eager(),
            jnp.asarray(STARTS[0]),
            STEPS,
            extra=lambda step: {"exchange": jnp.asarray(step in forced)},
        )
    right = simulated(STARTS[0], OUTER["nesterov"][1], "delta", forced.__contains__)
    assert_close(actual, right)


@pytest.mark.parametrize("weighted", [False, True])
def test_workers_left_out_go_on_from_their_own_center(weighted):
    def broken(worker, step):
        return (worker, step) in {(0, 3), (1, 5), (1, 8), (2, 8), (0, 9)}

    def weight(worker, step):
        return [1.0, 0.0, 2.5][(worker + step // 3) % 3]

    def with_nan(params, step):
        bad = np.array([broken(worker, step) for worker in range(WORKERS)])
        return jnp.where(bad[:, None], jnp.nan, gradients(params, step))

    def extra(step):
        weights = [weight(worker, step) for worker in range(WORKERS)]
        return {"weights": jnp.array(weights)} if weighted else {}

    with jax.enable_x64(True):
        *actual, state = train(eager(), jnp.asarray(STARTS[0]), STEPS, with_nan, extra)
    right = simulated(
        STARTS[0],
        OUTER["nesterov"][1],
        "delta",
        every,
        lambda worker, step: not broken(worker, step),
        weight if weighted else None,
    )
    # Weights are float32.
    assert_close(actual, right, **({"rtol": 1e-6, "atol": 1e-6} if weighted else {}))
    # One of the commits of step 3, one of 6, and all of 9, which landed at 6, 9 and 12.
    assert weighted or int(state.num_left_out) == 5


def test_estimates_of_a_linear_outer_optimizer_add_up_to_the_mean_of_all():
    """The workers' own centers: the shared one and a step by what each did last."""
    tx = eager(optax.sgd(1.0))
    with jax.enable_x64(True):
        *_, state = train(tx, jnp.asarray(STARTS[0]), 12)
        own = state.center - state.in_flight.sums / WORKERS
        np.testing.assert_allclose(state.pulled, own, rtol=1e-9)


def value_and_grad(params, batch):
    return jnp.sum(params["a"]), jax.tree.map(lambda p: 0.3 * p + batch, params)


@pytest.mark.parametrize("options", [{}, {"commit": "mean_gradient"}], ids=str)
def test_rounds_are_the_same_steps(options):
    each = jax.vmap(value_and_grad)
    with jax.enable_x64(True):
        tx = eager(OUTER["adam"][0], **options)
        start = {"a": jnp.asarray(STARTS[0]), "b": jnp.asarray(STARTS[1])}
        start = emaopt.stack_workers(start, WORKERS)
        params, state, update = start, tx.init(start), jax.jit(tx.update)
        for step in range(12):
            _, grads = each(params, jnp.asarray(NOISE[step]))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        one = jax.jit(functools.partial(emaopt.local_round, tx, each))
        actual = start, tx.init(start)
        for step in range(0, 12, 3):
            *actual, _ = one(*actual, jnp.asarray(NOISE[step : step + 3]))
    pairs = zip(*map(jax.tree.leaves, (tuple(actual), (params, state))), strict=True)
    for value, right in pairs:
        np.testing.assert_allclose(value, right, rtol=1e-9, atol=1e-12)


def test_synchronize_ends_at_the_mean_of_all_steps():
    tx = eager(optax.sgd(1.0))
    with jax.enable_x64(True):
        params = emaopt.stack_workers(jnp.asarray(STARTS[0]), WORKERS)
        state = tx.init(params)
        committed = 0
        for step in range(1, 9):
            before = params
            updates, state = tx.update(gradients(params, step), state, params)
            if not every(step):
                params = optax.apply_updates(params, updates)
                continue
            committed = committed + np.mean(state.in_flight.sums, axis=0)
            params = optax.apply_updates(before, updates)
        new = np.mean(np.asarray(state.pulled - params), axis=0)
        params, state = emaopt.synchronize(state, params)
        right = STARTS[0] - np.asarray(committed) - new
        np.testing.assert_allclose(np.asarray(emaopt.get_center(state)), right, rtol=1e-9)
        np.testing.assert_array_equal(np.asarray(params[1]), np.asarray(state.center))
