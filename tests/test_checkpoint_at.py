"""`at=` is obeyed by every reader, and what it leads to is called what it is."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1
from safetensors.numpy import load_file
from shell import emaopt_command
from test_places import same

import emaopt
from emaopt import checkpoint

TX = emaopt.averaged(optax.adam(1.0), 0.5, zero_init=True)  # averages 0, raw others
AVERAGE = "opt_state/averaging"


def params_of(raw=1.0):
    backbone = {"w": jnp.full(3, raw), "deep": {"v": jnp.full(1, raw)}}
    return {"backbone": backbone, "head": {"w": jnp.full(2, raw)}}


def state_of(raw=1.0, tx=TX):
    return {"params": params_of(raw), "opt_state": tx.init(params_of(raw))}


def stock(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "c"
    checkpoint.save(path, state_of())
    return path


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return stock(tmp_path_factory.mktemp("raw") / "c", state_of())


def exported(path, out, **options):
    said = checkpoint.export_safetensors(path, out, force=True, **options)
    arrays = load_file(out)
    kinds = {float(x) for array in arrays.values() for x in array}
    return said, sorted(arrays), kinds


AVERAGES, RAW = f"the averages of {AVERAGE}", "the raw parameters"
ALL = ["backbone/deep/v", "backbone/w", "head/w"]
PART = ["deep/v", "w"]
SLOT = f"{AVERAGE}/average"
# file, weights, at -> what is said, names, values; None: the default.
WHERE = {
    ("served", None, "params"): (AVERAGES, ALL, 0),
    ("served", None, "params/backbone"): (AVERAGES, PART, 0),
    ("served", None, "params/backbone/deep/v"): (AVERAGES, [""], 0),
    ("served", None, f"{SLOT}"): (RAW, ALL, 1),
    ("served", None, f"{SLOT}/backbone"): (RAW, PART, 1),
    ("served", "raw", "params/backbone"): (RAW, PART, 1),
    ("served", "raw", f"{SLOT}/backbone"): (RAW, PART, 1),
    ("served", "average", "params/backbone"): (AVERAGES, PART, 0),
    ("served", "average", f"{SLOT}/backbone"): (AVERAGES, PART, 0),
    ("served", "averaging", "params/backbone"): (AVERAGES, PART, 0),
    ("served", "served", "/params/backbone/"): (AVERAGES, PART, 0),
    ("served", None, "opt_state/inner_state/0/mu"): (
        "the arrays at opt_state/inner_state/0/mu",
        ALL,
        0,
    ),
    ("raw", None, "params/backbone"): (RAW, PART, 1),
    ("raw", None, f"{SLOT}/backbone"): (AVERAGES, PART, 0),
    ("raw", "raw", "params/backbone"): (RAW, PART, 1),
    ("raw", "average", "params/backbone"): (AVERAGES, PART, 0),
    ("raw", "average", f"{SLOT}/backbone"): (AVERAGES, PART, 0),
    ("raw", "averaging", "params"): (AVERAGES, ALL, 0),
    ("raw", "served", "params/head"): (AVERAGES, ["w"], 0),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("file, weights, at", WHERE)
def test_at_is_obeyed_and_labelled(file, weights, at, served, raw, tmp_path):
    path = {"served": served, "raw": raw}[file]
    said, names, kind = WHERE[file, weights, at]
    options = {"weights": weights, "at": at}
    assert exported(path, tmp_path / "x", **options) == (said, names, {kind})
    for make in (
        lambda out: checkpoint.average([path], out, **options),
        lambda out: checkpoint.combine([path, path], [0.5, 0.5], out, **options),
    ):
        if weights == "served":
            continue
        make(tmp_path / "out")
        assert checkpoint.describe(tmp_path / "out").record["weights"] == said
        leaves = jax.tree.leaves(ocp.StandardCheckpointer().restore(tmp_path / "out"))
        assert {float(x) for leaf in leaves for x in leaf} == {kind}
        shutil.rmtree(tmp_path / "out")


NOWHERE = {
    "no/such/thing": "at the top stand opt_state, params",
    "params/backbone/x": "at params/backbone stand deep, w",
    "params/head/w/x": "at params/head/w stands an array",
}


def command(*arguments):
    result = emaopt_command(*arguments)
    return " ".join((result.stdout + result.stderr).split())


READERS = {
    "export": lambda path, out, **o: checkpoint.export_safetensors(path, out, **o),
    "average": lambda path, out, **o: checkpoint.average([path], out, **o),
    "combine": lambda path, out, **o: checkpoint.combine([path], [1.0], out, **o),
    "load_averaged": lambda path, out, at, weights: checkpoint.load_averaged(path, at=at),
    "describe": lambda path, out, at, weights: checkpoint.describe(path, at=at),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("at", NOWHERE)
@pytest.mark.parametrize("weights", [None, "raw", "average", "averaging"])
@pytest.mark.parametrize("reader", READERS)
def test_an_at_that_leads_nowhere_is_an_error(reader, weights, at, served, tmp_path):
    match = f"{re.escape(f'has nothing at {at!r}')}; {NOWHERE[at]}"
    with pytest.raises(ValueError, match=match):
        READERS[reader](served, tmp_path / "out", at=at, weights=weights)
    assert not (tmp_path / "out").exists()


def test_what_averages_differ_in_is_refused_below_them_too(tmp_path, served, raw):
    with pytest.raises(ValueError, match=r"stand the averages of .* and the raw param"):
        checkpoint.combine([served, raw], [0.5, 0.5], tmp_path / "o", at="params/head")
    inside = f"{SLOT}/head"
    with pytest.raises(ValueError, match=r"stand the raw param.* and the averages of"):
        checkpoint.combine([served, raw], [0.5, 0.5], tmp_path / "o", at=inside)


def test_raw_parameters_are_not_where_averages_are_kept(raw, tmp_path):
    with pytest.raises(
        ValueError, match=rf"at '{SLOT}'.* the averages of {AVERAGE}, no raw"
    ):
        checkpoint.export_safetensors(raw, tmp_path / "x", weights="raw", at=SLOT)
    with pytest.raises(
        ValueError, match=r"no average of what stands at 'opt_state/inner"
    ):
        checkpoint.export_safetensors(raw, tmp_path / "x", at="opt_state/inner_state")


def networks(*, raw=1.0):
    """Two networks with an optimizer each, and what none averages."""
    params = {"actor": {"w": jnp.full(2, raw)}, "critic": {"v": jnp.full(3, raw)}}
    opt_state = {name: TX.init(tree) for name, tree in params.items()}
    return {"params": params | {"alpha": jnp.full(1, raw)}, "opt_state": opt_state}


NAMES = ("actor", "critic")
BOTH = "the averages of opt_state/actor/averaging, opt_state/critic/averaging"


def test_of_several_served_averages_at_decides(tmp_path):
    state = networks()
    checkpoint.save(tmp_path / "c", state, name=NAMES)
    path, out = tmp_path / "c", tmp_path / "x"
    for weights in (None, "average", "served"):
        with pytest.raises(ValueError, match=r"params/actor.*params/critic.*Say with "):
            exported(path, out, weights=weights)
        for name, leaf in (("actor", "w"), ("critic", "v")):
            found = exported(path, out, weights=weights, at=f"params/{name}")
            said = f"the averages of opt_state/{name}/averaging"
            assert found == (said, [leaf], {0})
        above = exported(path, out, weights=weights, at="params")
        assert above[1:] == (["actor/w", "alpha", "critic/v"], {0, 1})
        assert above[0] == f"{BOTH} and other arrays"
    assert exported(path, out, weights="raw", at="params")[2] == {1}
    same(checkpoint.load_averaged(path, at="params/critic"), {"v": jnp.zeros(3)})
    loaded = checkpoint.load_averaged(path, at="params")
    average = {"actor": {"w": jnp.zeros(2)}, "critic": {"v": jnp.zeros(3)}}
    same(loaded, average | {"alpha": jnp.ones(1)})
    target = {"actor": {"w": jnp.zeros(2)}, "alpha": jnp.zeros(1)}
    loaded = checkpoint.load_averaged(path, at="params", target=target, ignore_extra=True)
    same(loaded, {"actor": average["actor"], "alpha": jnp.ones(1)})
    told = checkpoint.describe(path)
    assert (told.parameters, told.served) == ("params/actor, params/critic", BOTH)
    assert checkpoint.describe(path, at="params/actor").served in BOTH
    assert f"There stand: {BOTH}" in command("inspect", path)


def test_of_several_averages_that_are_not_served_at_or_name_decides(tmp_path):
    path = stock(tmp_path / "c", networks())
    with pytest.raises(ValueError, match=r"several averages.*Say with name="):
        checkpoint.load_averaged(path)
    same(checkpoint.load_averaged(path, at="params/critic"), {"v": jnp.zeros(3)})
    same(checkpoint.load_averaged(path, name="critic"), {"v": jnp.zeros(3)})
    with pytest.raises(
        ValueError, match=r"holds averages of params/actor, params/critic"
    ):
        checkpoint.export_safetensors(path, tmp_path / "x", weights=None)
    with pytest.raises(ValueError, match=r"no average of what stands at 'params/alpha'"):
        checkpoint.load_averaged(path, at="params/alpha")
    two = optax.chain(emaopt.average_params(0.5), emaopt.average_params(0.9))
    path = stock(tmp_path / "d", state_of(tx=two))
    with pytest.raises(
        ValueError, match=r"several averages of what stands at 'params': "
    ):
        checkpoint.load_averaged(path, at="params")
    same(checkpoint.load_averaged(path, at="opt_state/1/average"), params_of())


def test_a_name_that_is_of_one_that_is_served_and_another_is_refused(tmp_path):
    checkpoint.save(tmp_path / "c", networks(), name="actor")
    with pytest.raises(
        ValueError, match=r"several averages.* under the name 'averaging'"
    ):
        checkpoint.load_averaged(tmp_path / "c", name="averaging")
    same(checkpoint.load_averaged(tmp_path / "c"), {"w": jnp.zeros(2)})
    found = checkpoint.load_averaged(tmp_path / "c", name="averaging", at="params/critic")
    same(found, {"v": jnp.zeros(3)})


def twins():
    """Two trees that the average may be of: told in saving, not clear in reading."""
    teacher = {"teacher": {"net": params_of(2.0)}, "student": {"net": params_of(1.0)}}
    return teacher | {"opt_state": TX.init(params_of())}


def without_record(path):
    file = path / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"] = {}
    file.write_text(json.dumps(metadata))
    return path


def lost(path):
    checkpoint.save(path, twins(), params="student/net")
    return without_record(path)


UNCLEAR = {"stock": lambda path: stock(path, twins()), "lost": lost}


@pytest.mark.parametrize("write", UNCLEAR.values(), ids=UNCLEAR)
def test_where_nothing_tells_the_parameters_at_does(write, tmp_path):
    path, out = write(tmp_path / "c"), tmp_path / "x"
    message = r"could be of any of student/net, teacher/net\. Say with at= which, as at="
    for read in (
        lambda: checkpoint.load_averaged(path),
        lambda: checkpoint.load_averaged(path, name="averaging"),
        lambda: checkpoint.export_safetensors(path, out),
        lambda: checkpoint.average([path], out, weights="average"),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    said = command("export", path, "--safetensors", out)
    assert "Say with --at which, as --at 'student/net'" in said
    zero = jax.tree.map(jnp.zeros_like, params_of())
    same(checkpoint.load_averaged(path, at="student/net"), zero)
    part = checkpoint.load_averaged(path, at="student/net/backbone")
    same(part, zero["backbone"])
    assert exported(path, out, at="student/net/head") == (AVERAGES, ["w"], {0})
    assert exported(path, out, weights="raw", at="student/net")[2] == {1}
    told = checkpoint.describe(path, at="student/net")
    assert told.parameters == "student/net"


def test_the_records_own_parameters_go_before_others_that_fit(tmp_path):
    tx = optax.named_chain(
        ("fast", emaopt.average_params(0.5, zero_init=True)),
        ("slow", emaopt.average_params(0.5)),
    )
    state = twins() | {"opt_state": tx.init(params_of())}
    checkpoint.save(tmp_path / "c", state, name="slow", params="student/net")
    same(checkpoint.load_averaged(tmp_path / "c"), params_of())
    found = checkpoint.load_averaged(tmp_path / "c", name="fast")
    same(found, jax.tree.map(jnp.zeros_like, params_of()))


def test_an_average_that_leaves_out_all_asks_for_no_name(tmp_path):
    def tx(mask):
        return emaopt.averaged(optax.sgd(1.0), 0.5, zero_init=True, mask=mask)

    state = networks()
    nothing = tx({"v": False}).init(state["params"]["critic"])
    state["opt_state"]["critic"] = nothing
    checkpoint.save(tmp_path / "c", state, name=NAMES)
    same(checkpoint.load_averaged(tmp_path / "c"), {"w": jnp.zeros(2)})
    params = {"w": jnp.ones(2)}
    state = {"params": params, "opt_state": tx({"w": False}).init(params)}
    checkpoint.save(tmp_path / "d", state, params="params")
    same(checkpoint.load_averaged(tmp_path / "d"), params)
    checkpoint.save(tmp_path / "e", state)
    with pytest.raises(ValueError, match="holds an average of no parameters"):
        checkpoint.load_averaged(tmp_path / "e")
    same(checkpoint.load_averaged(tmp_path / "e", at="params"), params)


def mixed_state():
    other = {"text": "a b", "int": 3, "float": 2.5, "flag": True, "none": None}
    other |= {"dict": {}, "list": [], "deep": [{"name": "x"}, jnp.ones(1)]}
    return state_of() | {"other": other}


def text_in_composite(path, state):
    registry = checkpoint.handler_registry()
    with ocp.CheckpointManager(path.parent, handler_registry=registry) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(state))
        manager.wait_until_finished()
        same(manager.restore(1), state_like(manager.restore(1), state))
    return path.parent / "1"


def state_like(found, state):
    """What Orbax's containers make of the state: dicts, lists, and nothing else."""
    leaves = jax.tree.leaves(found)
    assert len(leaves) == len(jax.tree.leaves(state))
    assert found["other"] == state["other"]
    same(found["params"], state["params"])
    return found


