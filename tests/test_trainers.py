"""Public trainers with an average: what their readers get and training resumes from.

States are in `trainers`, doors and readers here. Through a trainer's own manager goes
what `swap_state` gives, with `metadata`; with `handler_registry`, the state itself.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import trainers
from test_places import same
from trainers import OPTIMIZERS, by_name, zeros

from emaopt import checkpoint

A = ocp.args
PyTreeHandler = ocp.PyTreeCheckpointHandler
pytestmark = [
    # Of Orbax, in readers without a target; of Flax, as emaopt looks into Variables.
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]


class Data:
    """A data iterator, which knows its position."""

    def __init__(self, position=0):
        self.position = position


class DataHandler(ocp.CheckpointHandler):
    """Of the trainer's own, as openpi's for assets and Grain's for iterators."""

    def save(self, directory, item=None, args=None):
        data: Any = args.item if args else item
        (directory / "position").write_text(str(data.position))

    def restore(self, directory, item=None, args=None):
        return Data(int((directory / "position").read_text()))


@ocp.args.register_with_handler(DataHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DataArgs(A.CheckpointArgs):
    item: Any


class Door(NamedTuple):
    """A trainer's CheckpointManager, and how its reader opens what that writes."""

    handlers: Callable[[], dict[str, Any]]  # arguments of the manager
    read: Callable[[Any, Any], Any]  # directory, parameters alike -> parameters
    other: str | None  # the name of the item that is not a tree
    options: dict[str, Any]  # of the manager
    args: tuple[Any, Any] | None = None  # to save and restore; None: as `items`


def save_each(item):
    return A.PyTreeSave(item, jax.tree.map(lambda _: ocp.SaveArgs(), item))


def restore_each(item, **more):
    told = ocp.checkpoint_utils.construct_restore_args(item)
    return A.PyTreeRestore(item, restore_args=told, **more)


def read_openpi(directory, like):
    path = directory / "7" / "params"
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.PyTreeCheckpointer() as reader:
        item = {"params": reader.metadata(path).item_metadata["params"]}
        told = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=sharding), item)
        return reader.restore(path, A.PyTreeRestore(item, restore_args=told))["params"]


def read_nanodo(directory, like):
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(directory / "7" / "state")["params"]


def read_mava(directory, like):
    with ocp.CheckpointManager(directory, ocp.PyTreeCheckpointer()) as reader:
        return type(like)(**reader.restore(7)["learner_state"]["params"])


def read_part(path, item):
    told = ocp.checkpoint_utils.construct_restore_args(item)
    with ocp.Checkpointer(PyTreeHandler()) as reader:
        return reader.restore(path, item=item, transforms={}, restore_args=told)


def read_maxtext(directory, like):
    item = {"params": {"params": like}}
    return read_part(directory / "7" / "items", item)["params"]["params"]


def read_t5x(directory, like):
    item = {"target": like, "state": {"step": jnp.int32(0)}}
    return read_part(directory / "checkpoint_7" / "state", item)["target"]


def read_kauldron(directory, like):
    options = ocp.CheckpointManagerOptions(step_prefix="ckpt")
    with ocp.CheckpointManager(directory, options=options) as reader:
        return reader.restore(7, args=A.StandardRestore())["params"]


def for_items(other, *items, make: Any = PyTreeHandler, **more):
    """A manager's arguments: a handler for each item."""
    handlers = {item: make() for item in items}
    return {"item_handlers": {**handlers, other: DataHandler()}, **more}


def openpi_handlers():
    return for_items("assets", "train_state", "params")


def nanodo_handlers():
    data = ocp.Checkpointer(DataHandler())
    state = ocp.AsyncCheckpointer(PyTreeHandler())
    return {"checkpointers": {"state": state, "data": data}}


def maxtext_handlers():
    make = functools.partial(PyTreeHandler, use_zarr3=True)
    return for_items("iter", "items", make=make, item_names=("items", "iter"))


def kauldron_handlers():
    return for_items("timer", "default", make=ocp.StandardCheckpointHandler)


