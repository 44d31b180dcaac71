"""What a user calls "value" keeps its name, and Flax's variables have none of theirs."""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from models import Net
from records import edit, record_of
from safetensors.numpy import load_file
from test_places import same

import emaopt
from emaopt import checkpoint, tf1

TX = emaopt.averaged(optax.adam(1.0), 0.5, zero_init=True)
FILE = "_CHECKPOINT_METADATA"


class Scalar(eqx.Module):
    value: jax.Array


class Heads(NamedTuple):
    value: jax.Array
    other: jax.Array | None = None


def array(number=1.0):
    return jnp.full(2, number)


# Parameters, and how their leaves are called.
PARAMS = {
    "dict": ({"dense": {"value": array()}}, ["dense/value"]),
    "dict with a sibling": (
        {"dense": {"value": array(), "x": array(2)}, "v": {"value": array()}},
        ["dense/value", "dense/x", "v/value"],
    ),
    "beside nothing": ({"dense": {"value": array(), "x": None}}, ["dense/value"]),
    "at the top": ({"value": array()}, ["value"]),
    "twice": ({"a": {"value": {"value": array()}}}, ["a/value/value"]),
    "equinox": ({"scale": Scalar(array())}, ["scale/value"]),
    "NamedTuple": ({"heads": Heads(array())}, ["heads/value"]),
    "variables": (
        {"k": nnx.Param(array()), "b": {"c": nnx.Param(array())}},
        ["b/c", "k"],
    ),
    "boxed": ({"k": nn.Partitioned(array(), names=("x",))}, ["k"]),
    "both": ({"k": nnx.Param(array()), "d": {"value": array()}}, ["d/value", "k"]),
}
cases = pytest.mark.parametrize("params, names", PARAMS.values(), ids=PARAMS)


def saved(path, params):
    state = {"params": params, "opt_state": TX.init(params)}
    checkpoint.save(path, state)
    return state


def leaves_of(path):
    return [leaf.name for leaf in checkpoint.describe(path).leaves]


def exported(path, **options):
    out = path.with_name("out.safetensors")
    checkpoint.export_safetensors(path, out, force=True, **options)
    return load_file(out)


@pytest.mark.quick(2)
@cases
def test_names_are_the_users_in_exports_and_descriptions(params, names, tmp_path):
    state = saved(tmp_path / "1", params)
    assert sorted(exported(tmp_path / "1")) == names
    assert sorted(exported(tmp_path / "1", weights="raw")) == names
    for way in ("params", "opt_state/averaging/average"):
        inside = [n for n in leaves_of(tmp_path / "1") if n.startswith(way)]
        assert sorted(inside) == [f"{way}/{name}" for name in names]
    same(checkpoint.restore(tmp_path / "1", state), state)


@pytest.mark.quick(2)
@cases
def test_averages_of_checkpoints_keep_them(params, names, tmp_path):
    saved(tmp_path / "1", params)
    checkpoint.average([tmp_path / "1"], tmp_path / "out")
    assert leaves_of(tmp_path / "out") == [f"params/{name}" for name in names]
    assert sorted(exported(tmp_path / "out")) == names
    once, twice = (checkpoint.load_averaged(tmp_path / n) for n in ("1", "out"))
    same(once, twice)
    like = checkpoint.load_averaged(tmp_path / "1", target=params)
    same(like, emaopt.get_average(TX.init(params), params))
    np.testing.assert_array_equal(jax.tree.leaves(once), jax.tree.leaves(like))


@cases
def test_masks_and_variables_know_the_names(params, names):
    for name in names:
        mask = emaopt.by_name(f"^{name}$")(params)
        assert sum(jax.tree.leaves(mask)) == 1
    slots: Any = optax.adam(1.0).init(params)
    kept = [name.removeprefix("mu/") for name in tf1.variables(slots[0])]
    assert set(names) <= set(kept)
    assert sorted(checkpoint.average_names(params).values()) == names


