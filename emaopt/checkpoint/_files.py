"""Opens a checkpoint: names, shapes and dtypes of its leaves, and emaopt's record.

A checkpoint is a tree. Orbax keeps it in one directory, or, in a Composite of
CheckpointManager, in a directory for each top-level key. Here both are one tree.
"""

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from emaopt._advice import advised
from emaopt._beside import names_beside
from emaopt._names import is_below, leaves_with_keys, own_values, split
from emaopt._nodes import swapped_nodes
from emaopt._output import is_url, url
from emaopt._places import Names, Place, fitting, has_namesake, located_at
from emaopt._types import Json, Leaf, Path, PyTree
from emaopt.checkpoint import (
    _arrays,
    _checksums,
    _completion,
    _items,
    _record,
    _replacement,
)
from emaopt.checkpoint._agreement import agreed, holes
from emaopt.checkpoint._found import Found
from emaopt.checkpoint._orbax import CUSTOM, ITEM, STEP

if TYPE_CHECKING:
    from emaopt.checkpoint._orbax import TreeMetadata

_log_warning = logging.getLogger("emaopt").warning


class Files(NamedTuple):
    """A checkpoint on disk."""

    path: epath.Path  # where it is read from
    items: dict[Names, tuple[epath.Path, PyTree]]  # () or (item,) -> directory, metadata
    saved: dict[Names, Leaf]  # metadata of every leaf
    marker: _record.Marker | None
    combination: Json | None  # the record of what `combine` wrote
    checksums: dict[Names, _checksums.Checksum]  # of arrays, where they were recorded
    values: frozenset[Names]  # leaves that their users call "value", by the record
    # Of what other code wrote, `_sources` puts averages into a tree of emaopt's own kind:
    tree: PyTree = None  # this tree, in place of the items'
    origin: Mapping[Names, Names] = MappingProxyType({})  # name in it -> name in the file
    found: Mapping[Names, Found] = MappingProxyType({})  # the averages, by their places
    shown: Mapping[Names, str] = MappingProxyType({})  # names as the file has them

    @property
    def without_raw(self) -> list[_record.Served]:
        """Served averages without raw parameters: the item of their state is missing."""
        if self.marker is None or () in self.items:
            return []
        return [one for one in self.marker.served if one.average[:1] not in self.items]

    def refuse_without_raw(self, function: str, below: Names) -> None:
        """Raises if raw parameters at, above or below some names are missing."""
        for one in self.without_raw:
            if is_below(one.params, below) or is_below(below, one.params):
                raise ValueError(
                    f"{function}: {self.path} has no raw parameters: at "
                    f"{'/'.join(one.params)} stand the averages of "
                    f"{'/'.join(one.average)}, and the item {one.average[0]} with the "
                    "raw ones is missing. Take another step; load_averaged reads the "
                    "averages."
                )
            if self.marker is None or one != self.marker.served[0]:
                continue
            for names in sorted(self.marker.beside):
                if is_below(names, below) or is_below(below, names):
                    raise ValueError(
                        f"{function}: {self.path} has no raw values of "
                        f"{'/'.join(names)}: what stands there is served with the "
                        "averages. Take another step."
                    )


def absolute(path: Path) -> epath.Path:
    """What a user gave as a path, as one that Orbax takes: absolute, or a URL."""
    path = os.fspath(path)
    return url(path) if is_url(path) else epath.Path(os.path.abspath(path))