BEST = {"best_fn": lambda metrics: metrics["return"], "max_to_keep": 1}
PART = save_each, functools.partial(restore_each, partial_restore=True)
STANDARD, EACH = (A.StandardSave, A.StandardRestore), (save_each, restore_each)
CKPT, CHECKPOINT = {"step_prefix": "ckpt"}, {"step_prefix": "checkpoint"}
DOORS = {
    "openpi": Door(openpi_handlers, read_openpi, "assets", {"max_to_keep": 1}),
    "nanodo": Door(nanodo_handlers, read_nanodo, "data", {"max_to_keep": 3}),
    "Mava": Door(
        lambda: {"checkpointers": ocp.PyTreeCheckpointer()}, read_mava, None, BEST
    ),
    "MaxText": Door(maxtext_handlers, read_maxtext, "iter", {}, PART),
    "Kauldron": Door(kauldron_handlers, read_kauldron, "timer", CKPT, STANDARD),
    "T5X": Door(
        lambda: for_items("dataset", "state"), read_t5x, "dataset", CHECKPOINT, EACH
    ),
}


class Trainer(NamedTuple):
    step: Callable[[Any], trainers.Step]
    door: Any  # a Door; None: it does not write by Orbax
    told: dict[str, Any]  # what emaopt has to be told of it


def of_networks(**params):
    """The averages by the networks' names, and where the parameters of each stand."""
    ways = {
        f"learner_state/opt_states/{network}": f"learner_state/params/{way}"
        for network, way in params.items()
    }
    return {"name": tuple(params), "params": ways}


PPO = of_networks(actor="actor", critic="critic")
SAC = of_networks(actor="actor", q="q/online", log_alpha="log_alpha")
ONLINE = {"params": "learner_state/params/online"}
# The names of items are a part of the way, but for a lone "state" or "default".
TRAINERS = {
    "openpi": Trainer(trainers.openpi, DOORS["openpi"], {}),
    "openpi, LoRA": Trainer(trainers.openpi_lora, DOORS["openpi"], {}),
    "nanodo": Trainer(trainers.nanodo, DOORS["nanodo"], {}),
    "Mava PPO": Trainer(trainers.ppo, DOORS["Mava"], PPO),
    "Stoix PPO": Trainer(trainers.ppo_with_statistics, DOORS["Mava"], PPO),
    "Mava SAC": Trainer(trainers.sac, DOORS["Mava"], SAC),
    "Stoix DQN": Trainer(trainers.dqn, DOORS["Mava"], ONLINE),
    "MaxText": Trainer(trainers.maxtext, DOORS["MaxText"], {}),
    "MaxText, Linen": Trainer(trainers.maxtext_linen, DOORS["MaxText"], {}),
    "MaxText, DiLoCo": Trainer(trainers.maxtext_diloco, DOORS["MaxText"], {}),
    "Kauldron": Trainer(trainers.kauldron, DOORS["Kauldron"], {}),
    "T5X": Trainer(trainers.t5x, DOORS["T5X"], {"params": "target"}),
    "Levanter": Trainer(trainers.levanter, None, {}),
    "Levanter, own": Trainer(trainers.levanter_own, None, {"params": "model"}),
    "big_vision": Trainer(trainers.big_vision, None, {}),
}
# Where an optimizer's state stands without an average and with it, if that is to be told:
# no types and no key of an optimizer's, or a level that MaxText gives to some members.
MU, T5X = "items/opt_state/0/mu/params", {"state/param_states": "state/param_states/0"}
MOVED: dict[tuple[str, str], dict[str, str]] = {
    ("MaxText", "kron"): {MU: "items/opt_state/0/0/mu"},
    ("MaxText", "averaged kron"): {MU: "items/opt_state/inner_state/0/mu"},
    ("T5X", "adam"): T5X,
    ("T5X", "kron"): T5X,
    ("T5X", "traces"): T5X,
    ("T5X", "on spikes"): {
        "state/param_states/inner_state": "state/param_states/inner_state/0"
    },
    ("Mava PPO", "traces"): {
        "learner_state/opt_states/actor": "learner_state/opt_states/actor/0",
        "learner_state/opt_states/critic": "learner_state/opt_states/critic/0",
    },
}
ALL = ("openpi", "Mava PPO", "MaxText", "T5X")  # with more than two optimizers


