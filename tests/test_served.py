"""What belongs to the average is served with it; training resumes from its own values."""

import json
import re
import shutil
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.checkpoints import restore_checkpoint, save_checkpoint
from flax.training.train_state import TrainState
from orbax.checkpoint import v1
from records import edit, record_of
from safetensors.numpy import load_file
from shell import emaopt_command
from test_checkpoint import abstract, assert_same, trained_nnx

import emaopt
from emaopt import batch_stats, checkpoint

TX = emaopt.averaged(optax.adam(0.1), 0.9, zero_init=True)
PARAMS = {"w": jnp.ones((2, 3), jnp.bfloat16), "none": None, "empty": jnp.zeros((0, 2))}
OWN = {
    "bn": {"mean": jnp.arange(3.0), "var": jnp.ones(3)},
    "half": jnp.arange(2.0).astype(jnp.bfloat16),
    "count": jnp.int32(3),
    "more": {"value": jnp.zeros(2), "empty": jnp.zeros((0, 3))},
}
NEW = jax.tree.map(lambda x: x + 5, OWN)


class State(NamedTuple):
    params: dict
    opt_state: tuple
    batch_stats: dict
    rng: dict


class Trained(TrainState):
    batch_stats: dict


def opt_state():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    return TX.update(grads, TX.init(PARAMS), PARAMS)[1]


def as_dict():
    parts = {"params": PARAMS, "opt_state": opt_state(), "batch_stats": OWN}
    return parts | {"rng": {"key": jax.random.key(3)}}


def as_namedtuple():
    return State(**as_dict())


def as_train_state():
    new = Trained.create(apply_fn=jnp.dot, params=PARAMS, tx=TX, batch_stats=OWN)
    return new.replace(opt_state=opt_state(), step=jnp.int32(1))


def as_tuple():
    return PARAMS, opt_state(), OWN


STATES = {
    "dict": (as_dict, "batch_stats"),
    "namedtuple": (as_namedtuple, "batch_stats"),
    "TrainState": (as_train_state, "batch_stats"),
    "tuple": (as_tuple, "2"),
    "nested": (lambda: {"run": [as_dict()]}, "run/0/batch_stats"),
}


def averages():
    return emaopt.get_average(opt_state())


def plainly(path):
    with ocp.StandardCheckpointer() as orbax:
        return orbax.restore(path)


def at(tree, way):
    for key in way.split("/"):
        tree = tree[int(key)] if isinstance(tree, (list, tuple)) else tree[key]
    return tree


def without_empty(tree):
    return jax.tree.map(lambda x: x if x.size else None, tree)


@pytest.mark.parametrize("make, way", STATES.values(), ids=STATES)
def test_it_stands_under_its_names_and_the_own_values_resume(make, way, tmp_path):
    state, path = make(), tmp_path / "c"
    checkpoint.save(path, state, served={way: NEW})
    assert_same(checkpoint.restore(path, abstract(state)), state)
    assert_same(at(plainly(path), way), without_empty(NEW))
    assert_same(checkpoint.load_averaged(path), averages())
    assert_same(checkpoint.load_averaged(path, at=way, target=NEW), NEW)
    described = checkpoint.describe(path)
    assert described.beside == [way]
    assert described.served.startswith("the averages of ")
    # Without its record the tree still says what is what, but for arrays of size 0.
    file = path / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    assert content["custom_metadata"].pop("emaopt")["version"] == 4
    file.write_text(json.dumps(content))
    if make is as_dict:
        some = {"params": {"w": PARAMS["w"]}, "batch_stats": {"bn": OWN["bn"]}}
        back = checkpoint.restore(path, some, ignore_extra=True, report=list)
        assert_same(back, some)
        assert_same(checkpoint.load_averaged(path, at="params/w"), averages()["w"])


