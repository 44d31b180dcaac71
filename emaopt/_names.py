"""Names of the leaves of a tree, and masks by name."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from emaopt._types import Leaf, PyTree

Names = tuple[str, ...]

# Flax's types of variables: on disk, each is a dict with the one key "value".
_VARIABLES = (
    ("flax.nnx", "Variable"),
    ("flax.nnx", "VariableState"),  # before Flax 0.12
    ("flax.core.meta", "AxisMetadata"),
)


class Unknown(ValueError):
    """Something that an argument names or numbers is not in this tree or directory."""

    def __init__(self, message: str, argument: str = ""):
        super().__init__(message)
        self.argument = argument


def by_name(*regexes: str) -> Callable[[PyTree], PyTree]:
    """Returns a mask that is True for the leaves whose path matches any of `regexes`.

    Args:
      *regexes: Regular expressions, searched for in the leaf's path: its keys joined with
        "/", as in "encoder/layers/0/kernel". r"^(?!.*bias$)" is all but the biases.

    Returns:
      A function from a tree to a tree of booleans of the same structure.

    Raises:
      TypeError: If a regex is not a string.
      ValueError: If a regex does not compile; from the mask, if one matches no leaf.

    Example:
      >>> print(by_name("kernel$")({"dense": {"bias": 0.0, "kernel": 0.0}}))
      {'dense': {'bias': False, 'kernel': True}}
    """
    if not regexes:
        raise ValueError("by_name: give at least one regular expression.")
    patterns = []
    for regex in regexes:
        if not isinstance(regex, str):
            raise TypeError(f"by_name takes regular expressions, got {regex!r}.")
        try:
            patterns.append(re.compile(regex))
        except re.error as error:
            raise ValueError(f"by_name: {regex!r} does not compile: {error}.") from None

    def mask(tree: PyTree) -> PyTree:
        names = ["/".join(keys) for keys, _ in named_leaves(tree)]
        for pattern in patterns:
            if names and not any(pattern.search(name) for name in names):
                there = f"the leaves are {', '.join(names)}"
                if names == [""]:
                    there = (
                        "the tree is one leaf, without a name. If it is the count of "
                        "optax.inject_hyperparams, which takes functions for schedules, "
                        "name the mask in its static_args"
                    )
                raise ValueError(
                    f"by_name: {pattern.pattern!r} matches no leaf; {there}."
                )
        chosen = [any(p.search(name) for p in patterns) for name in names]
        return jax.tree.unflatten(jax.tree.structure(tree), chosen)

    return mask


def leaves_with_keys(
    tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None
) -> list[tuple[Names, Leaf]]:
    """The leaves of a tree with the names that lead to them, whatever the containers.

    A dict key, an attribute and a position all become a string. A Flax variable holds one
    leaf under the name "value", and on disk it is a dict. That name is dropped, so that a
    parameter has the same names in memory and on disk. Types are lost on disk, so "value"
    is dropped wherever a leaf is alone in its container; this never gives two leaves the
    same names. `named_leaves` has the names to be shown.
    """
    leaves = path_leaves(tree, is_leaf)
    if not any(_may_be_variable(name) for name, _ in leaves):
        return leaves
    members = _members(tree, is_leaf)

    def is_lost(name: Names, leaf: Leaf) -> bool:
        # Inside of a node more names may follow, and "value" is not their last.
        is_node = is_leaf is not None and is_leaf(leaf)
        return _may_be_variable(name) and members[name[:-1]] == 1 and not is_node

    return [(name[:-1] if is_lost(name, leaf) else name, leaf) for name, leaf in leaves]


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


def outermost(ways: Iterable[Names]) -> list[Names]:
    """The ways that lead below no other one of them, each once, in order."""
    found = {*ways}
    return sorted(w for w in found if not any(w[:i] in found for i in range(len(w))))


def named_leaves(tree: PyTree) -> list[tuple[Names, Leaf]]:
    """The leaves under the names that users know, with "value" where they chose it."""
    own = own_values(tree)
    return [
        ((*names, "value") if names in own else names, leaf)
        for names, leaf in leaves_with_keys(tree)
    ]


def own_values(tree: PyTree) -> set[Names]:
    """The names of leaves that lost a "value" of the user's own, not one of Flax's."""
    short = {names for names, _ in leaves_with_keys(tree)}
    lost = short - {names for names, _ in path_leaves(tree)}
    return lost and lost - _variables(tree)


def _variables(tree: PyTree) -> set[Names]:
    """The names of the nodes that hold one leaf under "value", by Flax's own types."""
    # A tree that holds such a type has its module imported; Flax is not imported here.
    kinds = [
        vars(sys.modules[module]).get(kind)
        for module, kind in _VARIABLES
        if module in sys.modules
    ]
    types = tuple(kind for kind in kinds if kind is not None)
    nodes = (
        path_leaves(tree, is_leaf=lambda node: isinstance(node, types)) if types else ()
    )
    return {names for names, node in nodes if isinstance(node, types)}


def _members(tree: PyTree, is_leaf: Callable[[PyTree], bool] | None) -> Counter[Names]:
    """How many children each container has, including those without leaves."""

    # None and MaskedNode count, or a mask would change the names of the leaves beside.
    def is_childless(node: PyTree) -> bool:
        return jax.tree.structure(node).num_leaves == 0

    def stop(node: PyTree) -> bool:
        return is_childless(node) or (is_leaf is not None and is_leaf(node))

    children = {
        name[: i + 1]
        for name, _ in path_leaves(tree, is_leaf=stop)
        for i in range(len(name))
    }
    return Counter(child[:-1] for child in children)


def path_leaves(
    tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None
) -> list[tuple[Names, Leaf]]:
    """The leaves with all names that lead to them, the "value" of a variable included."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [(tuple(map(key_name, path)), leaf) for path, leaf in flat]


def _may_be_variable(name: Names) -> bool:
    return len(name) > 1 and name[-1] == "value"


def split(way: str | None) -> Names:
    """The names that a user joins with "/"."""
    return tuple(filter(None, (way or "").split("/")))


def joined(names: Names) -> str:
    """Names joined with "/", as users read and write them."""
    return "/".join(names) or "the root"


def is_below(names: Names, way: Names) -> bool:
    """Whether the names are those of a way, or lead to something below it."""
    return names[: len(way)] == way


def num_common(a: Names, b: Names) -> int:
    """How many names two ways have in common, from the root on."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def key_name(key: object) -> str:
    """One key of a path in JAX, as a string."""
    # Of DictKey and FlattenedIndexKey, of GetAttrKey, and of SequenceKey.
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
