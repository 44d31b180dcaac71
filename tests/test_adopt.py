"""`adopt`: what is told apart, what is refused, what is said."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from other_writers import other
from safetensors.numpy import load_file

import emaopt
from emaopt import checkpoint

TX = emaopt.averaged(optax.adam(1e-3), emaopt.warmup_decay(0.9))
THEIRS = {
    "params": {"dense": {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}},
    "ema_params": {"dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.full(2, 5.0)}},
    "step": 4,
}


def orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def start(tx=TX, params=None):
    params = jax.tree.map(lambda x: jnp.full_like(x, 9), params or THEIRS["params"])
    return {"params": params, "opt_state": tx.init(params)}


def equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_what_is_not_theirs_stays_and_what_is_left_is_said(tmp_path):
    path, said = orbax(tmp_path / "c", {**THEIRS, "rng": jnp.ones(3)}), []
    state = start() | {"epoch": 7}
    found = checkpoint.adopt(path, state, report=said.append)
    assert found["epoch"] == 7
    equal(found["params"], THEIRS["params"])
    equal(emaopt.get_average(found["opt_state"]), THEIRS["ema_params"])
    assert found["opt_state"].averaging.num_updates == 4
    report = "\n".join(said)
    assert (
        "the parameters were at params, the average at ema_params (train_state)" in report
    )
    assert "its number of updates at step" in report
    assert "left out rng, step" in report
    assert "kept the target's values of epoch, opt_state/inner_state/0/count" in report


def test_slots_of_the_optimizer_come_along(tmp_path):
    adam = optax.adam(1e-3)
    grads = jax.tree.map(jnp.ones_like, THEIRS["params"])
    _, opt_state = adam.update(grads, adam.init(THEIRS["params"]))
    path = orbax(tmp_path / "c", {**THEIRS, "opt_state": opt_state})
    found = checkpoint.adopt(path, start())
    equal(found["opt_state"].inner_state[0], opt_state[0])
    equal(emaopt.get_average(found["opt_state"]), THEIRS["ema_params"])


def test_a_run_of_emaopt_is_adopted_too(tmp_path):
    state, other_state = start(), start()
    state["params"] = THEIRS["params"]
    _, state["opt_state"] = TX.update(
        state["params"], state["opt_state"], state["params"]
    )
    checkpoint.save(tmp_path / "c", state)
    found = checkpoint.adopt(tmp_path / "c", other_state)
    equal(found, state)


def test_without_an_average_it_begins_with_the_parameters(tmp_path):
    said = []
    path = orbax(tmp_path / "c", {"params": THEIRS["params"]})
    found = checkpoint.adopt(path, start(), report=said.append)
    equal(emaopt.get_average(found["opt_state"]), THEIRS["params"])
    assert found["opt_state"].averaging.num_updates == 0
    assert any("there was no average: it begins with them" in one for one in said)


def test_a_debiased_average_forgets_nothing_of_it(tmp_path):
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, debias=True)
    path = orbax(tmp_path / "c", THEIRS)
    state = checkpoint.adopt(path, start(tx))
    assert state["opt_state"].averaging.weight == 1
    zeros = jax.tree.map(jnp.zeros_like, state["params"])
    _, opt_state = tx.update(zeros, state["opt_state"], state["params"])
    half = jax.tree.map(lambda a, b: (a + b) / 2, THEIRS["params"], THEIRS["ema_params"])
    equal(emaopt.get_average(opt_state), half)


def test_parts_that_no_average_has_begin_with_the_parameters(tmp_path):
    part = {"dense": {"bias": THEIRS["ema_params"]["dense"]["bias"]}}
    path, said = orbax(tmp_path / "c", {**THEIRS, "ema_params": part}), []
    found = checkpoint.adopt(path, start(), report=said.append)
    average = emaopt.get_average(found["opt_state"])["dense"]
    equal(average["bias"], part["dense"]["bias"])
    equal(average["kernel"], THEIRS["params"]["dense"]["kernel"])
    assert any(
        "started the average anew from the parameters: 1 leaves" in s for s in said
    )


def test_abstract_and_sharded_targets(tmp_path):
    path = orbax(tmp_path / "c", {**THEIRS, "opt_state": optax.sgd(0.1).init(THEIRS)})
    tx = emaopt.averaged(optax.sgd(0.1), 0.9)
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    sharded = NamedSharding(mesh, PartitionSpec(None, "x"))

    def place(leaf):
        where = sharded if leaf.ndim == 2 else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    target = jax.tree.map(place, jax.eval_shape(lambda: start(tx)))
    found = checkpoint.adopt(path, target)
    kernel = emaopt.get_average(found["opt_state"])["dense"]["kernel"]
    assert kernel.sharding == sharded
    equal(kernel, THEIRS["ema_params"]["dense"]["kernel"])
    record = other("safetensors")
    params = checkpoint.load_averaged(
        record.path, sharding=NamedSharding(mesh, PartitionSpec())
    )
    equal(params["head"]["kernel"].astype(np.float32), record.average["head/kernel"])


def test_several_networks_are_told_by_the_place_of_their_parameters(tmp_path):
    kernel = {"w": jnp.ones(2)}
    theirs = {
        name: {
            "params": {"w": jnp.full(2, 1.0 * i)},
            "ema_params": {"w": jnp.full(2, i + 0.5)},
        }
        for i, name in enumerate(["actor", "critic"], 1)
    }
    path = orbax(tmp_path / "c", theirs)
    tx = emaopt.averaged(optax.sgd(0.1), 0.9)
    target = {n: {"params": kernel, "opt_state": tx.init(kernel)} for n in theirs}
    ways = {f"{n}/opt_state/averaging": f"{n}/params" for n in theirs}
    found = checkpoint.adopt(path, target, params=ways)
    for i, name in enumerate(["actor", "critic"], 1):
        equal(found[name]["params"], {"w": jnp.full(2, 1.0 * i)})
        average = emaopt.get_average(found[name]["opt_state"])
        equal(average, {"w": jnp.full(2, i + 0.5)})


def two_averages(path):
    state = (optax.EmptyState(), {"count": 3, "ema_params": THEIRS["params"]})
    return orbax(path, {**THEIRS, "opt_state": list(state)})


def test_two_averages_of_one_tree_are_told_by_the_layout(tmp_path):
    path = two_averages(tmp_path / "c")
    with pytest.raises(ValueError) as error:
        checkpoint.adopt(path, start())
    message = str(error.value)
    assert "ema_params (train_state, of params)" in message
    assert "opt_state/1/ema_params (kauldron, of params)" in message
    for layout, wanted in [
        ("train_state", "ema_params"),
        ("ema_params", "ema_params"),
        ("kauldron", "params"),
        ("opt_state/1/ema_params", "params"),
    ]:
        found = checkpoint.adopt(path, start(), layout=layout)
        equal(emaopt.get_average(found["opt_state"]), THEIRS[wanted])
    with pytest.raises(ValueError, match=r"several averages .*ema_params, opt_state/1"):
        checkpoint.load_averaged(path)
    equal(checkpoint.load_averaged(path, name="opt_state/1/ema_params"), THEIRS["params"])


def test_an_unknown_layout_lists_what_is_there(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    with pytest.raises(ValueError) as error:
        checkpoint.adopt(path, start(), layout="openpi")
    assert "It holds ema_params (train_state)." in str(error.value)
    assert "tf1_swapped" in str(error.value)


def test_missing_parameters_are_listed_with_what_is_left(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    params = {"Dense_0": THEIRS["params"]["dense"]}
    with pytest.raises(ValueError) as error:
        checkpoint.adopt(path, start(params=params))
    assert "lacks parameters of the target: params/Dense_0/bias" in str(error.value)
    assert "It has besides: params/dense/bias, params/dense/kernel" in str(error.value)
    assert "{their name: your name} which" in str(error.value)
    for old, new in itertools.product(("dense", "params/dense"), ("", "params/")):
        rename = {old: f"{new}Dense_0"}
        found = checkpoint.adopt(path, start(params=params), rename=rename)
        equal(found["params"]["Dense_0"], THEIRS["params"]["dense"])
        average = emaopt.get_average(found["opt_state"])
        equal(average["Dense_0"], THEIRS["ema_params"]["dense"])


def test_a_parameter_may_go_out_of_the_parameters(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    dense = THEIRS["params"]["dense"]
    target = start(params={"dense": {"kernel": dense["kernel"]}})
    target["offset"] = jnp.zeros_like(dense["bias"])
    found = checkpoint.adopt(path, target, rename={"dense/bias": "offset"})
    equal(found["offset"], dense["bias"])


def test_restore_says_who_takes_such_an_average_over(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    with pytest.raises(ValueError, match=r"adopt takes over .* at ema_params \(train_s"):
        checkpoint.restore(path, start())


def test_the_parameters_may_have_another_place_and_another_name(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    state = start(params={"Dense_0": THEIRS["params"]["dense"]})
    target = {"model": {"net": state["params"]}, "opt_state": state["opt_state"]}
    rename = {"params/dense": "model/net/Dense_0"}
    found = checkpoint.adopt(path, target, rename=rename)
    equal(found["model"]["net"]["Dense_0"], THEIRS["params"]["dense"])
    average = emaopt.get_average(found["opt_state"])
    equal(average["Dense_0"], THEIRS["ema_params"]["dense"])


def test_a_target_without_an_average_takes_the_parameters(tmp_path):
    path, said = orbax(tmp_path / "c", THEIRS), []
    params = start()["params"]
    equal(
        checkpoint.adopt(path, {"params": params}, report=said.append)["params"],
        THEIRS["params"],
    )
    assert any("left out an average, the target has none" in one for one in said)
    equal(checkpoint.adopt(path, params, report=said.append), THEIRS["params"])
    for target in ({"params": {"Dense": params["dense"]}}, {"Dense": params["dense"]}):
        with pytest.raises(ValueError, match=r"lacks parameters .*Dense/bias"):
            checkpoint.adopt(path, target, report=said.append)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"dens": "x"}, r"has no parameter of that name, .* there are dense/bias"),
        ({"dense": ""}, r"has no parameter of that name, or gives it none"),
        ({"dense/bias": "dense/kernel"}, r"dense/bias and .*the one name .*dense/kernel"),
        (
            {"dense/bias": "dense/kernel/b"},
            r"rename= puts .*dense/bias .* below the array .*dense/kernel",
        ),
        ({"dense/bias": "dense/biases"}, "lacks parameters .*params/dense/bias"),
    ],
)
def test_renames_that_cannot_be(rename, message, tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    with pytest.raises(ValueError, match=message):
        checkpoint.adopt(path, start(), rename=rename)


def test_other_shapes_are_refused(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"kernel has shape \(3, 2\) there and \(2, 3\)"):
        checkpoint.adopt(path, start(params=params))


def test_local_updates_are_refused(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    tx = emaopt.diloco(optax.sgd(0.1), period=2)
    with pytest.raises(ValueError, match="the target has local updates"):
        checkpoint.adopt(path, start(tx))


def test_restore_leaves_the_trees_of_others_as_they_are(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    equal(checkpoint.restore(path, THEIRS), THEIRS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision(dtype, tmp_path):
    theirs = jax.tree.map(lambda x: jnp.asarray(x, dtype), THEIRS) | {"step": 4}
    path = orbax(tmp_path / "c", theirs)
    found = checkpoint.adopt(path, start(params=theirs["params"]))
    equal(found["params"], theirs["params"])
    average = emaopt.get_average(found["opt_state"])
    assert average["dense"]["kernel"].dtype == np.float32
    equal(average, theirs["ema_params"])


def test_slots_and_statistics_follow_the_names_of_parameters(tmp_path):
    adam = optax.adam(1e-3)
    grads = jax.tree.map(jnp.ones_like, THEIRS["params"])
    _, opt_state = adam.update(grads, adam.init(THEIRS["params"]))
    stats = {"dense": {"mean": jnp.ones(2)}, "norm": {"mean": jnp.full(2, 3.0)}}
    theirs = {**THEIRS, "opt": opt_state, "batch_stats": stats, "global": jnp.int32(5)}
    path = orbax(tmp_path / "c", theirs)
    state = start(params={"encoder": {"Dense_0": THEIRS["params"]["dense"]}})
    state |= {
        "batch_stats": {
            "encoder": {"Dense_0": {"mean": jnp.zeros(2)}},
            "bn": {"mean": jnp.zeros(2)},
        },
        "step": 0,
    }
    found = checkpoint.adopt(
        path,
        state,
        rename={
            "dense": "encoder/Dense_0",
            "opt": "opt_state",
            "batch_stats/norm": "batch_stats/bn",
            "step": "old_step",
            "global": "step",
        },
    )
    inner = found["opt_state"].inner_state[0]
    equal(inner.mu["encoder"]["Dense_0"], opt_state[0].mu["dense"])
    assert inner.count == 1 and found["step"] == 5
    equal(found["batch_stats"]["encoder"]["Dense_0"]["mean"], stats["dense"]["mean"])
    equal(found["batch_stats"]["bn"]["mean"], stats["norm"]["mean"])
    assert found["opt_state"].averaging.num_updates == 4


def test_half_of_a_momentum_is_not_taken(tmp_path):
    adam = optax.adam(1e-3)
    small = {"dense": {"bias": THEIRS["params"]["dense"]["bias"]}}
    _, opt_state = adam.update(small, adam.init(small))
    path = orbax(tmp_path / "c", {**THEIRS, "opt_state": opt_state})
    found = checkpoint.adopt(path, start())
    assert found["opt_state"].inner_state[0].count == 0
    equal(
        found["opt_state"].inner_state[0].mu,
        jax.tree.map(jnp.zeros_like, found["params"]),
    )


def test_a_field_of_ones_own_for_the_average_is_filled(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    state = start()
    state["ema_params"] = state["params"]
    found = checkpoint.adopt(path, state)
    equal(found["ema_params"], THEIRS["ema_params"])
    equal(emaopt.get_average(found["opt_state"]), THEIRS["ema_params"])


def test_an_average_of_emaopts_own_is_not_forgotten_with_debias(tmp_path):
    state = start()
    state["opt_state"] = emaopt.reset_average(state["opt_state"], THEIRS["ema_params"])
    checkpoint.save(tmp_path / "c", state)
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, debias=True)
    found = checkpoint.adopt(tmp_path / "c", start(tx))
    assert found["opt_state"].averaging.weight == 1
    with pytest.raises(ValueError, match="an average of emaopt's own"):
        checkpoint.adopt(tmp_path / "c", start(), layout="train_state")


@pytest.mark.parametrize("name", ["grads", "batch_stats"])
def test_an_average_of_something_else_is_not_one_of_parameters(name, tmp_path):
    other_tree = {name: THEIRS["params"], f"{name}_ema": THEIRS["ema_params"]}
    path = orbax(tmp_path / "c", {"params": THEIRS["params"], **other_tree})
    with pytest.raises(ValueError, match="holds no average"):
        checkpoint.load_averaged(path)
    found = checkpoint.adopt(path, start())
    equal(emaopt.get_average(found["opt_state"]), THEIRS["params"])


@pytest.mark.parametrize("step", [jnp.nan, jnp.inf, 2.5, 1j])
def test_what_cannot_be_a_count_is_none(step, tmp_path):
    path = orbax(tmp_path / "c", {**THEIRS, "step": jnp.asarray(step)})
    found = checkpoint.adopt(path, start())
    assert found["opt_state"].averaging.num_updates == 0


def test_collections_of_a_model_in_the_average(tmp_path):
    theirs = {
        "params": THEIRS["params"],
        "batch_stats": {"mean": jnp.ones(2)},
        "ema_params": {
            "params": THEIRS["ema_params"],
            "batch_stats": {"mean": jnp.zeros(2)},
        },
    }
    path = orbax(tmp_path / "c", theirs)
    equal(checkpoint.load_averaged(path), THEIRS["ema_params"])
    checkpoint.average([path], tmp_path / "raw")
    equal(checkpoint.load_averaged(tmp_path / "raw"), THEIRS["params"])


def test_two_networks_are_told_apart_by_at(tmp_path):
    theirs = {
        "params": {"w": jnp.ones(2)},
        "ema_params": {"w": jnp.zeros(2)},
        "gan": {"params": {"w": jnp.full(2, 3.0)}, "ema_params": {"w": jnp.full(2, 4.0)}},
    }
    path = orbax(tmp_path / "c", theirs)
    assert checkpoint.load_averaged(path, at="params")["w"].tolist() == [0, 0]
    assert checkpoint.load_averaged(path, at="gan/params")["w"].tolist() == [4, 4]
    assert checkpoint.load_averaged(path, at="gan/ema_params")["w"].tolist() == [4, 4]
    checkpoint.average([path], tmp_path / "raw")  # as if there were no averages
    assert checkpoint.load_averaged(tmp_path / "raw")["w"].tolist() == [1, 1]
    for weights in (None, "served"):
        out = tmp_path / f"{weights}.safetensors"
        checkpoint.export_safetensors(path, out, weights=weights, at="ema_params")
        assert list(load_file(out)) == ["w"]


def test_an_average_among_renamed_slots_keeps_its_count(tmp_path):
    ema = {"count": jnp.int32(3), "ema_params": THEIRS["ema_params"]}
    theirs = {"params": THEIRS["params"], "opt": [{"trace": jnp.ones(2)}, ema]}
    path = orbax(tmp_path / "c", theirs)
    found = checkpoint.adopt(path, start(), rename={"opt": "opt_state"})
    equal(emaopt.get_average(found["opt_state"]), THEIRS["ema_params"])
    assert found["opt_state"].averaging.num_updates == 3
