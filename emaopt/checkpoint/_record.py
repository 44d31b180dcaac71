"""Our record in a checkpoint: that the averages stand under the names, and where."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emaopt._nodes import counter_of
from emaopt._places import Names, Place

KEY = "emaopt"  # in custom_metadata
RECORD = "emaopt_combination"  # there, too, of what `combine` writes
VERSION = 2  # 2: several averages, in "more"


class Served(NamedTuple):
    """What stands under which parameters' names."""

    params: Names  # names that lead to the parameters
    average: Names  # names that lead to the state that held it
    field: str  # the field of that state where the raw parameters are: average, center

    @property
    def inside(self) -> Names:
        return (*self.average, self.field)


class Marker(NamedTuple):
    """The record that the averages stand under the parameters' names, and where."""

    served: tuple[Served, ...]  # at least one
    empty: dict[Names, jax.ShapeDtypeStruct]  # arrays of size 0, which Orbax won't store


def write_marker(places: Sequence[Place], empty: list, values: Any) -> dict[str, Any]:
    """The marker as custom_metadata; `values` as `_trees.values` makes it."""
    first, *more = (
        {
            "params": list(place.params),
            "average": list(place.average),
            "field": place.field,
        }
        for place in places
    )
    record = {"version": 2 if more else 1, **first, "empty": empty, **values}
    return {KEY: record | {"more": more} if more else record}


def read_marker(function: str, path: Any, marker: Any) -> Marker | None:
    if marker is None:
        return None
    if not isinstance(marker, dict) or not isinstance(marker.get("version"), int):
        raise ValueError(
            f"{function}: {path} has custom_metadata[{KEY!r}] of another writer: "
            f"{marker!r}. emaopt keeps its record under that key."
        )
    if marker["version"] > VERSION:
        raise ValueError(
            f"{function}: {path} was written by a newer emaopt (format "
            f"{marker['version']}, this one reads up to {VERSION}). Upgrade emaopt."
        )
    return Marker(
        served=tuple(
            Served(
                tuple(one["params"]), tuple(one["average"]), one.get("field", "average")
            )
            for one in (marker, *marker.get("more", ()))
        ),
        empty={
            tuple(names): jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for names, shape, dtype in marker["empty"]
        },
    )


def name_in_state(names: Names, marker: Marker, present: Any) -> Names:
    """The name in the state of what stands at `names`: the swap, undone by name."""
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
