"""`minimize`: a line for every optimizer, and for every library of models."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import emaopt
from emaopt import tf1

START = {"a": jnp.array([1.5, -1.0]), "b": jnp.array([[0.5, 2.0]])}
SCALE = jnp.array([1.0, 10.0])


def loss(params, scale=SCALE):
    return jnp.sum(scale * params["a"] ** 2) + jnp.sum(params["b"] ** 4)


def by_hand(tx, steps, **options):
    """As Optax's documentation writes it; `options` are of its update."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(params):
        state = tx.init(params)
        for _ in range(steps):
            value, grads = jax.value_and_grad(loss)(params)
            given = {
                "value": value,
                "grad": grads,
                "value_fn": loss,
            }
            extra = {name: given[name] for name in options["takes"]}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params

    return run(START)


LINE = ("value", "grad", "value_fn")
OPTIMIZERS = {
    "sgd": (optax.sgd(0.01, 0.9), ()),
    "lbfgs": (optax.lbfgs(), LINE),
    "backtracking": (
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
        LINE,
    ),
    "polyak_sgd": (optax.polyak_sgd(), ("value",)),
    "schedule_free": (optax.contrib.schedule_free_sgd(0.02), ()),
    "reduce_on_plateau": (
        optax.chain(
            optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=0)
        ),
        ("value",),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_optax_written_by_hand(name):
    tx, takes = OPTIMIZERS[name]

    @jax.jit
    def run(params):
        state = tx.init(params)
        for _ in range(2):
            value, params, state = tf1.minimize(tx, loss, state, params)
        return value, params

    value, params = run(START)
    expected = by_hand(tx, 2, takes=takes)
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    assert loss(params) < value < loss(START)


def recorder():
    """An optimizer that keeps the extra arguments of its last update."""

    def update(updates, state, params, *, value, grad, value_fn, **extra):
        return updates, (value, grad, value_fn(params), extra.get("other"))

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def test_optimizer_gets_the_value_gradient_and_function_that_it_minimizes():
    weights = jnp.array([1.0, -2.0])

    def outputs(params, scale):
        return scale * params["a"] ** 2 + params["b"].sum(), jnp.ones(3)

    (value, aux), _, seen = tf1.minimize(
        recorder(),
        outputs,
        (),
        START,
        SCALE,
        grad_loss=weights,
        has_aux=True,
        other=7,
    )
    total = lambda p: weights @ outputs(p, SCALE)[0]  # noqa: E731
    np.testing.assert_allclose(value, outputs(START, SCALE)[0])
    chex.assert_trees_all_close(
        seen, (total(START), jax.grad(total)(START), total(START), 7), rtol=1e-6
    )
    np.testing.assert_array_equal(aux, np.ones(3))


def test_extra_arguments_that_the_users_optimizer_needs_come_through():
    inner = optax.sgd(0.1), optax.sgd(0.05)
    tx = optax.contrib.sam(*inner, opaque_mode=True, sync_period=2)
    grad_fn = jax.grad(lambda params, i: loss(params))
    grads, state = jax.grad(loss)(START), tx.init(START)
    updates, _ = tx.update(grads, state, START, grad_fn=grad_fn)
    right = optax.apply_updates(START, updates)
    _, params, _ = tf1.minimize(tx, loss, state, START, grad_fn=grad_fn)
    chex.assert_trees_all_close(params, right, rtol=1e-6)


def test_arguments_of_the_loss_and_chosen_variables_are_passed_on():
    tx = optax.sgd(0.1)
    value, params, _ = tf1.minimize(
        tx, loss, tx.init(START), START, 2 * SCALE, var_list="a"
    )
    assert value == loss(START, 2 * SCALE)
    right = START["a"] - 0.1 * 4 * SCALE * START["a"]
    chex.assert_trees_all_close(params, START | {"a": right}, rtol=1e-6)


@pytest.mark.parametrize("gate", [tf1.GATE_NONE, tf1.GATE_OP, tf1.GATE_GRAPH])
def test_gates_change_no_number(gate):
    tx = optax.sgd(0.1)
    step = jax.jit(
        lambda p: tf1.minimize(tx, loss, tx.init(p), p, gate_gradients=gate)[1]
    )
    right = jax.tree.map(lambda p, g: p - 0.1 * g, START, jax.grad(loss)(START))
    chex.assert_trees_all_close(step(START), right, rtol=1e-5)


# Models

X = jnp.array([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]])


def moved(tx, loss, params):
    """A step of Optax by hand."""

    @jax.jit
    def step(params):
        updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step(params)


