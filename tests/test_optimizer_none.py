"""Parameters without a gradient stay, bit for bit, with all that belongs to them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt import tf1

RANDOM = np.random.default_rng(1)
SHAPES = {"a": (3, 2), "b": (2, 4), "c": (2,)}
START = {n: jnp.asarray(RANDOM.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
GRADS = {n: jnp.asarray(RANDOM.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
ADAM = optax.adam(0.1)
# Where the slots are in other places; test_optimizer_slots.py has all of Optax's.
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, 0.9),
    "adamw": optax.adamw(0.1, weight_decay=0.5),
    "masked": optax.masked(ADAM, {"a": True, "b": False, "c": True}),
    "partition": optax.partition(
        {"fast": ADAM, "slow": optax.sgd(0.01, 0.9)},
        {"a": "fast", "b": "fast", "c": "slow"},
    ),
    "MultiSteps": optax.MultiSteps(ADAM, 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0.01, 8)
    ),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lbfgs": optax.lbfgs(0.1, linesearch=None),
    "sm3": optax.sm3(0.1),
    "averaged": emaopt.averaged(ADAM, 0.5, debias=True),
    "two averages": optax.chain(
        ADAM, emaopt.average_params(0.5), emaopt.average_params(0.9, every=2)
    ),
    "lookahead": emaopt.lookahead(ADAM, period=2),
}


def of(name, tree):
    """The arrays on whose way the name stands."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [
        leaf for path, leaf in flat if name in [getattr(k, "key", None) for k in path]
    ]


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def stepped(tx, start=START, grads=GRADS, without=None, steps=1):
    """(params, state) before, then after a step of Optax, and of emaopt without `b`."""

    def optax_step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit  # as one program: compiling costs more than all else here
    def run(start, grads, zero):
        before = optax_step(start, tx.init(start), grads)
        optaxs, ours = optax_step(*before, zero), before
        for _ in range(steps):
            ours = tf1.apply_gradients(tx, without or grads | {"b": None}, *ours[::-1])
        return before, optaxs, ours

    zero = grads | {"b": 0 * grads["b"]} if without is None else grads
    return run(start, grads, zero)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameter_its_slots_and_its_average_stay_and_the_others_move(name):
    before, optaxs, after = stepped(OPTIMIZERS[name])
    assert_same_bits(of("b", after), of("b", before))
    for other in "ac":
        chex.assert_trees_all_close(of(other, after), of(other, optaxs), rtol=1e-6)
    assert any(
        (x != y).any() for x, y in zip(of("a", after), of("a", before), strict=True)
    )


CONTAINERS = {
    "list": lambda tree: [tree["a"], tree["b"]],
    "tuple": lambda tree: (tree["a"], tree["b"]),
    "nested": lambda tree: {"x": {"y": tree["a"]}, "z": [tree["b"], None, ()]},
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["adafactor", "averaged"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_make_no_difference(container, name):
    tx, put = OPTIMIZERS[name], CONTAINERS[container]
    without = put(GRADS | {"b": None})
    _, _, (params, state) = stepped(tx, put(START), put(GRADS), without)
    _, _, (right_params, right_state) = stepped(tx)
    names = tf1.get_slot_names(state, params)
    assert names == tf1.get_slot_names(right_state, right_params)
    for tree, right in [(params, right_params)] + [
        (
            tf1.get_slot(state, params, n),
            tf1.get_slot(right_state, right_params, n),
        )
        for n in names
    ]:
        chex.assert_trees_all_close(jax.tree.leaves(tree), [right["a"], right["b"]])


WORKERS = 2
LOCAL = {
    "agn": emaopt.agn(ADAM, 2, num_workers=WORKERS),
    "agn by its author": emaopt.agn(ADAM, 2, num_workers=WORKERS, variant="paper"),
    "diloco": emaopt.diloco(ADAM, period=2, num_workers=WORKERS),
    "diloco in fragments": emaopt.diloco(
        ADAM, period=2, num_workers=WORKERS, num_fragments=2
    ),
    "easgd": emaopt.easgd(ADAM, period=2, num_workers=WORKERS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL)
def test_center_of_a_parameter_without_a_gradient_stays_too(name):
    tx = LOCAL[name]
    start = emaopt.stack_workers(START, WORKERS)
    grads = jax.tree.map(lambda g: jnp.stack([g, g + 0.1]), GRADS)
    before, _, after = stepped(tx, start, grads, steps=2)  # each fragment is exchanged
    assert_same_bits(of("b", after), of("b", before))
    centers = [emaopt.get_center(state)["a"] for _, state in (before, after)]
    assert (centers[0] != centers[1]).any()


@pytest.mark.parametrize("without", [None, "b"])
def test_donated_steps_are_the_same_and_leave_nothing_behind(without):
    tx = OPTIMIZERS["averaged"]
    grads = GRADS | ({without: None} if without else {})

    def step(params, state):
        return tf1.apply_gradients(tx, grads, state, params)

    donating = jax.jit(step, donate_argnums=(0, 1))
    start = jax.tree.map(jnp.copy, START)
    given = start, tx.init(start)
    expected = jax.jit(step)(*given)
    after = donating(*given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    chex.assert_trees_all_equal(after, expected)


def test_loss_that_ignores_a_parameter_leaves_it_alone_where_optax_decays_it():
    tx = OPTIMIZERS["adamw"]
    state = tx.init(START)
    loss = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["c"] ** 2)  # noqa: E731
    _, after, new_state = tf1.minimize(tx, loss, state, START)
    updates, _ = tx.update(jax.grad(loss)(START), state, START)
    assert_same_bits(of("b", (after, new_state)), of("b", (START, state)))
    assert (optax.apply_updates(START, updates)["b"] != START["b"]).all()
