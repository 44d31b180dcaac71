"""Every door of Orbax that a state goes through serves the average, or refuses."""

import subprocess
import sys
import textwrap
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import checkpoints as flax_checkpoints
from orbax.checkpoint import v1
from test_places import same

import emaopt
from emaopt import checkpoint

A = ocp.args
TREES = {
    "Standard": (A.StandardSave, A.StandardRestore),
    "PyTree": (A.PyTreeSave, A.PyTreeRestore),
}
TX = emaopt.averaged(optax.adam(0.1), 0.5)


def trained(tx: Any = TX) -> tuple[Any, Any]:
    params = {"dense": {"w": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def manager(directory, **options):
    registry = checkpoint.handler_registry(**options)
    return ocp.CheckpointManager(directory, handler_registry=registry)


def split(params, opt_state):
    """As openpi's items are."""
    return {"params": {"params": params}, "train_state": {"opt_state": opt_state}}


# What is saved as which items; None: one tree.
LAYOUTS = {
    "one tree": lambda p, o: {None: {"params": p, "opt_state": o}},
    "one item": lambda p, o: {"train": {"params": p, "opt_state": o}},
    "split": lambda p, o: split(p, o),
    "pair": lambda p, o: {"model": p, "optimizer": o},
}
PLACES = {
    "one tree": lambda items: items[None]["params"],
    "one item": lambda items: items["train"]["params"],
    "split": lambda items: items["params"]["params"],
    "pair": lambda items: items["model"],
}


def args_of(kind, items):
    """Arguments for all items; of several the first by the other kind of tree."""
    if None in items:
        return kind(items[None])
    made = {name: kind(tree) for name, tree in items.items()}
    return A.Composite(**made, meta=A.JsonSave({"epoch": 3}))


@pytest.mark.quick(8)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("door", TREES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_manager_serves_the_average_and_resumes(layout, door, asynchronous, tmp_path):
    Save, Restore = TREES[door]
    params, opt_state = trained()
    items = LAYOUTS[layout](params, opt_state)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)
    registry = checkpoint.handler_registry()
    with ocp.CheckpointManager(
        tmp_path, options=options, handler_registry=registry
    ) as ours:
        ours.save(1, args=args_of(Save, items))
        ours.wait_until_finished()
        if None in items:
            back = {None: ours.restore(1, args=Restore(items[None]))}
        else:
            wanted = {name: Restore(tree) for name, tree in items.items()}
            back = ours.restore(1, args=A.Composite(**wanted, meta=A.JsonRestore()))
            assert back["meta"] == {"epoch": 3}
        same({name: back[name] for name in items}, items)
    with ocp.CheckpointManager(tmp_path) as plain:
        if None in items:
            served = {None: plain.restore(1, args=A.StandardRestore())}
        else:
            wanted = {name: A.StandardRestore() for name in items}
            served = plain.restore(1, args=A.Composite(**wanted))
    average = emaopt.get_average(opt_state)
    same(PLACES[layout](served), average)
    same(checkpoint.load_averaged(tmp_path / "1"), average)


def test_items_may_go_through_different_handlers(tmp_path):
    params, opt_state = trained()
    items = split(params, opt_state)
    with manager(tmp_path) as ours:
        ours.save(
            1,
            args=A.Composite(
                params=A.StandardSave(items["params"]),
                train_state=A.PyTreeSave(items["train_state"]),
            ),
        )
        ours.wait_until_finished()
        back = ours.restore(
            1,
            args=A.Composite(
                params=A.PyTreeRestore(items["params"]),
                train_state=A.StandardRestore(items["train_state"]),
            ),
        )
        same(dict(back), items)
    same(
        ocp.StandardCheckpointer().restore(tmp_path / "1" / "params"),
        {"params": emaopt.get_average(opt_state)},
    )


def test_save_args_and_restore_args_follow_their_leaves(tmp_path):
    params, opt_state = trained()
    state = {"params": params, "opt_state": opt_state}
    narrow = ocp.SaveArgs(dtype=jnp.dtype(jnp.bfloat16))
    each = jax.tree.map(lambda _: ocp.SaveArgs(), state)
    each["params"]["b"] = narrow  # the raw one, wherever it stands
    with manager(tmp_path) as ours:
        ours.save(1, args=A.PyTreeSave(state, save_args=each))
        ours.wait_until_finished()
        told = ocp.checkpoint_utils.construct_restore_args(state)
        back = ours.restore(1, args=A.PyTreeRestore(state, restore_args=told))
        told = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), state)
        swapped = checkpoint.swap_state(state)
        each = jax.tree.map(lambda _: ocp.SaveArgs(), swapped)
        ours.save(2, args=A.PyTreeSave(swapped, save_args=each))
        ours.wait_until_finished()
        same(ours.restore(2, args=A.StandardRestore(state)), state)
        as_numpy = ours.restore(1, args=A.PyTreeRestore(state, restore_args=told))
    rounded = params["b"].astype(jnp.bfloat16).astype(jnp.float32)
    assert np.any(rounded != params["b"])
    state["params"]["b"] = rounded
    same(back, state)
    assert {type(x) for x in jax.tree.leaves(as_numpy)} == {np.ndarray}
    same(jax.tree.map(jnp.asarray, as_numpy), state)
    with ocp.CheckpointManager(tmp_path) as plain:
        served = plain.restore(1, args=A.StandardRestore())["params"]
    same(served, emaopt.get_average(opt_state))