def text_of_pytree_handler(path, state):
    swapped = checkpoint.swap_state(state)
    record = checkpoint.metadata(swapped)
    with ocp.PyTreeCheckpointer() as checkpointer:
        args = ocp.args.PyTreeSave(swapped, custom_metadata=record)
        checkpointer.save(path, args=args)
    return path


def text_of_v1(path, state):
    swapped = checkpoint.swap_state(state)
    v1.save(path, swapped, custom_metadata=checkpoint.metadata(swapped))
    return path


@pytest.mark.quick(3)
@pytest.mark.parametrize("write", [text_in_composite, text_of_pytree_handler, text_of_v1])
def test_text_numbers_and_nothing_beside_the_parameters_are_read(write, tmp_path):
    state = mixed_state()
    path = write(tmp_path / "c", state)
    zero = jax.tree.map(jnp.zeros_like, params_of())
    same(checkpoint.load_averaged(path), zero)
    restored = checkpoint.restore(path, state)
    assert restored["other"] == state["other"]
    told = checkpoint.describe(path)
    kinds = {leaf.name: leaf.dtype for leaf in told.leaves}
    assert (kinds["other/text"], kinds["other/int"]) == ("text", "int64")
    assert told.served == AVERAGES
    assert "other/text" in command("inspect", path)
    stocked = tmp_path / "stock"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(stocked, state)
    same(checkpoint.load_averaged(stocked), zero)
    same(checkpoint.load_averaged(stocked, name="averaging", at="params"), zero)


