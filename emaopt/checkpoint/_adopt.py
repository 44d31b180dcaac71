"""Training goes on from the parameters and the average of other code."""

from collections.abc import Mapping

import numpy as np

from emaopt._checks import check_callable, check_mapping, check_number, check_text
from emaopt._clock import split as split_time
from emaopt._leaves import opened
from emaopt._names import Names, is_below, joined, split
from emaopt._nodes import average_nodes, center_nodes
from emaopt._paths import check_readable
from emaopt._places import Ways, check_choices, located_at
from emaopt._types import Path, PyTree, Report
from emaopt.checkpoint import (
    _contents,
    _files,
    _names,
    _replacement,
    _restore,
    _sources,
    _trees,
)
from emaopt.checkpoint._files import listed, names_of
from emaopt.checkpoint._formats import _bytes
from emaopt.checkpoint._found import Found
from emaopt.checkpoint._names import Place


@_replacement.whole
def adopt(
    source: Path,
    target: PyTree,
    *,
    layout: str | None = _sources.AUTO,
    rename: Mapping[str, str] | None = None,
    params: Ways = None,
    elapsed: float | None = None,
    report: Report = _restore.log_warning,
) -> PyTree:
    """Fills a training state from a checkpoint in which other code kept an average.

    Parameters, the average and, where it is stored, its number of updates come from the
    source; so does what has the target's names besides, such as the step, and the slots
    of an optimizer under the same key: all of a transformation's, or none. All else stays
    as it is in the target. A source without an average gives the parameters, and the
    average begins with them.

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
        with "/": {"tower/dense": "encoder/Dense_0"}. It holds for the average, for slots
        and for collections such as batch_stats as well. Both may also be names in the
        whole state: {"tower/mean": "batch_stats/mean"}, {"global_step": "step"}.
      params: Where the target's parameters are, as for `save`, if several trees fit.
      elapsed: The time that the source's average has gone on for, if the target's has a
        `clock`, in the clock's units. For `schedule_free`, whose clock is the sum of its
        weights: the number of steps, if its learning rate is constant.
      report: Called with sentences on what stood where, and what was left.

    Returns:
      A tree like `target`.

    Raises:
      FileNotFoundError: If nothing is at `source`.
      ValueError: If the target's average has a clock and `elapsed` is missing, or none
        and it is given, or several have different clocks; if the source holds several
        averages that could be meant, or lacks some of the parameters, or has other shapes
        (the message lists them); if its files are damaged. Nothing is half-adopted.
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
    if elapsed is not None:
        check_number("adopt", "elapsed", elapsed, 0)
    check_callable("adopt", "report", report, 1)
    files = _sources.open_source("adopt", source, layout=layout)
    target = opened(target)
    plain, _ = _trees.raw("adopt", _trees.plain(target), params)
    if center_nodes(plain):
        raise ValueError(
            "adopt: the target has local updates. Adopt into the state of their inner "
            "optimizer, save it, and restore it into local updates."
        )
    here, there = _targets(plain, params), _of_source(files)
    if elapsed is not None:
        _check_one_clock(plain, here, elapsed)
    if rename:
        files = _names.renamed(files, there, here, names_of(plain), rename)
    told: dict[Names, Names] = {}
    said = []
    for ours, theirs in _pairs(files, here, there):
        told |= _moved(files, plain, ours, theirs, there)
        said.append(_sentence(files, theirs))
        if ours.average and theirs.average:
            files = _timed(files, plain, ours, theirs.average, told, elapsed)
            weight = (*ours.average, "weight")
            if weight in names_of(plain) and weight not in told:
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


def _clocks(plain: PyTree, ours: Place) -> list[Names]:
    """The names of the times on the clock of an average in the target."""
    way = (*(ours.average or ()), "elapsed")
    return [n for n in names_of(plain) if ours.average and is_below(n, way)]


def _check_one_clock(plain: PyTree, here: list[Place], elapsed: float) -> None:
    """Raises unless all clocks in the target are one, of which `elapsed` can be."""
    clocks = {clock[-1] for ours in here for clock in _clocks(plain, ours)}
    if len(clocks) != 1:
        raise ValueError(
            f"adopt: elapsed={elapsed}, but the target's averages count "
            f"{' and '.join(sorted(clocks)) or 'steps'}. "
            + ("Adopt each into a state of its own." if clocks else "Leave it out.")
        )


def _timed(
    files: _files.Files,
    plain: PyTree,
    ours: Place,
    theirs: Names,
    told: dict[Names, Names],
    elapsed: float | None,
) -> _files.Files:
    """The files with the time on the clock of the target's average, if it has one."""
    for clock in _clocks(plain, ours):
        if clock in told and elapsed is None:
            continue  # an average of emaopt's with the same clock
        if elapsed is None:
            raise ValueError(
                f"adopt: the average at {joined(clock[:-2])} counts {clock[-1]}, and "
                f"nothing in {files.path} tells how many the adopted one has seen: say "
                "with elapsed=. Without, it would forget all that it has."
            )
        place = (*theirs, "told", clock[-1])  # of no file, and of no checksum
        time = _bytes.constant(split_time(elapsed, np.dtype(np.float32)))
        files = files._replace(saved={**files.saved, place: time})
        told[clock] = place
    return files


