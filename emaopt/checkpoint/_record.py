"""emaopt's record in a checkpoint: that the averages stand under the names, and where.

The record decides what is read as the average and what as raw parameters, so it is not
trusted. It has a checksum of its own, each field is checked, and it must agree with the
tree on disk, where a swapped state can be told from one that was not.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
from etils import epath

from emaopt._names import Names, is_below
from emaopt._nodes import counter_of
from emaopt._places import Place
from emaopt._states import BESIDE
from emaopt._types import Json

KEY = "emaopt"  # in custom_metadata
RECORD = "emaopt_combination"  # the key of the record that `combine` writes there
# 2: several averages, in "more"; 3: a checksum over the record, in "sum"; 4: "beside",
# and other checksums of arrays.
VERSION = 4
IN_PLACE = "in_place"  # of a save whose directory never had another name

Check: TypeAlias = Callable[[object], bool]  # whether a value can be that of a field


class Served(NamedTuple):
    """An average, or a center, that stands under the names of its parameters."""

    params: Names  # names that lead to the parameters
    average: Names  # names that lead to the state that held it
    field: str  # the field of that state where the raw parameters are: average, center

    @property
    def inside(self) -> Names:
        """The names that lead to the raw parameters."""
        return (*self.average, self.field)


class Marker(NamedTuple):
    """The record that the averages stand under the parameters' names, and where."""

    served: tuple[Served, ...]  # at least one
    empty: dict[Names, jax.ShapeDtypeStruct]  # arrays of size 0, which Orbax won't store
    # What else is served; its raw values are in the state of the first average.
    beside: frozenset[Names] = frozenset()

    @property
    def raw_beside(self) -> Names:
        """The names that lead to the raw values of what is served beside the averages."""
        return (*self.served[0].average, BESIDE)


def marker(
    function: str,
    places: Sequence[Place],
    empty: list[list[list[str] | list[int] | str]],
    beside: Collection[Names],
    values: Mapping[str, object],
    more: Mapping[str, object],
) -> Json:
    """The record as custom_metadata; `values` as `_trees.values` makes it.

    `beside` has the names of what else is served; the raw values are in the first place.
    """
    first, *others = (
        {
            "params": list(place.params),
            "average": list(place.average),
            "field": place.field,
        }
        for place in places
    )
    record = {**first, "empty": empty, **values, **more}
    if beside:
        record["beside"] = sorted(map(list, beside))
    record = sealed(record | {"more": others} if others else record)
    # By the readers' own checks, so that nothing is saved that they would refuse.
    if fault := _fault(record, _FIELDS):
        raise ValueError(
            f"{function}: what stands where cannot be put on record: {fault}. Leave it "
            "out of the state."
        )
    return {KEY: record}


def sealed(record: Mapping[str, object]) -> Json:
    """A record with its version and the checksum over it."""
    # As JSON gives it back: the checksum is of what is read, with lists for tuples.
    read = json.loads(json.dumps({"version": VERSION, **record}))
    return {**read, "sum": _sum(read)}


