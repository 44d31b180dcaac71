"""Modules of NNX with pytree=False, which are leaves to JAX, go by their states."""

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from test_checkpoint import assert_same

import emaopt
from emaopt import checkpoint

TX = emaopt.averaged(optax.sgd(0.1), 0.5, zero_init=True)


class Model(nnx.Module, pytree=False):
    def __init__(self, number):
        self.w = nnx.Param(jnp.full(2, number))
        self.mean = nnx.BatchStat(jnp.full(3, number))


STATS = nnx.state(Model(7.0), nnx.BatchStat)
SERVED = nnx.state(Model(0.0)) | STATS  # the average is 0


def state_of(number):
    model = Model(number)
    return {"model": model, "opt_state": TX.init(nnx.state(model, nnx.Param))}


def as_states(state):
    return state | {"model": nnx.state(state["model"])}


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "1", state_of(3.0), served={"model": STATS})
    return tmp_path / "1"


def through_a_manager(path, target):
    registry = checkpoint.handler_registry()
    with ocp.CheckpointManager(path.parent, handler_registry=registry) as manager:
        args = ocp.args.StandardSave(state_of(3.0))
        manager.save(2, args=args)
        return manager.restore(2, args=ocp.args.StandardRestore(target))


@pytest.mark.parametrize(
    "restore",
    [checkpoint.restore, checkpoint.adopt, through_a_manager],
    ids=["restore", "adopt", "manager"],
)
def test_as_a_target_of_a_whole_state(restore, saved):
    assert_same(restore(saved, state_of(1.0)), as_states(state_of(3.0)))


def test_as_a_target_of_weights(saved):
    assert_same(checkpoint.load_averaged(saved, target=Model(1.0)), SERVED)
    best = checkpoint.Best(1, "average", 0.0, str(saved))
    assert_same(best.load(target=Model(1.0)), SERVED)


def test_published_and_watched(tmp_path):
    served = {"model": STATS}
    checkpoint.publish(tmp_path, state_of(3.0), served=served)
    got = checkpoint.watch(tmp_path, Model(1.0), served=served).poll()
    assert_same(got.params, SERVED)
    assert_same(got.served, served)


def test_swapped(tmp_path):
    swapped = checkpoint.swap_state(state_of(3.0), served={"model": STATS})
    assert_same(swapped["model"], SERVED)
    assert_same(checkpoint.swap_state(swapped), as_states(state_of(3.0)))


def test_as_what_is_served(tmp_path):
    class Statistics(nnx.Module, pytree=False):
        def __init__(self, number):
            self.mean = nnx.BatchStat(jnp.full(3, number))

    params = {"w": jnp.ones(2)}
    state = {"params": params, "opt_state": TX.init(params), "stats": Statistics(1.0)}
    new = {"stats": Statistics(7.0)}
    checkpoint.save(tmp_path / "c", state, served=new)
    got = checkpoint.load_averaged(tmp_path / "c", at="stats", target=Statistics(0.0))
    assert_same(got, nnx.state(Statistics(7.0)))
    swapped = checkpoint.swap_state(state, served=new)
    assert_same(swapped["stats"], nnx.state(Statistics(7.0)))
    checkpoint.publish(tmp_path / "run", state, served=new)
    like = {"stats": Statistics(0.0)}
    got = checkpoint.watch(tmp_path / "run", params, served=like).poll().served
    assert_same(got, jax.tree.map(nnx.state, new))
