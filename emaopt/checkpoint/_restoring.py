"""From files to trees: the whole training state, or the averages alone."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._nodes import refuse_unknown_name, served_nodes
from emaopt._places import Ways, located, placed
from emaopt._swapping import exchange
from emaopt.checkpoint import _files, _trees
from emaopt.checkpoint._files import Names, listed, names_of
from emaopt.checkpoint._matching import Rename, check_fit, match
from emaopt.checkpoint._worker_rows import refit

log_warning = logging.getLogger("emaopt").warning


def restored(
    files: _files.Files,
    target: Any,
    *,
    keep_missing: bool = False,
    ignore_extra: bool = False,
    report: Callable[[str], Any],
    scope: Names = (),
    fallback: Any = None,
    params: Ways = None,
    rename: Rename = None,
) -> Any:
    """Fills the target with the saved training state, raw parameters and average apart.

    With a scope, only the leaves below it are read; the others may be metadata. Leaves
    without a sharding go to `fallback`, or the default device.
    """
    plain, swapped = _trees.raw(_trees.plain(target), params)
    logical, present = _files.logical_names(files), _files.all_leaves(files)
    saved = {name: present[there] for name, there in logical.items()}
    targets = names_of(plain)
    found = match(
        "restore",
        files.path,
        plain,
        saved,
        with_other_items(files),
        scope=scope,
        keep_missing=keep_missing,
        ignore_extra=ignore_extra,
        params=params,
        rename=rename,
    )
    seeded = {source: source for source in found.seeds.values() if source is not None}
    wanted = {
        logical[source]: _trees.as_plan(targets[name], fallback)
        for name, source in (seeded | found.sources).items()
        if not _trees.is_empty(targets[name]) and name not in found.rows
    }
    for name in found.rows:  # whole, to be dealt out, if it is not read for another leaf
        if not _trees.is_empty(targets[name]):
            leaf = saved[found.sources[name]]
            plan = _trees.as_plan(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), fallback)
            wanted.setdefault(logical[found.sources[name]], plan)
    read = _files.read("restore", files, wanted)

    values = dict(targets)  # what is kept, or outside of the scope, stays
    for name, source in found.sources.items():
        leaf = targets[name]
        there = logical[source]
        if name in found.rows and there in read:
            values[name] = refit(read[there], leaf)
        elif there in read:
            values[name] = _trees.as_target(read[there], leaf)
        else:  # of size 0
            values[name] = _trees.zeros(leaf)
    for name, source in found.seeds.items():
        leaf = targets[name]
        if source is None or _trees.is_empty(leaf):
            values[name] = _trees.zeros(leaf)
        else:
            values[name] = _trees.copy_like(read[logical[source]], leaf)
    for sentence in found.report:
        report(f"restore: {files.path}: {sentence}.")
    state = _trees.fill(plain, values)
    state = exchange(state, [placed(state, *names) for names in swapped])
    return _trees.fill(target, names_of(state))


def as_saved(files: _files.Files, scope: Names) -> Any:
    """What a restore without a target gives: raw parameters in Orbax's containers."""
    target = with_other_items(files)
    logical = restored(files, target, report=log_warning, scope=scope)
    return logical[scope[0]] if scope else logical


def with_other_items(files: _files.Files, item: str = "", target: Any = None) -> Any:
    """The saved state as metadata, raw parameters in their places, one item replaced."""
    physical = jax.tree.map(_trees.as_array, _files.whole_tree(files))
    for names, leaf in files.marker.empty.items() if files.marker else ():
        _put(physical, names, leaf)
    state = _trees.raw_by(physical, files.marker)
    return state | {item: target} if item else state


def averages(
    files: _files.Files, target: Any, sharding: Any, dtype: Any, name: str | None
) -> Any:
    """The averages, with the target's containers or those on disk."""
    params, _, averaged, there = averages_on_disk("load_averaged", files, name)
    present = _files.all_leaves(files)
    if target is not None:
        # A model's other variables, which no average is of, may be left out.
        names = names_of(target).keys() | averaged
        there = {n: place for n, place in there.items() if n in names}
    saved = {n: present[place] for n, place in there.items()}
    wanted = _wanted(files.path, saved, target, sharding, dtype)
    read = _files.read(
        "load_averaged",
        files,
        {there[n]: x for n, x in wanted.items() if not _trees.is_empty(x)},
    )
    values = {
        n: _trees.zeros(x) if _trees.is_empty(x) else read[there[n]]
        for n, x in wanted.items()
    }
    if target is not None:
        return _trees.fill(target, values)
    return fill_as_on_disk(files, params, values)


