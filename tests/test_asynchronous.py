"""Asynchronous workers: TensorFlow's cluster replayed, and each method by its definition.

The oracle is `replay`: the same events one after the other in NumPy, float64.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorflow_records import assert_close, cases, load

from emaopt import simulate_async

pytestmark = pytest.mark.quick(1)

SGD = optax.sgd(1.0)

# The oracle: optimizers are functions (x, g, slots, exponent) -> x, which change `slots`.


def sgd(rate, momentum=0.0, nesterov=False):
    def step(x, g, slots, exponent):
        del exponent
        slots["m"] = momentum * slots.get("m", 0) + g
        return x - rate * (g + momentum * slots["m"] if nesterov else slots["m"])

    return step


def adam(rate, b1, b2, eps):
    def step(x, g, slots, exponent):
        slots["m"] = b1 * slots.get("m", 0) + (1 - b1) * g
        slots["v"] = b2 * slots.get("v", 0) + (1 - b2) * g * g
        m, v = slots["m"] / (1 - b1**exponent), slots["v"] / (1 - b2**exponent)
        return x - rate * m / (np.sqrt(v) + eps)

    return step


@dataclass
class Worker:
    local: Any
    pulled: Any
    slots: dict = field(default_factory=dict)
    gradients: list = field(default_factory=list)  # since the last push
    steps: int = 0
    pushes: int = 0
    tau: int = 0  # pushes of others since the last pull


def own_steps(worker, all_pushes):
    """Adam's exponents by definition: how often these slots have been moved."""
    return worker.steps, all_pushes


def replay(
    inner,
    exchange,
    start,
    gradient,
    schedule,
    *,
    period,
    num_workers,
    exponents=own_steps,
):
    """The trace; `exchange` is (center, worker, slots, exponent) -> (center, local)."""
    center, slots = np.asarray(start, np.float64), {}
    workers = [Worker(center, center) for _ in range(num_workers)]
    centers, locals_, pushed, taus = [center], [[center] * num_workers], [], []
    for event, index in enumerate(schedule):
        me = workers[index]
        g = gradient(me.local, index, event)
        me.steps += 1
        all_pushes = sum(pushed)
        me.local = inner(me.local, g, me.slots, exponents(me, all_pushes)[0])
        me.gradients.append(g)
        taus.append(me.tau)
        pushed.append(me.steps % period == 0)
        if pushed[-1]:
            me.pushes += 1
            exponent = exponents(me, all_pushes + 1)[1]
            center, me.local = exchange(center, me, slots, exponent)
            me.pulled, me.gradients = center, []
            for other in workers:
                other.tau += 1
            me.tau = 0
        centers.append(center)
        locals_.append([worker.local for worker in workers])
    return np.stack(centers), np.array(locals_), np.array(pushed), np.array(taus)


def add(factor):
    """Adds the worker's progress, times a factor of its period and staleness."""

    def exchange(center, me, slots, exponent):
        del slots, exponent
        center = center + factor(len(me.gradients), me.tau) * (me.local - me.pulled)
        return center, center

    return exchange


def step_with_mean_gradient(outer):
    def exchange(center, me, slots, exponent):
        center = outer(center, np.mean(me.gradients, axis=0), slots, exponent)
        return center, center

    return exchange


def spring(rate):
    def exchange(center, me, slots, exponent):
        del slots, exponent
        return (1 - rate) * center + rate * me.local, (
            (1 - rate) * me.local + rate * center
        )

    return exchange


# TensorFlow's cluster, and AGN as its authors describe it

RECORDS = cases("agn", "grad", "local", "center")
BETA_POWERS = (
    "a worker multiplies its beta powers once a local step and once a push, and its "
    "local steps and the center share them",
    "the exponent is the number of steps that corrected slots have made",
)
# Not copied: what TensorFlow does, and what is right and asserted here instead.
TENSORFLOW_BUGS = dict.fromkeys(
    ("agn/w1_adam_p3", "agn/w2_adam_p2", "agn/w2_adam_p3", "agn/w3_adam_p10"), BETA_POWERS
)