def test_flax_train_state_in_a_line():
    tx = emaopt.averaged(optax.sgd(0.1, 0.9), 0.5)
    state = TrainState.create(apply_fn=None, params=START, tx=tx)
    value, params, opt_state = tf1.minimize(state.tx, loss, state.opt_state, state.params)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    assert value == loss(START)
    chex.assert_trees_all_close(state.params, moved(tx, loss, START), rtol=1e-6)
    chex.assert_trees_all_close(
        emaopt.get_average(state),
        jax.tree.map(lambda a, b: (a + b) / 2, START, state.params),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "tx, steps",
    [
        (optax.sgd(0.2), 100),
        (optax.sgd(0.1, momentum=0.5), 100),
        (optax.adam(0.1), 200),
        (optax.lbfgs(), 10),
    ],
)
def test_complex_parameters_go_down_to_the_least_squares_solution(tx, steps):
    rng = np.random.default_rng(0)
    matrix = np.linalg.qr(rng.normal(size=(4, 3)) + 1j * rng.normal(size=(4, 3)))[0]
    right = rng.normal(size=4) + 1j

    def loss(w):
        return jnp.sum(jnp.abs(matrix @ w - right) ** 2)

    w = jnp.zeros(3, jnp.complex64)
    step = jax.jit(lambda state, w: tf1.minimize(tx, loss, state, w)[1:])
    state = tx.init(w)
    for _ in range(steps):
        w, state = step(state, w)
    expected = np.linalg.lstsq(matrix, right, rcond=None)[0]
    np.testing.assert_allclose(w, expected, rtol=1e-3)


def test_nnx_model_in_a_line():
    tx = emaopt.averaged(optax.sgd(0.1, 0.9), 0.5)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    expected = moved(tx, lambda p: jnp.sum(nnx.merge(graphdef, p)(X) ** 2), params)
    opt_state = tx.init(params)
    value, params, opt_state = tf1.minimize(
        tx, lambda p: jnp.sum(nnx.merge(graphdef, p)(X) ** 2), opt_state, params
    )
    nnx.update(model, params)
    chex.assert_trees_all_close(nnx.state(model), expected, rtol=1e-6)
    names = tf1.get_slot_names(opt_state, params)
    assert names == ["average", "trace"] and value > 0


def test_nnx_parameters_without_a_gradient_stay():
    tx = optax.sgd(0.1, 0.9)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    squares = lambda p: jnp.sum(nnx.merge(graphdef, p)(X) ** 2)  # noqa: E731
    _, after, state = tf1.minimize(
        tx, squares, tx.init(params), params, var_list="kernel"
    )
    np.testing.assert_array_equal(after["bias"][...], params["bias"][...])
    trace = tf1.get_slot(state, params, "trace")
    assert not jnp.any(trace["bias"][...]) and jnp.all(trace["kernel"][...])


def test_equinox_model_in_a_line():
    tx = emaopt.averaged(optax.sgd(0.1), 0.5)
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def squares(params):
        return jnp.sum(jax.vmap(eqx.combine(params, static))(X) ** 2)

    _, after, opt_state = tf1.minimize(tx, squares, tx.init(params), params)
    chex.assert_trees_all_close(after, moved(tx, squares, params), rtol=1e-5)
    served = eqx.combine(emaopt.get_average(opt_state, after), static)
    assert served(X[0]).shape == (2,)


def test_workers_of_agn_in_a_line():
    workers = 2
    tx = emaopt.agn(optax.sgd(0.01), 2, num_workers=workers)
    params = emaopt.stack_workers(START, workers)
    scales = jnp.stack([SCALE, 3 * SCALE])

    def losses(params, scales):  # one of each worker: minimize takes their sum
        return jax.vmap(loss)(params, scales)

    @jax.jit
    def step(params, state):
        return tf1.minimize(tx, losses, state, params, scales)

    state, alone = tx.init(params), [START, START]
    for _ in range(2):
        gradients = [jax.grad(loss)(p, s) for p, s in zip(alone, scales, strict=True)]
        alone = [
            jax.tree.map(lambda p, g: p - 0.01 * g, *both)
            for both in zip(alone, gradients, strict=True)
        ]
        value, params, state = step(params, state)
    # A step is 0.01 times a gradient: the center takes their mean over steps and workers.
    path = jax.tree.map(lambda s, *p: (s - sum(p) / workers) / 2, START, *alone)
    right = jax.tree.map(lambda s, p: s - p, START, path)
    assert value.shape == (workers,)
    chex.assert_trees_all_close(emaopt.get_center(state), right, rtol=1e-5)