def test_a_part_of_a_tree_may_be_served(tmp_path):
    state = as_dict()
    for i, (served, beside) in enumerate(
        [
            ({"batch_stats": {"bn": {"mean": NEW["bn"]["mean"]}}}, "batch_stats/bn/mean"),
            ({"batch_stats/more/value": NEW["more"]["value"]}, "batch_stats/more/value"),
            ({"batch_stats/bn": NEW["bn"]}, "batch_stats/bn"),
            ({"batch_stats/count": 8}, "batch_stats/count"),
            (
                {"batch_stats/more": {"value": NEW["more"]["value"]}},
                "batch_stats/more/value",
            ),
            ({"batch_stats/bn/mean/value": NEW["bn"]["mean"]}, "batch_stats/bn/mean"),
        ]
    ):
        path = tmp_path / str(i)
        checkpoint.save(path, state, served=served)
        assert_same(checkpoint.restore(path, state), state)
        stands = plainly(path)["batch_stats"]
        for way in ("bn/mean", "bn/var", "more/value", "count"):
            is_ours = f"batch_stats/{way}".startswith(beside)
            np.testing.assert_array_equal(
                at(stands, way), at(NEW if is_ours else OWN, way)
            )
        assert checkpoint.describe(path).beside == [beside]


def test_nothing_is_beside_where_nothing_is_given(tmp_path):
    for i, served in enumerate([None, {}, {"batch_stats": {}}]):
        checkpoint.save(tmp_path / str(i), as_dict(), served=served)
        record = record_of(tmp_path / str(i) / "_CHECKPOINT_METADATA")
        assert "beside" not in record
        assert checkpoint.describe(tmp_path / str(i)).beside == []


def test_nnx_statistics_inside_of_the_model(tmp_path):
    model, optimizer = trained_nnx()
    state = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    stats = jax.tree.map(lambda x: x + 7, nnx.state(model, nnx.BatchStat))
    checkpoint.save(tmp_path / "c", state, served={"model": stats})
    assert_same(checkpoint.restore(tmp_path / "c", abstract(state)), state)
    some = nnx.state(model, nnx.Param)
    got = checkpoint.load_averaged(tmp_path / "c", at="model", target=some)
    assert jax.tree.structure(got) == jax.tree.structure(some)
    served = checkpoint.load_averaged(tmp_path / "c", target=nnx.state(model))
    assert_same(served["norm"]["mean"], stats["norm"]["mean"])
    average = emaopt.get_average(state["optimizer"]["opt_state"])
    np.testing.assert_array_equal(
        served["norm"]["scale"].get_value(), average["norm"]["scale"].get_value()
    )
    assert checkpoint.describe(tmp_path / "c").beside == [
        "model/norm/mean",
        "model/norm/var",
    ]
    raw = tmp_path / "raw.safetensors"
    checkpoint.export_safetensors(tmp_path / "c", raw, weights="raw", separator=".")
    out = tmp_path / "served.safetensors"
    checkpoint.export_safetensors(tmp_path / "c", out, separator=".")

    np.testing.assert_array_equal(
        load_file(out)["norm.mean"], stats["norm"]["mean"].get_value()
    )
    np.testing.assert_array_equal(
        load_file(raw)["norm.mean"], state["model"]["norm"]["mean"].get_value()
    )


def test_the_state_that_served_it_goes_on_as_one_that_did_not(tmp_path):
    """Of a target without an average, or with another optimizer, it is nothing."""
    state = as_dict()
    checkpoint.save(tmp_path / "c", state, served={"batch_stats": NEW})
    for tx in (optax.adam(0.1), optax.chain(optax.clip(1.0), TX)):
        target = state | {"opt_state": tx.init(PARAMS)}
        said = []
        back = checkpoint.restore(tmp_path / "c", target, report=said.append)
        assert_same(back["batch_stats"], OWN)
        assert_same(back["params"], PARAMS)
        assert not any("beside" in sentence for sentence in said)
    part = {"params": PARAMS, "batch_stats": OWN}
    back = checkpoint.restore(tmp_path / "c", part, ignore_extra=True, report=list)
    assert_same(back, part)
    again = checkpoint.restore(tmp_path / "c", state)
    checkpoint.save(tmp_path / "d", again)
    assert_same(plainly(tmp_path / "d")["batch_stats"], without_empty(OWN))