def tensorflows_exponents(worker, all_pushes):
    del all_pushes
    # The push that a step ends in is counted when the center moves, not before.
    return worker.steps + worker.pushes, worker.steps + worker.pushes


def of_tensorflow(inner, adam, sgd):
    """An optimizer of TensorFlow, as one of Optax or of the oracle."""
    rate = inner["learning_rate"]
    if inner["cls"] == "AdamOptimizer":
        return adam(rate, inner["beta1"], inner["beta2"], inner["epsilon"])
    return sgd(rate, inner.get("momentum", 0.0), inner.get("use_nesterov", False))


def recorded(record):
    """The center [E+1, ...] and the workers' parameters [E+1, W, ...], by variable."""
    names = record.values("grad")
    return [{n: record.values(part)[n] for n in names} for part in ("center", "local")]


def simulated(case, record):
    hparams, grads = record.hparams, record.values("grad")
    optimizer = of_tensorflow(hparams["inner"], optax.adam, optax.sgd)
    paper = case.startswith("agn_paper")
    return simulate_async(
        optimizer,
        SGD if paper else optimizer,
        {name: center[0] for name, center in recorded(record)[0].items()},
        lambda params, worker, event: {
            n: jnp.asarray(g)[event] for n, g in grads.items()
        },
        record.arrays["schedule"],
        period=hparams["communication_period"],
        commit="mean_delta" if paper else "mean_gradient",
        num_workers=hparams["num_workers"],
    )


@pytest.mark.parametrize("case", [c for c in RECORDS if c not in TENSORFLOW_BUGS])
def test_cluster_is_the_recorded_one(case):
    record = load(case)
    trace = simulated(case, record)
    center, local = recorded(record)
    assert_close(trace.center, center, "float32")
    assert_close(trace.local, local, "float32")
    # The paper's records leave pushes out: there every period-th step of a worker is one.
    if "pushed" in record.arrays:
        np.testing.assert_array_equal(trace.pushed, record.arrays["pushed"])


@pytest.mark.parametrize("case", TENSORFLOW_BUGS)
def test_adam_corrects_its_bias_where_tensorflows_workers_share_one_exponent(case):
    record = load(case)
    hparams = record.hparams
    optimizer = of_tensorflow(hparams["inner"], adam, sgd)

    def model(exponents):
        traces = {
            name: replay(
                optimizer,
                step_with_mean_gradient(optimizer),
                recorded(record)[0][name][0],
                lambda params, worker, event, grads=grads: np.float64(grads[event]),
                record.arrays["schedule"],
                period=hparams["communication_period"],
                num_workers=hparams["num_workers"],
                exponents=exponents,
            )
            for name, grads in record.values("grad").items()
        }
        return [{name: trace[i] for name, trace in traces.items()} for i in (0, 1)]

    (right, right_local), (buggy, buggy_local) = map(
        model, (own_steps, tensorflows_exponents)
    )
    center, local = recorded(record)
    assert_close(buggy, center, "float32")
    assert_close(buggy_local, local, "float32")
    trace = simulated(case, record)
    assert_close(trace.center, right, "float32")
    assert_close(trace.local, right_local, "float32")
    np.testing.assert_array_equal(trace.pushed, record.arrays["pushed"])
    apart = max(np.abs(right[name] - center[name]).max() for name in center)
    assert apart > 0.1 * hparams["inner"]["learning_rate"], TENSORFLOW_BUGS[case]


