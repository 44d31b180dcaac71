"""What stands on disk: names, shapes, our marker; and reading of chosen leaves.

A checkpoint is a tree. Orbax keeps it in one directory, or, as CheckpointManager's
Composite does, in a directory for each of its top-level keys; here both are one tree.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from emaopt._names import leaves_with_keys, own_values, split
from emaopt._nodes import (
    average_nodes,
    center_nodes,
    is_swapped,
    swapped_nodes,
)
from emaopt._places import Names
from emaopt._writing import is_url, url
from emaopt.checkpoint import _arrays, _checksums, _finished, _record, _replacing
from emaopt.checkpoint._locating import located_in

_log_warning = logging.getLogger("emaopt").warning
MIN_IN_FLIGHT = 2**25  # bytes that a restore may have under way, of however small a state
WHOLE = ("default", "state", "pytree")  # what Orbax calls the only item of a step


class Files(NamedTuple):
    """A checkpoint on disk."""

    path: Any  # as given
    items: dict[Names, tuple[Any, Any]]  # () or (item,) -> directory, tree of metadata
    saved: dict[Names, Any]  # metadata of every leaf
    marker: _record.Marker | None
    custom: dict[str, Any]  # custom_metadata of other keys
    checksums: dict[Names, _checksums.Checksum]  # of arrays, where they were recorded
    values: frozenset[Names]  # leaves whose users call them "value", on record


def absolute(path: str | os.PathLike) -> Any:
    path = os.fspath(path)
    return url(path) if is_url(path) else epath.Path(os.path.abspath(path))


def open_files(
    function: str,
    given: str | os.PathLike,
    *,
    at: str | None = None,
    option: str = "params",
    lazy: bool = False,
) -> Files:
    """Reads the metadata of a checkpoint, or says what stands there instead.

    If its record is lost, `at` says where the parameters stand, by the caller's `option`.
    With `lazy`, arrays are not opened before something is asked of them.
    """
    _replacing.opening(absolute(given))
    path, found = absolute(given), _replacing.standing(absolute(given))
    if found is None:
        raise FileNotFoundError(
            f"{function}: there is no checkpoint at {path}. Give the directory that was "
            "saved; of a CheckpointManager, a step's."
        )
    if found != _replacing.followed(path):
        _log_warning(
            f"{function}: a save over {path} was cut short; {found} is complete, and is "
            "read in its place."
        )
        path = found
    _finished.refuse_unfinished(function, path)
    custom = _step_metadata(function, path)
    directories = _directories(path, custom)
    if not directories:
        inside = path.iterdir() if path.is_dir() else ()
        steps = sorted(int(p.name) for p in inside if p.name.isdigit())
        what = (
            f"It holds steps: {_few(steps)}. Give the directory of one, such as "
            f"{path / str(steps[-1])}."
            if steps
            else "The save was not finished, its metadata is lost, or it never was one: "
            "take another step."
        )
        raise ValueError(f"{function}: {path} is not a complete Orbax checkpoint. {what}")
    items, saved = {}, {}
    lost: set[Names] = set()
    checksums = _recorded((), custom)
    for prefix, directory in directories.items():
        try:
            metadata = _arrays.metadata(directory)
            if not lazy:
                _arrays.open_all(jax.tree.leaves(metadata.tree))
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(
                f"{function}: the metadata in {directory} cannot be read, "
                f"{_brief(error)}. Take another step."
            ) from error
        checksums |= _recorded(prefix, metadata.custom_metadata or {})
        custom = (metadata.custom_metadata or {}) | custom
        items[prefix] = directory, metadata.tree
        saved |= {prefix + names: leaf for names, leaf in names_of(metadata.tree).items()}
        lost |= {prefix + names for names in own_values(metadata.tree)}
    record = custom.pop(_record.KEY, None)
    marker = _record.read_marker(function, path, record)
    own = (record or custom.get(_record.RECORD) or {}).get("values", ())
    values = frozenset(lost if own is True else lost & set(map(tuple, own)))
    files = Files(path, items, saved, marker, custom, checksums, values)
    if files.marker is None:
        return files._replace(marker=_lost_marker(function, files, at, option))
    if () in items and _is_item(path, files.marker):
        return open_files(function, path.parent, at=at, option=option, lazy=lazy)
    _check_marker(function, files)
    return files


def _few(steps: list[int]) -> str:
    """Some of a run's steps, the first and the last."""
    few = [str(step) for step in steps]
    return ", ".join(few if len(few) <= 8 else [*few[:3], "...", *few[-3:]])


