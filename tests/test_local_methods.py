"""Methods of local updates by their definitions, and TensorFlow's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from local_oracle import (
    STARTS,
    WORKERS,
    adam,
    gradient,
    gradients,
    sgd,
    simulate,
    stepper,
    train,
)
from tensorflow_records import assert_close, cases, load

import emaopt

SGD, MOMENTUM, ADAM = optax.sgd(0.1), optax.sgd(0.1, 0.9), optax.adam(0.1)


def block_momentum(eta, zeta=1.0, nesterov=True):
    """As in the paper, of two sequences: the model W, and where workers start from.

    G = mean θ - start, Δ := η Δ + ζ G, W := W + Δ, start := W, or W + η Δ.
    """

    def step(start, delta, slots):
        slots["Δ"] = eta * slots.get("Δ", 0) - zeta * delta
        slots["W"] = slots.get("W", start) + slots["Δ"]
        return slots["W"] + (eta * slots["Δ"] if nesterov else 0)

    return step


# The method; the steps of its workers and of its center, and what else it is by.
METHODS = {
    "local SGD": (
        lambda **kw: emaopt.local_sgd(ADAM, **kw),
        (adam(0.1), sgd(1.0), {}),
    ),
    "DOWNPOUR": (
        lambda **kw: emaopt.local_updates(SGD, optax.sgd(1.0), reduce="sum", **kw),
        (sgd(0.1), sgd(1.0), {"reduce": "sum"}),
    ),
    "SlowMo": (
        lambda **kw: emaopt.local_updates(SGD, optax.sgd(0.9, momentum=0.6), **kw),
        (sgd(0.1), sgd(0.9, 0.6), {}),
    ),
    "DiLoCo": (
        lambda **kw: emaopt.diloco(ADAM, **kw),
        (adam(0.1), sgd(0.7, 0.9, nesterov=True), {}),
    ),
    "DiLoCo, outer optimizer": (
        lambda **kw: emaopt.diloco(ADAM, optax.adam(0.2), **kw),
        (adam(0.1), adam(0.2), {}),
    ),
    "AGN, TensorFlow": (
        lambda period, **kw: emaopt.agn(MOMENTUM, period, **kw),
        (sgd(0.1, 0.9), sgd(0.1, 0.9), {"commit": "mean_gradient"}),
    ),
    "AGN, TensorFlow, center optimizer": (
        lambda period, **kw: emaopt.agn(
            ADAM, period, center_optimizer=SGD, reduce="sum", **kw
        ),
        (adam(0.1), sgd(0.1), {"commit": "mean_gradient", "reduce": "sum"}),
    ),
    "AGN, paper": (
        lambda period, **kw: emaopt.agn(
            ADAM, period, variant="paper", reduce="sequential", **kw
        ),
        (adam(0.1), sgd(1.0), {"commit": "mean_delta", "reduce": "sequential"}),
    ),
    "EASGD": (
        lambda **kw: emaopt.easgd(SGD, **kw),
        (sgd(0.1), sgd(1.0), {"rate": 0.9 / (3 * WORKERS), "reduce": "sum"}),
    ),
    "EAMSGD": (
        lambda **kw: emaopt.easgd(MOMENTUM, moving_rate=0.3, reduce="sequential", **kw),
        (sgd(0.1, 0.9), sgd(1.0), {"rate": 0.3, "reduce": "sequential"}),
    ),
    "block momentum": (
        lambda **kw: emaopt.block_momentum(SGD, **kw),
        (sgd(0.1), block_momentum(1 - 1 / WORKERS), {}),
    ),
    "block momentum, plain": (
        lambda **kw: emaopt.block_momentum(
            SGD, block_momentum=0.5, block_learning_rate=0.8, nesterov=False, **kw
        ),
        (sgd(0.1), block_momentum(0.5, 0.8, False), {}),
    ),
}


@pytest.mark.parametrize("method, definition", METHODS.values(), ids=METHODS)
def test_method_is_its_definition(method, definition):
    inner, outer, options = definition
    with jax.enable_x64(True):
        tx = method(period=3, num_workers=WORKERS)
        actual = train(tx, jnp.asarray(STARTS[0]), 10)[:2]
    expected = simulate(
        STARTS[0],
        gradient,
        10,
        inner,
        outer,
        lambda step, since: step % 3 == 0,
        num_workers=WORKERS,
        **options,
    )
    for value, right in zip(actual, expected, strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-10)


# One worker, and workers that always meet


def alone(tx, steps):
    """The parameters after each step of one worker, [T, ...], and the last state."""
    params = jnp.asarray(STARTS[0])
    state, step, rows = tx.init(params), stepper(tx), []
    for number in range(1, steps + 1):
        params, state = step(params, state, jnp.asarray(gradient(params, 0, number)))
        rows.append(params)
    return np.stack(rows), state


@pytest.mark.parametrize(
    "inner, period, rate", [(MOMENTUM, 1, 0.3), (ADAM, 4, 0.5)], ids=["momentum", "adam"]
)
def test_lookahead_is_that_of_optax(inner, period, rate):
    with jax.enable_x64(True):
        tx = emaopt.lookahead(inner, period=period, slow_step_size=rate)
        fast, state = alone(tx, 9)
        theirs = optax.lookahead(inner, sync_period=period, slow_step_size=rate)
        params = optax.LookaheadParams.init_synced(jnp.asarray(STARTS[0]))
        their_state, step = theirs.init(params), stepper(theirs)
        for number in range(1, 10):
            grads = jnp.asarray(gradient(params.fast, 0, number))
            params, their_state = step(params, their_state, grads)
            np.testing.assert_allclose(fast[number - 1], params.fast, rtol=1e-12)
        np.testing.assert_allclose(emaopt.get_center(state), params.slow, rtol=1e-12)


@pytest.mark.parametrize(
    "inner, period", [(MOMENTUM, 4), (ADAM, 1)], ids=["momentum", "adam"]
)
def test_one_worker_of_local_sgd_is_its_optimizer(inner, period):
    with jax.enable_x64(True):
        expected, _ = alone(inner, 8)
        rows, state = alone(emaopt.local_sgd(inner, period=period), 8)
    np.testing.assert_allclose(rows, expected, rtol=1e-12)
    np.testing.assert_allclose(emaopt.get_center(state), expected[-1], rtol=1e-12)


def test_workers_that_meet_at_every_step_are_data_parallel_training():
    inner = MOMENTUM
    with jax.enable_x64(True):
        tx = emaopt.local_sgd(inner, period=1, num_workers=WORKERS)
        centers, *_ = train(tx, jnp.asarray(STARTS[0]), 6)
        params = jnp.asarray(STARTS[0])
        state, step = inner.init(params), stepper(inner)
        for number in range(1, 7):
            grads = gradients(jnp.tile(params, (WORKERS, 1)), number)
            params, state = step(params, state, jnp.mean(grads, axis=0))
            np.testing.assert_allclose(centers[number - 1], params, rtol=1e-10)


@pytest.mark.parametrize("reduce", ["mean", "sequential"])
def test_variants_of_agn_agree_for_sgd(reduce):
    options = {"num_workers": WORKERS, "reduce": reduce}
    with jax.enable_x64(True):
        tf, paper = (
            train(emaopt.agn(SGD, 3, variant=v, **options), jnp.asarray(STARTS[0]), 7)
            for v in ("tf", "paper")
        )
    for value, right in zip(tf[:2], paper[:2], strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-10)


@pytest.mark.parametrize(
    "method, steps",
    [
        (lambda inner: emaopt.agn(inner, num_workers=WORKERS), 10),
        (lambda inner: emaopt.diloco(inner, num_workers=WORKERS), 500),
        (lambda inner: emaopt.lookahead(inner), 5),
    ],
    ids=["agn", "diloco", "lookahead"],
)
def test_default_period(method, steps):
    tx = method(optax.sgd(1.0))
    params = jnp.zeros((WORKERS, 2))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.ones_like(params), state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, state.since_exchange[0]

    _, since = jax.lax.scan(step, (params, tx.init(params)), length=steps + 1)
    expected = np.arange(1, steps + 2)
    expected[-2:] = [0, 1]
    np.testing.assert_array_equal(since, expected)


# TensorFlow: a cluster whose workers take turns is `reduce="sequential"`


def of_tensorflow(inner):
    rate = inner["learning_rate"]
    if inner["cls"] == "AdamOptimizer":
        return optax.adam(rate, inner["beta1"], inner["beta2"], inner["epsilon"])
    return optax.sgd(rate, inner.get("momentum"), inner.get("use_nesterov", False))


def takes_turns(case):
    record = load(case)
    schedule = record.arrays["schedule"]
    return np.array_equal(
        schedule, np.arange(len(schedule)) % record.hparams["num_workers"]
    )


def corrects_bias_wrongly(case):
    # TENSORFLOW_BUGS in tests/test_asynchronous.py says how; not where both betas are 0.
    inner = load(case).hparams["inner"]
    return case.startswith("agn/") and inner.get("beta1", 0) > 0


RECORDS = [
    case
    for case in cases("agn", "grad", "local", "center")
    if takes_turns(case) and not corrects_bias_wrongly(case)
]


@pytest.mark.parametrize("case", RECORDS)
def test_sequential_agn_is_the_recorded_cluster(case):
    record = load(case)
    num_workers = record.hparams["num_workers"]
    grads, center, local = map(record.values, ("grad", "center", "local"))
    center, local = ({n: x[n] for n in grads} for x in (center, local))
    tx = emaopt.agn(
        of_tensorflow(record.hparams["inner"]),
        record.hparams["communication_period"],
        variant="paper" if case.startswith("agn_paper") else "tf",
        num_workers=num_workers,
        reduce="sequential",
    )
    params = emaopt.stack_workers({n: x[0] for n, x in center.items()}, num_workers)
    state, step = tx.init(params), stepper(tx)
    rounds = len(record.arrays["schedule"]) // num_workers
    centers, rows = [], []
    for number in range(rounds):
        turn = slice(number * num_workers, (number + 1) * num_workers)
        params, state = step(params, state, {n: g[turn] for n, g in grads.items()})
        centers.append(emaopt.get_center(state))
        rows.append(params)
    for actual, expected in ((centers, center), (rows, local)):
        stacked = jax.tree.map(lambda *x: np.stack(x), *actual)
        after = {n: x[num_workers::num_workers] for n, x in expected.items()}
        assert_close(stacked, after, record.dtype)


SIGN = optax.adam(0.1, b1=0.0, b2=0.0)
ONE = optax.sgd(1.0)
# From TensorFlow's unit tests: two variables; after some of the steps, the center and the
# variables of each worker.
UPSTREAM = {
    "AGN, one worker": (
        lambda: emaopt.agn(SIGN, 4, num_workers=1),
        [[-1.0]],
        (0.0, 0.5),
        {
            1: ([0.0, 0.5], [[0.1, 0.6]]),
            3: ([0.0, 0.5], [[0.3, 0.8]]),
            4: ([0.1, 0.6], [[0.1, 0.6]]),
            8: ([0.2, 0.7], [[0.2, 0.7]]),
        },
    ),
    "AGN, two workers": (
        lambda: emaopt.agn(SIGN, 1, num_workers=2, reduce="sequential"),
        [[-1.0], [-1.0]],
        (0.0, 0.5),
        {
            1: ([0.2, 0.7], [[0.1, 0.6], [0.2, 0.7]]),
            3: ([0.6, 1.1], [[0.5, 1.0], [0.6, 1.1]]),
        },
    ),
    "EASGD, one worker": (
        lambda: emaopt.easgd(ONE, period=2, moving_rate=1.0, num_workers=1),
        [[-1.0]],
        (0.0, 1.0),
        {1: ([0.0, 1.0], [[1.0, 2.0]]), 2: ([2.0, 3.0], [[0.0, 1.0]])},
    ),
    "EASGD, two workers": (
        lambda: emaopt.easgd(
            ONE, period=1, moving_rate=0.5, num_workers=2, reduce="sequential"
        ),
        [[-1.0], [-1.0]],
        (0.0, 1.0),
        {1: ([0.75, 1.75], [[0.5, 1.5], [0.75, 1.75]])},
    ),
    "ModelAverage": (
        lambda: emaopt.local_sgd(ONE, period=2, num_workers=2),
        [[-1.0], [-2.0]],
        (0.0, 1.0),
        {
            1: ([0.0, 1.0], [[1.0, 2.0], [2.0, 3.0]]),
            2: ([3.0, 4.0], [[3.0, 4.0], [3.0, 4.0]]),
        },
    ),
}


@pytest.mark.parametrize("method, grads, start, after", UPSTREAM.values(), ids=UPSTREAM)
def test_method_gives_the_numbers_of_tensorflows_unit_tests(method, grads, start, after):
    tx, grads = method(), jnp.array(grads)
    params = emaopt.stack_workers(jnp.array(start), len(grads))
    state, step = tx.init(params), stepper(tx)
    for number in range(1, max(after) + 1):
        params, state = step(params, state, jnp.broadcast_to(grads, params.shape))
        if number in after:
            center, rows = after[number]
            np.testing.assert_allclose(emaopt.get_center(state), center, rtol=1e-6)
            np.testing.assert_allclose(params, rows, rtol=1e-6, atol=1e-7)


# Numbers of NumPy


@pytest.mark.parametrize(
    "arguments",
    [
        {
            "outer": SGD,
            "period": np.int64(2),
            "moving_rate": np.float64(0.2),
        },
        {"method": emaopt.easgd, "period": np.int64(2)},
        {"method": emaopt.block_momentum, "period": 2, "block_momentum": np.float64(0.2)},
        {
            "method": emaopt.block_momentum,
            "period": 2,
            "block_learning_rate": np.float64(1),
        },
    ],
)
def test_numbers_of_numpy_leave_the_dtypes_alone(arguments):
    method = arguments.get("method", emaopt.local_updates)
    others = {k: v for k, v in arguments.items() if k != "method"}
    tx = method(inner=SGD, num_workers=2, **others)
    params = {"w": jnp.ones((2, 3), jnp.float32)}
    with jax.enable_x64(True):
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.float32
    assert emaopt.get_center(state)["w"].dtype == jnp.float32


def test_narrow_period_does_not_wrap():
    tx = emaopt.local_sgd(SGD, period=np.int8(100), num_workers=2, num_fragments=4)
    params = {n: jnp.ones((2, 3)) for n in "abcd"}
    state = tx.init(params)._replace(num_steps=jnp.int32(24))
    before = emaopt.get_center(state)
    _, state = tx.update(params, state, params)
    moved = [n for n in "abcd" if np.any(emaopt.get_center(state)[n] != before[n])]
    assert len(moved) == 1  # at step 25 one of four fragments has its turn
