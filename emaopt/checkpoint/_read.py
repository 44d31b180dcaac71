"""Reading of chosen leaves, each checked against what was saved."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from emaopt.checkpoint import _arrays, _checksums, _files, _orbax
from emaopt.checkpoint._files import Names

MIN_IN_FLIGHT = 2**25  # bytes that a restore may have under way, of however small a state


def read(
    function: str, files: _files.Files, wanted: dict[Names, tuple[Names, Any]]
) -> Any:
    """Reads leaves, and nothing else: where each stands and as what, by any names."""
    with _all_together(function, files, [plan for _, plan in wanted.values()]):
        values, whole = _read(function, files, wanted)
    _checksums.check(function, files.path, files.checksums, whole)
    return values


@contextlib.contextmanager
def _all_together(function: str, files: _files.Files, plans: list[Any]) -> Iterator[None]:
    """Lets none of several processes go on to what they do together if one has failed."""
    places = [getattr(plan, "sharding", None) for plan in plans]
    if all(place is None or place.is_fully_addressable for place in places):
        yield
        return
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    any_failed = multihost_utils.process_allgather(np.asarray(failed is not None))
    if failed is not None:
        raise failed
    if np.any(any_failed):
        raise ValueError(f"{function}: {files.path} cannot be read by another process.")


def _read(
    function: str, files: _files.Files, wanted: dict[Names, tuple[Names, Any]]
) -> tuple[dict[Names, Any], dict[Names, Any]]:
    """The values, and those of whole arrays by where they stand."""
    with _files.explained(function, files.path):
        _arrays.open_all(files.saved[place] for place, _ in wanted.values())
    here = {
        names: (files.saved[place], plan)
        for names, (place, plan) in wanted.items()
        if _arrays.can_read(files.saved[place], plan)
    }
    sizes = [_arrays.nbytes_read(*leaf) for leaf in here.values()]
    limit = max([sum(sizes) // 32, MIN_IN_FLIGHT, *sizes])
    # What is cast is read as it was saved, to be checked, if all of it is read.
    raw = {
        names: np.empty(leaf.shape, leaf.dtype)
        for names, (leaf, plan) in here.items()
        if wanted[names][0] in files.checksums and _arrays.is_cast_whole(leaf, plan)
    }
    plans = [(leaf, raw.get(names, plan)) for names, (leaf, plan) in here.items()]
    found, values = _arrays.read(plans, limit), {}
    for names, (_, plan) in here.items():
        with _files.explained(function, files.path):
            value = next(found)
        if names in raw:
            place = wanted[names][0]
            _checksums.check(function, files.path, files.checksums, {place: value})
            value = _arrays.placed(plan, value)
        values[names] = value
    others = {n: read for n, read in wanted.items() if n not in here}
    numbers = {
        n: plan for n, (place, plan) in others.items() if _cuts(files, place, plan)
    }
    others |= {n: (wanted[n][0], 0) for n in numbers}  # as it is, to see whether it fits
    while others:  # of one that is wanted twice, once more
        now = {place: (names, plan) for names, (place, plan) in others.items()}
        they = _read_others(function, files, {p: plan for p, (_, plan) in now.items()})
        values |= {names: they[place] for place, (names, _) in now.items()}
        others = {n: read for n, read in others.items() if n not in values}
    for names, plan in numbers.items():
        try:
            values[names] = _arrays.of_number(values[names], plan)
        except OverflowError as error:
            place = "/".join(wanted[names][0])
            raise ValueError(f"{function}: {files.path}: {place} is {error}") from None
    whole = {
        wanted[n][0]: value
        for n, value in values.items()
        if n not in here or _files.shape(value) == here[n][0].shape  # not of other rows
    }
    # In one order in all processes, which go through the checksums together.
    return values, {place: whole[place] for place in files.saved if place in whole}


def _cuts(files: _files.Files, place: Names, plan: Any) -> bool:
    """Whether a Python integer is wanted in an array, which Orbax would cut it to."""
    saved = files.saved[place]
    number = _orbax.is_number(saved)
    dtypes = [getattr(leaf, "dtype", None) or float for leaf in (saved, plan)]
    return number and all(jnp.issubdtype(dtype, jnp.integer) for dtype in dtypes)


def _read_others(
    function: str, files: _files.Files, wanted: dict[Names, Any]
) -> dict[Names, Any]:
    """Reads numbers, text, and whatever else Orbax knows."""
    values = {}
    for prefix, (directory, tree) in files.items.items():
        names = [prefix + names for names in _files.names_of(tree)]
        if not any(name in wanted for name in names):
            continue
        plan = jax.tree.unflatten(
            jax.tree.structure(tree), [wanted.get(n, ocp.PLACEHOLDER) for n in names]
        )
        with _files.explained(function, directory):
            restored = _orbax.restored(directory, plan)
        leaves = _files.names_of(restored)
        values |= {prefix + n: leaves[n] for n in leaves if prefix + n in wanted}
    return values