def _check_marker(function: str, files: Files) -> None:
    """Raises unless the swapped states stand where the marker says."""
    tree = whole_tree(files)
    nodes = average_nodes(tree) | center_nodes(tree)
    found = [names for names, node in nodes.items() if is_swapped(node)]
    says = f"by its record in custom_metadata[{_record.KEY!r}], {files.path} has"
    for served in files.marker.served if files.marker else ():
        if served.average in found:
            continue
        if served.average in nodes:
            raise ValueError(
                f"{function}: {says} its averages under the parameters' names, but "
                f"{'/'.join(served.average)} was saved in its own place: the record went "
                "with a state that emaopt.checkpoint.swap_state had not swapped. Its "
                "parameters are raw."
            )
        if not found:
            continue  # not even a part of it is left
        there = ", ".join("/".join(names) for names in found)
        raise ValueError(
            f"{function}: {says} a swapped average at {'/'.join(served.average)}, but it "
            f"has one at {there}. "
            "The record is of another tree than the one that was saved: give to "
            "emaopt.checkpoint.metadata the whole that is saved, with the names of its "
            "items, such as metadata({'state': state})."
        )


def _recorded(prefix: Names, custom: dict) -> dict[Names, _checksums.Checksum]:
    """The checksums in custom_metadata; those of an item name what is in the item."""
    marker = custom.get(_record.KEY)
    entries = marker.get("checksums", ()) if isinstance(marker, dict) else ()
    return {prefix + n: found for n, found in _checksums.recorded(entries).items()}


def _is_item(path: Any, marker: _record.Marker) -> bool:
    """Whether the directory is one item of a step, and the marker speaks of the step."""
    ways = {way[:1] for one in marker.served for way in (one.params, one.average)}
    return (path.name,) in ways and (path.parent / "_CHECKPOINT_METADATA").exists()


def whole_tree(files: Files) -> Any:
    """The metadata as one tree, as it stands on disk."""
    tree = {}
    for prefix, (_, subtree) in files.items.items():
        tree = subtree if prefix == () else tree | {prefix[0]: subtree}
    return tree


def _lost_marker(
    function: str, files: Files, at: str | None, option: str
) -> _record.Marker | None:
    """The marker again, if it is lost: a swapped state says itself what it is."""
    tree = whole_tree(files)
    places = [
        located_in(function, tree, names, at=split(at), option=option)
        for names in swapped_nodes(tree)
    ]
    served = tuple(_record.Served(p.params, p.average, p.field) for p in places)
    return _record.Marker(served, {}) if served else None


def is_checkpoint(path: Any) -> bool:
    """Whether anything of a checkpoint's stands there, be it complete or not."""
    return (path / "_CHECKPOINT_METADATA").exists() or bool(_directories(path, {}))


def _directories(path: Any, custom: dict[str, Any]) -> dict[Names, Any]:
    """The directories of the items, by their names; () for that of a whole tree.

    A lone item is one if it has a name of Orbax's for that, but for a record of the step
    that says what stands in the item.
    """
    if (path / "_METADATA").exists():
        return {(): path}
    if not path.is_dir():
        return {}
    found = {
        p.name: p
        for p in path.iterdir()
        if (p / "_METADATA").exists()
        and not (p / "_CHECKPOINT_METADATA").exists()  # a checkpoint by itself
    }
    if len(found) == 1 and (name := next(iter(found))) in WHOLE:
        if not _speaks_of(custom.get(_record.KEY), name, found[name]):
            return {(): found[name]}
    return {(name,): found[name] for name in sorted(found)}


def _speaks_of(record: Any, item: str, directory: Any) -> bool:
    """Whether a record names an item, which is no key of the tree that is in it."""
    ways = [record.get(key) for key in ("params", "average")] if record else []
    tops = {way[0] for way in ways if isinstance(way, list) and way}
    if tops != {item}:
        return False
    tree = json.loads((directory / "_METADATA").read_text())["tree_metadata"]
    return all(leaf["key_metadata"][0]["key"] != item for leaf in tree.values())


def _step_metadata(function: str, path: Any) -> dict[str, Any]:
    """What `custom_metadata=` of Orbax's checkpointers wrote; items have their own."""
    if not (file := path / "_CHECKPOINT_METADATA").exists():
        return {}
    try:
        return json.loads(file.read_text()).get("custom_metadata") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{function}: {file} cannot be read, {_brief(error)}. Take another step, or "
            "remove the file: all arrays but those of size 0 can be had without it."
        ) from error


