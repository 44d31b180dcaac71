"""Any optimizer inside of local updates, and local updates inside of anything."""

import contextlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from local_oracle import NOISE, TARGETS, WORKERS, stepper

import emaopt

pytestmark = pytest.mark.quick(1)

START = {"w": np.arange(8.0).reshape(4, 2) / 8, "b": np.array([1.0, -1.0])}
TARGET = {"w": np.stack([TARGETS, -TARGETS], -1), "b": TARGETS[:, :2]}


def gradients(params, worker, step):
    """Of one worker; steps count from 1."""
    pull = jax.tree.map(lambda p, t: 0.3 * (p - t[worker]), params, TARGET)
    return {
        "w": pull["w"] + NOISE[step, worker][:, None],
        "b": pull["b"] + NOISE[step, worker, :2],
    }


@contextlib.contextmanager
def counting_traces():
    """Counts what is compiled meanwhile."""
    events = []

    def note(event, duration, **_):
        if "trace" in event or "compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield lambda: len(events)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


# Inside

INNER = {
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "chain": optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.scale_by_adam(),
        optax.scale_by_schedule(lambda n: -0.1 / (1 + n)),
    ),
    "masked": optax.chain(
        optax.masked(optax.trace(0.9), {"w": True, "b": False}), optax.scale(-0.1)
    ),
    "partition": optax.partition(
        {"fast": optax.adam(0.1), "slow": optax.sgd(0.01)}, {"w": "fast", "b": "slow"}
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0.01, 8)
    ),
    "muon": optax.contrib.muon(0.1),
    "lion": optax.lion(0.1),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "averaged": emaopt.averaged(optax.sgd(0.1, 0.9), 0.5),
}


@pytest.mark.parametrize("inner", INNER)
def test_between_exchanges_each_worker_runs_its_optimizer(inner):
    inner = INNER[inner]
    with jax.enable_x64(True):
        tx = emaopt.local_sgd(inner, period=4, num_workers=WORKERS)
        params = emaopt.stack_workers(jax.tree.map(jnp.asarray, START), WORKERS)
        state, step, one = tx.init(params), stepper(tx), stepper(inner)
        workers = [jax.tree.map(jnp.asarray, START)] * WORKERS
        states = [inner.init(worker) for worker in workers]
        for number in range(1, 7):
            grads = [gradients(p, w, number) for w, p in enumerate(workers)]
            params, state = step(params, state, stacked(grads))
            for w in range(WORKERS):
                workers[w], states[w] = one(workers[w], states[w], grads[w])
            if number == 4:  # all pull the mean, and keep the rest
                mean = jax.tree.map(lambda *x: sum(x) / WORKERS, *workers)
                workers = [mean] * WORKERS
            chex.assert_trees_all_close(params, stacked(workers), rtol=1e-9, atol=1e-9)
        chex.assert_trees_all_close(
            state.inner_state, stacked(states), rtol=1e-9, atol=1e-9
        )


@pytest.mark.quick(2)
@pytest.mark.parametrize("jitted", [True, False])
def test_slots_that_the_inner_optimizer_widens_stay_wide(jitted):
    inner = optax.GradientTransformation(
        lambda params: jnp.zeros(params.shape, jnp.bfloat16),
        lambda updates, state, params=None: (updates, state + updates),
    )
    tx = emaopt.local_sgd(inner, period=9, num_workers=2)
    params, grads = jnp.ones((2, 3)), jnp.full((2, 3), 1 + 2**-12, jnp.float32)
    update = jax.jit(tx.update) if jitted else tx.update
    _, state = update(grads, tx.init(params), params)
    assert state.inner_state.dtype == jnp.float32
    np.testing.assert_array_equal(state.inner_state, grads)


def polyak(per_worker):
    """Polyak's step size takes the value of the loss, and `scale` is for all."""
    inner = optax.polyak_sgd(max_learning_rate=1.0)

    def update(updates, state, params=None, *, value, scale):
        updates, state = inner.update(updates, state, params, value=value)
        return jax.tree.map(lambda u: scale * u, updates), state

    return emaopt.local_sgd(
        optax.GradientTransformationExtraArgs(inner.init, update),
        period=9,
        num_workers=WORKERS,
        per_worker=per_worker,
    )