def _targets(plain: PyTree, params: Ways) -> list[Place]:
    """The averages of the target; without any, its parameters."""
    found = [
        Place(located_at("adopt", plain, way, params).params, way)
        for way in average_nodes(plain)
    ]
    if found:
        return found
    if isinstance(params, str):
        return [Place(split(params), None)]
    return [Place(_contents.default_way(names_of(plain)), None)]


def _of_source(files: _files.Files) -> list[Place]:
    """The averages of the source; without any, its parameters."""
    found = [Place(one.params, one.average) for one in _contents.averages("adopt", files)]
    if found:
        return found
    return [Place(_contents.default_way(files.saved), None)]


def _pairs(
    files: _files.Files, here: list[Place], there: list[Place]
) -> list[tuple[Place, Place]]:
    """Which of the source's averages is for which of the target's."""
    if len(there) == 1 and there[0].average is None:
        return [(ours, there[0]) for ours in here]
    if len(here) == 1 and len({theirs.params for theirs in there}) == 1:
        if len(there) > 1 and here[0].average:
            raise _several(files, there, here[0])
        return [(here[0], there[0])]
    pairs = []
    for ours in here:
        alike = [theirs for theirs in there if theirs.params == ours.params]
        if len(alike) != 1:
            raise _several(files, alike or there, ours)
        pairs.append((ours, alike[0]))
    return pairs


def _several(files: _files.Files, there: list[Place], ours: Place) -> ValueError:
    ways = [joined(one.average or ()) for one in there]
    known = [files.found.get(one.average or ()) for one in there]
    layouts = [found.layout if found else "emaopt" for found in known]
    both = ", ".join(
        f"{way} ({layout}, of {joined(one.params)})"
        for way, layout, one in zip(ways, layouts, there, strict=True)
    )
    return ValueError(
        f"adopt: {files.path} holds {both}, and nothing tells which is the average of "
        f"{joined(ours.params)}. Say with layout= which, as layout={ways[0]!r}; of "
        "several networks, adopt each into a state of its own."
    )


def _moved(
    files: _files.Files, plain: PyTree, ours: Place, theirs: Place, there: list[Place]
) -> dict[Names, Names]:
    """Where the leaves of the target stand in the source, by their names here."""
    targets, saved = names_of(plain), _files.logical_names(files)
    inside = [n for n in saved if is_below(n, theirs.params)]
    states = [one.average for one in there if one.average]
    inside = [n for n in inside if not any(is_below(n, state) for state in states)]
    cut = len(theirs.params)
    moved = {ours.params + n[cut:]: n for n in inside if ours.params + n[cut:] in targets}
    wanted = {n for n in targets if is_below(n, ours.params)}
    wanted -= {n for n in wanted for way in average_nodes(plain) if is_below(n, way)}
    # Without an average or a key for the parameters, the target may hold more than them.
    is_whole = ours.average is None and not ours.params and moved
    if missing := set() if is_whole else wanted - moved.keys():
        left = {*inside} - {*moved.values()}
        raise ValueError(
            f"adopt: {files.path} lacks parameters of the target: {listed(missing)}. "
            + (
                f"It has besides: {listed(left)}. Say with rename={{their name: your "
                f"name}} which are which."
                if left
                else "Make the target without them, and add them afterwards."
            )
        )
    if ours.average is None or theirs.average is None:
        return moved
    for name in [n for n in targets if is_below(n, ours.average)]:
        # Parameters have the same names below the average's own field.
        if (place := theirs.average + name[len(ours.average) :]) in saved:
            moved[name] = place
    # A field of the user's own for the average, such as ema_params, is filled, too.
    cut = len(theirs.average)
    for place in files.origin:
        name = theirs.average + place[cut + 1 :]
        if name in targets and is_below(place, theirs.average):
            moved.setdefault(name, place)
    return moved


def _sentence(files: _files.Files, theirs: Place) -> str:
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
