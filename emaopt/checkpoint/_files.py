"""What stands on disk: names, shapes, our record.

A checkpoint is a tree. Orbax keeps it in one directory, or, as CheckpointManager's
Composite does, in a directory for each of its top-level keys; here both are one tree.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from emaopt._advice import advised
from emaopt._names import is_below, leaves_with_keys, own_values, split
from emaopt._nodes import swapped_nodes
from emaopt._output import is_url, url
from emaopt._places import Names, Place, fitting, has_namesake, located_at
from emaopt.checkpoint import (
    _arrays,
    _checksums,
    _completion,
    _items,
    _record,
    _replacement,
)
from emaopt.checkpoint._agreement import agreed, holes
from emaopt.checkpoint._orbax import CUSTOM, ITEM, STEP

_log_warning = logging.getLogger("emaopt").warning


class Files(NamedTuple):
    """A checkpoint on disk."""

    path: Any  # as given
    items: dict[Names, tuple[Any, Any]]  # () or (item,) -> directory, tree of metadata
    saved: dict[Names, Any]  # metadata of every leaf
    marker: _record.Marker | None
    combination: dict[str, Any] | None  # the record of what `combine` wrote
    checksums: dict[Names, _checksums.Checksum]  # of arrays, where they were recorded
    values: frozenset[Names]  # leaves whose users call them "value", on record

    @property
    def without_raw(self) -> list[_record.Served]:
        """Served averages whose raw parameters went with the item of their state."""
        if self.marker is None or () in self.items:
            return []
        return [one for one in self.marker.served if one.average[:1] not in self.items]

    def refuse_without_raw(self, function: str, below: Names) -> None:
        """Raises if raw parameters are meant that are not there."""
        for one in self.without_raw:
            if is_below(one.params, below) or is_below(below, one.params):
                raise ValueError(
                    f"{function}: {self.path} has no raw parameters: at "
                    f"{'/'.join(one.params)} stand the averages of "
                    f"{'/'.join(one.average)}, and the item {one.average[0]} with the "
                    "raw ones is missing. Take another step; load_averaged reads the "
                    "averages."
                )


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
    _replacement.opening(absolute(given))
    path, found = absolute(given), _replacement.standing(absolute(given))
    if found is None:
        raise FileNotFoundError(
            f"{function}: there is no checkpoint at {path}. Give the directory that was "
            "saved; of a CheckpointManager, a step's."
        )
    if found != _replacement.followed(path):
        _log_warning(
            f"{function}: a save over {path} was cut short; {found} is complete, and is "
            "read in its place."
        )
        path = found
    _completion.refuse_unfinished(function, path)
    step = path / STEP
    custom = _step_metadata(function, step)
    directories = _items.directories_of(
        path, _record.checked(function, step, custom, _record.KEY)
    )
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
    _items.refuse_bare(function, path, directories)
    items, saved = {}, {}
    lost: set[Names] = set()
    said: list[tuple[Names, Any, dict[str, Any]]] = [((), step, custom)]
    for prefix, directory in directories.items():
        metadata = _metadata(function, directory, lazy)
        said.append((prefix, directory / ITEM, metadata.custom_metadata or {}))
        _refuse_misplaced(function, *said[-1][1:])
        items[prefix] = directory, metadata.tree
        saved |= {prefix + names: leaf for names, leaf in names_of(metadata.tree).items()}
        lost |= {prefix + names for names in own_values(metadata.tree)}
    record, checksums = _one_of(function, said, _record.KEY)
    combination, sums = _one_of(function, said, _record.RECORD)
    own = (record or combination or {}).get("values", ())
    values = frozenset(lost if own is True else lost & set(map(tuple, own)))
    combination = _record.content(combination) if combination else None
    files = Files(path, items, saved, None, combination, checksums | sums, values)
    if record is None:
        marker = _lost_marker(function, files, at, option)
    else:
        marker = _record.as_marker(record)
        one_of_step = () in items and _completion.is_item(path)
        if one_of_step and _speaks_of(marker, [(path.name,)]):
            return open_files(function, path.parent, at=at, option=option, lazy=lazy)
        if one_of_step and not _speaks_of(marker, saved):
            marker = None  # it is of other items of the step
        else:
            marker = agreed(function, path, marker, whole_tree(files), saved, items)
    _refuse_lost(function, files)
    return files._replace(marker=marker)


def _metadata(function: str, directory: Any, lazy: bool) -> Any:
    """Orbax's metadata of an item; with all arrays opened, if it is not lazy."""
    with explained(function, f"the metadata in {directory}"):
        metadata = _arrays.metadata(directory)
        if not lazy:
            _arrays.open_all(jax.tree.leaves(metadata.tree))
    return metadata