def open_files(
    function: str,
    given: Path,
    *,
    at: str | None = None,
    option: str = "params",
    lazy: bool = False,
) -> Files:
    """Reads the metadata of a checkpoint, or raises and says what there is instead.

    If its record is lost, `at` tells where the parameters are; errors name the caller's
    `option` for that. With `lazy`, arrays are opened only when their shapes are needed.
    """
    # Before anything is read: `whole` compares with this when the reader is done.
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
    # Whether a lone directory is an item or a whole tree depends on the step's record.
    step = path / STEP
    custom = _step_metadata(function, step)
    directories = _items.directories_of(
        path, _record.checked(function, step, custom, _record.KEY)
    )
    if not directories:
        inside = path.iterdir() if path.is_dir() else ()
        steps = [p.name for p in inside if re.fullmatch(r"([^.]*[_-])?\d+", p.name)]
        steps.sort(key=lambda name: (len(name), name))
        what = (
            f"It holds steps: {_few(steps)}. Give the directory of one, such as "
            f"{path / steps[-1]}."
            if steps
            else "The save was not finished, its metadata is lost, or it never was one: "
            "take another step."
        )
        raise ValueError(f"{function}: {path} is not a complete Orbax checkpoint. {what}")
    _items.refuse_bare(function, path, directories)
    items, saved = {}, {}
    lost: set[Names] = set()
    # The record may be with the step, with each item, or both: all must agree.
    said: list[tuple[Names, epath.Path, Json]] = [((), step, custom)]
    for prefix, directory in directories.items():
        metadata = _metadata(function, directory, lazy)
        said.append((prefix, directory / ITEM, metadata.custom_metadata or {}))
        _refuse_misplaced(function, *said[-1][1:])
        items[prefix] = directory, metadata.tree
        saved |= {prefix + names: leaf for names, leaf in names_of(metadata.tree).items()}
        lost |= {prefix + names for names in own_values(metadata.tree)}
    record, checksums = _one_of(function, said, _record.KEY)
    combination, sums = _one_of(function, said, _record.RECORD)
    # What lost "value" in the names is a Flax variable, unless the record calls it a leaf
    # of that name: True is all of them.
    own = (record or combination or {}).get("values", ())
    values = frozenset(lost if own is True else lost & set(map(tuple, own)))
    combination = _record.content(combination) if combination else None
    files = Files(path, items, saved, None, combination, checksums | sums, values)
    if record is None:
        marker = _lost_marker(function, files, at, option)
    else:
        marker = _record.as_marker(record)
        # Given one item of a step, with a record of the whole step: if that speaks of the
        # item, the step is opened in its place, for the swap goes across items.
        one_of_step = () in items and _completion.is_item(path)
        if one_of_step and _speaks_of(marker, [(path.name,)]):
            return open_files(function, path.parent, at=at, option=option, lazy=lazy)
        if one_of_step and not _speaks_of(marker, saved):
            marker = None  # the record is of other items of the step
        else:
            marker = agreed(function, path, marker, whole_tree(files), saved, items)
    _refuse_lost(function, files)
    return files._replace(marker=marker)


def made(path: epath.Path, tree: PyTree, shown: Mapping[Names, str], own: bool) -> Files:
    """A checkpoint of another format than Orbax's, from its tree of arrays."""
    values = frozenset(own_values(tree) if own else ())
    one = {(): (path, tree)}
    return Files(path, one, names_of(tree), None, None, {}, values, shown=shown)


def _metadata(function: str, directory: epath.Path, lazy: bool) -> "TreeMetadata":
    """Orbax's metadata of an item; unless `lazy`, its arrays are opened, all at once."""
    with explained(function, f"the metadata in {directory}"):
        metadata = _arrays.metadata(directory)
        if not lazy:
            _arrays.open_all(jax.tree.leaves(metadata.tree))
    return metadata


def _few(steps: list[str]) -> str:
    """The steps of a run in words: of more than eight the first and the last three."""
    return ", ".join(steps if len(steps) <= 8 else [*steps[:3], "...", *steps[-3:]])


def _one_of(
    function: str, said: list[tuple[Names, epath.Path, Json]], key: str
) -> tuple[Json | None, dict[Names, _checksums.Checksum]]:
    """The record of a step, which each item may have a copy of, and all checksums.

    The checksums of an item have names below the item.
    """
    checksums: dict[Names, _checksums.Checksum] = {}
    found: list[tuple[epath.Path, Json]] = []
    for prefix, file, custom in said:
        if (record := _record.checked(function, file, custom, key)) is None:
            continue
        found.append((file, record))
        if record["version"] > 3:  # before, checksums had another definition
            entries = _checksums.recorded(record.get("checksums", ()))
            checksums |= {prefix + names: entry for names, entry in entries.items()}
        # A manager writes one token in all records of a save: items of two saves differ
        # here even if the averages are at the same places.
        first, other = found[0]
        if _record.content(record) != _record.content(other):
            raise ValueError(
                f"{function}: {first} and {file} have records that differ: they are of "
                "two saves, or damaged. Take another step."
            )
    return (found[0][1] if found else None), checksums


def _refuse_lost(function: str, files: Files) -> None:
    """Raises if an array is not there whose checksum is on record."""
    if odd := [names for names in files.checksums if names not in files.saved]:
        raise ValueError(
            f"{function}: {files.path} lacks {listed(odd)}, of which its record has "
            "checksums. Its files are damaged, take another step."
        )


