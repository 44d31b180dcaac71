"""From files to trees: the whole training state, or the averages alone."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from emaopt._leaves import opened
from emaopt._places import Ways, placed, shape_of
from emaopt._swap import exchange
from emaopt._types import DTypeLike, Leaf, Path, PyTree, Report
from emaopt.checkpoint import _arrays, _contents, _files, _read, _trees
from emaopt.checkpoint._files import Names, listed, names_of
from emaopt.checkpoint._match import Rename, check_fit, match
from emaopt.checkpoint._worker_rows import refit

log_warning = logging.getLogger("emaopt").warning


def restored(
    files: _files.Files,
    target: PyTree,
    *,
    keep_missing: bool = False,
    ignore_extra: bool = False,
    report: Report,
    scope: Names = (),
    fallback: Sharding | None = None,
    params: Ways = None,
    rename: Rename = None,
    told: dict[Names, Names] | None = None,
    as_it_is: bool = False,
    function: str = "restore",
) -> PyTree:
    """Fills the target with the saved training state: raw parameters, averages in slots.

    With a scope, only the leaves below it are read; the others may be metadata. Leaves
    without a sharding go to `fallback`, or the default device. With `as_it_is`, a target
    of metadata gets the leaves as they were read, unchecked. `told` says of some leaves,
    by their names in the target, where they stand in the saved state.
    """
    target = opened(target)
    for way in [scope] if scope else {names[:1] for names in names_of(target)}:
        files.refuse_without_raw(function, way)
    plain, swapped = _trees.raw(function, _trees.plain(target), params)
    logical, present = _files.logical_names(files), _files.all_leaves(files)
    saved = {name: present[there] for name, there in logical.items()}
    targets = names_of(plain)
    found = match(
        function,
        files.path,
        plain,
        saved,
        with_other_items(files),
        scope=scope,
        keep_missing=keep_missing,
        ignore_extra=ignore_extra,
        params=params,
        known={o.average: o.params for o in files.marker.served} if files.marker else {},
        rename=rename,
        told=told,
    )
    # In the target's order: that of sets of names differs between processes.
    sources = {n: found.sources[n] for n in targets if n in found.sources}
    seeds = {n: found.seeds[n] for n in targets if n in found.seeds}
    wanted, dealt = {}, set()
    for name, place in (sources | seeds).items():
        if place is not None and not _trees.is_empty(targets[name]):
            plan = _trees.as_plan(targets[name], fallback)
            leaf = saved[place]
            if name not in found.rows | seeds.keys() or _arrays.can_read(leaf, plan):
                wanted[name] = logical[place], plan
            else:  # Orbax reads these, such as keys, whole; `refit` deals out the rows
                plan = jax.ShapeDtypeStruct(leaf.shape, plan.dtype)
                wanted[name] = logical[place], _trees.as_plan(plan, fallback)
                dealt.add(name)
    read = _read.read(function, files, wanted)

    values = dict(targets)  # what is kept, or outside of the scope, stays
    for name in sources | seeds:
        leaf = targets[name]
        if name not in read:  # of size 0, or a counter that starts
            values[name] = _trees.zeros(leaf)
        else:
            value = refit(read[name], leaf) if name in dealt else read[name]
            values[name] = _trees.as_target(value, leaf)
    if not as_it_is:
        _trees.check_kinds(function, files.path, values, targets)
    for sentence in found.report:
        report(f"{function}: {files.path}: {sentence}.")
    state = _trees.fill(plain, values)
    # A target that was swapped comes back swapped.
    state = exchange(state, [placed(state, *names) for names in swapped])
    return _trees.fill(target, names_of(state))


def as_saved(files: _files.Files, scope: Names) -> PyTree:
    """Restores without a target: raw parameters under their names, Orbax's containers."""
    target = with_other_items(files)
    logical = restored(files, target, report=log_warning, scope=scope, as_it_is=True)
    return logical[scope[0]] if scope else logical


def with_other_items(
    files: _files.Files, item: str = "", target: PyTree = None
) -> PyTree:
    """The saved state as metadata, raw parameters in their places, one item replaced."""
    physical = jax.tree.map(_trees.as_array, _files.whole_tree(files))
    for names, leaf in files.marker.empty.items() if files.marker else ():
        _put(physical, names, leaf)
    state = _trees.raw_by(physical, files.marker)
    return state | {item: target} if item else state


def averages(
    files: _files.Files,
    target: PyTree,
    sharding: PyTree,
    dtype: DTypeLike | None,
    name: str | None,
    at: str | None,
    ignore_extra: bool,
) -> PyTree:
    """The averages, with the target's containers or those on disk."""
    function, target = "load_averaged", opened(target)
    prefix, averaged, there = _contents.averages_at(
        function, files, name, at, option="name"
    )
    if target is not None:
        # The target may lack a model's other variables, which have no average.
        needed = set() if ignore_extra else averaged
        names = below_a_key(target).keys() | needed
        there = {n: place for n, place in there.items() if n in names}
    return weights(function, files, prefix, there, target, sharding, dtype)


