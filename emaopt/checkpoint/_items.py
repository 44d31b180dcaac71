"""Which directories of a checkpoint hold a tree: the whole, or one item of a step."""

import json

from etils import epath

from emaopt._names import Names
from emaopt._types import Json
from emaopt.checkpoint._orbax import ARRAYS, ITEM, STEP, TREE, WHOLE


def refuse_bare(
    function: str, path: epath.Path, directories: dict[Names, epath.Path]
) -> None:
    """Raises if an item has its arrays, but no metadata."""
    # Without its metadata an item would seem not to be there, as if somebody had removed
    # it to keep the others.
    if () in directories and directories[()] == path:
        return
    for p in path.iterdir():
        if p in directories.values() or (p / STEP).exists():
            continue
        if (p / ARRAYS).exists():
            raise ValueError(
                f"{function}: {p} has arrays, but lacks its {ITEM}. It is damaged, "
                "take another step."
            )


def is_checkpoint(path: epath.Path) -> bool:
    """Whether a directory holds any part of a checkpoint, complete or not."""
    return (path / STEP).exists() or bool(directories_of(path, None))


def directories_of(path: epath.Path, record: Json | None) -> dict[Names, epath.Path]:
    """The directories of the items, by their names; () is the name of a whole tree.

    A lone item is the whole tree if it has one of the names that Orbax gives to such,
    unless the record of the step takes that name for a key of the saved tree.
    """
    if (path / ITEM).exists():
        return {(): path}
    if not path.is_dir():
        return {}
    found = {
        p.name: p
        for p in path.iterdir()
        if (p / ITEM).exists() and not (p / STEP).exists()  # a checkpoint by itself
    }
    # A user's Composite(state=...) has such an item, too. There "state" is a key of the
    # tree that was saved, which only the record can tell.
    if len(found) == 1 and (name := next(iter(found))) in WHOLE:
        if record is None or not _is_named(record, name, found[name]):
            return {(): found[name]}
    return {(name,): found[name] for name in sorted(found)}


def _is_named(record: Json, item: str, directory: epath.Path) -> bool:
    """Whether a record's paths begin with an item that is no key of the tree in it."""
    if {way[0] for key in ("params", "average") if (way := record[key])} != {item}:
        return False
    try:
        tree = json.loads((directory / ITEM).read_text())[TREE]
        return all(leaf["key_metadata"][0]["key"] != item for leaf in tree.values())
    except Exception:
        return False  # damaged: the reading of the metadata raises