def _speaks_of(marker: _record.Marker, names: Iterable[Names]) -> bool:
    """Whether a record's averages or parameters share their first key with some names."""
    ways = [way for one in marker.served for way in (one.params, one.average)]
    ways += marker.beside
    return bool({way[:1] for way in ways} & {name[:1] for name in names})


def whole_tree(files: Files) -> PyTree:
    """The metadata as one tree, in the layout on disk."""
    if files.tree is not None:
        return files.tree
    tree = {}
    for prefix, (_, subtree) in files.items.items():
        tree = subtree if prefix == () else tree | {prefix[0]: subtree}
    return tree


def _lost_marker(
    function: str, files: Files, at: str | None, option: str
) -> _record.Marker | None:
    """The marker without a record, from the tree: swapped states have other fields."""
    tree = whole_tree(files)
    places = [
        located_in(function, tree, names, at=split(at), option=option)
        for names in swapped_nodes(tree)
    ]
    # What else is served is looked for in the state of the first.
    places.sort(key=lambda place: not names_beside(tree, place.average))
    served = tuple(_record.Served(p.params, p.average, p.field) for p in places)
    # Orbax writes this entry in every step's metadata. If it is missing, so may be the
    # record, and with it the shapes of arrays of size 0: None may stand for one.
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
    if not served:
        return None
    return _record.Marker(served, {}, frozenset(names_beside(tree, served[0].average)))


def located_in(
    function: str,
    tree: PyTree,
    average: Names,
    *,
    at: Names = (),
    known: Iterable[Names] = (),
    option: str,
) -> Place:
    """The parameters of an average in a checkpoint's tree.

    They are the tree at `at`, or the next one above it, that fits; else the only one of
    the `known` trees that fits; else the only tree that they can be. A known tree is left
    out if another one shares a name with the average that the known one lacks. Errors
    name the caller's `option` that tells where the parameters are.
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


def _step_metadata(function: str, file: epath.Path) -> Json:
    """The `custom_metadata=` given to Orbax's checkpointers; items have their own."""
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


def _refuse_misplaced(function: str, file: epath.Path, found: Json) -> None:
    """Raises if emaopt's record is under another key, as after a flipped bit."""
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
    named = {
        _record.name_in_state(names, files.marker, present): names for names in present
    }
    return {names: place for names, place in named.items() if names is not None}


def all_leaves(files: Files) -> dict[Names, Leaf]:
    """Metadata of every leaf, also of arrays of size 0, by name on disk."""
    return files.saved | files.marker.empty if files.marker else files.saved


@contextlib.contextmanager
def explained(function: str, place: object) -> Iterator[None]:
    """Turns an error in reading into a ValueError that names the place."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the files are not at fault
    except Exception as error:
        raise ValueError(
            f"{function}: {place} cannot be read, {_brief(error)}. If its files are "
            "damaged, take another step; nothing was restored from this one."
        ) from error


def _brief(error: BaseException) -> str:
    """The kind of an error and the first line of its innermost cause."""
    while error.__cause__ is not None:  # the innermost names the file
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def names_of(tree: PyTree) -> dict[Names, Leaf]:
    """The leaves by name, the same in memory and on disk."""
    return dict(leaves_with_keys(tree))


def shape(leaf: Leaf) -> tuple[int, ...]:
    """The shape in a leaf's metadata; () for text, which has none."""
    return tuple(getattr(leaf, "shape", ()))


def nbytes(leaf: Leaf) -> int:
    """The size in memory of an array, by its metadata; 0 for text."""
    if not hasattr(leaf, "dtype"):
        return 0
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def shown(files: Files, names: Names, place: Names | None = None) -> Names:
    """A leaf's name as its users know it; `place` is its name on disk, if another."""
    known = place if place is not None else names
    return (*names, "value") if known in files.values else names


def in_file(files: Files, names: Names) -> str:
    """A leaf's name as its file has it."""
    place = files.origin.get(names, names)
    return files.shown.get(place) or "/".join(shown(files, place))


def is_added(files: Files, names: Names) -> bool:
    """Whether a leaf is in no file: a counter of an average that other code wrote."""
    return names not in files.origin and any(is_below(names, w) for w in files.found)


def listed(paths: Iterable[Names]) -> str:
    """Names in words, of more than ten the first ten and how many more there are."""
    names = ["/".join(path) for path in sorted(paths)]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