@pytest.mark.parametrize(
    "period, rate, schedule, center, local",
    [
        (2, 1.0, [0, 0], [[0, 1], [0, 1], [2, 3]], [[[0, 1]], [[1, 2]], [[0, 1]]]),
        (
            1,
            0.5,
            [0, 1],
            [[0, 1], [0.5, 1.5], [0.75, 1.75]],
            [[[0, 1]] * 2, [[0.5, 1.5], [0, 1]], [[0.5, 1.5], [0.75, 1.75]]],
        ),
    ],
    ids=["one worker", "two workers"],
)
def test_easgd_is_that_of_tensorflows_unit_tests(period, rate, schedule, center, local):
    trace = simulate_async(
        SGD,
        None,
        jnp.array([0.0, 1.0]),
        lambda params, worker, event: -jnp.ones(2),
        schedule,
        period=period,
        num_workers=len(local[0]),
        moving_rate=rate,
    )
    np.testing.assert_array_equal(trace.center, center)
    np.testing.assert_array_equal(trace.local, local)


# The methods by their definitions

NUM_WORKERS, PERIOD = 4, 3
SCHEDULE = np.random.default_rng(0).choice(NUM_WORKERS, 90, p=[0.4, 0.3, 0.2, 0.1])
NOISE = np.random.default_rng(1).normal(size=(90, 5))
TARGETS = np.random.default_rng(2).normal(size=(NUM_WORKERS, 5))
START = np.random.default_rng(3).normal(size=5)


def gradient(params, worker, event):
    """Of a quadratic for each worker, with the noise of the event."""
    return 0.3 * (params - jnp.asarray(TARGETS)[worker]) + jnp.asarray(NOISE)[event]


def gradient_in_numpy(params, worker, event):
    return 0.3 * (params - TARGETS[worker]) + NOISE[event]


METHODS = {
    "DOWNPOUR": (SGD, {}, add(lambda period, tau: 1)),
    "AGN, paper": (SGD, {"commit": "mean_delta"}, add(lambda period, tau: 1 / period)),
    "AGN, TensorFlow": (
        optax.sgd(0.1, 0.9),
        {"commit": "mean_gradient"},
        step_with_mean_gradient(sgd(0.1, 0.9)),
    ),
    "DynSGD": (
        SGD,
        {"staleness": lambda tau: 1.0 / (1.0 + tau)},  # float64, not int32's float32
        add(lambda period, tau: 1 / (1 + tau)),
    ),
    "factor from Python's numbers": (
        SGD,
        {"commit": "mean_delta", "staleness": lambda tau: 2},
        add(lambda period, tau: 2 / period),
    ),
    "EASGD": (None, {"moving_rate": 0.3}, spring(0.3)),
}


@pytest.mark.parametrize("outer, options, exchange", METHODS.values(), ids=METHODS)
def test_method_is_its_definition(outer, options, exchange):
    sizes = {"period": PERIOD, "num_workers": NUM_WORKERS}
    with jax.enable_x64(True):
        trace = simulate_async(
            optax.sgd(0.1, 0.9), outer, START, gradient, SCHEDULE, **sizes, **options
        )
    expected = replay(
        sgd(0.1, 0.9), exchange, START, gradient_in_numpy, SCHEDULE, **sizes
    )
    for actual, value in zip(trace, expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-10)


@pytest.mark.parametrize("period", [1, 4])
def test_one_worker_of_downpour_is_its_optimizer(period):
    optimizer = optax.adam(0.1)
    schedule = np.zeros(12, int)
    trace = simulate_async(
        optimizer,
        SGD,
        jnp.asarray(START),
        gradient,
        schedule,
        period=period,
        num_workers=1,
    )
    params, state = jnp.asarray(START), optimizer.init(jnp.asarray(START))
    for event in range(12):
        updates, state = optimizer.update(gradient(params, 0, event), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(trace.local[event + 1, 0], params, rtol=1e-5)
        if (event + 1) % period == 0:
            np.testing.assert_allclose(trace.center[event + 1], params, rtol=1e-5)


# How it runs


def simulate(params, schedule, **options):
    return simulate_async(
        optax.sgd(0.1, 0.9),
        SGD,
        params,
        gradient,
        schedule,
        period=PERIOD,
        num_workers=NUM_WORKERS,
        **options,
    )


def test_jit_with_a_traced_schedule_is_eager():
    eager = simulate(START, SCHEDULE)
    compiled = jax.jit(simulate)(START, SCHEDULE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), compiled, eager
    )


