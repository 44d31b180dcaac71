"""Elastic exchanges in what trainers have: wrappers, meshes, donation, NumPy states."""

import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from elastic_runs import together
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_elastic import METHODS, START, WORKERS, center_node, elastic, gradient

import emaopt

ALL = {"w": True, "b": True}
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(10.0), tx),
    "named_chain": lambda tx: optax.named_chain(
        ("clip", optax.clip(10.0)), ("local", tx)
    ),
    "masked": lambda tx: optax.masked(tx, ALL),
    "partition": lambda tx: optax.partition({"all": tx}, {"w": "all", "b": "all"}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "averaged": lambda tx: emaopt.averaged(tx, 0.9),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "a jitted update": lambda tx: optax.GradientTransformationExtraArgs(
        tx.init, jax.jit(tx.update, static_argnames="exchange")
    ),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name):
    params = jax.tree.map(jnp.asarray, START)
    found = []
    for tx in (METHODS["diloco"](), WRAPPERS[name](METHODS["diloco"]())):

        def body(workers, tx=tx):
            own, state = params, tx.init(params)
            for _ in range(2):
                grads = gradient(workers.worker, own)
                updates, state = tx.update(grads, state, own, exchange=False)
                own = optax.apply_updates(own, updates)
                own, state, number, *_ = workers.exchange(tx, own, state)
            return own, emaopt.get_center(state), number

        one, other = together(body, 2)
        chex.assert_trees_all_equal(one, other)
        found.append(one)
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


def test_a_wrapper_that_drops_the_order_is_refused():
    tx = optax.MultiSteps(METHODS["diloco"](), 1).gradient_transformation()
    params = jax.tree.map(jnp.asarray, START)
    with pytest.raises(ValueError, match="does not pass extra arguments on"):
        emaopt.elastic.pseudo_gradient(tx, params, tx.init(params))


@pytest.mark.parametrize("rate", [0.7, 0.35])
def test_another_outer_optimizer_is_told_from_roundings(rate, caplog):
    def body(workers):
        outer = optax.sgd(rate if workers.worker else 0.7)
        tx = METHODS["diloco"](outer=outer)
        params = jax.tree.map(jnp.asarray, START)
        state = tx.init(params)
        updates, state = tx.update(params, state, params, exchange=False)
        params = optax.apply_updates(params, updates)
        return workers.exchange(tx, params, state).params

    with caplog.at_level(logging.WARNING, "emaopt.elastic"):
        first, second = together(body, 2)
    chex.assert_trees_all_equal(first, second)
    warned = "worker 1 computed another center than the others" in caplog.text
    assert warned == (rate != 0.7)


def test_center_between_other_transformations():
    def make(**form):
        return optax.chain(
            optax.clip_by_global_norm(10.0),
            optax.masked(METHODS["diloco"](**form), {"w": True, "b": False}),
            optax.masked(optax.set_to_zero(), {"w": False, "b": True}),
        )

    def body(workers):
        params = jax.tree.map(jnp.asarray, START)
        tx = make()
        state = tx.init(params)
        for _ in range(2):
            grads = gradient(workers.worker, params)
            updates, state = tx.update(grads, state, params, exchange=False)
            params = optax.apply_updates(params, updates)
        return workers.exchange(tx, params, state)

    found = together(body, WORKERS)
    for one in found:
        assert one.params["b"] == START["b"]
        assert (one.number, one.live, one.joined) == (1, (0, 1, 2), ())
        np.testing.assert_array_equal(one.params["w"], found[0].params["w"])
        assert not np.allclose(one.params["w"], START["w"])


def test_each_worker_has_a_mesh_of_its_own():
    def place(worker, params):
        sizes = [2, 4, 1]  # and layouts of their own
        devices = np.array(jax.devices()[sum(sizes[:worker]) :][: sizes[worker]])
        sharding = NamedSharding(Mesh(devices, "fsdp"), PartitionSpec("fsdp"))
        return jax.device_put(params, {"w": sharding, "b": sharding})

    params = {"w": jnp.linspace(-1, 1, 8), "b": jnp.ones((4, 3))}
    alone = elastic(METHODS["diloco"], params)
    spread = elastic(METHODS["diloco"], params, place=place)
    on_host = functools.partial(jax.tree.map, np.asarray)
    first = center_node(spread[0][1])
    for worker, (found, state, log) in enumerate(spread):
        # Differently many devices round differently; that must not show.
        assert all(len(record.weights) == WORKERS for record in log)
        node = center_node(state)
        for field in ("center", "outer_state"):
            chex.assert_trees_all_equal(
                on_host(getattr(node, field)), on_host(getattr(first, field))
            )
        for got, wanted in zip(found, alone[worker][0], strict=True):
            chex.assert_trees_all_close(on_host(got), on_host(wanted), rtol=1e-5)
        wanted = place(worker, params)["w"].sharding
        for leaf in (found[-1][0]["w"], found[-1][1]["w"]):
            assert leaf.sharding.is_equivalent_to(wanted, 1)
        trace = jax.tree.leaves(node.outer_state)
        assert all(x.sharding.device_set == wanted.device_set for x in trace)


def test_states_of_numpy_arrays():
    tx = METHODS["diloco"]()
    params = jax.tree.map(np.asarray, START)

    def body(workers):
        state = jax.tree.map(np.asarray, tx.init(params))
        for _ in range(2):
            own, state, number, _, joined = workers.exchange(tx, params, state)
            state = jax.tree.map(np.asarray, state)
        return number, joined, own

    first, second = together(body, 2)
    assert first[:2] == (2, ())
    chex.assert_trees_all_equal(first, second)


def test_what_is_returned_may_be_donated():
    tx = METHODS["diloco"]()
    params = {"w": jnp.ones(1000)}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params, exchange=False)
        return optax.apply_updates(params, updates), state

    def body(workers):
        own, state = jax.tree.map(jnp.copy, params), tx.init(params)
        for _ in range(3):
            own, state = step(own, state)
            own, state, *_ = workers.exchange(tx, own, state)
        return own, emaopt.get_center(state)

    for own, center in together(body, 2):
        chex.assert_trees_all_equal(own, center)
        assert 0 < float(own["w"][0]) < 1