def test_average_convert_and_export_take_it_as_it_is_asked_for(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / str(step), as_dict(), served={"batch_stats": NEW})
    paths = [tmp_path / "1", tmp_path / "2"]
    checkpoint.average(paths, tmp_path / "mean")
    assert_same(plainly(tmp_path / "mean")["params"], without_empty(averages()))
    for weights, tree in (("served", NEW), ("raw", OWN)):
        out = tmp_path / f"{weights}.safetensors"
        said = checkpoint.export_safetensors(
            paths[0], out, weights=weights, at="batch_stats/bn"
        )

        np.testing.assert_array_equal(load_file(out)["mean"], tree["bn"]["mean"])
        words = {"served": "what is served beside the averages"}
        assert said == words.get(weights, "the raw parameters")


def test_it_goes_with_the_average_that_a_name_chooses(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, as_dict(), served={"batch_stats": NEW})
    got = checkpoint.load_averaged(path, name="averaging", at="batch_stats", target=NEW)
    assert_same(got, NEW)
    with pytest.raises(ValueError, match="no average under the name 'no'"):
        checkpoint.load_averaged(path, name="no", at="batch_stats")


def test_where_nothing_was_served_an_error_says_so(tmp_path):
    checkpoint.save(tmp_path / "c", as_dict())
    with pytest.raises(
        ValueError, match="nothing was given to `served=`, when it was sa"
    ):
        checkpoint.load_averaged(tmp_path / "c", at="batch_stats")


def test_its_raw_values_are_raw_where_they_stand(tmp_path):
    checkpoint.save(tmp_path / "c", as_dict(), served={"batch_stats": NEW})
    at, out = "opt_state/averaging/beside/batch_stats", tmp_path / "out.safetensors"
    for weights in (None, "raw"):
        said = checkpoint.export_safetensors(
            tmp_path / "c", out, weights=weights, at=at, force=True
        )
        assert said == "the raw parameters"
        assert load_file(out)["bn/mean"].tolist() == OWN["bn"]["mean"].tolist()


def test_inspect_says_what_goes_with_the_averages(tmp_path):
    checkpoint.save(tmp_path / "c", as_dict(), served={"batch_stats": NEW})
    shown = emaopt_command("inspect", tmp_path / "c")
    assert "With them go batch_stats; training resumes" in " ".join(shown.stdout.split())
    found = json.loads(emaopt_command("inspect", tmp_path / "c", "--json").stdout)
    assert found["beside"] == ["batch_stats"]


# The doors of Orbax


Save, Restore = ocp.args.StandardSave, ocp.args.StandardRestore


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("make", [as_dict, as_train_state])
def test_a_manager_asks_a_function_of_the_state(make, asynchronous, tmp_path):
    state, asked = make(), []

    def served(given):
        asked.append(given)
        return {"batch_stats": NEW}

    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)
    registry = checkpoint.handler_registry(served=served)
    with ocp.CheckpointManager(
        tmp_path, options=options, handler_registry=registry
    ) as manager:
        manager.save(1, args=Save(state))
        manager.wait_until_finished()
        assert asked == [state] or asked[0] is state
        assert_same(manager.restore(1, args=Restore(abstract(state))), state)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert_same(manager.restore(1)["batch_stats"], without_empty(NEW))
    assert checkpoint.describe(tmp_path / "1").beside == ["batch_stats"]


