"""The variables of a TensorFlow checkpoint as a tree: parameters, and a tree a slot.

TensorFlow keeps variables in one list, by name. A variable that belongs to another, such
as its average or its momentum, has the other's name within its own:

- Saver (TensorFlow 1): "dense/kernel/ExponentialMovingAverage" belongs to "dense/kernel".
  In a variable scope the name of the scope goes before.
- Checkpoint (TensorFlow 2): "model/dense/kernel/.OPTIMIZER_SLOT/optimizer/average/..." is
  the slot "average" that "optimizer" keeps of "model/dense/kernel".

Here the parameters are below "params", and each slot is a tree like them, below its name.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from emaopt._names import Names, joined, nested
from emaopt.checkpoint._arrays import DiskArray
from emaopt.checkpoint._formats._trees import Opened
from emaopt.checkpoint._found import Found

AVERAGE = "ExponentialMovingAverage"
_ATTRIBUTE = "/.ATTRIBUTES/VARIABLE_VALUE"
_SLOT = "/.OPTIMIZER_SLOT/"
# Slots of optimizers in TensorFlow 1 that may stand in another scope than their variable.
_OPTIMIZERS = (
    "Momentum|Adam|AdamW|RMSProp|Adagrad|AdagradDA|Adadelta|Ftrl|GradientDescent"
)
_KNOWN = re.compile(rf"({AVERAGE}|{_OPTIMIZERS})(_\d+)?")
_COUNTS = ("iter", "_iterations", "iterations")  # of an optimizer in TensorFlow 2
_COUNTER = re.compile(r"(.*/)?global_step")
_OF_OPTIMIZER = re.compile(r"(.*/)?beta[12]_power(_\d+)?")


def is_object_graph(names: Mapping[str, object]) -> bool:
    """Whether tf.train.Checkpoint wrote it, and not a Saver."""
    return any(name.endswith(_ATTRIBUTE) for name in names)


def of_saver(arrays: Mapping[str, DiskArray], swapped: bool, average: str) -> Opened:
    """What a tf.train.Saver wrote; `average` is the name of its averages.

    With `swapped`, the averages stand under the parameters' names and the parameters
    under those of the averages: a swapping_saver wrote it, which nothing in it tells.
    """
    # A second average has the name of the first with a number.
    is_average = re.compile(rf"{re.escape(average)}(_\d+)?").fullmatch
    averages: set[str] = set()
    leaves: dict[Names, DiskArray] = {}
    shown: dict[Names, str] = {}
    counts: list[Names] = []
    for name, array in arrays.items():
        way = tuple(name.split("/"))
        if owned := _owner(name, arrays, average):
            owner, slot = owned
            place = (slot, *owner.split("/"))
            if is_average(slot):
                averages.add(slot)
                _refuse_unclear(name, owner, slot, arrays)
            else:
                place = ("slots", *place)
        elif _COUNTER.fullmatch(name):
            place = way
            counts.append(place)
        elif _OF_OPTIMIZER.fullmatch(name):
            place = ("optimizer", *way)
        else:
            place = ("params", *way)
        if place in leaves:
            raise ValueError(
                f"{name} and {shown[place]} would both be the {joined(place[:1])} of "
                f"{joined(place[1:])}: scopes do not tell which is whose"
            )
        leaves[place], shown[place] = array, name
    if swapped:
        for one in averages:
            moved = _exchanged(leaves, (one,), ("params",))
            leaves = {moved[place]: array for place, array in leaves.items()}
            shown = {moved[place]: name for place, name in shown.items()}
    layout = "tf1_swapped" if swapped else "tf1"
    count = counts[0] if len(counts) == 1 else None
    found = [Found(layout, (one,), ("params",), count) for one in sorted(averages)]
    return Opened(nested(leaves), found, shown)


def _owner(
    name: str, arrays: Mapping[str, DiskArray], average: str
) -> tuple[str, str] | None:
    """The variable that a variable belongs to, and as what; None if it is one itself."""
    *way, slot = name.split("/")
    for i in range(len(way)):
        owner = "/".join(way[i:])
        if owner not in arrays:
            continue
        # The name of a parameter may by chance look like one of a slot.
        shapes = arrays[name].shape, arrays[owner].shape
        is_like = i == 0 and (shapes[0] == shapes[1] or not shapes[0])
        if is_like or slot == average or _KNOWN.fullmatch(slot):
            return owner, slot
    return None


def _refuse_unclear(
    name: str, owner: str, slot: str, arrays: Mapping[str, DiskArray]
) -> None:
    """Raises if an average could be one of a shorter name, made inside of a scope."""
    way = owner.split("/")
    for i in range(1, len(way)):
        other = "/".join(way[i:])
        if other in arrays and f"{other}/{slot}" not in arrays:
            if arrays[other].shape == arrays[name].shape == arrays[owner].shape:
                raise ValueError(
                    f"{name} could be the average of {owner}, or of {other} in a scope"
                )


def _exchanged(places: Iterable[Names], one: Names, other: Names) -> dict[Names, Names]:
    """The new place of each leaf, if those that two trees both have are exchanged."""
    there = set(places)

    def moved(place: Names) -> Names:
        for here, twin in ((one, other), (other, one)):
            if place[: len(here)] == here and twin + place[len(here) :] in there:
                return twin + place[len(here) :]
        return place

    return {place: moved(place) for place in there}


def of_object_graph(arrays: Mapping[str, DiskArray], swapped: bool) -> Opened:
    """What tf.train.Checkpoint wrote; the averages are the slots called "average"."""
    leaves: dict[Names, DiskArray] = {}
    shown: dict[Names, str] = {}
    slots: set[Names] = set()
    for name, array in arrays.items():
        short = name.removesuffix(_ATTRIBUTE)
        variable, is_slot, slot = short.partition(_SLOT)
        way = tuple(map(_unescaped, variable.split("/")))
        if is_slot:
            tree = ("slots", *map(_unescaped, slot.split("/")))
            slots.add(tree)
            way = (*tree, *way)
        leaves[way], shown[way] = array, name
    if numbered := [way for way in leaves if "_trainable_variables" in way]:
        raise ValueError(
            f"Keras keeps weights by number, as {joined(numbered[0])}. In Keras, call "
            "optimizer.finalize_variable_values(model.trainable_variables), which puts "
            "its averages into the model, and save tf.train.Checkpoint(model=model)"
        )
    averages = sorted(slot for slot in slots if slot[-1] == "average")
    # What belongs to optimizers: they have slots, or count.
    optimizers = {slot[1:-1] for slot in slots} - {()}
    optimizers |= {way[:-1] for way in leaves if way[-1] in _COUNTS and len(way) > 1}
    aside = {("slots",), *optimizers}
    aside |= {way for way in leaves if len(way) == 1 and _is_count(leaves[way])}
    variables = {
        way for way in leaves if not any(way[: len(one)] == one for one in aside)
    }
    counts = [
        way
        for way in leaves
        if way[-1] in _COUNTS and any(way[: len(one)] == one for one in optimizers)
    ]
    # The slots' trees begin at the root of the checkpoint. Below one key of it, such as
    # "model", the parameters are there.
    tops = {way[0] for way in variables if len(way) > 1}
    top = tuple(tops) if len(tops) == 1 and all(len(w) > 1 for w in variables) else ()
    renamed = {
        way: ("params", *way[len(top) :]) if way in variables else way for way in leaves
    }
    leaves = {renamed[way]: array for way, array in leaves.items()}
    shown = {renamed[way]: name for way, name in shown.items()}
    count = counts[0] if len(counts) == 1 else None
    found = [Found("tf2", (*slot, *top), ("params",), count) for slot in averages]
    if swapped:
        for one in found:
            moved = _exchanged(leaves, one.average, ("params",))
            leaves = {moved[place]: array for place, array in leaves.items()}
            shown = {moved[place]: name for place, name in shown.items()}
        found = [one._replace(layout="tf2_swapped") for one in found]
    return Opened(nested(leaves), found, shown)


def _is_count(array: DiskArray) -> bool:
    """Whether an array can be a counter of steps, as a trainer keeps beside its model."""
    return not array.shape and np.issubdtype(array.dtype, np.integer)


def _unescaped(name: str) -> str:
    """A name as its user gave it: TensorFlow writes "/" as ".S", and "." as ".."."""
    return re.sub(r"\.(S|\.)", lambda match: "/" if match[1] == "S" else ".", name)
