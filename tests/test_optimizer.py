"""TensorFlow's optimizers by Optax and `apply_gradients`, against records of theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorflow_optimizers import SLOTS, converted, hyperparameters, same_arguments
from tensorflow_records import (
    assert_close,
    cases,
    error,
    facts,
    load,
    with_start,
)

from emaopt import tf1

TRAJECTORIES = cases("base_optimizer", "param", "grad")


def slots_of(case, record):
    """TensorFlow's slots that the case has, and Optax's."""
    slots = SLOTS[record.hparams["cls"]]
    return {name: slots[name] for name in slots if record.values(f"slot_{name}")}


def replay(tx, record, slots=()):
    """The parameters [T+1, ...], and each slot."""
    values = record.values("param")

    def shown(params, state):
        return params, {name: tf1.get_slot(state, params, name) for name in slots}

    def step(carry, grads):
        params, state = carry
        params, state = tf1.apply_gradients(tx, grads, state, params)
        return (params, state), shown(params, state)

    @jax.jit
    def run(params, grads):
        state = tx.init(params)
        return shown(params, state), jax.lax.scan(step, (params, state), grads)[1]

    with jax.enable_x64(record.dtype == "float64"):
        start = {name: value[0] for name, value in values.items()}
        return with_start(*run(start, record.values("grad")))


# Adam's powers of β are variables of their own, in float32 for float64 parameters too.
NARROW_POWERS = "base_optimizer/traj_adam_float64"


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_steps_and_slots_are_tensorflows(case):
    record = load(case)
    slots = slots_of(case, record)
    ours = [name for name, _ in slots.values()]
    params, found = replay(converted(hyperparameters(case)), record, ours)
    dtype = "float32" if case == NARROW_POWERS else record.dtype
    assert_close(params, record.values("param"), dtype)
    for theirs, (name, sign) in slots.items():
        slot = {n: sign * value for n, value in found[name].items()}
        values = record.values(f"slot_{theirs}")
        assert_close(slot, {n: values[n] for n in slot}, record.dtype)


def test_adam_in_float64_is_exact_where_tensorflows_is_not():
    record, h = load(NARROW_POWERS), hyperparameters(NARROW_POWERS)
    ours, theirs = replay(converted(h), record)[0], record.values("param")
    right = {}
    for name, grads in record.values("grad").items():
        steps = np.arange(len(grads))
        newest = steps[:, None] - steps  # the age of gradient i at step t, from 0
        shape = (len(grads), -1)

        def moment(x, beta, newest=newest, shape=shape):
            weights = np.where(newest >= 0, (1 - beta) * beta ** np.maximum(newest, 0), 0)
            return weights @ x.reshape(shape)

        powers = [1 - h[b] ** (steps[:, None] + 1) for b in ("beta1", "beta2")]
        m, v = moment(grads, h["beta1"]), moment(grads**2, h["beta2"])
        rates = h["learning_rate"] * np.sqrt(powers[1]) / powers[0]
        moves = (rates * m / (np.sqrt(v) + h["epsilon"])).reshape(grads.shape)
        start = theirs[name][:1]
        right[name] = np.concatenate([start, start - np.cumsum(moves, axis=0)])
    assert error(ours, right) < 1e-12 < 1e-7 < error(theirs, right)


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_slots_are_those_that_tensorflow_has(case):
    name = case.partition("traj_")[2].rpartition("_")[0]
    record = load(case)
    slots = slots_of(case, record)
    params = {n: value[0] for n, value in record.values("param").items()}
    with jax.enable_x64(record.dtype == "float64"):
        state = converted(hyperparameters(case)).init(params)
    theirs = facts("base_optimizer/slots", "info")[name]["get_slot_names"]
    assert sorted(slots) == theirs
    names = tf1.get_slot_names(state, params)
    assert names == sorted(name for name, _ in slots.values())


DIFFERENT = ("adam_bigeps", "rmsprop", "rmsprop_centered")


@pytest.mark.parametrize(
    "case",
    [c for c in TRAJECTORIES if c.endswith("float32") and "ftrl" not in c],
)
def test_same_arguments_are_another_optimizer_where_the_definitions_differ(case):
    record, h = load(case), hyperparameters(case)
    naive = error(replay(same_arguments(h), record)[0], record.values("param"))
    differs = case in [f"base_optimizer/traj_{name}_float32" for name in DIFFERENT]
    assert (naive > 0.05) if differs else (naive < 1e-4)


# Gradients


@pytest.mark.parametrize("gate", ["GATE_NONE", "GATE_OP", "GATE_GRAPH"])
def test_gradients_with_a_cotangent_are_tensorflows_behind_every_gate(gate):
    record = load("base_optimizer/compute_gradients_grad_loss")
    x, w, cotangent = (record.arrays[name] for name in ("X", "w", "grad_loss"))

    def gradient(**options):
        mode = getattr(tf1, gate)
        options["gate_gradients"] = mode
        loss = lambda w: jnp.tanh(x @ w)  # noqa: E731
        return tf1.compute_gradients(loss, w, **options)[1]

    theirs = record.arrays
    ours = {"with": gradient(grad_loss=cotangent), "without": gradient()}
    right = {"with": theirs[f"grad_{gate}"], "without": theirs["grad_no_grad_loss"]}
    assert_close(ours, right, "float32")


# Gates

SGD = optax.sgd(0.1)
AB = {"a": jnp.array([1.0, 2.0]), "b": jnp.ones(2)}
LOSS = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))  # noqa: E731
GATED = {
    "compute_gradients": lambda gate: (SGD, gate),
    "in the chain": lambda gate: (
        optax.chain(tf1.gate_gradients(gate), SGD),
        tf1.GATE_NONE,
    ),
}


def lowered_step(way, gate):
    tx, gate = GATED[way](gate)

    def step(params):
        state = tx.init(params)
        return tf1.minimize(tx, LOSS, state, params, gate_gradients=gate)[1]

    return jax.jit(step).lower(AB)


@pytest.mark.parametrize("way", GATED)
@pytest.mark.parametrize(
    "gate, barriers",
    [(tf1.GATE_NONE, 0), (tf1.GATE_OP, 2), (tf1.GATE_GRAPH, 1)],
)
def test_gate_is_a_barrier_that_the_compiler_gets_and_changes_no_number(
    gate, barriers, way
):
    lowered = lowered_step(way, gate)
    assert lowered.as_text().count("stablehlo.optimization_barrier") == barriers
    expected = {name: 0.8 * value for name, value in AB.items()}
    assert_close(lowered.compile()(AB), expected, "float32")


@pytest.mark.parametrize("way", GATED)
def test_gates_keep_the_gradients_from_being_fused_on_cpu_since_jax_0_12(way):
    def work(gate):
        text = lowered_step(way, gate).compile().as_text()
        return "opt-barrier" in text, text.count("fusion(")

    none, *gated = map(work, (tf1.GATE_NONE, tf1.GATE_OP, tf1.GATE_GRAPH))
    # Two leaves: one fusion each, or one more each where the barrier still stands then.
    apart = 2 if jax.__version_info__ >= (0, 12) else 0
    assert none[0] is False
    assert gated == [(False, none[1] + apart)] * 2
