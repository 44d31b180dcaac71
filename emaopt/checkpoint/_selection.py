"""Which leaves of a checkpoint are weights, and which checkpoints a run has."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from emaopt._advice import advised
from emaopt._names import Unknown, is_below
from emaopt._nodes import as_state, average_nodes, counter_of, is_swapped, served_nodes
from emaopt._paths import may_enter
from emaopt._profiles import says_decay
from emaopt._types import Leaf, Path, PyTree, Report
from emaopt.checkpoint import (
    _completion,
    _contents,
    _files,
    _items,
    _orbax,
    _restore,
    _sources,
    _trees,
)
from emaopt.checkpoint._files import Names, listed, names_of


class Weights(NamedTuple):
    """Weights in a checkpoint: the served ones, the raw ones, or an average."""

    files: _files.Files
    prefix: Names  # the names that lead to the parameters
    places: dict[Names, Names]  # name below the prefix -> name on disk
    kept: frozenset[Names]  # raw ones, where an average is asked for that leaves them out
    said: str  # which weights they are, in words
    averages: tuple[str, ...]  # the averages among them


def select(
    function: str,
    path: Path,
    which: str | None,
    at: str | None = None,
    *,
    layout: str | None = None,
) -> Weights:
    """Finds weights in a checkpoint.

    Args:
      which: None: the arrays under the parameters' names. "raw": the raw parameters.
        "average": the only average. "served": as "average" if there is one, else as None.
        Any other text: the average of that name.
      at: Where the parameters are, or some of them, as keys joined with "/".
      layout: As for `open_source`.
    """
    files = _sources.open_source(function, path, at=at, layout=layout)
    present = _files.all_leaves(files)
    if which == "served":
        tree = _files.whole_tree(files)
        holds = files.marker or files.combination or served_nodes(tree)
        which = "average" if holds else None
    if which not in (None, "raw"):
        name = None if which == "average" else which
        prefix, averaged, places = _contents.averages_at(
            function, files, name, at, option="weights"
        )
        kept = frozenset(places.keys() - averaged)
        found = weights_at(files, prefix, places, kept)
        if at:
            refuse_optimizer_state(function, found._replace(prefix=()))
        return found
    if not present:
        raise ValueError(f"{function}: {files.path} holds no arrays.")
    way = _contents.way_to(function, files, at)
    prefix = way or _parameters(function, files)
    if which == "raw":
        files.refuse_without_raw(function, prefix)
    # A place in a served average's state holds raw parameters as it is. Elsewhere raw
    # parameters are where the swap put them.
    as_raw = which == "raw" and not (
        way and _contents.refuse_averages(function, files, str(at), way)
    )
    logical = _files.logical_names(files) if as_raw else {n: n for n in present}
    places = {
        n[len(prefix) :]: place
        for n, place in logical.items()
        if n[: len(prefix)] == prefix and not _files.is_added(files, n)
    }
    if not places:
        _contents.way_to(function, files, "/".join(prefix))  # raises
    return weights_at(files, prefix, places, raw=which == "raw")


def weights_at(
    files: _files.Files,
    prefix: Names,
    places: dict[Names, Names],
    kept: frozenset[Names] = frozenset(),
    *,
    raw: bool = False,
) -> Weights:
    """The weights at these places, with words for what they are."""
    said, averages = _contents.said_of(files, prefix, places.values(), raw=raw)
    return Weights(files, prefix, places, kept, said, averages)


def empty(weights: Weights) -> dict[Names, Leaf]:
    """The arrays of size 0 among weights, by place: Orbax has no files for them."""
    present = _files.all_leaves(weights.files)
    return {n: x for n in weights.places.values() if _trees.is_empty(x := present[n])}


def select_alike(
    function: str, paths: Sequence[Path], which: str | None, at: str | None
) -> list[Weights]:
    """The weights in checkpoints, which without `which` must serve the same averages."""
    found = [select(function, path, which, at) for path in paths]
    for one in found:
        if which is None and one.averages != found[0].averages:
            raise advised(
                ValueError,
                f"{function}: {found[0].files.path} and {one.files.path} differ: under "
                f"the parameters' names stand {found[0].said} in the one and {one.said} "
                "in the other.",
                "Say with weights= which are meant: raw, average, or a name.",
                "Say with --weights which are meant: raw, average, or a name.",
            )
    return found


def what_stands(
    function: str, files: _files.Files, at: str | None
) -> tuple[list[Names], str]:
    """The names that lead to the parameters, and which weights are there, in words."""
    present = _files.all_leaves(files)
    if not present:
        raise ValueError(f"{function}: {files.path} holds no arrays.")
    if way := _contents.way_to(function, files, at):
        ways = [way]
    else:
        try:
            ways = _contents.parameters(function, files)
        except ValueError:  # an average fits several trees
            ways = [()]
        ways = ways or [_parameters(function, files)]
    places = [n for n in present if any(n[: len(way)] == way for way in ways)]
    return ways, _contents.said_of(files, ways[0], places)[0]


def _parameters(function: str, files: _files.Files) -> Names:
    """The names that lead to the parameters: the average's own, "params", or none."""
    way = _contents.default_way(files.saved)
    # Averages that other code wrote stand beside; they do not hide the parameters.
    if way and files.found and not any(is_below(one, way) for one in files.found):
        return way
    ways = _contents.parameters(function, files)
    if len(ways) > 1:
        raise advised(
            ValueError,
            f"{function}: {files.path} holds averages of {listed(ways)}.",
            "Say with at= which are meant.",
            "Say with --at which are meant.",
        )
    if ways:
        return ways[0]
    return way