def test_partial_restores_give_the_raw_parameters_and_transforms_are_refused(tmp_path):
    params, opt_state = trained()
    with manager(tmp_path, report=lambda _: None) as ours:
        ours.save(1, args=A.PyTreeSave({"params": params, "opt_state": opt_state}))
        ours.wait_until_finished()
        part = A.PyTreeRestore({"params": params}, partial_restore=True)
        same(ours.restore(1, args=part), {"params": params})
        moved = A.PyTreeRestore(
            {"model": params}, transforms={"model": ocp.Transform(original_key="params")}
        )
        with pytest.raises(ValueError, match=r"transforms=.*would act on the averages"):
            ours.restore(1, args=moved)


def restore_of(tree):
    told = ocp.checkpoint_utils.construct_restore_args(tree)
    return A.PyTreeRestore(tree, restore_args=told)


def test_handlers_of_the_users_own_take_a_swapped_state(tmp_path):
    params, opt_state = trained()
    items = split(params, opt_state)

    def handled():
        handlers = {name: ocp.PyTreeCheckpointHandler() for name in items}
        return ocp.CheckpointManager(tmp_path, item_handlers=handlers)

    swapped = checkpoint.swap_state(items)
    with handled() as theirs:
        args = {name: A.PyTreeSave(tree) for name, tree in swapped.items()}
        record = checkpoint.metadata(swapped)
        theirs.save(1, args=A.Composite(**args), custom_metadata=record)
        theirs.wait_until_finished()
        args = {name: restore_of(tree) for name, tree in swapped.items()}
        back = dict(theirs.restore(1, args=A.Composite(**args)))
    same(checkpoint.swap_state(back), items)
    same(checkpoint.restore(tmp_path / "1", items), items)
    average = emaopt.get_average(opt_state)
    same(checkpoint.load_averaged(tmp_path / "1"), average)
    with ocp.StandardCheckpointer() as plain:
        same(plain.restore(tmp_path / "1" / "params")["params"], average)


@pytest.mark.parametrize(
    "make",
    [
        ocp.PyTreeCheckpointer,
        lambda: ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()),
    ],
)
def test_a_checkpointer_takes_a_swapped_state(make, tmp_path):
    params, opt_state = trained()
    state = {"params": params, "opt_state": opt_state}
    swapped = checkpoint.swap_state(state)
    with make() as theirs:
        record = checkpoint.metadata(swapped)
        theirs.save(tmp_path / "c", args=A.PyTreeSave(swapped, custom_metadata=record))
        getattr(theirs, "wait_until_finished", lambda: None)()
        back = theirs.restore(tmp_path / "c", args=restore_of(swapped))
    same(checkpoint.swap_state(back), state)
    same(checkpoint.restore(tmp_path / "c", state), state)
    same(checkpoint.load_averaged(tmp_path / "c"), emaopt.get_average(opt_state))


def test_of_v1s_items_the_record_is_that_of_the_whole(tmp_path):
    params, opt_state = trained()
    items = {"state": {"params": params, "opt_state": opt_state}, "meta": {"epoch": 1}}

    def saved(name, record):
        swapped = checkpoint.swap_state(items)
        v1.save_checkpointables(tmp_path / name, swapped, custom_metadata=record)
        return tmp_path / name

    right = saved("right", checkpoint.metadata(items))
    same(checkpoint.load_averaged(right), emaopt.get_average(opt_state))
    wrong = saved("wrong", checkpoint.metadata(items["state"]))
    v1.save_checkpointables(
        tmp_path / "raw", items, custom_metadata=checkpoint.metadata(items)
    )
    for read in (checkpoint.load_averaged, lambda p: checkpoint.restore(p, items)):
        with pytest.raises(ValueError, match="swap_state had not swapped"):
            read(tmp_path / "raw")
    for read in (checkpoint.load_averaged, checkpoint.describe):
        with pytest.raises(ValueError, match=r"metadata.*names of its items"):
            read(wrong)