def test_the_record_holds_what_is_not_clear_alone(tmp_path):
    for number, (params, _) in enumerate(PARAMS.values()):
        saved(tmp_path / str(number), params)
    found = {
        name: record_of(tmp_path / str(number) / FILE).get("values")
        for number, name in enumerate(PARAMS)
    }
    clear = ("beside nothing", "NamedTuple", "variables", "boxed")
    all_own = ("dict", "dict with a sibling", "at the top", "twice", "equinox")
    assert not any(found[name] for name in clear)
    assert all(found[name] is True for name in all_own)
    slots = "mu", "nu"
    ways = [("params",), ("opt_state", "averaging", "average")]
    ways += [("opt_state", "inner_state", "0", slot) for slot in slots]
    assert sorted(map(tuple, found["both"])) == sorted((*way, "d") for way in ways)


def test_a_file_without_the_record_is_read_as_before(tmp_path):
    """As one that was written before, or by Orbax alone: it may hold variables."""
    params = {"dense": {"value": array()}, "v": {"value": array(), "x": array()}}
    state = saved(tmp_path / "1", params)
    edit(tmp_path / "1" / FILE, lambda record: record.pop("values"))
    assert sorted(exported(tmp_path / "1")) == ["dense", "v/value", "v/x"]
    same(checkpoint.restore(tmp_path / "1", state), state)
    same(checkpoint.load_averaged(tmp_path / "1"), state["opt_state"].averaging.average)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "2", {"params": params})
    assert sorted(exported(tmp_path / "2", weights=None)) == ["dense", "v/value", "v/x"]


def test_nnx_states_and_dicts_restore_into_one_another(tmp_path):
    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    forms = {
        "state": params,
        "pure": nnx.to_pure_dict(params),
        "as on disk": jax.tree.map(lambda v: {"value": v}, nnx.to_pure_dict(params)),
        "raw values": nnx.State(nnx.to_pure_dict(params)),
    }
    states = {n: {"params": p, "opt_state": TX.init(p)} for n, p in forms.items()}
    for written, state in states.items():
        checkpoint.save(tmp_path / written, state)
        for target in states.values():
            same(checkpoint.restore(tmp_path / written, target), target)
            average = checkpoint.load_averaged(
                tmp_path / written, target=target["params"]
            )
            same(average, jax.tree.map(jnp.zeros_like, target["params"]))
    own = [n for n in exported(tmp_path / "as on disk") if n.endswith("/value")]
    assert len(own) == len(jax.tree.leaves(params))
    for written in ("state", "pure", "raw values"):
        assert not any(n.endswith("/value") for n in exported(tmp_path / written))


def test_what_a_mask_leaves_out_beside_a_value_does_not_rename_it(tmp_path):
    params = {"dense": {"value": array(), "x": array(2)}, "b": array(3)}
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, mask=emaopt.by_name("value"))
    state = {"params": params, "opt_state": tx.init(params)}
    same(emaopt.get_average(state["opt_state"], params), params)
    checkpoint.save(tmp_path / "c", state)
    same(checkpoint.restore(tmp_path / "c", state), state)
    same(checkpoint.load_averaged(tmp_path / "c"), params)


@pytest.mark.parametrize("key", ["value", "other"])
def test_an_optimizer_may_be_called_value(key, tmp_path):
    params = {"w": array()}
    state = {"params": params, "opt_state": {key: TX.init(params)}}
    checkpoint.save(tmp_path / "c", state)
    same(checkpoint.restore(tmp_path / "c", state), state)
    same(checkpoint.load_averaged(tmp_path / "c"), {"w": array(0)})


def test_at_takes_the_name_that_is_shown(tmp_path):
    saved(tmp_path / "c", {"dense": {"value": array()}})
    assert [*exported(tmp_path / "c", at="params/dense/value")] == ["value"]
    assert [*exported(tmp_path / "c", at="params/dense")] == ["value"]


def test_names_that_collide_on_disk_only_are_refused(tmp_path):
    params = {"a": {"value": array()}, "a.value": array()}
    with pytest.raises(ValueError, match=r"write \S*a/value and \S*a\.value to one file"):
        saved(tmp_path / "c", params)
