"""Reads chosen leaves, and checks each against its recorded checksum."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from emaopt._types import Leaf
from emaopt.checkpoint import _arrays, _checksums, _files, _orbax
from emaopt.checkpoint._files import Names

MIN_IN_FLIGHT = 2**25  # bytes that may be under way in a restore, however small the state


def read(
    function: str, files: _files.Files, wanted: dict[Names, tuple[Names, Leaf]]
) -> dict[Names, Leaf]:
    """Reads the leaves in `wanted`, and nothing else.

    `wanted` maps any names, by which the result has the leaves, to the place on disk and
    the plan: what to read the leaf as.
    """
    with _all_together(function, files, [plan for _, plan in wanted.values()]):
        values, whole = _read(function, files, wanted)
    _checksums.check(function, files.path, files.checksums, whole)
    return values


@contextlib.contextmanager
def _all_together(
    function: str, files: _files.Files, plans: Sequence[Leaf]
) -> Iterator[None]:
    """Raises in all processes if one has failed, before they go on together."""
    # With arrays of this process alone the others may not be reading: they are not asked.
    places = [getattr(plan, "sharding", None) for plan in plans]
    if all(place is None or place.is_fully_addressable for place in places):
        yield
        return
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    # All processes compute the checksums that follow together. Were one of them missing,
    # the others would wait for ever.
    any_failed = multihost_utils.process_allgather(np.asarray(failed is not None))
    if failed is not None:
        raise failed
    if np.any(any_failed):
        raise ValueError(f"{function}: {files.path} cannot be read by another process.")


def _read(
    function: str, files: _files.Files, wanted: dict[Names, tuple[Names, Leaf]]
) -> tuple[dict[Names, Leaf], dict[Names, Leaf]]:
    """The values by name, and those of whole arrays by their place on disk."""
    with _files.explained(function, files.path):
        _arrays.open_all(files.saved[place] for place, _ in wanted.values())
    # Other formats have no numbers of Python's: they come as arrays.
    kinds = {
        names: type(plan)
        for names, (place, plan) in wanted.items()
        if isinstance(files.saved[place], _arrays.OTHERS) and not hasattr(plan, "dtype")
    }
    arrays = {names: files.saved[wanted[names][0]] for names in kinds}
    wanted = wanted | {
        names: (wanted[names][0], np.empty(leaf.shape, leaf.dtype))
        for names, leaf in arrays.items()
    }
    here = {
        names: (files.saved[place], plan)
        for names, (place, plan) in wanted.items()
        if _arrays.can_read(files.saved[place], plan)
    }
    sizes = [_arrays.nbytes_read(*leaf) for leaf in here.values()]
    # A 32nd of all bytes at a time, but never less than the largest array.
    limit = max([sum(sizes) // 32, MIN_IN_FLIGHT, *sizes])
    # A checksum is of the saved dtype. If all of an array is read, to be cast, it is read
    # as it was saved, checked, and then cast. What other processes read parts of, too, is
    # cast unchecked.
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
    others |= {n: (wanted[n][0], 0) for n in numbers}  # as Python's, to see if it fits
    # Orbax reads a leaf once for each place: one that is wanted twice takes another turn.
    while others:
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
    values |= {names: kind(values[names].item()) for names, kind in kinds.items()}
    whole = {
        wanted[n][0]: value
        for n, value in values.items()
        if n not in here or _files.shape(value) == here[n][0].shape  # not with other rows
    }
    # In the same order in all processes, because they compute the checksums together.
    return values, {place: whole[place] for place in files.saved if place in whole}


def _cuts(files: _files.Files, place: Names, plan: Leaf) -> bool:
    """Whether a Python integer is wanted as an array: Orbax would cut it to the dtype."""
    saved = files.saved[place]
    number = _orbax.is_number(saved)
    dtypes = [getattr(leaf, "dtype", None) or float for leaf in (saved, plan)]
    return number and all(jnp.issubdtype(dtype, jnp.integer) for dtype in dtypes)


def _read_others(
    function: str, files: _files.Files, wanted: dict[Names, Leaf]
) -> dict[Names, Leaf]:
    """Reads numbers, text, typed keys, and whatever else Orbax knows, by its handlers."""
    values = {}
    # Orbax knows them by the names in its files.
    named = {files.origin.get(name, name): name for name in wanted}
    wanted = {names: wanted[name] for names, name in named.items()}
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
        there = {prefix + n: leaf for n, leaf in leaves.items()}
        values |= {named[n]: leaf for n, leaf in there.items() if n in wanted}
    return values