def cases(orbax, *more):
    chosen = [
        (trainer, optimizer)
        for trainer in TRAINERS
        for optimizer in ("adam", "kron", *more)
        if (TRAINERS[trainer].door is not None) == orbax
    ]
    if orbax:
        rest = ("averaged kron", "traces", "on spikes")
        chosen += [(trainer, optimizer) for trainer in ALL for optimizer in rest]
    return pytest.mark.parametrize(("trainer", "optimizer"), chosen)


@functools.cache
def step_of(trainer, optimizer, decay):
    return TRAINERS[trainer].step(OPTIMIZERS[optimizer](decay))


def started(trainer, optimizer):
    """With decay 0 an average is the parameters, but for the count of its updates."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "num_updates" in str(path[-1]) else x,
        step_of(trainer, optimizer, 0.0).items,
    )


def whole(items):
    return next(iter(items.values())) if {*items} <= {"default", "state"} else items


def as_items(tree, like):
    return dict.fromkeys(like, tree) if {*like} <= {"default", "state"} else tree


@contextlib.contextmanager
def manager(door, directory, registry):
    handlers = {"handler_registry": registry} if registry else door.handlers()
    if registry and door.other:
        registry.add(door.other, DataArgs, DataHandler())
    options = ocp.CheckpointManagerOptions(**door.options)
    with ocp.CheckpointManager(directory, options=options, **handlers) as made:
        yield made
        made.wait_until_finished()


def arguments(door, make, items):
    if [*items] == ["default"] and not door.other:
        return make(items["default"])
    made = {name: make(item) for name, item in items.items()}
    return A.Composite(**made, **{door.other: DataArgs(Data(7))})


def put(door, directory, items, registry=None, record=None):
    """Saves as the trainer does."""
    more: dict[str, Any] = {"metrics": {"return": 0.0}} if door.options is BEST else {}
    with manager(door, directory, registry) as theirs:
        if registry or door.args:
            make, _ = door.args or (A.PyTreeSave, None)
            more["args"] = arguments(door, make, items)
            theirs.save(7, custom_metadata=record, **more)
        else:
            others = {door.other: Data(7)} if door.other else {}
            items = items.get("default", items) | others
            theirs.save(7, items, custom_metadata=record, **more)


def get(door, directory, items, registry=None):
    """Restores as the trainer does."""
    with manager(door, directory, registry) as theirs:
        if not (registry or door.args):
            back = theirs.restore(7, items=items.get("default", items))
            return {"default": back} if "default" in items else dict(back)
        _, make = door.args or (None, A.PyTreeRestore)
        if "default" in items and (registry or not door.other):
            # A new manager with a registry takes no Composite where it finds "default".
            return {"default": theirs.restore(7, args=make(items["default"]))}
        back = dict(theirs.restore(7, args=arguments(door, make, items)))
        assert back.pop(door.other).position == 7
        return back


def in_silence(_):
    """Takes reports."""


def restored(how, door, directory, target, **told):
    """Through the registry, or from the trainer's files by `checkpoint.restore`."""
    told["report"] = in_silence
    if how == "registry":
        return get(door, directory, target, checkpoint.handler_registry(**told))
    told.pop("name", None)
    (path,) = directory.glob("*7")
    return as_items(checkpoint.restore(path, whole(target), **told), target)


