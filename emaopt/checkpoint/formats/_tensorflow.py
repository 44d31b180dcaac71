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

from emaopt._names import Names
from emaopt.checkpoint._arrays import DiskArray
from emaopt.checkpoint._found import Found
from emaopt.checkpoint.formats._trees import Opened, nested

AVERAGE = "ExponentialMovingAverage"
_ATTRIBUTE = "/.ATTRIBUTES/VARIABLE_VALUE"
_SLOT = "/.OPTIMIZER_SLOT/"
# Slots of optimizers in TensorFlow 1 that may stand in another scope than their variable.
_OPTIMIZERS = (
    "Momentum|Adam|AdamW|RMSProp|Adagrad|AdagradDA|Adadelta|Ftrl|GradientDescent"
)
_KNOWN = re.compile(rf"({AVERAGE}|{_OPTIMIZERS})(_\d+)?")
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
            else:
                place = ("slots", *place)
        elif _COUNTER.fullmatch(name):
            place = way
            counts.append(place)
        elif _OF_OPTIMIZER.fullmatch(name):
            place = ("optimizer", *way)
        else:
            place = ("params", *way)
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
        # In a scope, the name of a parameter may by chance look like one of a slot.
        if i == 0 or slot == average or _KNOWN.fullmatch(slot):
            return owner, slot
    return None


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
    averages = [slot for slot in slots if slot[-1] == "average"]
    optimizers = {slot[1:-1] for slot in slots}
    # What has no slot and is of no optimizer is a variable, too: BatchNorm's statistics.
    kept = {"save_counter", "slots"} | {way[0] for way in optimizers}
    tops = {way[0] for way in leaves} - kept
    counts = [
        way
        for way in leaves
        if way[-1] in ("iter", "_iterations", "iterations") and way[0] in kept
    ]
    count = counts[0] if len(counts) == 1 else None
    found = []
    for average in averages:
        below = {way[len(average)] for way in leaves if way[: len(average)] == average}
        # The slots' tree begins at the root of the checkpoint: below one key of it, the
        # parameters are there. Else they get a key of their own.
        if len(below) == 1 and below <= tops:
            (top,) = below
            found.append(Found("tf2", (*average, top), (top,), count))
    if averages and not found:
        inside = {way for way in leaves if way[0] in tops}
        leaves = {("params", *w) if w in inside else w: x for w, x in leaves.items()}
        shown = {("params", *w) if w in inside else w: x for w, x in shown.items()}
        found = [Found("tf2", average, ("params",), count) for average in averages]
    if swapped:
        for one in found:
            moved = _exchanged(leaves, one.average, one.params or ())
            leaves = {moved[place]: array for place, array in leaves.items()}
            shown = {moved[place]: name for place, name in shown.items()}
        found = [one._replace(layout="tf2_swapped") for one in found]
    return Opened(nested(leaves), found, shown)


def _unescaped(name: str) -> str:
    """A name as its user gave it: TensorFlow writes "/" as ".S", and "." as ".."."""
    return re.sub(r"\.(S|\.)", lambda match: "/" if match[1] == "S" else ".", name)