def _sum(record: Mapping[str, object]) -> str:
    """The checksum over all fields but itself, in one order and spelling."""
    content = {key: value for key, value in record.items() if key != "sum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def content(record: Mapping[str, object]) -> Json:
    """The fields of a record that are the same in all items; checksums are of one."""
    own = ("checksums", "sum")
    return {key: value for key, value in record.items() if key not in own}


def checked(
    function: str, file: epath.Path, custom: Mapping[str, object], key: str
) -> Json | None:
    """The record under a key of custom_metadata, None if there is none, or an error."""
    record = custom.get(key)
    if record is None:
        return None
    where = f"{function}: {file} has in custom_metadata[{key!r}] a record"
    if not isinstance(record, dict) or not _is_count(record.get("version")):
        raise ValueError(
            f"{where} of another writer, or a damaged one: {_short(record)}. emaopt "
            "keeps its own under that key."
        )
    if record["version"] > VERSION:
        raise ValueError(
            f"{where} of format {record['version']}, as if it was written by a newer "
            f"emaopt; this one reads up to {VERSION}. Upgrade emaopt."
        )
    # JSON may nest deeper than Python's checks can follow.
    try:
        fault = _fault(record, _FIELDS if key == KEY else _COMBINATION)
    except RecursionError:
        fault = "it is nested too deep"
    if fault:
        raise ValueError(f"{where} that is damaged: {fault}. {_ADVICE}")
    return record


def looks_like_one(found: object) -> bool:
    """Whether a value under another key is a record, or holds one under its key."""
    # One flipped bit in the key would else hide the record, and averages pass for raw.
    needed = {"params", "average", "sum"}
    return isinstance(found, dict) and (
        needed <= found.keys()
        or (isinstance(found.get(KEY), dict) and needed <= found[KEY].keys())
    )


_ADVICE = (
    "Take another step; nothing was read of this one. Without the record, all but arrays "
    "of size 0 can be had."
)


def _fault(record: Json, fields: Mapping[str, tuple[Check, bool]]) -> str | None:
    """What shows that a record is not as it was written, in words, or None."""
    if record["version"] > 2 and record.get("sum") != _sum(record):
        return "its checksum is of another content"
    # A flipped bit in the version must not do away with the checksum.
    if record["version"] < 3 and "sum" in record:
        return f"of format {record['version']}, it has a checksum"
    if record["version"] < 4 and "beside" in record:
        return f"of format {record['version']}, it has a field of format 4"
    for name, (is_right, needed) in fields.items():
        if name in record and not is_right(record[name]):
            return f"its {name} is {_short(record[name])}"
        if needed and name not in record:
            return f"it has no {name}"
    if fields is _FIELDS and (odd := sorted(record.keys() - fields.keys())):
        return f"it has fields that emaopt does not write, {_short(odd)}"
    return None


# Types are compared, not asked by isinstance: True is an int to Python, and no count.
def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _all(is_right: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _is_place(value: object) -> bool:
    fields = {"params": _is_names, "average": _is_names, "field": _is_field}
    return (
        isinstance(value, dict)
        and value.keys() == fields.keys()
        and all(is_right(value[name]) for name, is_right in fields.items())
    )


def _is_field(value: object) -> bool:
    return value in ("average", "center")


def _is_empty(value: object) -> bool:
    """Whether a value is [names, shape, dtype] of an array of size 0."""
    # One size is 0, so that no record can ask for memory.
    return (
        isinstance(value, list)
        and len(value) == 3
        and _is_names(value[0])
        and isinstance(value[1], list)
        and all(type(n) is int and 0 <= n < 2**63 for n in value[1])
        and 0 in value[1]
        and _is_dtype(value[2])
    )


def _is_dtype(value: object) -> bool:
    try:
        return isinstance(value, str) and str(jax.numpy.dtype(value)) == value
    except TypeError:
        return False


def _is_checksum(value: object) -> bool:
    """Whether a value is [names, dtype, sum], as `_checksums.checksums` gives it."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and _is_names(value[0])
        and _is_text(value[1])
        and type(value[2]) is int
        and 0 <= value[2] < 2**32
    )


def _is_values(value: object) -> bool:
    """Whether a value is True or a list of names, as `_trees.values` gives it."""
    return value is True or _all(_is_names)(value)


_FIELDS: dict[str, tuple[Check, bool]] = {  # its check, and whether it is needed
    "version": (_is_count, True),
    "params": (_is_names, True),
    "average": (_is_names, True),
    "field": (_is_field, False),
    "more": (_all(_is_place), False),
    "empty": (_all(_is_empty), True),
    "beside": (_all(_is_names), False),
    "values": (_is_values, False),
    "checksums": (_all(_is_checksum), False),
    "save": (_is_text, False),  # the same in all items of one save
    "metrics_of": (lambda value: value in ("raw", "averaged"), False),
    IN_PLACE: (lambda value: value is True, False),
    "sum": (_is_text, False),
}
_COMBINATION = {  # beside what the callers add
    "version": (_is_count, True),
    "params": (_is_names, True),
    "weights": (_is_text, True),
    "beside": (_all(_is_names), False),
    "values": (_is_values, False),
    "checksums": (_all(_is_checksum), False),
}


OF_COMBINATIONS = {*_COMBINATION, "checkpoints", "coefficients", "sum"}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def as_marker(record: Json) -> Marker:
    """A record that was checked, as a `Marker`."""
    return Marker(
        served=tuple(
            Served(
                tuple(one["params"]), tuple(one["average"]), one.get("field", "average")
            )
            for one in (record, *record.get("more", ()))
        ),
        empty={
            tuple(names): jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype))
            for names, shape, dtype in record["empty"]
        },
        beside=frozenset(map(tuple, record.get("beside", ()))),
    )


def name_in_state(
    names: Names, marker: Marker, present: Collection[Names]
) -> Names | None:
    """The name in the state of the leaf at `names` on disk: the swap, undone by name.

    None for what is served beside the averages, and is nothing of the state's.
    """
    if names in marker.beside:
        return None
    if is_below(names, marker.raw_beside):
        return names[len(marker.raw_beside) :]
    # A masked parameter has no twin in the average's state, and keeps its name.
    for one in marker.served:
        if names == (*one.average, counter_of(one.field, swapped=True)):
            return (*one.average, counter_of(one.field, swapped=False))
        inside, params = one.inside, one.params
        for here, there in ((inside, params), (params, inside)):
            if names[: len(here)] == here:
                other = there + names[len(here) :]
                if other in present:
                    return other
    return names