def weights(
    function: str,
    files: _files.Files,
    prefix: Names,
    there: dict[Names, Names],
    target: PyTree,
    sharding: PyTree,
    dtype: DTypeLike | None,
    kinds: Mapping[Names, np.dtype] | None = None,
) -> PyTree:
    """The weights at some places, with the target's containers or those on disk.

    `kinds` are the dtypes of those that are not to have their own.
    """
    present = _files.all_leaves(files)
    saved = {n: present[place] for n, place in there.items()}
    # The files were opened lazily; all arrays that are wanted are opened together here.
    with _files.explained(function, files.path):
        _arrays.open_all(saved.values())
    wanted = _wanted(function, files.path, saved, target, sharding, dtype, kinds or {})
    plans = {n: (there[n], x) for n, x in wanted.items() if not _trees.is_empty(x)}
    read = _read.read(function, files, plans)
    values = {n: read[n] if n in read else _trees.zeros(x) for n, x in wanted.items()}
    if target is not None:
        _trees.check_kinds(function, files.path, values, wanted)
        leaves = [values[n] for n in below_a_key(target)]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)
    return fill_as_on_disk(files, prefix, values)


def below_a_key(tree: PyTree) -> dict[Names, Leaf]:
    """The leaves by the names that they have below a prefix, as in a checkpoint."""
    # A lone "value" at the top keeps its name. Below a key, as on disk, it loses it.
    return {names[1:]: leaf for names, leaf in names_of({"": tree}).items()}


def _wanted(
    function: str,
    path: Path,
    saved: dict[Names, Leaf],
    target: PyTree,
    sharding: PyTree,
    dtype: DTypeLike | None,
    kinds: Mapping[Names, np.dtype],
) -> dict[Names, Leaf]:
    """What to load each parameter as: its shape, dtype and sharding, by name."""
    like = {} if target is None else below_a_key(target)
    if target is not None:
        check_fit(function, path, like, saved)
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        shardings = below_a_key(sharding)
        for one in shardings.values():
            if not isinstance(one, jax.sharding.Sharding):
                raise TypeError(
                    f"{function}: sharding must be a jax.sharding.Sharding or a tree "
                    f"of them like the parameters, got {one!r}."
                )
        if odd := sorted(saved.keys() ^ shardings.keys()):
            raise ValueError(
                f"{function}: sharding must be a jax.sharding.Sharding or a tree of "
                f"them like the parameters; they differ at {listed(odd)}."
            )
    else:
        shardings = dict.fromkeys(saved, sharding)
    default = _trees.default_sharding()

    def want(names: Names, leaf: Leaf) -> Leaf:
        if not hasattr(leaf, "dtype"):
            return _trees.as_array(leaf)  # text
        here = like.get(names)
        kind = getattr(here, "dtype", kinds.get(names, leaf.dtype))
        if dtype is not None and jnp.issubdtype(kind, jnp.floating):
            kind = jnp.dtype(dtype)
        place = shardings[names] or getattr(here, "sharding", None) or default
        # A typed key has another shape than its integers on disk.
        shape = leaf.shape if here is None else shape_of(here)
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    return {names: want(names, leaf) for names, leaf in saved.items()}


def fill_as_on_disk(
    files: _files.Files, prefix: Names, values: Mapping[Names, Leaf]
) -> PyTree:
    """The values in the nested dicts and lists in which Orbax keeps the parameters."""
    tree = _files.whole_tree(files)
    for name in prefix:
        tree = child(tree, name)
    # Other leaves at the place, such as an average's counters, stay None.
    filled = jax.tree.map(lambda _: None, tree)
    if not isinstance(filled, (dict, list)):
        return values[()]
    for names, value in values.items():
        _put(filled, names, value)
    return filled


def child(tree: PyTree, name: str) -> PyTree:
    return tree[_key(tree, name)]


def _key(tree: PyTree, name: str) -> Any:
    """The key of a container that has this name: a position, or an object in a dict."""
    if isinstance(tree, (list, tuple)):
        return int(name)
    return next(key for key in tree if str(key) == name)


def _put(tree: PyTree, names: Names, value: Leaf) -> None:
    """Sets a leaf in nested dicts and lists, by its name in the checkpoint."""
    node, key = {"": tree}, ""
    for name in names:
        node = node[key]
        key = _key(node, name)
    # A Flax variable is such a dict on disk; names of leaves do without its "value".
    if isinstance(node[key], dict) and set(node[key]) == {"value"}:
        node, key = node[key], "value"
    node[key] = value