def _few(steps: list[int]) -> str:
    """Some of a run's steps, the first and the last."""
    few = [str(step) for step in steps]
    return ", ".join(few if len(few) <= 8 else [*few[:3], "...", *few[-3:]])


def _one_of(
    function: str, said: list[tuple[Names, Any, dict[str, Any]]], key: str
) -> tuple[dict[str, Any] | None, dict[Names, _checksums.Checksum]]:
    """The record of a step, which each of its items may have, and all its checksums.

    Those of an item name what is in the item.
    """
    checksums: dict[Names, _checksums.Checksum] = {}
    found: list[tuple[Any, dict[str, Any]]] = []
    for prefix, file, custom in said:
        if (record := _record.checked(function, file, custom, key)) is None:
            continue
        found.append((file, record))
        if record["version"] > 2:  # before, they were others
            entries = _checksums.recorded(record.get("checksums", ()))
            checksums |= {prefix + names: entry for names, entry in entries.items()}
        first, other = found[0]
        if _record.content(record) != _record.content(other):
            raise ValueError(
                f"{function}: {first} and {file} have records that differ: they are of "
                "two saves, or damaged. Take another step."
            )
    return (found[0][1] if found else None), checksums


def _refuse_lost(function: str, files: Files) -> None:
    """Raises if something is not there whose checksum is on record."""
    if odd := [names for names in files.checksums if names not in files.saved]:
        raise ValueError(
            f"{function}: {files.path} lacks {listed(odd)}, of which its record has "
            "checksums. Its files are damaged, take another step."
        )


def _speaks_of(marker: _record.Marker, names: Iterable[Names]) -> bool:
    """Whether a record's averages or parameters are below one of the first names."""
    ways = [way for one in marker.served for way in (one.params, one.average)]
    return bool({way[:1] for way in ways} & {name[:1] for name in names})


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
    # Orbax always writes it, with this entry.
    found = [_completion.json_of(p / STEP) for p in (files.path, files.path.parent)]
    is_damaged = not any(CUSTOM in content for content in found)
    nothing = holes(tree) if served and is_damaged and not at else ()
    if odd := [n for n in nothing if any(is_below(n, one.params) for one in served)]:
        where = "where the parameters stand, and do without them."
        raise advised(
            ValueError,
            f"{function}: {files.path} lost its {STEP}, which says whether arrays of "
            f"size 0 stand at {listed(odd)}. Take another step;",
            f"or say with {option}= {where}",
            f"or say with --{option} {where}",
        )
    return _record.Marker(served, {}) if served else None


def located_in(
    function: str,
    tree: Any,
    average: Names,
    *,
    at: Names = (),
    known: Iterable[Names] = (),
    option: str,
) -> Place:
    """The parameters of an average in a checkpoint's tree.

    They are what leads to `at` and fits, or the one of the `known` that does, or the only
    ones that they can be. Those of another average are not taken where its twin's are
    called as this average is. An error names the option by which the caller is told.
    """
    told = (at[:i] for i in range(len(at), 0, -1))
    found = fitting(tree, average, told)[:1]
    found = found or [
        place
        for place in fitting(tree, average, sorted(set(known)))
        if not has_namesake(tree, average, place.params)
    ]
    if len(found) == 1:
        return found[0]
    return located_at(function, tree, average, option=option)


def _step_metadata(function: str, file: Any) -> dict[str, Any]:
    """What `custom_metadata=` of Orbax's checkpointers wrote; items have their own."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        custom = dict((content.get(CUSTOM) or {}).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{function}: {file} cannot be read, {_brief(error)}. Take another step, or "
            "remove the file: all arrays but those of size 0 can be had without it."
        ) from error
    _refuse_misplaced(function, file, {**content, **custom})
    return custom


def _refuse_misplaced(function: str, file: Any, found: dict[str, Any]) -> None:
    """Raises if our record is under another key."""
    for key in found.keys() - {CUSTOM, _record.KEY}:
        if _record.looks_like_one(found[key]):
            raise ValueError(
                f"{function}: {file} has emaopt's record under {key!r}: it is damaged. "
                "Take another step."
            )


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
