"""Whether a save was finished, by any of the marks that Orbax uses for that."""

import json
import re
from collections.abc import Iterator

from etils import epath

from emaopt._types import Json
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


def refuse_unfinished(function: str, path: epath.Path) -> None:
    """Raises if the save of a checkpoint, or of an item's step, was not finished."""
    if why := unfinished(path):
        raise ValueError(
            f"{function}: {path} is an unfinished save: {why}. It is being written, or "
            "was cut short: take another step."
        )


def unfinished(path: epath.Path) -> str | None:
    """What shows that a save was not finished, in words; None if nothing does.

    Orbax either renames a directory when it is complete, or writes it in place and adds a
    mark last. Nothing on disk says which. Newer versions also add the mark before they
    rename, older ones do not. So a missing mark counts only if something else shows that
    Orbax would have written it.
    """
    if not path.is_dir():
        return None
    # An item is finished with its step, which has the times; it needs no mark itself.
    if is_item(path) and (why := unfinished(path.parent)):
        return why
    if UNFINISHED in path.name:
        return f"its name has {UNFINISHED} in it"
    here = (path / STEP).exists() or (path / ITEM).exists()
    # In stores that cannot rename, Orbax always writes in place, and says so itself.
    if here and not is_finalized(path):
        return f"it lacks {MARK}"
    step = json_of(path / STEP)
    # Orbax writes the time of the commit just before it renames or marks the directory.
    committed = step.get(COMMITTED)
    if step.get(BEGUN) and not committed:
        return f"its {STEP} has no {COMMITTED}"
    if is_item(path) or (path / MARK).exists():
        return None
    # The step lacks the mark. Three things tell that it was written in place: marks in
    # its items, emaopt's own record, and earlier steps of the run that have the mark.
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


def is_item(path: epath.Path) -> bool:
    """Whether a directory is one item of a step."""
    return not (path / STEP).exists() and (path.parent / STEP).exists()


def _is_in_place(path: epath.Path) -> bool:
    """Whether emaopt's record in a directory says that it was written in place."""
    custom = json_of(path / ITEM).get(CUSTOM)
    record = custom.get(KEY) if isinstance(custom, dict) else None
    return isinstance(record, dict) and bool(record.get(IN_PLACE))


def _marked_beside(path: epath.Path) -> Iterator[int]:
    """The times at which the other steps of a run that have the mark were committed."""
    # Steps of one run have the same prefix before their number; best-1 says nothing of 2.
    if number := re.search(r"\d+$", path.name):
        another = re.compile(re.escape(path.name[: number.start()]) + r"\d+")
        for other in path.parent.iterdir():
            if another.fullmatch(other.name) and (other / MARK).exists():
                yield json_of(other / STEP).get(COMMITTED) or 0


def json_of(file: epath.Path) -> Json:
    """What a file holds; {} if it cannot be read: a reader that needs it raises."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