@pytest.mark.quick(2)
@pytest.mark.parametrize("how", ["own", "registry"])
@cases(True)
def test_readers_get_the_average_and_training_resumes(trainer, optimizer, how, tmp_path):
    items, served = step_of(trainer, optimizer, 0.5)
    _, door, told = TRAINERS[trainer]
    if how == "registry":
        put(door, tmp_path, items, checkpoint.handler_registry(**told))
    else:
        swapped = checkpoint.swap_state(whole(items), **told)
        record = checkpoint.metadata(swapped, **told)
        put(door, tmp_path, as_items(swapped, items), record=record)
        target = checkpoint.swap_state(whole(zeros(items)), **told)
        back = get(door, tmp_path, as_items(target, items))
        same(checkpoint.swap_state(whole(back), **told), whole(items))
    same(by_name(door.read(tmp_path, served)), by_name(served))
    same(restored(how, door, tmp_path, zeros(items)), items)
    without, _ = step_of(trainer, optimizer, None)
    moved = {new: old for old, new in MOVED.get((trainer, optimizer), {}).items()}
    same(restored(how, door, tmp_path, zeros(without), rename=moved), without)


@pytest.mark.quick(2)
@pytest.mark.parametrize("how", ["own", "registry"])
@cases(True)
def test_checkpoints_without_an_average_are_adopted(trainer, optimizer, how, tmp_path):
    _, door, told = TRAINERS[trainer]
    put(door, tmp_path, step_of(trainer, optimizer, None).items)
    like = started(trainer, optimizer)
    told = told | {"rename": MOVED.get((trainer, optimizer), {})}
    same(restored(how, door, tmp_path, zeros(like), **told), like)


@pytest.mark.quick(2)
@cases(False, "skipping")
def test_a_writer_of_its_own_takes_a_swapped_state(trainer, optimizer, tmp_path):
    state, served = step_of(trainer, optimizer, 0.5)
    told = TRAINERS[trainer].told
    np.savez(tmp_path / "7.npz", **by_name(checkpoint.swap_state(state, **told)))
    written = np.load(tmp_path / "7.npz")
    key = "params/" if trainer == "big_vision" else "model/"
    read = {n.removeprefix(key): written[n] for n in written if n.startswith(key)}
    same(jax.tree.map(jnp.asarray, read), by_name(served))
    target = checkpoint.swap_state(zeros(state), **told)
    leaves = [jnp.asarray(written[name]) for name in by_name(target)]
    back = jax.tree.unflatten(jax.tree.structure(target), leaves)
    same(checkpoint.swap_state(back, **told), state)


@pytest.mark.quick(2)
@cases(False)
def test_what_has_its_own_writer_goes_through_orbax(trainer, optimizer, tmp_path):
    state, served = step_of(trainer, optimizer, 0.5)
    told = TRAINERS[trainer].told
    checkpoint.save(tmp_path / "new", state, **told)
    with ocp.StandardCheckpointer() as reader:
        raw = reader.restore(tmp_path / "new")
    read = raw["params" if trainer == "big_vision" else "model"]
    same(by_name(read), by_name(served))
    same(checkpoint.restore(tmp_path / "new", zeros(state)), state)
    without, _ = step_of(trainer, optimizer, None)
    same(checkpoint.restore(tmp_path / "new", zeros(without), report=in_silence), without)
    checkpoint.save(tmp_path / "old", without, optional=True)
    like = started(trainer, optimizer)
    adopted = checkpoint.restore(tmp_path / "old", zeros(like), **told, report=in_silence)
    same(adopted, like)


# What emaopt says where it is not told what could be two things.
REFUSED = {
    "Mava PPO": ("name", r"several averages.*actor.*critic.*name="),
    "Mava SAC": ("name", r"several averages.*actor.*q.*log_alpha.*name="),
    "Stoix PPO": ("params", r"any of .*params/actor, .*params/critic.*params="),
    "Stoix DQN": ("params", r"any of .*params/online, .*params/target.*params="),
    "T5X": ("params", r"any of .*/mu, .*/nu, target.*params="),
    "Levanter, own": ("params", r"any of model, model_averaging/model.*params="),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("trainer", REFUSED)
def test_what_could_be_two_things_is_refused(trainer):
    state = step_of(trainer, "adam", 0.5).items
    state = state if TRAINERS[trainer].door is None else whole(state)
    untold, message = REFUSED[trainer]
    told = {key: x for key, x in TRAINERS[trainer].told.items() if key != untold}
    with pytest.raises(ValueError, match=message):
        checkpoint.swap_state(state, **told)
