"""Which directories of a checkpoint hold a tree: the whole, or one item of a step."""

import json
from typing import Any

from emaopt._names import Names
from emaopt.checkpoint._orbax import ARRAYS, ITEM, STEP, TREE, WHOLE


def refuse_bare(function: str, path: Any, directories: dict[Names, Any]) -> None:
    """Raises if an item has its arrays, but no metadata."""
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


def is_checkpoint(path: Any) -> bool:
    """Whether anything of a checkpoint's stands there, be it complete or not."""
    return (path / STEP).exists() or bool(directories_of(path, None))


def directories_of(path: Any, record: dict[str, Any] | None) -> dict[Names, Any]:
    """The directories of the items, by their names; () for that of a whole tree.

    A lone item is one if it has a name of Orbax's for that, but for a record of the step
    that says what stands in the item.
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
    if len(found) == 1 and (name := next(iter(found))) in WHOLE:
        if record is None or not _is_named(record, name, found[name]):
            return {(): found[name]}
    return {(name,): found[name] for name in sorted(found)}


def _is_named(record: dict[str, Any], item: str, directory: Any) -> bool:
    """Whether a record names an item, which is no key of the tree that is in it."""
    if {way[0] for key in ("params", "average") if (way := record[key])} != {item}:
        return False
    try:
        tree = json.loads((directory / ITEM).read_text())[TREE]
        return all(leaf["key_metadata"][0]["key"] != item for leaf in tree.values())
    except Exception:
        return False  # damaged, as its reading says
