"""Checkpoints of other formats than Orbax's, each as a tree of arrays.

A format tells its own files from others' and opens them: names, shapes and dtypes at
once, arrays when they are used. Nothing is unpickled.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from emaopt.checkpoint import _items
from emaopt.checkpoint._formats import (
    _msgpack,
    _safetensors,
    _table,
    _tensorbundle,
    _tensorflow,
    _zarr,
)
from emaopt.checkpoint._formats._trees import Opened
from emaopt.checkpoint._found import LAYOUTS

__all__ = ["Format", "Opened", "found"]

_PICKLES = [bytes([0x80, protocol]) for protocol in range(2, 6)]


class Format(NamedTuple):
    """A checkpoint of another format, and how to open it."""

    path: epath.Path  # of the checkpoint itself, where a directory around it was given
    open: Callable[[str | None], Opened]  # of a layout, or None


def found(function: str, path: epath.Path) -> Format | None:
    """The format of what is at a path; None for Orbax's checkpoints, or nothing.

    Raises:
      ValueError: If several checkpoints are there, or one that needs its own program.
    """
    if _items.is_checkpoint(path):
        return None
    if (prefix := _prefix(function, path)) is not None:

        def bundle(layout: str | None) -> Opened:
            return _of_tensorflow(prefix, layout)

        return Format(prefix, bundle)
    if _safetensors.is_one(path):
        return Format(path, lambda layout: _safetensors.opened(path))
    if _zarr.is_one(path):
        return Format(path, lambda layout: _zarr.opened(path))
    if path.is_file():
        _refuse_others(function, path)
        if _msgpack.is_one(path):
            return Format(path, lambda layout: _msgpack.opened(path))
    return None


def _prefix(function: str, path: epath.Path) -> epath.Path | None:
    """The prefix of a TensorFlow checkpoint, from it, its files, or its directory."""
    for ending in (r"\.index", r"\.data-\d{5}-of-\d{5}", r"\.meta"):
        if re.search(ending + "$", path.name) and path.exists():
            prefix = path.parent / re.sub(ending + "$", "", path.name)
            if _tensorbundle.is_bundle(prefix):
                return prefix
    if _tensorbundle.is_bundle(path):
        return path
    if not path.is_dir():
        return None
    # A SavedModel has its variables in a directory of their own.
    saved = path / "variables" / "variables"
    inside = [saved] if _tensorbundle.is_bundle(saved) else []
    inside += _tensorbundle.prefixes_in(path)
    if len(inside) > 1:
        names = ", ".join(prefix.name for prefix in inside)
        raise ValueError(
            f"{function}: {path} holds several TensorFlow checkpoints: {names}. Give "
            f"one, such as {inside[-1]}."
        )
    return inside[0] if inside else None


def _of_tensorflow(prefix: epath.Path, layout: str | None) -> Opened:
    arrays = _tensorbundle.opened(prefix)
    swapped = layout in ("tf1_swapped", "tf2_swapped")
    if _tensorflow.is_object_graph(arrays):
        return _tensorflow.of_object_graph(arrays, swapped)
    own = layout is None or layout in LAYOUTS
    average = _tensorflow.AVERAGE if own else str(layout)
    return _tensorflow.of_saver(arrays, swapped, average)


def _refuse_others(function: str, path: epath.Path) -> None:
    """Raises for files that only their own programs read, and says what to do."""
    with path.open("rb") as file:
        begin = file.read(8)
        file.seek(max(0, path.stat().length - 64))
        end = file.read()
    if begin[:2] == b"PK" or begin[:2] in _PICKLES:
        raise ValueError(
            f"{function}: {path} is a pickle, as torch.save writes it. To read it is to "
            "run it, so emaopt does not; docs/adopting.md says how to save its tensors "
            "as safetensors, in five lines of PyTorch."
        )
    if _table.is_table(end):
        raise ValueError(
            f"{function}: {path} is a checkpoint in TensorFlow's format of before 2016. "
            "Restore it there, and save it with a Saver of write_version=V2."
        )
