"""Opens what holds weights: Orbax's checkpoints, and those of other code.

An average that other code wrote is put into the tree as the state of one of emaopt's, in
the place where it stands. So all that reads a checkpoint finds it as it finds its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emaopt._names import Names, Unknown, is_below, joined, split
from emaopt._nodes import served_nodes
from emaopt._states import AVERAGE
from emaopt._types import Leaf, Path, PyTree
from emaopt.checkpoint import _files, _formats, _layouts, _replacement, _stream
from emaopt.checkpoint._formats import _bytes
from emaopt.checkpoint._found import LAYOUTS, Found

AUTO = "auto"  # the layout that is found


def open_source(
    function: str,
    given: Path,
    *,
    at: str | None = None,
    lazy: bool = False,
    layout: str | None = None,
) -> _files.Files:
    """Opens a checkpoint of any format, with the averages that other code keeps in it.

    Args:
      at, lazy: As for `open_files`.
      layout: Whose way of keeping the average it is, of `LAYOUTS`, or the names that lead
        to the average's tree, joined with "/". None: found.
    """
    layout = None if layout == AUTO else layout
    path = _files.absolute(given)
    format_ = _formats.found(function, path)
    if format_ is None:
        files = _files.open_files(function, given, at=at, option="at", lazy=lazy)
        found: Sequence[Found] = []
    else:
        _replacement.opening(path)
        with _files.explained(function, format_.path):
            opened = format_.open(layout)
        tree, shown, own = opened.tree, opened.shown, opened.has_values
        files = _files.made(format_.path, tree, shown, own)
        found = opened.found
    if files.marker or files.combination or served_nodes(_files.whole_tree(files)):
        if layout is not None:
            raise Unknown(
                f"{function}: {files.path} holds an average of emaopt's own, which needs "
                f"no layout, got {layout!r}.",
                "layout",
            )
        return files
    found = [one for one in found if _layouts.fits(files.saved, one)]
    found = [*found, *_layouts.averages_in(files.saved)]
    found = [_layouts.counted(files.saved, one) for one in found]
    return _with_averages(function, files, _chosen(function, files, found, layout))


def _chosen(
    function: str, files: _files.Files, found: Sequence[Found], layout: str | None
) -> dict[Names, Found]:
    """The averages of a layout, or all, by the names that lead to them."""
    first: dict[Names, Found] = {}
    for one in found:
        first.setdefault(one.average, one)
    if layout is None:
        return first
    way = split(layout)
    chosen = {w: one for w, one in first.items() if one.layout == layout or w == way}
    if not chosen and layout not in LAYOUTS:
        # A tree that no layout knows, but the user does.
        one = Found("named", way, None)
        chosen = {way: one} if _layouts.fits(files.saved, one) else {}
    if not chosen:
        there = ", ".join(f"{joined(w)} ({one.layout})" for w, one in first.items())
        raise Unknown(
            f"{function}: {files.path} holds no average of the layout {layout!r}. "
            + (f"It holds {there}." if there else "It holds none that emaopt knows.")
            + f" Layouts are {', '.join(LAYOUTS)}, or the names that lead to a tree like "
            "the parameters.",
            "layout",
        )
    return chosen


def _with_averages(
    function: str, files: _files.Files, found: Mapping[Names, Found]
) -> _files.Files:
    """The checkpoint with these averages as states of emaopt's."""
    if not found:
        return files
    states = {way: _counters(_count(function, files, o)) for way, o in found.items()}

    def wrapped(way: Names, node: PyTree) -> Any:
        # Names have lost the types of containers, and so does the tree.
        if way in states:
            return {**states[way], AVERAGE.field: node}
        if not any(is_below(other, way) for other in states):
            return node
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        inside = [(key, wrapped((*way, str(key)), child)) for key, child in items]
        return dict(inside) if isinstance(node, Mapping) else [one for _, one in inside]

    tree = wrapped((), _files.whole_tree(files))
    moved = {
        (*way, AVERAGE.field, *names[len(way) :]): names
        for way in found
        for names in files.saved
        if is_below(names, way)
    }
    return files._replace(
        tree=tree,
        saved=_files.names_of(tree),
        origin=moved,
        found=found,
    )


def _count(function: str, files: _files.Files, one: Found) -> int:
    """The number of updates that an average says it had; 0 if it does not say."""
    count = one.updates
    if isinstance(count, tuple):
        leaves = _stream.stored(function, files, [count])
        (value,) = next(_stream.prefetched([lambda: _stream.read(function, leaves)]))
        # Whatever else stands there is no count.
        whole = np.isrealobj(value) and np.isfinite(value) and value == np.floor(value)
        count = int(value) if whole else None
    total = 0 if count is None else count + one.more
    return min(max(total, 0), np.iinfo(np.int32).max)


def _counters(count: int) -> dict[str, Leaf]:
    """The fields of an average's state beside the average, after so many updates."""
    return {
        "num_updates": _bytes.constant(np.int32(count)),
        "num_skipped": _bytes.constant(np.int32(0)),
        "pending": _bytes.constant(np.float32(0)),
    }