def test_text_among_the_parameters_is_loaded_as_it_is(tmp_path):
    state = state_of()
    state["params"]["name"] = "net"
    path = text_of_pytree_handler(tmp_path / "c", state)
    zero = jax.tree.map(jnp.zeros_like, params_of())
    assert checkpoint.load_averaged(path, at="params")["name"] == "net"
    loaded = checkpoint.load_averaged(path, target=zero | {"name": ""})
    same({k: loaded[k] for k in zero}, zero)


def test_a_target_may_have_a_part_and_no_more_is_read(tmp_path):
    state, path = state_of(), tmp_path / "c"
    swapped = checkpoint.swap_state(state)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        record = checkpoint.metadata(swapped)
        args = ocp.args.PyTreeSave(swapped, custom_metadata=record)
        checkpointer.save(path, args=args)
    for metadata in path.glob("*/.zarray"):  # an array has a directory of its own
        if not metadata.parent.name.startswith("params.backbone."):
            for file in metadata.parent.iterdir():
                if file != metadata:
                    file.unlink()
    wanted = {"backbone": params_of(0.0)["backbone"]}
    same(checkpoint.load_averaged(path, target=wanted, ignore_extra=True), wanted)
    found = checkpoint.load_averaged(
        path, target=wanted["backbone"], at="params/backbone"
    )
    same(found, wanted["backbone"])
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16), wanted)
    loaded = checkpoint.load_averaged(path, target=half, ignore_extra=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float16)}


def test_names_that_the_checkpoint_lacks_or_that_are_left_out_are_errors(served):
    wanted = {"backbone": params_of()["backbone"]}
    with pytest.raises(ValueError, match=r"it also holds head/w"):
        checkpoint.load_averaged(served, target=wanted)
    wanted["tail"] = jnp.ones(1)
    with pytest.raises(ValueError, match=r"it lacks tail\."):
        checkpoint.load_averaged(served, target=wanted, ignore_extra=True)
    wrong = {"head": {"w": jnp.ones(5)}}
    with pytest.raises(ValueError, match=r"head/w has shape \(2,\) there and \(5,\)"):
        checkpoint.load_averaged(served, target=wrong, ignore_extra=True)