def test_traced_workers_out_of_range_are_the_nearest():
    schedule = np.where(SCHEDULE == 0, -1, np.where(SCHEDULE == 3, 4, SCHEDULE))
    trace = jax.jit(simulate)(START, schedule)
    np.testing.assert_array_equal(trace.center, jax.jit(simulate)(START, SCHEDULE).center)


def test_trace_without_local_has_the_same_center():
    whole, part = simulate(START, SCHEDULE), simulate(START, SCHEDULE, keep_local=False)
    assert part.local is None
    np.testing.assert_array_equal(part.center, whole.center)


@pytest.mark.parametrize("outer, options, _", METHODS.values(), ids=METHODS)
def test_no_event_copies_what_all_workers_hold(outer, options, _):
    def run(params, schedule):
        return simulate_async(
            optax.adam(0.1),
            outer,
            params,
            gradient,
            schedule,
            period=PERIOD,
            num_workers=17,
            keep_local=False,
            **options,
        )

    text = jax.jit(run).lower(START, SCHEDULE).compile().as_text()
    body = re.search(r"while\(.*body=%([\w.-]+)", text)[1]
    loop = re.search(rf"^%{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL)[0]
    assert "f32[17,5]" in loop and not re.search(r"= f32\[17,5\]\S* copy\(", loop)


def test_empty_schedule_is_the_start():
    trace = simulate(jnp.asarray(START), [])
    np.testing.assert_array_equal(trace.center, jnp.asarray(START)[None])
    np.testing.assert_array_equal(trace.local, [[jnp.asarray(START)] * NUM_WORKERS])
    assert trace.pushed.shape == trace.staleness.shape == (0,)


@pytest.mark.parametrize("outer, options, _", METHODS.values(), ids=METHODS)
def test_tree_keeps_its_structure_with_none_and_empty_leaves(outer, options, _):
    params = {"a": None, "b": [np.float32(1), jnp.zeros((2, 0))], "c": jnp.ones(3) * 1j}
    trace = simulate_async(
        optax.sgd(0.1, 0.9),
        outer,
        params,
        lambda params, worker, event: jax.tree.map(lambda p: 0.1 * p, params),
        [0, 1, 1],
        period=2,
        num_workers=2,
        **options,
    )
    for tree, axes in ((trace.center, (4,)), (trace.local, (4, 2))):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == {
            "a": None,
            "b": [(axes, jnp.float32), ((*axes, 2, 0), jnp.float32)],
            "c": ((*axes, 3), jnp.complex64),
        }


@pytest.mark.slow
@pytest.mark.parametrize("commit", ["delta", "mean_delta"])
def test_bfloat16_workers_commit_what_they_hold_to_a_float32_center(commit):
    """Also where a batch of schedules turns the push into a select within one kernel."""
    # With a period that divides exactly there is one way to round: all bits are the same.
    bf16 = jnp.bfloat16
    start, noise = START.astype(bf16), NOISE.astype(bf16)

    def run(schedule):
        return simulate_async(
            optax.sgd(0.5),
            SGD,
            start,
            lambda params, worker, event: jnp.asarray(noise)[event],
            schedule,
            period=4,
            commit=commit,
            num_workers=NUM_WORKERS,
        )

    def step(x, g, slots, exponent):
        del slots, exponent
        return (x.astype(bf16) - (bf16(0.5) * g).astype(bf16)).astype(bf16)

    def exchange(center, me, slots, exponent):
        del slots, exponent
        delta = me.local.astype(np.float32) - me.pulled.astype(bf16).astype(np.float32)
        center = np.float32(center) + delta / (1 if commit == "delta" else 4)
        return center, center.astype(bf16)

    schedules = np.stack([SCHEDULE, SCHEDULE[::-1]])
    for trace in (
        jax.jit(jax.vmap(run))(schedules),
        jax.tree.map(lambda *x: jnp.stack(x), *map(run, schedules)),
    ):
        assert (trace.center.dtype, trace.local.dtype) == (jnp.float32, bf16)
        for i, schedule in enumerate(schedules):
            center, local, *_ = replay(
                step,
                exchange,
                start,
                lambda params, worker, event: noise[event],
                schedule,
                period=4,
                num_workers=NUM_WORKERS,
            )
            np.testing.assert_array_equal(trace.center[i], center)
            np.testing.assert_array_equal(np.float32(trace.local[i]), np.float32(local))


ERRORS = {
    "inner": ({"inner": 0.1}, TypeError, "inner must be an optax"),
    "outer": ({"outer": None}, TypeError, "outer must be an optax"),
    "integer params": (
        {"params": {"a": {"n": np.arange(3)}}},
        TypeError,
        r"params\['a'\]\['n'\] is int32",
    ),
    "grad_fn": ({"grad_fn": None}, TypeError, "grad_fn must be a function"),
    "gradients": (
        {"grad_fn": lambda params, worker, event: (0.0, params)},
        ValueError,
        "grad_fn must return gradients like the parameters",
    ),
    "schedule of rows": ({"schedule": [[0, 1]]}, ValueError, r"int64 of shape \(1, 2\)"),
    "floating schedule": ({"schedule": [0.0]}, ValueError, "got float64 of shape"),
    "boolean schedule": ({"schedule": [True]}, ValueError, "got bool of shape"),
    "negative worker": ({"schedule": [0, -1]}, ValueError, "from -1 to 0"),
    "worker too many": ({"schedule": [1, 2]}, ValueError, r"in \[0, 2\), got .* to 2"),
    "period": ({"period": 0}, ValueError, "period must be at least 1, got 0"),
    "floating period": ({"period": 2.0}, TypeError, "period must be a whole number"),
    "commit": ({"commit": "sum"}, ValueError, "commit must be .delta., .mean_delta. or"),
    "num_workers": ({"num_workers": 0}, ValueError, "num_workers must be at least 1"),
    "keep_local": ({"keep_local": 1}, TypeError, "keep_local must be True or False"),
    "staleness": ({"staleness": 0.5}, TypeError, "staleness must be a function of τ"),
    "factors": (
        {"staleness": lambda tau: jnp.ones(2)},
        ValueError,
        r"staleness must return a real scalar, it returned float32 of shape \(2,\)",
    ),
    "moving_rate": (
        {"outer": None, "moving_rate": 1.5},
        ValueError,
        r"moving_rate must be in \(0, 1\], got 1.5",
    ),
    "EASGD with outer": ({"moving_rate": 0.1}, ValueError, "outer must be None"),
    "EASGD with a commit": (
        {"outer": None, "moving_rate": 0.1, "commit": "mean_delta"},
        ValueError,
        "commit must be 'delta'",
    ),
    "EASGD with staleness": (
        {"outer": None, "moving_rate": 0.1, "staleness": lambda tau: 1.0},
        ValueError,
        "staleness must be None",
    ),
}


@pytest.mark.parametrize("changed, error, message", ERRORS.values(), ids=ERRORS)
def test_bad_argument_is_named(changed, error, message):
    arguments = {
        "inner": SGD,
        "outer": SGD,
        "params": jnp.zeros(()),
        "grad_fn": lambda params, worker, event: params,
        "schedule": [0, 1],
        "period": 1,
        "num_workers": 2,
    }
    with pytest.raises(error, match=f"^simulate_async: .*{message}"):
        simulate_async(**arguments | changed)
