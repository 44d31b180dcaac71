"""Trees of arrays that other programs wrote, by the names that lead to the arrays."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from emaopt._names import Names
from emaopt._types import PyTree
from emaopt.checkpoint._found import Found


class Opened(NamedTuple):
    """A checkpoint of another format, as a tree."""

    tree: PyTree  # nested dicts, with a `DiskArray` for each array
    found: Sequence[Found] = ()  # the averages that the format itself tells
    # The names in the file, where they are others.
    shown: Mapping[Names, str] = MappingProxyType({})
    # Whether a last name "value" is the writer's, and not that of a variable of Flax's.
    has_values: bool = True


def split_names(names: list[str]) -> list[Names]:
    """Flat names as the keys that were joined: at "/", or, where none has it, at "."."""
    separator = "/" if any("/" in name for name in names) else "."
    return [tuple(filter(None, name.split(separator))) or (name,) for name in names]
