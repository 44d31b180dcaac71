"""Training goes on from the parameters and the average of other code."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from emaopt._checks import check_callable, check_mapping, check_text
from emaopt._names import Names, is_below, joined, split
from emaopt._nodes import average_nodes, center_nodes
from emaopt._paths import check_readable
from emaopt._places import Ways, check_choices, located_at
from emaopt._states import AVERAGE
from emaopt._types import Path, PyTree, Report
from emaopt.checkpoint import (
    _contents,
    _files,
    _renaming,
    _replacement,
    _restore,
    _sources,
    _trees,
)
from emaopt.checkpoint._files import listed, names_of
from emaopt.checkpoint._found import Found
from emaopt.checkpoint.formats import _bytes


class _Place(NamedTuple):
    """Parameters and an average of them, by the names that lead to each."""

    params: Names
    average: Names | None  # to its state; None without an average


@_replacement.whole
def adopt(
    source: Path,
    target: PyTree,
    *,
    layout: str | None = _sources.AUTO,
    rename: Mapping[str, str] | None = None,
    params: Ways = None,
    report: Report = _restore.log_warning,
) -> PyTree:
    """Fills a training state from a checkpoint in which other code kept an average.

    Parameters, the average and, where it is stored, its number of updates come from the
    source; so does what has the target's names besides, such as the slots of its
    optimizer. All else stays as it is in the target. A source without an average gives
    the parameters, and the average begins with them.

        state = {"params": params, "opt_state": optimizer.init(params), "step": 0}
        state = checkpoint.adopt("their_run/10000", state)

    Layouts, which are found by what they are:
      "train_state": trees called ema_params, params_ema or ema beside params, at any
        depth, in Orbax's checkpoints and in Flax's msgpack files; in safetensors, X_ema
        beside X. The state's step is taken for the number of updates.
      "openpi", "kauldron", "praxis", "swag" (optax-swag), "nnx" (`nnx.EMA` beside the
        model), "levanter", "diffusers" (a folder unet_ema beside unet).
      "tf1": a TensorBundle of a tf.train.Saver, with averages called
        NAME/ExponentialMovingAverage; global_step is their number of updates.
        "tf1_swapped": written by a swapping_saver of MovingAverageOptimizer, with the
        averages under the parameters' names. Nothing in the files tells that, so it has
        to be said.
      "tf2": a TensorBundle of a tf.train.Checkpoint with the slots "average" of
        tf-models' ExponentialMovingAverage; "tf2_swapped" as above.
    `optax.ema`, whose state looks like praxis', is an average of updates, and is not
    taken for one of parameters.

    Args:
      source: A checkpoint of Orbax's; a file of msgpack or safetensors, the index of
        several, or a folder of such; the prefix, or the directory, of a TensorFlow
        checkpoint. Pickles, as torch.save writes them, are refused.
      target: The training state to fill: any tree with the parameters and an optimizer
        state with an average, as for `restore`. What the source lacks must be arrays.
      layout: One of the above; or the names that lead to the average's tree, joined with
        "/" (of a Saver: the name of the ExponentialMovingAverage). "auto" or None: found.
      rename: {their name: your name} of parameters, or of what names begin with, joined
        with "/": {"tower/dense": "encoder/Dense_0"}. It holds for the average as well. A
        name may also be that in the whole state: {"tower/mean": "batch_stats/mean"}.
      params: Where the target's parameters are, as for `save`, if several trees fit.
      report: Called with sentences on what stood where, and what was left.

    Returns:
      A tree like `target`.

    Raises:
      FileNotFoundError: If nothing is at `source`.
      ValueError: If the source holds several averages that could be meant, or lacks some
        of the parameters, or has other shapes (the message lists them); if its files are
        damaged. Nothing is half-adopted.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, optax, orbax.checkpoint as ocp, tempfile, emaopt
      >>> theirs = {"params": {"w": jnp.ones(2)}, "ema_params": {"w": jnp.zeros(2)}}
      >>> path = tempfile.mkdtemp() + "/theirs"
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     checkpointer.save(path, theirs)
      >>> params = {"w": jnp.full(2, 9.0)}
      >>> state = (params, emaopt.averaged(optax.sgd(1.0), 0.5).init(params))
      >>> params, opt_state = adopt(path, state, report=lambda sentence: None)
      >>> print(params["w"], emaopt.get_average(opt_state)["w"])
      [1. 1.] [0. 0.]
    """
    check_readable("adopt", "source", source)
    check_text("adopt", "layout", layout, optional=True)
    check_mapping("adopt", "rename", rename, optional=True, of_text=True)
    check_choices("adopt", None, params)
    check_callable("adopt", "report", report, 1)
    files = _sources.open_source("adopt", source, layout=layout)
    plain, _ = _trees.raw(_trees.plain(target), params)
    if center_nodes(plain):
        raise ValueError(
            "adopt: the target has local updates. Adopt into the state of their inner "
            "optimizer, save it, and restore it into local updates."
        )
    here, there = _targets(plain, params), _of_source(files)
    told: dict[Names, Names] = {}
    said = []
    for ours, theirs in _pairs(files, here, there):
        told |= _moved(files, plain, ours, theirs, rename or {})
        said.append(_sentence(files, theirs))
        if ours.average and theirs.average and files.found:
            weight = (*ours.average, "weight")
            if weight in names_of(plain):
                # Nothing of it is forgotten, for it has no start that weighs too much.
                whole = (*theirs.average, "weight")
                one = {whole: _bytes.constant(np.float32(1))}
                files = files._replace(saved={**files.saved, **one})
                told[weight] = whole
    state = _restore.restored(
        files,
        target,
        function="adopt",
        keep_missing=True,
        ignore_extra=True,
        report=report,
        params=params,
        told=told,
    )
    for sentence in said:
        report(f"adopt: {files.path}: {sentence}.")
    return state


def _targets(plain: PyTree, params: Ways) -> list[_Place]:
    """The averages of the target; without any, its parameters."""
    found = [
        _Place(located_at("adopt", plain, way, params).params, way)
        for way in average_nodes(plain)
    ]
    if found:
        return found
    if isinstance(params, str):
        return [_Place(split(params), None)]
    has_params = any(names[:1] == ("params",) for names in names_of(plain))
    return [_Place(("params",) if has_params else (), None)]


def _of_source(files: _files.Files) -> list[_Place]:
    """The averages of the source; without any, its parameters."""
    found = [
        _Place(one.params, one.average) for one in _contents.averages("adopt", files)
    ]
    if found:
        return found
    has_params = any(names[:1] == ("params",) for names in files.saved)
    return [_Place(("params",) if has_params else (), None)]


def _pairs(
    files: _files.Files, here: list[_Place], there: list[_Place]
) -> list[tuple[_Place, _Place]]:
    """Which of the source's averages is for which of the target's."""
    if len(there) == 1 and there[0].average is None:
        return [(ours, there[0]) for ours in here]
    if len(here) == 1 and len({theirs.params for theirs in there}) == 1:
        if len(there) > 1 and here[0].average:
            raise _several(files, there)
        return [(here[0], there[0])]
    pairs = []
    for ours in here:
        alike = [theirs for theirs in there if theirs.params == ours.params]
        if len(alike) != 1:
            raise _several(files, alike or there)
        pairs.append((ours, alike[0]))
    return pairs


def _several(files: _files.Files, there: list[_Place]) -> ValueError:
    ways = [joined(one.average or ()) for one in there]
    known = [files.found.get(one.average or ()) for one in there]
    layouts = [found.layout if found else "emaopt" for found in known]
    both = ", ".join(
        f"{way} ({layout}, of {joined(one.params)})"
        for way, layout, one in zip(ways, layouts, there, strict=True)
    )
    return ValueError(
        f"adopt: {files.path} holds several averages: {both}. Say with layout= which, as "
        f"layout={ways[0]!r}."
    )


def _moved(
    files: _files.Files,
    plain: PyTree,
    ours: _Place,
    theirs: _Place,
    rename: Mapping[str, str],
) -> dict[Names, Names]:
    """Where the leaves of the target stand in the source, by their names here."""
    targets, saved = names_of(plain), _files.logical_names(files)
    inside = [n[len(theirs.params) :] for n in saved if is_below(n, theirs.params)]
    averages = (*theirs.average, AVERAGE.field) if theirs.average else None
    states = [one.average for one in _of_source(files) if one.average]
    inside = [
        n for n in inside if not any(is_below(theirs.params + n, s) for s in states)
    ]
    renamed = _renaming.renamed("adopt", files.path, theirs.params, inside, rename)
    moved: dict[Names, Names] = {}
    for rest in inside:
        place = (*ours.params, *renamed[rest])
        if place not in targets and renamed[rest] != rest:
            place = renamed[rest]  # a name in the whole state
        if place not in targets:
            continue
        moved[place] = theirs.params + rest
        if averages is None or ours.average is None or not is_below(place, ours.params):
            continue
        average = (*ours.average, AVERAGE.field, *place[len(ours.params) :])
        if average in targets and averages + rest in saved:
            moved[average] = averages + rest
    wanted = {n for n in targets if is_below(n, ours.params)}
    wanted -= {n for n in wanted for way in average_nodes(plain) if is_below(n, way)}
    # Without an average or a key for the parameters, the target may hold more than them.
    is_whole = ours.average is None and not ours.params and moved
    if missing := set() if is_whole else wanted - moved.keys():
        left = {theirs.params + rest for rest in inside} - {*moved.values()}
        raise ValueError(
            f"adopt: {files.path} lacks parameters of the target: {listed(missing)}. "
            + (f"It has besides: {listed(left)}. " if left else "")
            + "Say with rename={their name: your name} which are which."
        )
    if ours.average is not None and theirs.average is not None:
        for field in ("num_updates", "num_skipped", "pending", "weight"):
            name, place = (*ours.average, field), (*theirs.average, field)
            if name in targets and place in saved:
                moved[name] = place
    return moved


def _sentence(files: _files.Files, theirs: _Place) -> str:
    """What stood where in the source."""
    params = f"the parameters were at {joined(theirs.params)}"
    if theirs.average is None:
        return f"{params}, and there was no average: it begins with them"
    found = files.found.get(theirs.average)
    if found is None:
        return f"{params}, the average was emaopt's, at {joined(theirs.average)}"
    average = f"{params}, the average at {joined(theirs.average)} ({found.layout})"
    return f"{average}, {_counted(found)}"


def _counted(found: Found) -> str:
    if found.updates is None:
        return (
            "and nothing told its number of updates, which begins at 0 "
            "(emaopt.reset_average sets it)"
        )
    if isinstance(found.updates, int):
        return f"after {found.updates} updates"
    return f"its number of updates at {joined(found.updates)}"