def test_extra_arguments_that_are_declared_per_worker_are_each_workers():
    tx = polyak(["value"])
    params = emaopt.stack_workers(jnp.ones(4), WORKERS)
    grads = jnp.asarray(TARGETS, jnp.float32)
    values, scale = jnp.array([0.1, 0.2, 0.4]), jnp.float32(0.5)
    updates, _ = tx.update(grads, tx.init(params), params, value=values, scale=scale)
    steps = np.minimum(np.float64(values) / np.sum(TARGETS**2, axis=1), 1)
    np.testing.assert_allclose(updates, -0.5 * steps[:, None] * TARGETS, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^local_sgd: value is one of per_worker.*\(\)"):
        tx.update(grads, tx.init(params), params, value=jnp.ones(()), scale=scale)


@pytest.mark.parametrize("make", [jax.random.PRNGKey, jax.random.key])
@pytest.mark.parametrize("jitted", [True, False])
def test_other_extra_arguments_go_whole_to_every_worker(make, jitted):
    seen = []

    def update(updates, state, params=None, *, key, table, name):
        seen.append((key.shape, table["t"].shape, name))
        return jax.tree.map(lambda u: u + jax.random.normal(key, u.shape), updates), state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = emaopt.local_sgd(inner, period=9, num_workers=2)
    params, key = emaopt.stack_workers(jnp.zeros(3), 2), make(0)

    def step(key, table):
        extra = {"key": key, "table": table, "name": "text"}
        return tx.update(params, tx.init(params), params, **extra)[0]

    updates = (jax.jit(step) if jitted else step)(key, {"t": jnp.ones((2, 5))})
    assert set(seen) == {(key.shape, (2, 5), "text")}
    noise = np.tile(jax.random.normal(key, (3,)), (2, 1))
    np.testing.assert_allclose(updates, noise, rtol=1e-6)


# A step by its program


@pytest.mark.parametrize("num_fragments", [1, 12])
def test_inner_optimizer_is_traced_once_whatever_the_number_of_fragments(num_fragments):
    calls = []

    def update(updates, state, params=None):
        calls.append(1)
        return updates, state

    inner = optax.GradientTransformation(optax.init_empty_state, update)
    tx = emaopt.local_sgd(inner, period=12, num_workers=2, num_fragments=num_fragments)
    params = {str(i): jnp.ones((2, 3)) for i in range(12)}
    jax.jit(tx.update).lower(params, tx.init(params), params)
    assert len(calls) == 1


EAGER = {
    "every": emaopt.average_params(0.9, every=10),
    "lookahead": emaopt.lookahead(optax.sgd(0.1), period=2),
    "stacked": emaopt.local_sgd(optax.adam(0.1), period=2, num_workers=2),
}


@pytest.mark.parametrize("name", EAGER)
def test_outside_of_jit_a_step_traces_nothing_new(name):
    tx, params = EAGER[name], {"w": jnp.ones((2, 3))}
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state, params)
    with counting_traces() as traced:
        for _ in range(4):
            _, state = tx.update(params, state, params)
    assert traced() == 0


# Outside

LOCAL = emaopt.local_sgd(optax.sgd(0.1), period=2, num_workers=2)
MASK = {"w": True, "b": False}
WRAPPERS = {
    "nothing": LOCAL,
    "chain": optax.chain(optax.clip_by_global_norm(100.0), LOCAL),
    "named_chain": optax.named_chain(("clip", optax.clip(100.0)), ("local", LOCAL)),
    "masked": optax.masked(LOCAL, {"w": True, "b": True}),
    "partition": optax.partition({"all": LOCAL}, {"w": "all", "b": "all"}),
    "apply_if_finite": optax.apply_if_finite(LOCAL, 3),
    "averaged": emaopt.averaged(LOCAL, 0.5),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda rate: emaopt.local_sgd(optax.sgd(rate), period=2, num_workers=2)
    )(0.1),
    "MultiSteps of one": optax.MultiSteps(LOCAL, 1),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_center_and_spread_are_read_through_any_wrapper(wrapper):
    tx = WRAPPERS[wrapper]
    params = emaopt.stack_workers(jax.tree.map(jnp.float32, START), 2)
    grads = jax.tree.map(
        lambda p: p * jnp.arange(1.0, 3).reshape(2, *[1] * (p.ndim - 1)), params
    )
    state, step = tx.init(params), stepper(tx)
    for _ in range(3):
        params, state = step(params, state, grads)
    # Each step takes 0.1 and 0.2 of the start; at the second, the center has the mean.
    center = jax.tree.map(lambda x: 0.7 * x, START)
    chex.assert_trees_all_close(emaopt.get_center(state), center, rtol=1e-5)
    spread = np.array([0.1, 0.2]) / 0.7
    np.testing.assert_allclose(emaopt.worker_spread(state, params), spread, rtol=1e-5)


def test_center_is_read_from_a_train_state():
    params = emaopt.stack_workers(jax.tree.map(jnp.float32, START), 2)
    train_state = TrainState.create(apply_fn=None, params=params, tx=LOCAL)
    train_state = train_state.apply_gradients(grads=params)
    chex.assert_trees_all_close(
        emaopt.get_center(train_state), jax.tree.map(np.float32, START)
    )