@pytest.mark.parametrize("save", [Save, ocp.args.PyTreeSave])
def test_across_items_it_is_made_once(save, tmp_path):
    state, asked = as_dict(), []

    def served(items):
        asked.append(sorted(items))
        return {"batch_stats": NEW}

    registry = checkpoint.handler_registry(served=served)
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        items = {name: save(tree) for name, tree in state.items()}
        if save is ocp.args.PyTreeSave:
            each = jax.tree.map(lambda _: ocp.SaveArgs(dtype=np.dtype("float32")), OWN)
            items["batch_stats"] = save(OWN, save_args=each)
        manager.save(1, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
        assert asked == [sorted(state)]
        targets = {name: Restore(abstract(tree)) for name, tree in state.items()}
        back = manager.restore(1, args=ocp.args.Composite(**targets))
        assert_same({**back}, state)
    # The arguments of an item hold for what stands in it.
    dtype = "float32" if save is ocp.args.PyTreeSave else "bfloat16"
    leaves = {
        leaf.name: leaf.dtype for leaf in checkpoint.describe(tmp_path / "1").leaves
    }
    assert leaves["batch_stats/half"] == dtype
    assert leaves["opt_state/averaging/beside/batch_stats/half"] == "bfloat16"


def test_save_args_of_a_whole_tree_hold_for_the_values_at_their_names(tmp_path):
    state = {n: x for n, x in as_dict().items() if n != "rng"}
    state["params"], state["batch_stats"] = {"w": PARAMS["w"]}, OWN["bn"]
    state["opt_state"] = TX.init(state["params"])
    each = jax.tree.map(lambda _: ocp.SaveArgs(), state)
    each["batch_stats"]["mean"] = ocp.SaveArgs(dtype=np.dtype("float16"))
    registry = checkpoint.handler_registry(served=lambda _: {"batch_stats": NEW["bn"]})
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(state, save_args=each))
        manager.wait_until_finished()
        assert_same(manager.restore(1, args=Restore(abstract(state))), state)
    dtypes = {x.name: x.dtype for x in checkpoint.describe(tmp_path / "1").leaves}
    assert dtypes["batch_stats/mean"] == "float16"
    assert dtypes["batch_stats/var"] == "float32"


def test_of_items_that_were_removed(tmp_path):
    registry = checkpoint.handler_registry(served=lambda _: {"batch_stats": NEW})
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        for step in (1, 2):
            items = {name: Save(tree) for name, tree in as_dict().items()}
            manager.save(step, args=ocp.args.Composite(**items))
    alone = tmp_path / "2" / "batch_stats"  # an item, of which its step tells more
    assert_same(checkpoint.restore(alone, {"batch_stats": OWN}, ignore_extra=True)
                ["batch_stats"], OWN)  # fmt: skip
    shutil.rmtree(tmp_path / "1" / "opt_state")
    assert_same(checkpoint.load_averaged(tmp_path / "1"), averages())
    assert_same(
        checkpoint.load_averaged(tmp_path / "1", at="batch_stats", target=NEW), NEW
    )
    with pytest.raises(ValueError, match="no raw values of batch_stats/bn/mean:"):
        checkpoint.restore(tmp_path / "1", {"batch_stats": OWN}, ignore_extra=True)
    with pytest.raises(ValueError, match="no raw values of batch_stats"):
        checkpoint.export_safetensors(
            tmp_path / "1", tmp_path / "out", weights="raw", at="batch_stats/bn"
        )
    shutil.rmtree(tmp_path / "2" / "batch_stats")
    assert_same(checkpoint.restore(tmp_path / "2", as_dict()), as_dict())
    rest = {n: x for n, x in as_dict().items() if n != "batch_stats"}
    back = checkpoint.restore(tmp_path / "2", rest, ignore_extra=True, report=list)
    assert_same(back, rest)
    assert_same(checkpoint.load_averaged(tmp_path / "2"), averages())
    described = [checkpoint.describe(tmp_path / step).beside for step in "12"]
    assert described == [["batch_stats"], []]


def test_without_an_average_the_function_is_not_asked(tmp_path):
    def served(state):
        raise AssertionError

    registry = checkpoint.handler_registry(served=served, optional=True)
    state = {"params": PARAMS["w"], "opt_state": optax.sgd(0.1).init(PARAMS["w"])}
    state["batch_stats"] = OWN["bn"]
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        manager.save(1, args=Save(state))
    other = {"batch_stats": NEW["bn"]}
    checkpoint.save(tmp_path / "c", state, optional=True, served=other)
    assert_same(plainly(tmp_path / "c")["batch_stats"], OWN["bn"])


def test_an_error_of_the_function_is_raised_by_save(tmp_path):
    for made, error, words in (
        (lambda _: [], TypeError, r"served must be a dict, got \[\]"),
        (lambda _: {"x": 1}, ValueError, "x is not in the state"),
        (lambda _: 1 / 0, ZeroDivisionError, "division"),
    ):
        registry = checkpoint.handler_registry(served=made)
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        manager = ocp.CheckpointManager(
            tmp_path, options=options, handler_registry=registry
        )
        with pytest.raises(error, match=words):
            manager.save(1, args=Save(as_dict()))
        assert manager.all_steps(read=True) == []


