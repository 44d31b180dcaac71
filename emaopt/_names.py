"""Names of the leaves of a tree, and masks by name."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax


def by_name(*regexes: str) -> Callable[[Any], Any]:
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

    def mask(tree):
        names = ["/".join(keys) for keys, _ in leaves_with_keys(tree)]
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


def leaves_with_keys(tree: Any, is_leaf=None) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of a tree with the names that lead to them, whatever the containers.

    A dict key, an attribute and a position all become a string. What a Flax variable
    holds is its only leaf, under the name "value"; that name is dropped, so that a
    parameter has one name in memory, in every container and on disk.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    names = [tuple(key_name(key) for key in path) for path, _ in flat]
    siblings = Counter(name[:-1] for name in names)
    parents = Counter(prefix for name in names for prefix in _prefixes(name))
    return [
        (name[:-1] if _is_variable(name, siblings, parents) else name, leaf)
        for name, (_, leaf) in zip(names, flat, strict=True)
    ]


def _prefixes(name: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [name[:i] for i in range(len(name))]


def _is_variable(name: tuple[str, ...], siblings: Counter, parents: Counter) -> bool:
    alone = siblings[name[:-1]] == parents[name[:-1]] == 1
    return len(name) > 1 and name[-1] == "value" and alone


def key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