def test_center_of_masked_local_updates_has_no_place_for_other_leaves():
    params = emaopt.stack_workers(jax.tree.map(jnp.float32, START), 2)
    tx = optax.masked(LOCAL, MASK)
    state, step = tx.init(params), stepper(tx)
    for _ in range(2):
        params, state = step(params, state, jax.tree.map(jnp.ones_like, params))
    center = emaopt.get_center(state)
    np.testing.assert_allclose(center["w"], START["w"] - 0.2, rtol=1e-5)
    assert center["b"] == optax.MaskedNode()
    np.testing.assert_allclose(emaopt.worker_spread(state, params), 0, atol=1e-6)


TWO = {
    "named_chain": optax.named_chain(("near", LOCAL), ("far", LOCAL)),
    "partition": optax.partition(
        {"near": LOCAL, "far": LOCAL}, {"w": "near", "b": "far"}
    ),
}


@pytest.mark.parametrize("read", ["get_center", "worker_spread", "synchronize"])
@pytest.mark.parametrize("wrapper", TWO)
def test_which_of_several_centers_has_to_be_said(wrapper, read):
    params = emaopt.stack_workers(jax.tree.map(jnp.float32, START), 2)
    state = TWO[wrapper].init(params)
    arguments = (state,) if read == "get_center" else (state, params)
    message = f"^{read}: several centers(?=.*near)(?=.*far).*name="
    with pytest.raises(ValueError, match=message):
        getattr(emaopt, read)(*arguments)
    center = emaopt.get_center(state, name="near")
    np.testing.assert_allclose(center["w"], START["w"])


@pytest.mark.parametrize(
    "state, name, message",
    [
        (optax.adam(0.1).init(jnp.zeros(2)), None, "no center in this optimizer state"),
        (LOCAL.init(jnp.zeros((2, 2))), "other", "under the name 'other'"),
    ],
    ids=["none", "another name"],
)
def test_center_that_is_not_there(state, name, message):
    with pytest.raises(ValueError, match=f"^get_center: .*{re.escape(message)}"):
        emaopt.get_center(state, name=name)


def test_averaged_outer_optimizer_averages_the_centers_at_exchanges():
    outer = emaopt.averaged(optax.sgd(0.7, momentum=0.9), 0.5)
    tx = emaopt.local_updates(optax.sgd(0.1), outer, period=3, num_workers=2)
    params = emaopt.stack_workers(jnp.zeros(3), 2)
    state, step, centers = tx.init(params), stepper(tx), [np.zeros(3)]
    for number in range(1, 11):
        params, state = step(params, state, jnp.full((2, 3), float(number)))
        if number % 3 == 0:
            centers.append(np.float64(emaopt.get_center(state)))
    weights = emaopt.decay_weights(0.5, 3)
    expected = np.tensordot(weights, np.stack(centers), axes=1)
    np.testing.assert_allclose(emaopt.get_average(state), expected, rtol=1e-5)


def test_averaged_local_updates_average_each_worker():
    tx = emaopt.averaged(emaopt.diloco(optax.sgd(0.1), period=3, num_workers=2), 0.5)
    params = emaopt.stack_workers(jnp.ones(3), 2)
    state, step, rows = tx.init(params), stepper(tx), [params]
    for number in range(1, 6):
        grads = jnp.array([[1.0], [-2.0]]) * number * jnp.ones((2, 3))
        params, state = step(params, state, grads)
        rows.append(params)
    weights = emaopt.decay_weights(0.5, 5)
    expected = np.tensordot(weights, np.float64(np.stack(rows)), axes=1)
    np.testing.assert_allclose(emaopt.get_average(state), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_worker_spread_is_the_distance_of_each_row_from_the_center(dtype):
    random = np.random.default_rng(0)
    unit = 1j if dtype == jnp.complex64 else 1
    rows = {
        n: jnp.asarray(unit * random.normal(size=(3, *x.shape)), dtype)
        for n, x in START.items()
    }
    start = jax.tree.map(lambda x: jnp.asarray(x, dtype), START)
    state = emaopt.local_sgd(optax.sgd(0.1), period=2, num_workers=3).init(
        emaopt.stack_workers(start, 3)
    )
    flat = [
        np.concatenate([np.asarray(x[n], np.complex128).reshape(w, -1) for n in START], 1)
        for x, w in ((rows, 3), (start, 1))
    ]
    expected = np.linalg.norm(flat[0] - flat[1], axis=1) / np.linalg.norm(flat[1])
    np.testing.assert_allclose(emaopt.worker_spread(state, rows), expected, rtol=1e-5)