def logical_names(files: Files) -> dict[Names, Names]:
    """Where each leaf of the training state stands on disk, by its name in the state."""
    present = all_leaves(files)
    if files.marker is None:
        return {names: names for names in present}
    return {
        _record.name_in_state(names, files.marker, present): names for names in present
    }


def all_leaves(files: Files) -> dict[Names, Any]:
    """Metadata of every leaf, those of size 0 too, by name on disk."""
    return files.saved | files.marker.empty if files.marker else files.saved


def read(function: str, files: Files, wanted: dict[Names, tuple[Names, Any]]) -> Any:
    """Reads leaves, and nothing else: where each stands and as what, by any names."""
    with explained(function, files.path):
        _arrays.open_all(files.saved[place] for place, _ in wanted.values())
    here = {
        names: (files.saved[place], plan)
        for names, (place, plan) in wanted.items()
        if _arrays.can_read(files.saved[place], plan)
    }
    sizes = [_arrays.nbytes_read(*leaf) for leaf in here.values()]
    limit = max([sum(sizes) // 32, MIN_IN_FLIGHT, *sizes])
    with explained(function, files.path):
        values = dict(zip(here, _arrays.read(here.values(), limit), strict=True))
    others = {n: read for n, read in wanted.items() if n not in here}
    numbers = {
        n: plan for n, (place, plan) in others.items() if _cuts(files, place, plan)
    }
    others |= {n: (wanted[n][0], 0) for n in numbers}  # as it is, to see whether it fits
    while others:  # of one that is wanted twice, once more
        now = {place: (names, plan) for names, (place, plan) in others.items()}
        found = _read_others(function, files, {p: plan for p, (_, plan) in now.items()})
        values |= {names: found[place] for place, (names, _) in now.items()}
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
        if n not in here or shape(value) == here[n][0].shape  # not of other rows
    }
    # In one order in all processes, which go through the checksums together.
    whole = {place: whole[place] for place in files.saved if place in whole}
    _checksums.check(function, files.path, files.checksums, whole)
    return values


def _cuts(files: Files, place: Names, plan: Any) -> bool:
    """Whether a Python integer is wanted in an array, which Orbax would cut it to."""
    saved = files.saved[place]
    number = isinstance(saved, ocp.metadata.value.ScalarMetadata)
    dtypes = [getattr(leaf, "dtype", None) or float for leaf in (saved, plan)]
    return number and all(jnp.issubdtype(dtype, jnp.integer) for dtype in dtypes)


def _read_others(
    function: str, files: Files, wanted: dict[Names, Any]
) -> dict[Names, Any]:
    """Reads numbers, text, and whatever else Orbax knows."""
    values = {}
    handler = ocp.PyTreeCheckpointHandler()
    for prefix, (directory, tree) in files.items.items():
        names = [prefix + names for names in names_of(tree)]
        if not any(name in wanted for name in names):
            continue
        plan = jax.tree.unflatten(
            jax.tree.structure(tree), [wanted.get(n, ocp.PLACEHOLDER) for n in names]
        )
        arguments = ocp.args.PyTreeRestore(
            item=plan, restore_args=ocp.checkpoint_utils.construct_restore_args(plan)
        )
        with explained(function, directory):
            restored = handler.restore(directory, args=arguments)
        leaves = names_of(restored)
        values |= {prefix + n: leaves[n] for n in leaves if prefix + n in wanted}
    return values


@contextlib.contextmanager
def explained(function: str, place: Any) -> Iterator[None]:
    """Says of what goes wrong in reading where it did."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # not of the files
    except Exception as error:
        raise ValueError(
            f"{function}: {place} cannot be read, {_brief(error)}. If its files are "
            "damaged, take another step; nothing was restored from this one."
        ) from error


def _brief(error: BaseException) -> str:
    while error.__cause__ is not None:  # the innermost names the file
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def names_of(tree: Any) -> dict[Names, Any]:
    """The leaves by name, the same in memory and on disk."""
    return dict(leaves_with_keys(tree))


def shape(leaf: Any) -> tuple[int, ...]:
    """The shape that a leaf's metadata tells; text has none."""
    return tuple(getattr(leaf, "shape", ()))


def nbytes(leaf: Any) -> int:
    """The size in memory of what a leaf's metadata describes."""
    if not hasattr(leaf, "dtype"):
        return 0
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def shown(files: Files, names: Names, place: Names | None = None) -> Names:
    """A leaf's name as its users know it; `place`: where it stands, if elsewhere."""
    known = place if place is not None else names
    return (*names, "value") if known in files.values else names


def listed(paths: Any) -> str:
    names = ["/".join(path) for path in sorted(paths)]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