def test_swap_state_and_metadata_are_doors_of_ones_own(tmp_path):
    state = as_dict()
    del state["params"]["none"]
    state["opt_state"] = TX.init(state["params"])
    swapped = checkpoint.swap_state(state, served={"batch_stats": NEW})
    assert_same(swapped["batch_stats"], NEW)
    assert jax.tree.structure(checkpoint.swap_state(swapped)) == jax.tree.structure(state)
    assert_same(checkpoint.swap_state(swapped), state)
    record = checkpoint.metadata(swapped)
    lean = jax.tree.map(lambda x: x if x.size else None, swapped)
    v1.save(tmp_path / "c", lean, custom_metadata=record)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    checkpoint.save(tmp_path / "d", swapped)
    assert_same(checkpoint.restore(tmp_path / "d", state), state)
    assert checkpoint.describe(tmp_path / "d").beside == ["batch_stats"]
    again = {"batch_stats": OWN}
    with pytest.raises(ValueError, match=r"serves other values .* already"):
        checkpoint.save(tmp_path / "e", swapped, served=again)
    plain = checkpoint.swap_state(state)
    with pytest.raises(ValueError, match="is swapped, and goes back"):
        checkpoint.swap_state(plain, served=again)
    checkpoint.save(tmp_path / "e", plain, served={"batch_stats": NEW})
    assert_same(checkpoint.restore(tmp_path / "e", state), state)
    with pytest.raises(ValueError, match="raw values beside it"):
        emaopt.swap(swapped["params"], swapped["opt_state"])
    with pytest.raises(ValueError, match=r"restore: the target is swapped, .* as it is"):
        checkpoint.restore(tmp_path / "d", swapped)
    # A reader that drops what its target has no place for needs the same target.
    save_checkpoint(tmp_path / "flax", lean, 1)
    back = restore_checkpoint(tmp_path / "flax", lean)
    assert_same(checkpoint.swap_state(back), checkpoint.swap_state(lean))


# What holds an average


def test_of_several_averages_all_are_served_with_it(tmp_path):
    nets = {
        name: {"params": {"w": jnp.full(2, i)}, "stats": jnp.full(3, i)}
        for i, name in enumerate(("actor", "critic"), start=1)
    }
    state = {"nets": {n: x["params"] for n, x in nets.items()}}
    state["stats"] = {n: x["stats"] for n, x in nets.items()}
    state["opt_states"] = {n: TX.init(x["params"]) for n, x in nets.items()}
    new = jax.tree.map(lambda x: x * 10, state["stats"])
    ways = {"actor": "nets/actor", "critic": "nets/critic"}
    checkpoint.save(
        tmp_path / "c",
        state,
        name=("critic", "actor"),
        params={f"opt_states/{n}": way for n, way in ways.items()},
        served={"stats": new},
    )
    assert_same(checkpoint.restore(tmp_path / "c", state, params=ways), state)
    assert_same(plainly(tmp_path / "c")["stats"], new)
    for net in nets:
        served = {f"nets/{net}/w": state["nets"][net]["w"]}
        with pytest.raises(ValueError, match=f"nets/{net}/w is averaged"):
            checkpoint.save(
                tmp_path / "d",
                state,
                name=("critic", "actor"),
                params={f"opt_states/{n}": way for n, way in ways.items()},
                served=served,
            )


def two_networks():
    shapes = {"actor": 2, "critic": 3}
    state = {n: {"w": jnp.ones(size)} for n, size in shapes.items()}
    state |= {f"opt_state_{n}": TX.init(state[n]) for n in shapes}
    return state | {"stats": {"mean": jnp.ones(4)}}


def test_a_lost_record_of_several_averages_still_tells_it(tmp_path):
    state, new = two_networks(), {"mean": jnp.full(4, 9.0)}
    names = ("opt_state_critic", "opt_state_actor")  # beside the first of them
    checkpoint.save(tmp_path / "c", state, name=names, served={"stats": new})
    file = tmp_path / "c" / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    content["custom_metadata"].pop("emaopt")
    file.write_text(json.dumps(content))
    assert_same(checkpoint.restore(tmp_path / "c", state), state)


