"""The leaves of a tree as a column, and the fragments that are exchanged together."""

from typing import Any, TypeAlias

import jax
import optax

from emaopt._exchange import Leaf
from emaopt._leaves import is_averaged
from emaopt._states import LocalUpdatesState
from emaopt._tracing import TreeDef
from emaopt._types import PyTree

Column: TypeAlias = list[Any]  # by leaf of the parameters, in flattening order


def fragments_of(function: str, center: Column, num_fragments: int) -> list[list[int]]:
    """The positions of the leaves that are exchanged together, in parts of like sizes."""
    fragments: list[list[int]] = [[] for _ in range(num_fragments)]
    sizes = [0] * num_fragments
    moving = [i for i, leaf in enumerate(center) if is_averaged(leaf)]
    # A tree without leaves passes: optax.tree.map_params calls `init` with one.
    if 1 < num_fragments > len(moving) and center:
        raise ValueError(
            f"{function}: num_fragments={num_fragments}, but there are only "
            f"{len(moving)} leaves; a fragment is one leaf or more."
        )
    # Greedy: the largest leaf that is left goes to the smallest fragment so far.
    for i in sorted(moving, key=lambda i: -center[i].size):
        smallest = sizes.index(min(sizes))
        fragments[smallest].append(i)
        sizes[smallest] += center[i].size
    return [sorted(fragment) for fragment in fragments]


def column_of(treedef: TreeDef, tree: PyTree) -> Column:
    """The leaves in the parameters' order; Nones where there is no tree."""
    return [None] * treedef.num_leaves if tree is None else treedef.flatten_up_to(tree)


def tree_of(treedef: TreeDef, column: Column, like: PyTree) -> PyTree:
    """The leaves of a column as a tree like another; None where that is None."""
    return None if like is None else jax.tree.unflatten(treedef, column)


def leaves_of(treedef: TreeDef, state: LocalUpdatesState) -> list[Leaf]:
    """What exchanges change of each leaf."""
    trees = state.pulled, state.residual, state.center
    return list(map(Leaf, *(column_of(treedef, tree) for tree in trees)))


def subtree(treedef: TreeDef, positions: list[int], leaves: list[jax.Array]) -> PyTree:
    """A tree with the parameters' names and MaskedNode in place of other leaves."""
    # Outer optimizers may go by the names, as masks and partitions do.
    nodes: Column = [optax.MaskedNode()] * treedef.num_leaves
    for i, leaf in zip(positions, leaves, strict=True):
        nodes[i] = leaf
    return jax.tree.unflatten(treedef, nodes)