def test_a_state_that_may_have_no_average_is_saved_as_it_is(tmp_path):
    params, opt_state = trained(optax.adam(0.1))
    state = {"params": params, "opt_state": opt_state}
    with pytest.raises(ValueError, match=r"no average in this state.*optional=True"):
        checkpoint.save(tmp_path / "c", state)
    checkpoint.save(tmp_path / "c", state, optional=True)
    same(checkpoint.restore(tmp_path / "c", state), state)
    for number, (Save, Restore) in enumerate(TREES.values()):
        with manager(tmp_path / str(number), optional=True) as ours:
            ours.save(1, args=Save(state))
            ours.wait_until_finished()
            same(ours.restore(1, args=Restore(state)), state)


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon", "ignore:Sharding info")
@pytest.mark.parametrize("orbax", [True, False])
def test_flax_training_checkpoints_take_a_swapped_state(orbax, tmp_path):
    flax.config.update("flax_use_orbax_checkpointing", orbax)
    try:
        params, opt_state = trained()
        state = {"params": params, "opt_state": opt_state}
        swapped = checkpoint.swap_state(state)
        flax_checkpoints.save_checkpoint(str(tmp_path), swapped, 7)
        back = flax_checkpoints.restore_checkpoint(str(tmp_path), swapped)
        same(checkpoint.swap_state(back), state)
        served = flax_checkpoints.restore_checkpoint(str(tmp_path), None)["params"]
        same(served, emaopt.get_average(opt_state))
        if orbax:
            same(checkpoint.restore(tmp_path / "checkpoint_7", state), state)
            same(checkpoint.load_averaged(tmp_path / "checkpoint_7"), served)
        else:  # which keeps the names of fields: swapped_at is not num_updates
            with pytest.raises(ValueError, match="field names"):
                flax_checkpoints.restore_checkpoint(str(tmp_path), state)
    finally:
        flax.config.update("flax_use_orbax_checkpointing", True)


@pytest.mark.parametrize("error", ["ours", "of Orbax", "of jax"])
def test_an_error_of_an_asynchronous_save_ends_the_process_at_once(error, tmp_path):
    program = """
        import sys, jax.numpy as jnp, optax, orbax.checkpoint as ocp, emaopt
        from emaopt import checkpoint

        tx = optax.adam(0.1)
        if "ours" not in sys.argv:
            tx = emaopt.averaged(tx, 0.5)
        params = {"w": jnp.ones(2)}
        state = {"params": params, "opt_state": tx.init(params)}
        if "of Orbax" in sys.argv:
            state["x"] = object()
        if "of jax" in sys.argv:
            params["w"].delete()
        registry = checkpoint.handler_registry()
        manager = ocp.CheckpointManager(sys.argv[1], handler_registry=registry)
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "run")]
    run = subprocess.run(  # Orbax alone holds the process for minutes
        [*command, error], capture_output=True, text=True, timeout=60
    )
    said = {
        "ours": "no average in this state",
        "of Orbax": "Unsupported type",
        "of jax": "has been deleted",
    }
    assert run.returncode == 1 and said[error] in run.stderr


@jax.tree_util.register_pytree_with_keys_class
class Spliced:
    """A node with the members of a tuple beside one of its own."""

    def __init__(self, members, own):
        self.members, self.own = members, own

    def tree_flatten_with_keys(self):
        keys = map(jax.tree_util.SequenceKey, range(len(self.members)))
        own = jax.tree_util.GetAttrKey("own"), self.own
        return [*zip(keys, self.members, strict=True), own], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(tuple(children[:-1]), children[-1])


def test_what_orbax_writes_and_cannot_read_is_refused(tmp_path):
    params = {"w": jnp.ones(3)}
    tx = optax.chain(optax.adam(0.1), emaopt.average_params(0.5))
    state = {"params": params, "opt_state": Spliced(tx.init(params), jnp.zeros(2))}
    said = "the node at opt_state has positions and names for keys"
    with pytest.raises(ValueError, match=said):
        checkpoint.save(tmp_path / "c", state, params="params")
    with manager(tmp_path / "run", params="params") as ours:
        with pytest.raises(ValueError, match=said):
            ours.save(1, args=A.StandardSave(state))
            ours.wait_until_finished()


@pytest.mark.parametrize("item", ["state", "train"])
def test_a_lone_item_of_any_name_is_read_by_its_record(item, tmp_path):
    params, opt_state = trained()
    items = {item: {"params": params, "opt_state": opt_state}}
    handlers = {item: ocp.PyTreeCheckpointHandler()}
    swapped = checkpoint.swap_state(items)
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as theirs:
        args = {name: A.PyTreeSave(tree) for name, tree in swapped.items()}
        record = checkpoint.metadata(swapped)
        theirs.save(1, args=A.Composite(**args), custom_metadata=record)
        theirs.wait_until_finished()
    same(checkpoint.restore(tmp_path / "1", items), items)
    same(checkpoint.load_averaged(tmp_path / "1"), emaopt.get_average(opt_state))


def test_an_item_that_the_record_does_not_speak_of_is_read_by_itself(tmp_path):
    params, opt_state = trained()
    train, other = {"params": params, "opt_state": opt_state}, {"x": jnp.ones(2)}
    with manager(tmp_path) as ours:
        args = {"train": A.PyTreeSave(train), "other": A.PyTreeSave(other)}
        ours.save(1, args=A.Composite(**args))
        ours.wait_until_finished()
    same(checkpoint.restore(tmp_path / "1" / "other", {"x": jnp.zeros(2)}), other)
    with pytest.raises(ValueError, match="other holds no average"):
        checkpoint.load_averaged(tmp_path / "1" / "other")
    same(
        checkpoint.restore(tmp_path / "1" / "train", {"train": train, "other": other})[
            "train"
        ],
        train,
    )
