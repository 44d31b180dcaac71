"""Items of a step that are missing, or of another save; outputs beside their sources."""

import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import _items

pytestmark = pytest.mark.quick(2)

TX = optax.chain(optax.adam(0.1), emaopt.average_params(0.9))
ITEMS = ("params", "train")


def items(state):
    return ocp.args.Composite(
        params=ocp.args.StandardSave(state["params"]),
        train=ocp.args.PyTreeSave(state["train"]),
    )


def manager(directory):
    return ocp.CheckpointManager(
        directory, handler_registry=checkpoint.handler_registry(items=ITEMS)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of three steps, and the state at each."""
    directory, states = tmp_path_factory.mktemp("run"), {}
    params = {"a": jnp.ones(3), "b": jnp.arange(2.0)}
    opt_state = TX.init(params)
    with manager(directory) as m:
        for step in (1, 2, 3):
            updates, opt_state = TX.update(params, opt_state, params)
            params = optax.apply_updates(params, updates)
            train = {"opt_state": opt_state, "step": step}
            states[step] = {"params": params, "train": train}
            m.save(step, args=items(states[step]))
        m.wait_until_finished()
    return directory, states


def all_readers(path, state):
    """Each reads something of a checkpoint."""
    restores = ocp.args.Composite(
        params=ocp.args.StandardRestore(state["params"]),
        train=ocp.args.PyTreeRestore(state["train"]),
    )

    def managed():
        with manager(path.parent) as m:
            m.restore(int(path.name), args=restores)

    def written(write):
        return lambda: write(path, path.parent / "out", force=True)

    return {
        "restore": lambda: checkpoint.restore(path, state),
        "load_averaged": lambda: checkpoint.load_averaged(path),
        "describe": lambda: checkpoint.describe(path),
        "average": lambda: checkpoint.average([path], path.parent / "out", force=True),
        "export_safetensors": written(checkpoint.export_safetensors),
        "manager": managed,
    }


READERS = ["restore", "load_averaged", "describe", "average", "export_safetensors"]


@pytest.mark.parametrize("reader", [*READERS, "manager"])
@pytest.mark.parametrize("item", ITEMS)
def test_an_item_of_another_save_is_refused(run, item, reader, tmp_path):
    directory, states = run
    path = shutil.copytree(directory / "3", tmp_path / "3")
    shutil.rmtree(path / item)
    shutil.copytree(directory / "2" / item, path / item)
    with pytest.raises(ValueError, match="records that differ: they are of two saves"):
        all_readers(path, states[3])[reader]()


def test_items_of_one_save_may_stand_elsewhere(run, tmp_path):
    directory, states = run
    for item in ITEMS:
        shutil.copytree(directory / "3" / item, tmp_path / "9" / item)
    for file in filter(Path.is_file, (directory / "3").iterdir()):
        shutil.copy(file, tmp_path / "9")
    restored = checkpoint.restore(tmp_path / "9", states[3])
    chex.assert_trees_all_equal(restored, states[3])


@pytest.fixture
def alone(run, tmp_path):
    """The step without the item that holds the raw parameters, and its state."""
    directory, states = run
    path = shutil.copytree(directory / "3", tmp_path / "3")
    shutil.rmtree(path / "train")
    return path, states[3]


def test_averages_without_their_raw_parameters_are_served_as_what_they_are(alone):
    path, state = alone
    average = emaopt.get_average(state["train"]["opt_state"])
    chex.assert_trees_all_equal(checkpoint.load_averaged(path), average)
    assert checkpoint.describe(path).served == "the averages of train/opt_state/1"
    for which in ("served", "average", None):
        out = path.parent / f"{which}.safetensors"
        said = checkpoint.export_safetensors(path, out, weights=which)
        assert said == "the averages of train/opt_state/1"
    checkpoint.average([path], path.parent / "out")
    out = checkpoint.load_averaged(path.parent / "out")
    jax.tree.map(np.testing.assert_array_equal, out, average)


RAW = {
    "restore": lambda path, state: checkpoint.restore(path, state),
    "restore, parameters": lambda path, state: checkpoint.restore(
        path, {"params": state["params"]}, ignore_extra=True
    ),
    "average": lambda path, state: checkpoint.average(
        [path], path.parent / "out", weights="raw"
    ),
    "average, at": lambda path, state: checkpoint.average(
        [path], path.parent / "out", weights="raw", at="params/a"
    ),
    "export": lambda path, state: checkpoint.export_safetensors(
        path, path.parent / "out", weights="raw"
    ),
}


@pytest.mark.parametrize("reader", [*RAW, "manager"])
def test_raw_parameters_that_are_not_there_are_missed(alone, reader):
    path, state = alone
    with pytest.raises(ValueError, match=r"no raw parameters.*item train .* missing"):
        if reader != "manager":
            RAW[reader](path, state)
        else:
            arguments = ocp.args.StandardRestore(state["params"])
            with manager(path.parent) as m:
                m.restore(3, args=ocp.args.Composite(params=arguments))


INSIDE = [("3",), ("3", "params"), ("3", "params", "d"), ("3", "new")]


@pytest.mark.parametrize("inside", INSIDE, ids="/".join)
@pytest.mark.parametrize("writer", ["average", "export_safetensors"])
def test_no_output_stands_in_its_source(run, writer, inside, tmp_path):
    directory, states = run
    path = shutil.copytree(directory / "3", tmp_path / "3")
    out = tmp_path.joinpath(*inside)
    source = [path] if writer == "average" else path
    with pytest.raises(ValueError, match=f"^{writer}: .*stands in what is .*elsewhere"):
        getattr(checkpoint, writer)(source, out, force=True)
    chex.assert_trees_all_equal(checkpoint.restore(path, states[3]), states[3])


@pytest.mark.parametrize("writer", ["save", "average", "export_safetensors"])
def test_a_device_is_not_replaced(run, writer):
    directory, states = run
    if writer == "save":
        call, source = checkpoint.save, None
    else:
        call, source = getattr(checkpoint, writer), directory / "3"
    arguments = {
        "save": ("/dev/null", states[3]),
        "average": ([source], "/dev/null"),
        "export_safetensors": (source, "/dev/null"),
    }[writer]
    with pytest.raises(ValueError, match=f"^{writer}: .* is a device.*'/dev/null'"):
        call(*arguments, force=True)


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", ["default", "state", "pytree"])
def test_a_lone_item_with_a_name_of_orbaxs_is_the_whole_tree(name, tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        tree = ocp.args.StandardSave({"w": np.ones(1)})
        manager.save(0, args=ocp.args.Composite(**{name: tree}))
    step = epath.Path(tmp_path / "0")
    assert _items.directories_of(step, None) == {(): step / name}


def test_a_lone_item_is_a_key_of_the_state_if_the_record_begins_with_it(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        tree = ocp.args.StandardSave({"w": np.ones(1)})
        manager.save(0, args=ocp.args.Composite(state=tree))
    step = epath.Path(tmp_path / "0")
    for other, found in (("state", ("state",)), ("train", ())):
        record = {"params": ["state", "w"], "average": [other]}
        assert list(_items.directories_of(step, record)) == [found]