def test_a_swapped_state_may_be_saved_with_its_names_in_another_order(tmp_path):
    state, new = two_networks(), {"mean": jnp.full(4, 9.0)}
    names = ("opt_state_critic", "opt_state_actor")
    swapped = checkpoint.swap_state(state, name=names, served={"stats": new})
    checkpoint.save(tmp_path / "c", swapped, name=names[::-1])
    assert checkpoint.describe(tmp_path / "c").beside == ["stats"]
    assert_same(checkpoint.restore(tmp_path / "c", state), state)


def test_the_item_of_another_average_does_not_matter_to_it(tmp_path):
    state, new = two_networks(), {"mean": jnp.full(4, 9.0)}
    registry = checkpoint.handler_registry(
        name=("opt_state_actor", "opt_state_critic"), served=lambda _: {"stats": new}
    )
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        items = {name: Save(tree) for name, tree in state.items()}
        manager.save(1, args=ocp.args.Composite(**items))
    shutil.rmtree(tmp_path / "1" / "opt_state_critic")
    part = {"stats": state["stats"]}
    back = checkpoint.restore(tmp_path / "1", part, ignore_extra=True, report=list)
    assert_same(back, part)


def test_a_leaf_without_a_name_of_its_own_resumes(tmp_path):
    own = {"": jnp.zeros(2), "value": jnp.ones(2)}
    state = as_dict() | {"batch_stats": own}
    new = jax.tree.map(lambda x: x + 8, own)
    checkpoint.save(tmp_path / "c", state, served={"batch_stats": new})
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    swapped = checkpoint.swap_state(state, served={"batch_stats": new})
    assert_same(checkpoint.swap_state(swapped), state)


def test_what_stands_in_an_optimizers_state_is_not_served(tmp_path):
    tx = emaopt.average_params(0.5)
    states = [
        {"opt_state": {"x": PARAMS, "avg": tx.init(PARAMS), "more": OWN}},
        {"opt_state": (PARAMS, tx.init(PARAMS), OWN)},
    ]
    for state, way, more in zip(states, ("x", "0"), ("more", "2"), strict=True):
        served = {f"opt_state/{more}": NEW}
        with pytest.raises(ValueError, match="belongs to the optimizer's state"):
            checkpoint.save(
                tmp_path / "c", state, params=f"opt_state/{way}", served=served
            )


def test_a_tuple_of_parameters_and_an_average_is_no_chain(tmp_path):
    tx = emaopt.average_params(0.5)
    state = (PARAMS, tx.init(PARAMS), OWN)
    checkpoint.save(tmp_path / "c", state, params="0", served={"2": NEW})
    assert_same(checkpoint.restore(tmp_path / "c", state, params="0"), state)
    assert_same(checkpoint.load_averaged(tmp_path / "c", at="2", target=NEW), NEW)


def test_it_goes_with_the_average_that_is_served_and_no_other(tmp_path):
    mask = {"w": True, "stats": False}
    averages = [
        (n, emaopt.average_params(b, mask=mask)) for n, b in (("a", 0.5), ("b", 0.9))
    ]
    tx = optax.named_chain(("sgd", optax.sgd(0.1)), *averages)
    params = {"w": jnp.ones(2), "stats": jnp.zeros(3)}
    state = {"params": params, "opt_state": tx.init(params)}
    new = {"params/stats": jnp.full(3, 7.0)}
    checkpoint.save(tmp_path / "c", state, name="a", served=new)
    assert checkpoint.load_averaged(tmp_path / "c", name="a")["stats"].sum() == 21
    assert checkpoint.load_averaged(tmp_path / "c", name="b")["stats"].sum() == 0


def test_an_average_of_nothing_serves_it_too(tmp_path):
    tx = emaopt.averaged(optax.sgd(0.1), 0.5, mask=jax.tree.map(lambda _: False, PARAMS))
    state = as_dict() | {"opt_state": tx.init(PARAMS)}
    checkpoint.save(tmp_path / "c", state, served={"batch_stats": NEW})
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    swapped = checkpoint.swap_state(state, served={"batch_stats": NEW})
    assert_same(checkpoint.swap_state(swapped), state)


