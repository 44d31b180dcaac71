"""TensorFlow's variables by name: whose averages, slots and counts they are."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from other_writers import DATA, bundle

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint._files import names_of
from emaopt.checkpoint._formats import _bytes, _tensorflow


def averages(said, tensors, *, raw=False):
    """What is served of each parameter, by its name in the checkpoint."""
    return {
        name: tensors[(not raw and one["average"]) or one["raw"]].astype(np.float64)
        for name, one in said["params"].items()
    }


def flat(tree):
    return {
        "/".join(names): np.asarray(leaf, np.float64)
        for names, leaf in names_of(tree).items()
    }


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, name)


SAVED = ["v1_ema", "v1_partitioned", "v1_sharded"]


@pytest.mark.quick(99)
@pytest.mark.parametrize("name", SAVED)
def test_averages_of_a_saver_are_served(name):
    folder, said, tensors = bundle(name)
    served = checkpoint.load_averaged(folder)
    same(flat(served), averages(said, tensors))
    described = checkpoint.describe(folder)
    assert described.parameters == "params" and described.nbytes_on_disk > 0
    (average,) = described.averages
    assert (average.name, average.num_updates) == ("ExponentialMovingAverage", 7)


@pytest.mark.parametrize("name", ["v1_ema_in_scope", "v1_ema_name"])
def test_an_average_of_another_name_is_told_by_it(name, tmp_path):
    folder, said, tensors = bundle(name)
    with pytest.raises(ValueError, match="holds no average"):
        checkpoint.load_averaged(folder)
    said_of = checkpoint.convert(folder, tmp_path / "mine", layout="slow")
    assert said_of == "the averages of slow"
    served = checkpoint.load_averaged(tmp_path / "mine", at="params")
    wanted = averages(said, tensors)
    assert {n: x for n, x in flat(served).items() if n in wanted}.keys() == wanted.keys()
    same({n: x for n, x in flat(served).items() if n in wanted}, wanted)


def test_of_two_averages_one_is_named():
    folder, said, tensors = bundle("v1_ema_twice")
    with pytest.raises(
        ValueError, match=r"several averages .*ExponentialMovingAverage_1"
    ):
        checkpoint.load_averaged(folder)
    served = checkpoint.load_averaged(folder, name="ExponentialMovingAverage")
    same(flat(served), averages(said, tensors))


def test_a_swapping_saver_has_to_be_told():
    folder, said, tensors = bundle("v1_moving_average_optimizer")
    wanted = averages(said, tensors)
    state = start(wanted)
    state = checkpoint.adopt(folder, state, layout="tf1_swapped")
    same(flat(state["params"]), averages(said, tensors, raw=True))
    same(flat(emaopt.get_average(state["opt_state"])), wanted)


TX = emaopt.averaged(optax.adam(1e-3), emaopt.warmup_decay(0.9))


def start(like):
    params: dict = {}
    for name, array in like.items():
        *way, last = name.split("/")
        node = params
        for key in way:
            node = node.setdefault(key, {})
        node[last] = jnp.full(array.shape, 9.0)
    return {"params": params, "opt_state": TX.init(params)}


def test_a_run_of_tensorflow_goes_on_here():
    folder, said, tensors = bundle("v1_ema")
    raw, served = averages(said, tensors, raw=True), averages(said, tensors)
    names = {"tower/dense": "Dense_0", "scale": "head/scale"}
    mine = {
        "Dense_0/kernel": "tower/dense/kernel",
        "Dense_0/bias": "tower/dense/bias",
        "head/scale": "scale",
    }
    said_of = []
    state = start({n: raw[old] for n, old in mine.items()})
    state["batch_stats"] = {"mean": jnp.zeros(3)}
    state = checkpoint.adopt(
        folder,
        state,
        rename=names | {"tower/moving_mean": "batch_stats/mean"},
        report=said_of.append,
    )
    same(flat(state["params"]), {n: raw[old] for n, old in mine.items()})
    average = emaopt.get_average(state["opt_state"])
    same(flat(average), {n: served[old] for n, old in mine.items()})
    np.testing.assert_array_equal(state["batch_stats"]["mean"], raw["tower/moving_mean"])
    # The warm-up goes on: min(.9, (1 + 8) / (10 + 8)) of the old average.
    grads = jax.tree.map(jnp.zeros_like, state["params"])
    _, opt_state = TX.update(grads, state["opt_state"], state["params"])
    kernel = emaopt.get_average(opt_state)["Dense_0"]["kernel"]
    wanted = 0.5 * served["tower/dense/kernel"] + 0.5 * raw["tower/dense/kernel"]
    np.testing.assert_allclose(kernel, wanted, rtol=1e-6)
    assert any("ExponentialMovingAverage (tf1)" in one for one in said_of)
    assert any("left out" in one and "slots/Momentum" in one for one in said_of)


@pytest.mark.parametrize("name", ["tf2_tfm", "tf2_tfm_manager"])
def test_slots_of_tf_models_are_served(name):
    folder, said, tensors = bundle(name)
    served = flat(checkpoint.load_averaged(folder))
    wanted = {
        one["raw"].split("/", 1)[1].partition("/.ATTR")[0]: tensors[
            one["average"] or one["raw"]
        ]
        for one in said["params"].values()
    }
    same(served, wanted)
    (average,) = checkpoint.describe(folder).averages
    assert average.num_updates == 7


def test_a_swapped_checkpoint_of_tf_models_has_to_be_told(tmp_path):
    folder, said, tensors = bundle("tf2_tfm_swapped")
    checkpoint.convert(folder, tmp_path / "mine", layout="tf2_swapped")
    served = flat(checkpoint.load_averaged(tmp_path / "mine"))
    for one in said["params"].values():
        name = (one["average"] or one["raw"]).split("/", 1)[1].partition("/.ATTR")[0]
        array = tensors[one["average"] or one["raw"]]
        np.testing.assert_array_equal(served[name], array.astype(np.float64), name)


@pytest.mark.parametrize("name", ["tf2_plain", "tf2_keras2_ema"])
def test_without_slots_there_is_no_average(name, tmp_path):
    folder, said, _ = bundle(name)
    with pytest.raises(ValueError, match="holds no average"):
        checkpoint.load_averaged(folder)
    checkpoint.convert(folder, tmp_path / "c", report=lambda said: None)
    params = flat(checkpoint.load_averaged(tmp_path / "c"))
    raw = [one["raw"].partition("/.ATTR")[0] for one in said["params"].values()]
    names = {n.replace(".S", "/").replace("..", ".") for n in raw}
    assert names >= params.keys() or {n.partition("/")[2] for n in names} >= params.keys()
    assert params and not any("optimizer" in name for name in params)


def test_variables_at_the_root_are_parameters_and_steps_are_not():
    scalar, step = np.float32(2), np.int64(7)
    arrays = {
        f"{name}/.ATTRIBUTES/VARIABLE_VALUE": _bytes.constant(value)
        for name, value in {"scale": scalar, "dense/w": scalar, "step": step}.items()
    }
    tree = _tensorflow.of_object_graph(arrays, False).tree
    assert set(tree) == {"params", "step"} and set(tree["params"]) == {"scale", "dense"}


def test_what_keras_keeps_by_number_is_refused():
    with pytest.raises(ValueError, match=r"finalize_variable_values"):
        checkpoint.load_averaged(bundle("tf2_keras_ema")[0])


def test_a_scope_that_does_not_tell_whose_a_slot_is_is_refused():
    arrays = {
        name: _bytes.constant(np.zeros(2, np.float32))
        for name in ("w", "a/w/Adam", "b/w/Adam")
    }
    with pytest.raises(ValueError, match=r"would both be the slots of Adam/w"):
        _tensorflow.of_saver(arrays, False, "slow")


def test_an_average_of_one_of_two_names_is_refused():
    names = ("head", "scope/head", "scope/head/slow")
    arrays = {n: _bytes.constant(np.zeros(2, np.float32)) for n in names}
    with pytest.raises(ValueError, match=r"of scope/head, or of head in a scope"):
        _tensorflow.of_saver(arrays, False, "slow")
    arrays["head/slow"] = arrays["head"]  # now no scope is in the way
    found = _tensorflow.of_saver(arrays, False, "slow").tree["slow"]
    assert set(found) == {"head", "scope"}


def test_a_parameter_below_another_is_no_slot_of_it():
    arrays = {"emb": np.zeros((4, 2)), "emb/kernel": np.zeros((3, 3))}
    made_of = {n: _bytes.constant(x.astype(np.float32)) for n, x in arrays.items()}
    with pytest.raises(ValueError, match=r"emb is an array there, and has|below it"):
        _tensorflow.of_saver(made_of, False, "slow")


def test_escaped_names_are_those_of_their_users(tmp_path):
    checkpoint.convert(bundle("tf2_plain")[0], tmp_path / "mine", at="params/tower")
    served = checkpoint.load_averaged(tmp_path / "mine")
    assert "a/b.c" in served["heads"]


def test_the_prefix_its_files_and_its_directory_are_the_checkpoint(tmp_path):
    folder, *_ = bundle("v1_ema")
    prefix = folder / "model.ckpt-7"
    for path in (prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001", folder):
        assert checkpoint.describe(path).averages[0].num_updates == 7
    shutil.copytree(folder, tmp_path / "saved" / "variables")
    for file in (tmp_path / "saved" / "variables").glob("model.ckpt-7*"):
        file.rename(file.with_name(file.name.replace("model.ckpt-7", "variables")))
    assert checkpoint.describe(tmp_path / "saved").averages[0].num_updates == 7
    for file in folder.glob("model.ckpt-7*"):
        shutil.copy(file, tmp_path / file.name)
        shutil.copy(file, tmp_path / file.name.replace("-7", "-8"))
    with pytest.raises(ValueError, match=r"several .*model.ckpt-7, model.ckpt-8"):
        checkpoint.describe(tmp_path)


def test_the_format_of_before_2016_is_refused():
    path = DATA / "bundles" / "v1_saver_v1_format" / "model.ckpt-7"
    with pytest.raises(ValueError, match="write_version=V2"):
        checkpoint.load_averaged(path)