def refuse_optimizer_state(function: str, weights: Weights) -> None:
    """Raises if weights are a whole checkpoint with an optimizer's state in it."""
    # A checkpoint has names and no types. By custom the state is called opt_state; Optax
    # calls Adam's first moment mu, beside a count.
    names = set() if weights.prefix else weights.places.keys()
    counted = {n[:-1] for n in names if n[-1:] == ("count",)}
    if any("opt_state" in n for n in names) or any(
        (*parent, "mu") == n[: len(parent) + 1] for n in names for parent in counted
    ):
        tops = ", ".join(sorted({n[0] for n in names}))
        raise advised(
            ValueError,
            f"{function}: {weights.files.path} holds an optimizer's state, and no "
            "average and no 'params' that tell which arrays are the parameters.",
            f"Say with at= where they stand; at the top stand {tops}.",
            f"Say with --at where they stand; at the top stand {tops}.",
        )


def check_alike(function: str, weights: Sequence[Weights]) -> None:
    """Raises unless all have the same names, shapes and dtypes as the first."""
    first, *others = weights
    for other in others:
        here, there = _kinds(first), _kinds(other)
        both = f"{first.files.path} and {other.files.path}"
        if only := here.keys() ^ there.keys():
            sides = [
                f"only {side.files.path} has {listed(only & kinds.keys())}"
                for side, kinds in ((first, here), (other, there))
                if only & kinds.keys()
            ]
            raise ValueError(f"{function}: {both} differ: {'; '.join(sides)}.")
        for names, kind in here.items():
            if kind != there[names]:
                where = "/".join(first.prefix + names)
                raise ValueError(
                    f"{function}: {both} differ: {where} is {_kind(kind)} in the one and "
                    f"{_kind(there[names])} in the other."
                )


def _kinds(weights: Weights) -> dict[Names, tuple[tuple[int, ...], str]]:
    """The shape and dtype of each leaf, by its name below the prefix."""
    present = _files.all_leaves(weights.files)
    return {
        n: (_files.shape(present[there]), str(getattr(present[there], "dtype", "text")))
        for n, there in weights.places.items()
    }


def _kind(kind: tuple[tuple[int, ...], str]) -> str:
    return f"{kind[1]} of shape {kind[0]}"