class Statistics(nnx.Module):
    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros(2))


class NoPytree(nnx.Module, pytree=False):  # one leaf to JAX
    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros(2))


@pytest.mark.parametrize("module", [Statistics, NoPytree])
def test_modules_of_nnx_are_taken_as_their_states(module, tmp_path):
    state, new = as_dict() | {"batch_stats": module()}, module()
    new.mean[...] = jnp.ones(2)
    checkpoint.save(tmp_path / "c", state, served={"batch_stats": new})
    assert plainly(tmp_path / "c")["batch_stats"]["mean"]["value"].sum() == 2


@pytest.mark.parametrize("axis", [True, False])
def test_local_updates_serve_statistics_of_the_center(axis, tmp_path):
    tx = emaopt.diloco(optax.sgd(0.1), period=2, num_workers=4)
    params = {"w": jnp.ones((4, 3))}
    own = {"mean": jnp.arange(8.0).reshape(4, 2), "n": jnp.arange(4)}
    state = {"params": params, "opt_state": tx.init(params), "batch_stats": own}
    new = {"mean": jnp.full((4, 2) if axis else (2,), 9.0)}
    new["n"] = jnp.full((4,) if axis else (), 9)
    checkpoint.save(tmp_path / "c", state, served={"batch_stats": new})
    assert checkpoint.describe(tmp_path / "c").beside == ["batch_stats"]
    assert_same(checkpoint.load_averaged(tmp_path / "c", at="batch_stats"), new)
    for shape in ((3, 2), (4, 4, 2), (1, 4, 2)):
        with pytest.raises(ValueError, match=r"\(4, 2\)"):
            wrong = {"batch_stats/mean": jnp.zeros(shape)}
            checkpoint.save(tmp_path / "d", state, served=wrong)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    assert_same(plainly(tmp_path / "c")["batch_stats"], new)
    fewer = emaopt.diloco(optax.sgd(0.1), period=2, num_workers=2)
    target = {"params": {"w": jnp.ones((2, 3))}}
    target["opt_state"] = fewer.init(target["params"])
    back = checkpoint.restore(tmp_path / "c", target, ignore_extra=True, report=list)
    assert_same(back["params"], target["params"])


def test_primal_averaging_serves_it_too(tmp_path):
    tx = emaopt.gpa(optax.adam(0.1))
    state = as_dict() | {"opt_state": tx.init(PARAMS)}
    checkpoint.save(tmp_path / "c", state, served={"batch_stats": NEW})
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    assert_same(plainly(tmp_path / "c")["batch_stats"], without_empty(NEW))


# What is refused


WRONG = {
    "not in the state": {
        "stats": {"other": 1.0},
        "match": "stats/other is not in the state; there are batch_stats, params, rng",
    },
    "deeper": {"bn": OWN["bn"], "match": "did you mean batch_stats/bn?"},
    "under another key": {"stats": OWN, "match": r"did you mean batch_stats\?"},
    "too high": {
        "batch_stats": {"mean": OWN["bn"]["mean"]},
        "match": "did you mean batch_stats/bn\\?",
    },
    "not in the tree": {
        "batch_stats/no": 1.0,
        "match": "there are batch_stats/bn, batch_stats/count",
    },
    "averaged": {"params/w": PARAMS["w"], "match": "params/w is averaged"},
    "optimizer": {
        "opt_state/inner_state/0/count": 1,
        "match": "belongs to the optimizer",
    },
    "average": {"opt_state/averaging/pending": 1.0, "match": "belongs to the optimizer"},
    "shape": {"batch_stats/half": jnp.zeros(3, jnp.bfloat16), "match": r"\(3,\), in the"},
    "axis": {"batch_stats/bn/mean": jnp.zeros((1, 3)), "match": r"\(1, 3\), in the"},
    "rows": {"batch_stats/more/value": jnp.zeros((2, 2)), "match": r"\(2, 2\), in the"},
    "key": {
        "rng/key": jax.random.key(1, impl="rbg"),
        "match": r"is key<rbg> .* key<fry>",
    },
    "kind": {"batch_stats/half": jnp.zeros(2, int), "match": "is integer of shape"},
    "root": {"": OWN, "match": "its keys say where"},
    "number": {0: OWN, "match": "its keys say where"},
    "twice": {
        "batch_stats": OWN,
        "batch_stats/half": OWN["half"],
        "match": "another key",
    },
}


