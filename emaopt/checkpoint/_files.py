"""What stands on disk: names, shapes, our marker; and reading of chosen leaves.

A checkpoint is a tree. Orbax keeps it in one directory, or, as CheckpointManager's
Composite does, in a directory for each of its top-level keys; here both are one tree.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from emaopt._names import leaves_with_keys, own_values
from emaopt._nodes import average_nodes, center_nodes, counter_of, swapped_nodes
from emaopt._places import Names, Place
from emaopt.checkpoint import _checksums, _finished
from emaopt.checkpoint._locating import located_in, ways

KEY = "emaopt"  # in custom_metadata
RECORD = "emaopt_combination"  # there, too, of what `combine` writes
VERSION = 2  # 2: several averages, in "more"
MIN_IN_FLIGHT = 2**25  # bytes that a restore may have under way, of however small a state
WHOLE = ("default", "state", "pytree")  # what Orbax calls the only item of a step


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


class Files(NamedTuple):
    """A checkpoint on disk."""

    path: Any  # as given
    items: dict[Names, tuple[Any, Any]]  # () or (item,) -> directory, tree of metadata
    saved: dict[Names, Any]  # metadata of every leaf
    marker: Marker | None
    custom: dict[str, Any]  # custom_metadata of other keys
    checksums: dict[Names, _checksums.Checksum]  # of arrays, where they were recorded
    values: frozenset[Names]  # leaves whose users call them "value", on record


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


def absolute(path: str | os.PathLike) -> Any:
    path = os.fspath(path)
    return epath.Path(path if "://" in path else os.path.abspath(path))


def replacement(path: Any) -> Any:
    """Where a checkpoint that is to take another's place is written."""
    return path.with_name(path.name + ".replacement")


def replace(path: Any) -> None:
    """Puts the replacement in its place; all processes wait for the first.

    What was there is moved aside before and removed after, so that `path` never holds a
    part of a checkpoint; between the two renames it holds none, which `open_files` says.
    """
    if jax.process_index() == 0:
        if not (new := replacement(path)).exists():
            raise OSError(f"save: {new} was not completed; {path} is as it was.")
        aside = path.with_name(path.name + ".replaced")
        if path.exists():
            aside.rmtree(missing_ok=True)
            path.rename(aside)
        new.rename(path)
        aside.rmtree(missing_ok=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"emaopt: replaced {path}")


def open_files(
    function: str,
    given: str | os.PathLike,
    *,
    at: str | None = None,
    option: str = "params",
) -> Files:
    """Reads the metadata of a checkpoint, or says what stands there instead.

    If its record is lost, `at` says where the parameters stand, by the caller's `option`.
    """
    path = absolute(given)
    if not path.exists():
        what = (
            f"A save over it was cut short: {beside} is complete, move it there."
            if (beside := replacement(path)).exists()
            else "Give the directory that was saved; of a CheckpointManager, a step's."
        )
        raise FileNotFoundError(f"{function}: there is no checkpoint at {path}. {what}")
    _finished.refuse_unfinished(function, path)
    directories = _directories(path)
    if not directories:
        inside = path.iterdir() if path.is_dir() else ()
        steps = sorted(int(p.name) for p in inside if p.name.isdigit())
        what = (
            f"It holds steps: give the directory of one, such as {path / str(steps[-1])}."
            if steps
            else "The save was not finished, its metadata is lost, or it never was one: "
            "take another step."
        )
        raise ValueError(f"{function}: {path} is not a complete Orbax checkpoint. {what}")
    handler = ocp.PyTreeCheckpointHandler()
    items, saved, custom = {}, {}, _step_metadata(function, path)
    lost: set[Names] = set()
    checksums = _recorded((), custom)
    for prefix, directory in directories.items():
        try:
            metadata = handler.metadata(directory)
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
    record = custom.pop(KEY, None)
    marker = _read_marker(function, path, record)
    own = (record or custom.get(RECORD) or {}).get("values", ())
    values = frozenset(lost if own is True else lost & set(map(tuple, own)))
    files = Files(path, items, saved, marker, custom, checksums, values)
    if files.marker is None:
        return files._replace(marker=_lost_marker(function, files, at, option))
    if () in items and _is_item(path, files.marker):
        return open_files(function, path.parent, at=at, option=option)
    _check_marker(function, files)
    return files