def in_order(
    function: str, paths: Sequence[Path], steps: Sequence[int] | None, report: Report
) -> tuple[list[epath.Path], list[int] | None]:
    """The checkpoints, oldest first, and their steps; in the given order if one has none.

    A run's directory stands for all its finished steps.
    """
    found = []
    for path in map(_files.absolute, paths):
        inside, unfinished = {}, []
        if path.is_dir() and not _items.is_checkpoint(path):
            inside, unfinished = steps_in(function, path)
        for left in unfinished:
            report(f"{function}: {path / left} was not finished, and is left out.")
        found += inside.values() or [path]
    if not found:
        raise ValueError(f"{function}: give at least one checkpoint.")
    if steps is not None and len(steps) != len(found):
        raise Unknown(
            f"{function}: {len(steps)} steps for {len(found)} checkpoints.", "steps"
        )
    given = steps or [step_of(path) for path in found]
    numbers = [number for number in given if number is not None]
    if len(numbers) < len(found):
        return found, None
    order = np.argsort(numbers, kind="stable")
    found, numbers = [found[i] for i in order], [numbers[i] for i in order]
    for i in np.flatnonzero(np.diff(numbers) == 0):
        raise ValueError(
            f"{function}: {found[i]} and {found[i + 1]} are both of step {numbers[i]}."
        )
    return found, numbers


def steps_in(
    function: str, directory: epath.Path
) -> tuple[dict[int, epath.Path], list[str]]:
    """The steps of a run by number, and the names of those that were not finished."""
    steps, unfinished = {}, []
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        step = step_of(path)
        if (step is None and _orbax.UNFINISHED not in path.name) or not path.is_dir():
            continue
        if not may_enter(path):
            raise PermissionError(
                f"{function}: {path} may not be entered. Let this user read it, or give "
                "the steps that are wanted one by one."
            )
        if _completion.unfinished(path):
            unfinished.append(path.name)
        elif step is not None and (other := steps.setdefault(step, path)) != path:
            raise ValueError(
                f"{function}: {other} and {path} are both of step {step}. Move the one "
                "that is not a step of the run elsewhere, or give the steps one by one."
            )
    return dict(sorted(steps.items())), unfinished


def step_of(path: epath.Path) -> int | None:
    """The step in a directory's name: a number alone, or at the end after "_" or "-"."""
    found = re.fullmatch(r"(?:.*[_-])?(\d+)", path.name)
    return int(found[1]) if found else None


class Average(NamedTuple):
    """An average in a checkpoint."""

    names: Names  # names that lead to its state
    counter: Names  # the name on disk of its num_updates
    elapsed: Names | None  # that of the time on its clock, whose name is the last
    debias: bool
    served: bool  # whether it is under the parameters' names


def averages_in(files: _files.Files) -> list[Average]:
    """The averages in a checkpoint."""
    found = []
    for names, node in average_nodes(_files.whole_tree(files)).items():
        swapped = is_swapped(node)
        counter = (*names, counter_of("average", swapped))
        debias = names_of(as_state(node).weight) != {}
        clock = next(iter(as_state(node).elapsed or {}), None)
        elapsed = (*names, "elapsed", clock) if clock else None
        found.append(Average(names, counter, elapsed, debias, swapped))
    return found


def decay_said(names: Names) -> str | None:
    """The last of an average's names that is a decay, such as "power:0.1", or None."""
    return next((name for name in reversed(names) if says_decay(name)), None)


def containers(weights: Weights, values: dict[Names, Leaf]) -> PyTree:
    """The values under their names on disk, in containers like those on disk.

    Arrays of size 0 become None, which Orbax can store.
    """
    filled: PyTree = _restore.fill_as_on_disk(weights.files, weights.prefix, values)
    # Above the parameters, from the inside out: a dict, or a list where the parameters
    # are the first member of one. At another position a list would have gaps.
    for i in reversed(range(len(weights.prefix))):
        parent = _files.whole_tree(weights.files)
        for name in weights.prefix[:i]:
            parent = _restore.child(parent, name)
        first = isinstance(parent, (list, tuple)) and weights.prefix[i] == "0"
        filled = [filled] if first else {weights.prefix[i]: filled}
    return _trees.without_empty(filled)