def averages_on_disk(
    function: str, files: _files.Files, name: str | None
) -> tuple[Names, str, set[Names], dict[Names, Names]]:
    """The averages: what they are of, and where each stands.

    Returns the names that lead to the parameters, those of the averages' states in words,
    the names below of what is averaged, and where on disk each parameter's is.
    """
    present = _files.all_leaves(files)
    served = _asked_for(function, files, name)
    if served:
        params = served[0].params
        if not params and not any(
            n[: len(s.inside)] == s.inside for s in served for n in present
        ):
            raise ValueError(
                f"{function}: {files.path} holds an average of no parameters."
            )
        there = {n[len(params) :]: n for n in present if n[: len(params)] == params}
        averaged = {n for n in there for one in served if one.inside + n in present}
        if name is not None:  # the other names may hold other averages
            logical = _files.logical_names(files)
            raw = {n: logical[params + n] for n in there if params + n in logical}
            there = {
                n: there[n] if n in averaged else raw.get(n, there[n]) for n in there
            }
        said = ", ".join("/".join(one.average) or "the state" for one in served)
        return params, said, averaged, there
    if name is None and _files.RECORD in files.custom:
        params = tuple(files.custom[_files.RECORD]["params"])
        there = {n[len(params) :]: n for n in present}
        return params, _files.RECORD, set(there), there
    tree = _files.whole_tree(files)
    if not served_nodes(tree, name):
        refuse_unknown_name(function, tree, name)
        raise ValueError(
            f"{function}: {files.path} holds no average: its parameters are raw. Load "
            "them with orbax.checkpoint.StandardCheckpointer."
        )
    # Not the one that stands under the names, if one does: look for it as if none did.
    tree = _trees.raw_by(jax.tree.map(_trees.as_array, tree), files.marker)
    (where,) = located(function, tree, name, None, together=False)
    inside, there, averaged = (*where.average, where.field), {}, set()
    for logical, place in _files.logical_names(files).items():
        if logical[: len(where.params)] == where.params:
            rest = logical[len(where.params) :]
            there[rest] = place
            if inside + rest in present:
                there[rest] = inside + rest
                averaged.add(rest)
    return where.params, "/".join(where.average) or "the state", averaged, there


def _asked_for(
    function: str, files: _files.Files, name: str | None
) -> list[_files.Served]:
    """The averages of that name that stand under the parameters' names."""
    served = list(files.marker.served) if files.marker else []
    if name is not None:
        nodes = served_nodes(_files.whole_tree(files), name)
        served = [one for one in served if one.average in nodes]
    if len({one.params for one in served}) > 1:
        there = ", ".join(
            f"{'/'.join(s.average)} of {'/'.join(s.params)}" for s in served
        )
        raise ValueError(
            f"{function}: {files.path} serves several averages: {there}. Say with name= "
            "which."
        )
    return served


def _wanted(path: Any, saved: dict, target: Any, sharding: Any, dtype: Any) -> dict:
    """What to load each parameter as: its shape, dtype and sharding, by name."""
    if dtype is not None and not jnp.issubdtype(np.dtype(dtype), jnp.floating):
        raise ValueError(f"load_averaged: dtype must be floating, got {dtype!r}.")
    like = {} if target is None else names_of(target)
    if target is not None:
        check_fit("load_averaged", path, like, saved)
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        shardings = names_of(sharding)
        if odd := sorted(saved.keys() ^ shardings.keys()):
            raise ValueError(
                "load_averaged: sharding must be a jax.sharding.Sharding or a tree of "
                f"them like the parameters; they differ at {listed(odd)}."
            )
    else:
        shardings = dict.fromkeys(saved, sharding)
    default = _trees.default_sharding()

    def want(names, leaf):
        here = like.get(names)
        kind = getattr(here, "dtype", leaf.dtype)
        if dtype is not None and jnp.issubdtype(kind, jnp.floating):
            kind = jnp.dtype(dtype)
        place = shardings[names] or getattr(here, "sharding", None) or default
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=place)

    return {names: want(names, leaf) for names, leaf in saved.items()}


def fill_as_on_disk(files: _files.Files, prefix: Names, values: dict) -> Any:
    """The values in the nested dicts and lists that Orbax keeps the parameters in."""
    tree = _files.whole_tree(files)
    for name in prefix:
        tree = child(tree, name)
    filled = jax.tree.map(lambda leaf: leaf, tree)  # a copy of the containers
    if not isinstance(filled, (dict, list)):
        return values[()]
    for names, value in values.items():
        _put(filled, names, value)
    return filled


def child(tree: Any, name: str) -> Any:
    return tree[_key(tree, name)]


def _key(tree: Any, name: str) -> Any:
    if isinstance(tree, (list, tuple)):
        return int(name)
    return next(key for key in tree if str(key) == name)


def _put(tree: Any, names: Names, value: Any) -> None:
    for name in names[:-1]:
        tree = child(tree, name)
    key = _key(tree, names[-1])
    if isinstance(tree[key], dict) and set(tree[key]) == {"value"}:  # a Flax variable
        tree, key = tree[key], "value"
    tree[key] = value
