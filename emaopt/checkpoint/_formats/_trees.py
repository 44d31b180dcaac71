"""Trees of arrays that other programs wrote, by the names that lead to the arrays."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from emaopt._names import Names, joined
from emaopt._types import Leaf, PyTree
from emaopt.checkpoint._found import Found


class Opened(NamedTuple):
    """A checkpoint of another format, as a tree."""

    tree: PyTree  # nested dicts, with a `DiskArray` for each array
    found: Sequence[Found] = ()  # the averages that the format itself tells
    # The names in the file, where they are others.
    shown: Mapping[Names, str] = MappingProxyType({})
    # Whether a last name "value" is the writer's, and not that of a variable of Flax's.
    has_values: bool = True


def nested(leaves: Mapping[Names, Leaf]) -> PyTree:
    """Nested dicts of leaves by name."""
    tree: dict[str, Any] = {}
    nodes: dict[Names, dict[str, Any]] = {(): tree}
    for names, leaf in leaves.items():
        for i in range(1, len(names)):
            if names[:i] not in nodes:
                parent = nodes[names[: i - 1]]
                if names[i - 1] in parent:
                    raise ValueError(
                        f"{joined(names[:i])} is an array there, and {joined(names)} "
                        "another one below it"
                    )
                nodes[names[:i]] = parent[names[i - 1]] = {}
        if names in nodes:
            raise ValueError(f"{joined(names)} is an array there, and has others below")
        nodes[names[:-1]][names[-1]] = leaf
    return tree


def split_names(names: list[str]) -> list[Names]:
    """Flat names as the keys that were joined: at "/", or, where none has it, at "."."""
    separator = "/" if any("/" in name for name in names) else "."
    return [tuple(filter(None, name.split(separator))) or (name,) for name in names]
