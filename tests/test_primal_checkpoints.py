"""Checkpoints of optimizers whose gradient is taken near an average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from primal_runs import ADAM, OPTIONS, PARAMS, SGD, gradients, run, same

import emaopt
from emaopt import checkpoint


@pytest.mark.parametrize("options", OPTIONS)
def test_training_resumes_bit_for_bit_and_the_file_serves_x(options, tmp_path):
    extra = {"tokens": 7} if options == "clock" else {}
    tx = emaopt.primal_averaging(ADAM, 0.9, **OPTIONS[options])
    params, state = run(tx, steps=4, **extra)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": state})
    served = checkpoint.load_averaged(tmp_path / "c", target=params)
    same(served, emaopt.get_average(state, params))
    assert not np.array_equal(served["w"], params["w"])
    target = {"params": PARAMS, "opt_state": tx.init(PARAMS)}
    again = checkpoint.restore(tmp_path / "c", target)
    same(again, {"params": params, "opt_state": state})
    same(
        run(tx, again["params"], 5, again["opt_state"], **extra),
        run(tx, PARAMS, 9, **extra),
    )


def test_a_train_state_with_schedule_free_is_served_and_resumed(tmp_path):
    schedule = optax.warmup_constant_schedule(0.0, 0.05, 3)
    tx = emaopt.schedule_free(optax.adamw(schedule, b1=0.0), schedule)
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    for _ in range(5):
        state = state.apply_gradients(grads=gradients(state.params))
    checkpoint.save(tmp_path / "c", state)
    same(
        checkpoint.load_averaged(tmp_path / "c", target=PARAMS),
        emaopt.get_average(state.opt_state, PARAMS),
    )
    fresh = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    same(checkpoint.restore(tmp_path / "c", fresh), state)


WRAPPED = {
    "GPA": lambda inner: emaopt.gpa(inner, 0.9),
    "schedule-free": lambda inner: emaopt.schedule_free(
        inner, optax.constant_schedule(0.05)
    ),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_run_without_it_goes_on_with_it_and_back(wrapped, tmp_path):
    tx = WRAPPED[wrapped](ADAM)
    params, state = run(ADAM, steps=4)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": state}, optional=True)
    said = []
    target = {"params": PARAMS, "opt_state": tx.init(PARAMS)}
    found = checkpoint.restore(tmp_path / "c", target, report=said.append)
    primal = getattr(found["opt_state"], "primal", found["opt_state"])
    same(primal.inner_state, state)
    same(primal.base, params)
    same(emaopt.get_average(found["opt_state"]), params)
    assert "started the average anew" in " ".join(said)
    params, state = run(tx, found["params"], 3, found["opt_state"])
    checkpoint.save(tmp_path / "d", {"params": params, "opt_state": state})
    target = {"params": PARAMS, "opt_state": ADAM.init(PARAMS)}
    back = checkpoint.restore(tmp_path / "d", target, report=said.append)
    same(back["params"], params)
    same(back["opt_state"], getattr(state, "primal", state).inner_state)
    assert any("left out an average" in one for one in said)


def test_an_average_beside_the_optimizer_becomes_x(tmp_path):
    plain = emaopt.averaged(ADAM, 0.9)
    params, state = run(plain, steps=4)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": state})
    tx = emaopt.gpa(ADAM, 0.9)
    target = {"params": PARAMS, "opt_state": tx.init(PARAMS)}
    found = checkpoint.restore(tmp_path / "c", target)
    same(found["opt_state"].averaging, state.averaging)
    same(found["opt_state"].base, params)
    same(found["opt_state"].inner_state, state.inner_state)


def test_a_parameter_of_any_name_goes_over_with_its_values(tmp_path):
    """Names that the states themselves use, for parameters and for keys above them."""
    params = {"primal": {"largest": jnp.ones(3), "base": jnp.full(2, 5.0)}}
    checkpoint.save(
        tmp_path / "c", {"params": params, "opt_state": SGD.init(params)}, optional=True
    )
    for tx in (emaopt.gpa(SGD), emaopt.schedule_free(SGD, optax.constant_schedule(0.1))):
        target = {"params": params, "opt_state": tx.init(params)}
        found = checkpoint.restore(tmp_path / "c", target, report=lambda said: None)
        primal = getattr(found["opt_state"], "primal", found["opt_state"])
        same(primal.base, params)
        checkpoint.save(tmp_path / "d", found, force=True)
        same(checkpoint.restore(tmp_path / "d", target), found)


def test_a_wider_mask_begins_x_and_z_from_the_parameters(tmp_path):
    masked = emaopt.gpa(SGD, 0.9, mask={"w": True, "b": False})
    params, state = run(masked, steps=3)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": state})
    tx = emaopt.gpa(SGD, 0.9)
    target = {
        "params": PARAMS,
        "opt_state": tx.init(jax.tree.map(lambda p: p * 0 + 7, PARAMS)),
    }
    found = checkpoint.restore(
        tmp_path / "c", target, keep_missing=True, report=lambda said: None
    )["opt_state"]
    same(found.base["b"], params["b"])
    same(found.averaging.average["b"], params["b"])


def test_z_is_left_out_beside_another_average_that_stays(tmp_path):
    chain = optax.named_chain(("a", emaopt.gpa(SGD, 0.9)))
    params, state = run(chain, steps=3)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": state})
    other = optax.named_chain(
        ("a", emaopt.averaged(SGD, 0.9)), ("b", emaopt.average_params(0.5))
    )
    said = []
    target = {"params": PARAMS, "opt_state": other.init(PARAMS)}
    found = checkpoint.restore(tmp_path / "c", target, report=said.append)
    same(found["opt_state"]["a"].averaging, state["a"].averaging)
    assert any("left out the iterates z" in one for one in said)