def _check_marker(function: str, files: Files) -> None:
    """Raises unless the swapped states stand where the marker says."""
    tree = whole_tree(files)
    found, nodes = swapped_nodes(tree), average_nodes(tree) | center_nodes(tree)
    for served in files.marker.served if files.marker else ():
        if served.average in found:
            continue
        if served.average in nodes:
            raise ValueError(
                f"{function}: by its record in custom_metadata[{KEY!r}], {files.path} "
                "has its averages under the parameters' names, but the one at "
                f"{'/'.join(served.average)} was saved in its own place: the record went "
                "with a state that emaopt.checkpoint.swap_state had not swapped. Its "
                "parameters are raw."
            )
        if not found:
            continue  # not even a part of it is left
        there = ", ".join("/".join(names) for names in found)
        raise ValueError(
            f"{function}: by its record in custom_metadata[{KEY!r}], {files.path} has a "
            f"swapped average at {'/'.join(served.average)}, but it has one at {there}. "
            "The record is of another tree than the one that was saved: give to "
            "emaopt.checkpoint.metadata the whole that is saved, with the names of its "
            "items, such as metadata({'state': state})."
        )


def _recorded(prefix: Names, custom: dict) -> dict[Names, _checksums.Checksum]:
    """The checksums in custom_metadata; those of an item name what is in the item."""
    marker = custom.get(KEY)
    entries = marker.get("checksums", ()) if isinstance(marker, dict) else ()
    return {prefix + n: found for n, found in _checksums.recorded(entries).items()}


def _is_item(path: Any, marker: Marker) -> bool:
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
) -> Marker | None:
    """The marker again, if it is lost: a swapped state says itself what it is."""
    tree = whole_tree(files)
    places = [
        located_in(function, tree, names, at=ways(at), option=option)
        for names in swapped_nodes(tree)
    ]
    served = tuple(Served(p.params, p.average, p.field) for p in places)
    return Marker(served, {}) if served else None


def is_checkpoint(path: Any) -> bool:
    """Whether anything of a checkpoint's stands there, be it complete or not."""
    return (path / "_CHECKPOINT_METADATA").exists() or bool(_directories(path))


def _directories(path: Any) -> dict[Names, Any]:
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
        return {(): found[name]}
    return {(name,): found[name] for name in sorted(found)}


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


def _read_marker(function: str, path: Any, marker: Any) -> Marker | None:
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


def logical_names(files: Files) -> dict[Names, Names]:
    """Where each leaf of the training state stands on disk, by its name in the state."""
    present = all_leaves(files)
    if files.marker is None:
        return {names: names for names in present}
    return {_exchanged(names, files.marker, present): names for names in present}


def all_leaves(files: Files) -> dict[Names, Any]:
    """Metadata of every leaf, those of size 0 too, by name on disk."""
    return files.saved | files.marker.empty if files.marker else files.saved


def _exchanged(names: Names, marker: Marker, present: Any) -> Names:
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


def read(function: str, files: Files, wanted: dict[Names, Any]) -> dict[Names, Any]:
    """Reads the wanted leaves, as what `wanted` says, and nothing else."""
    values = {}
    sizes = [size for n in wanted for size in _sizes_of_reads(wanted[n], files.saved[n])]
    limit = max([sum(sizes) // 32, MIN_IN_FLIGHT, *(size + 1 for size in sizes)])
    gigabytes: Any = limit / 1e9  # Orbax's default is more than fits beside the state
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=gigabytes)
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
    _checksums.check(function, files.path, files.checksums, values)
    return values


def _sizes_of_reads(plan: Any, saved: Any) -> list[int]:
    """The bytes of each part of an array that this process reads: whole chunks.

    Orbax limits the sum of those under way, and refuses one that is over the limit.
    """
    if getattr(saved, "storage", None) is None:
        return []  # a number
    parts: Any = {None: (slice(None),) * len(saved.shape)}
    if isinstance(plan, jax.ShapeDtypeStruct) and plan.shape == saved.shape:
        parts = plan.sharding.addressable_devices_indices_map(plan.shape)
    bounds = {
        tuple(part.indices(n)[:2] for part, n in zip(index, saved.shape, strict=True))
        for index in parts.values()
    }
    chunks = saved.storage.chunk_shape
    return [
        jnp.dtype(saved.dtype).itemsize
        * math.prod(
            (-(-stop // n) - start // n) * n
            for (start, stop), n in zip(bound, chunks, strict=True)
        )
        for bound in bounds
    ]


@contextlib.contextmanager
def explained(function: str, place: Any) -> Iterator[None]:
    """Says of what goes wrong in reading where it did."""
    try:
        yield
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