@pytest.mark.parametrize("served", WRONG.values(), ids=WRONG)
def test_what_cannot_be_served_is_an_error(served, tmp_path):
    served = dict(served)
    match = served.pop("match")
    with pytest.raises(ValueError, match=match) as error:
        checkpoint.save(tmp_path / "c", as_dict(), served=served)
    assert str(error.value).startswith("save: ")
    assert not (tmp_path / "c").exists()


def test_what_is_on_record_as_served_must_be_there(tmp_path):
    state = {"params": PARAMS["w"], "opt_state": TX.init(PARAMS["w"]), "stats": OWN["bn"]}
    swapped = checkpoint.swap_state(state, served={"stats": NEW["bn"]})
    record = checkpoint.metadata(swapped)
    swapped["stats"] = {"var": NEW["bn"]["var"]}
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(tmp_path / "c", swapped, custom_metadata=record)
    with pytest.raises(ValueError, match=r"stats/mean served beside .* there is none"):
        checkpoint.restore(tmp_path / "c", state)


DAMAGES = {
    "less": lambda r: r["beside"].pop(),
    "more": lambda r: r["beside"].append(["rng", "key"]),
    "none": lambda r: r.pop("beside"),
    "older": lambda r: r.update(version=3),
    "no names": lambda r: r.update(beside="batch_stats"),
    "no text": lambda r: r.update(beside=[1]),
    "other": lambda r: r.update(beside=[["batch_stats", "no"]]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_record_that_says_otherwise_is_refused(damage, tmp_path):
    checkpoint.save(tmp_path / "c", as_dict(), served={"batch_stats": NEW})
    edit(tmp_path / "c" / "_CHECKPOINT_METADATA", damage)
    for read in (lambda p: checkpoint.restore(p, as_dict()), checkpoint.load_averaged):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            read(tmp_path / "c")


# The whole path: train, recalibrate, evaluate, save, serve


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.tanh(x))


def test_what_is_evaluated_is_what_plain_orbax_serves(tmp_path):
    net, x = Net(), jax.random.normal(jax.random.key(0), (64, 4)) + 3
    y = jnp.sin(x.sum(1, keepdims=True))
    state = net.init(jax.random.key(1), x, train=True)
    params, stats = state["params"], state["batch_stats"]
    opt_state = TX.init(params)

    @jax.jit
    def step(params, stats, opt_state):
        def loss(p):
            variables = {"params": p, "batch_stats": stats}
            out, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
            return jnp.square(out - y).mean(), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    def loss(params, stats):
        variables = {"params": params, "batch_stats": stats}
        return float(jnp.square(net.apply(variables, x, train=False) - y).mean())

    for _ in range(20):
        params, stats, opt_state = step(params, stats, opt_state)
    average = emaopt.get_average(opt_state)
    for_average = batch_stats.recalibrate(
        lambda p, s, x: net.apply(
            {"params": p, "batch_stats": s}, x, train=True, mutable=["batch_stats"]
        ),
        average,
        [x],
        stats,
    )
    measured = loss(average, for_average)
    assert measured < 0.99 * loss(average, stats)
    state = {"params": params, "batch_stats": stats, "opt_state": opt_state}
    checkpoint.save(tmp_path / "c", state, served={"batch_stats": for_average})
    served = plainly(tmp_path / "c")
    assert loss(served["params"], served["batch_stats"]) == measured
    loaded = checkpoint.load_averaged(tmp_path / "c")
    stats_loaded = checkpoint.load_averaged(tmp_path / "c", at="batch_stats")
    assert loss(loaded, stats_loaded) == measured
    # Training goes on bit for bit.
    back = checkpoint.restore(tmp_path / "c", abstract(state))
    on = step(back["params"], back["batch_stats"], back["opt_state"])
    assert_same(on, step(params, stats, opt_state))
