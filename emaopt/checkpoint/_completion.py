"""Whether a save was finished, in whichever way Orbax marks that."""

import json
import re
from collections.abc import Iterator
from typing import Any

from emaopt.checkpoint._orbax import (
    BEGUN,
    COMMITTED,
    CUSTOM,
    ITEM,
    MARK,
    STEP,
    UNFINISHED,
    is_finalized,
)
from emaopt.checkpoint._record import IN_PLACE, KEY


def refuse_unfinished(function: str, path: Any) -> None:
    """Raises if a checkpoint, or the step that it is an item of, was not finished."""
    if why := unfinished(path):
        raise ValueError(
            f"{function}: {path} is an unfinished save: {why}. It is being written, or "
            "was cut short: take another step."
        )


def unfinished(path: Any) -> str | None:
    """What shows that a save was not finished, in words; None if nothing does.

    Orbax either renames a directory when it is complete, or writes in its place and puts
    a mark in at last. Nothing on disk says which; newer versions put the mark in before
    they rename, older ones do not. So without the mark it is asked what else tells that
    it should be there.
    """
    if not path.is_dir():
        return None
    if is_item(path) and (why := unfinished(path.parent)):
        return why
    if UNFINISHED in path.name:
        return f"its name has {UNFINISHED} in it"
    here = (path / STEP).exists() or (path / ITEM).exists()
    if here and not is_finalized(path):
        return f"it lacks {MARK}"  # where Orbax always writes in place
    step = json_of(path / STEP)
    # In either way, the last thing before the directory is renamed or gets the mark.
    committed = step.get(COMMITTED)
    if step.get(BEGUN) and not committed:
        return f"its {STEP} has no {COMMITTED}"
    if is_item(path) or (path / MARK).exists():
        return None
    items = [p for p in path.iterdir() if p.is_dir() and not (p / STEP).exists()]
    if any((item / MARK).exists() for item in items):
        why = "its items have it"
    elif any(map(_is_in_place, (path, *items))):
        why = "by its record it was written in place"
    elif committed and any(before < committed for before in _marked_beside(path)):
        why = "steps before it have it"
    else:
        return None
    return f"it lacks {MARK}, and {why} (if it is known to be whole, make that file)"


def is_item(path: Any) -> bool:
    """Whether a directory is one item of a step."""
    return not (path / STEP).exists() and (path.parent / STEP).exists()


def _is_in_place(path: Any) -> bool:
    custom = json_of(path / ITEM).get(CUSTOM)
    record = custom.get(KEY) if isinstance(custom, dict) else None
    return isinstance(record, dict) and bool(record.get(IN_PLACE))


def _marked_beside(path: Any) -> Iterator[int]:
    """When the other steps of a run that have the mark were committed."""
    if number := re.search(r"\d+$", path.name):
        another = re.compile(re.escape(path.name[: number.start()]) + r"\d+")
        for other in path.parent.iterdir():
            if another.fullmatch(other.name) and (other / MARK).exists():
                yield json_of(other / STEP).get(COMMITTED) or 0


def json_of(file: Any) -> dict[str, Any]:
    """What a file holds; nothing if it cannot be read, for whoever needs it says that."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
