"""Averages made after training, from the checkpoints of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from emaopt._advice import advised, named
from emaopt._checks import (
    check_decay,
    check_integer,
    check_mapping,
    check_number,
    check_text,
)
from emaopt._names import Unknown
from emaopt._paths import check_readable
from emaopt._profiles import BadProfile, decay_of, is_annealing, weights_of
from emaopt._types import DecayLike, DTypeLike, Path, Report
from emaopt._weights import checked_weights, shares_taken, weights_of_shares
from emaopt.checkpoint import (
    _files,
    _merge,
    _replacement,
    _restore,
    _selection,
    _sources,
)
from emaopt.checkpoint._combinations import check_merging
from emaopt.checkpoint._merge import Progress
from emaopt.checkpoint._timelines import (
    STEPS,
    Snapshot,
    chosen_timeline,
    snapshot,
    timeline,
)
from emaopt.posthoc import Recorded, Solution, solve_recorded

_FAR = 0.1  # the residual from which on there is a warning


class Synthesis(NamedTuple):
    """What `synthesize` made, and from which snapshots.

    solution: the `posthoc.Solution`. step: the number of updates that the average is
    after. snapshots: (checkpoint, average, its number of updates) of each coefficient.
    """

    solution: Solution
    step: int  # the number of updates after which the average is meant
    snapshots: list[tuple[str, str, int]]  # checkpoint, average, its number of updates


@_replacement.whole
def synthesize(
    directory: Path,
    out: Path,
    *,
    target: DecayLike | str | ArrayLike,
    step: int | None = None,
    recorded: Mapping[str, DecayLike | str] | None = None,
    every: int = 1,
    start: int = 0,
    clock: str | None = None,
    rcond: float | None = None,
    at: str | None = None,
    dtype: DTypeLike | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    report: Report = _restore.log_warning,
) -> Synthesis:
    """Synthesizes an average that was not recorded, from snapshots of others that were.

    The checkpoints of a run hold averages of known decays; `posthoc.solve_recorded` says
    how to combine them. The name of an average tells its decay, as that of a member of an
    `optax.named_chain` called "power:0.05" or "ema:0.999"; `recorded` tells the decays of
    others. The checkpoints tell how many updates an average has had, and the time on its
    `clock`; between two checkpoints all steps are taken to be equally long.

    Args:
      directory: The directory of a CheckpointManager, or of checkpoints whose names end
        in numbers.
      out: Directory to make, as for `combine`.
      target: The average to make: a decay, its name such as "power:0.1" or "cosine:0.2",
        or the weight of every iterate, float [T+1].
      step: The number of updates after which the average is meant, at most the newest
        snapshot's. None: the newest snapshot's, or T.
      recorded: {name of an average, as for `get_average`: its decay, or the decay's
        name}. If given, no other averages are used.
      every, start: The arguments with which the recorded averages were made.
      clock: What a target that is a decay counts: the clock of an average in the
        checkpoints, as "tokens", or "steps". None: what the recorded averages count, if
        all of them count the same.
      rcond: As for `posthoc.solve`.
      at, dtype, force, progress: As for `combine`.
      report: As for `combine`; also called if the residual is over 10 %.

    Returns:
      A `Synthesis`. Look at the residual and the noise gain of its solution.

    Raises:
      FileNotFoundError, ValueError: As `combine` does; if there are no averages of known
        decays, or the checkpoints hold different ones.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt, jax.numpy as jnp, optax, tempfile, orbax.checkpoint as ocp
      >>> tx = optax.named_chain(
      ...     ("sgd", optax.sgd(0.1)),
      ...     ("power:0.05", emaopt.average_params(emaopt.power_decay(sigma_rel=0.05))),
      ...     ("power:0.1", emaopt.average_params(emaopt.power_decay(sigma_rel=0.1))),
      ... )
      >>> params, run = {"w": jnp.ones(2)}, tempfile.mkdtemp()
      >>> opt_state = tx.init(params)
      >>> with ocp.CheckpointManager(run) as manager:
      ...     for step in range(1, 41):
      ...         updates, opt_state = tx.update(params, opt_state, params)
      ...         params = optax.apply_updates(params, updates)
      ...         if step % 4 == 0:
      ...             state = {"params": params, "opt_state": opt_state}
      ...             saved = manager.save(step, args=ocp.args.StandardSave(state))
      >>> made = synthesize(run, run + "/wide", target="power:0.15")
      >>> print(len(made.snapshots), made.solution.residual < 0.05)
      20 True

    References:
      Karras et al., 2024, §3.2, https://arxiv.org/abs/2312.02696
    """
    return synthesized(
        "synthesize",
        directory,
        out,
        target=target,
        step=step,
        recorded=recorded,
        every=every,
        start=start,
        clock=clock,
        rcond=rcond,
        at=at,
        dtype=dtype,
        force=force,
        progress=progress,
        report=report,
    )


def synthesized(
    name: str,
    directory: Path,
    out: Path,
    *,
    target: DecayLike | str | ArrayLike,
    step: int | None,
    recorded: Mapping[str, DecayLike | str] | None,
    every: int,
    start: int,
    clock: str | None,
    report: Report,
    at: str | None = None,
    rcond: float | None = None,
    dtype: DTypeLike | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Synthesis:
    """`synthesize`, for the function of that name."""
    check_merging(name, out, at, dtype, force, progress, report)
    check_readable(name, "directory", directory)
    check_recorded(name, recorded, every, start, step, clock)
    if rcond is not None:
        check_number(name, "rcond", rcond, 0)
    # A target that is no profile is refused before any checkpoint is opened.
    _target(name, target, 1)
    found, _ = _selection.in_order(name, [directory], None, report)
    decays = {n: _decay(name, d) for n, d in (recorded or {}).items()}
    names: dict[str, DecayLike] = {}
    snapshots: dict[str, list[Snapshot]] = {}
    first = None
    # One snapshot of each average in each checkpoint: all must hold the same averages.
    for path in found:
        files = _sources.open_source(name, path, at=at)
        averages = _known(name, files, decays)
        if first is None:
            first, names = files.path, {n: decay for n, (decay, _) in averages.items()}
        if averages.keys() != names.keys():
            raise ValueError(
                f"{name}: {first} and {files.path} differ: averages of known decay are "
                f"{', '.join(names)} in the one and {', '.join(averages)} in the other."
            )
        for n, (_, one) in averages.items():
            snapshots.setdefault(n, []).append(snapshot(name, files, one))
    times = {
        n: timeline(name, n, names[n], taken, start) for n, taken in snapshots.items()
    }
    options = {
        n: Recorded(
            names[n],
            [one.updates for one in taken],
            every=every,
            start=start,
            debias=taken[0].average.debias,
            units=times[n].units,
        )
        for n, taken in snapshots.items()
    }
    newest = max(taken[-1].updates for taken in snapshots.values())
    if step is not None and not 0 <= step <= newest:
        raise Unknown(
            f"{name}: step must be in [0, {newest}], up to the newest snapshot's, got "
            f"{step}.",
            "step",
        )
    time = chosen_timeline(name, times, clock)
    if clock not in (None, STEPS) and not _is_decay(target):
        raise Unknown(
            f"{name}: clock={clock!r} is for a target that is a decay; {target!r} weighs "
            "steps.",
            "clock",
        )
    wanted = _target(name, target, newest if step is None else step, time.units)
    solution = solve_recorded(list(options.values()), wanted, rcond=rcond)
    if solution.residual > _FAR:
        report(
            f"{name}: the profile got is {solution.residual:.0%} off the one wanted. "
            "More snapshots, recorded averages of a nearer width, or the step of a "
            "snapshot would bring it nearer."
        )
    sources = [
        (path, n, one.updates)
        for n in snapshots
        for path, one in zip(found, snapshots[n], strict=True)
    ]
    # Oldest first: the last one gives the leaves that are not averaged.
    order = sorted(range(len(sources)), key=lambda i: sources[i][2])
    chosen = {}
    for path, n, _ in sources:
        chosen[path, n] = _selection.select(name, path, n, at)
    _merge.combined(
        name,
        [chosen[sources[i][:2]] for i in order],
        solution.coefficients[order],
        out,
        dtype=dtype,
        force=force,
        record={
            "target": target if isinstance(target, (str, float)) else repr(target),
            "step": len(wanted) - 1,
            "clock": time.clock or STEPS,
            "weights": f"the averages of {', '.join(snapshots)}",
            "averages": [sources[i][1] for i in order],
            "residual": solution.residual,
            "noise_gain": solution.noise_gain,
        },
        progress=progress,
        report=report,
    )
    said = [(str(path), n, count) for path, n, count in sources]
    return Synthesis(solution, len(wanted) - 1, said)


def check_recorded(
    function: str,
    recorded: Mapping[str, DecayLike | str] | None,
    every: int,
    start: int,
    step: int | None,
    clock: str | None,
) -> None:
    """Raises unless the arguments can say what was recorded, and where to end."""
    check_mapping(function, "recorded", recorded, optional=True)
    for decay in (recorded or {}).values():
        _decay(function, decay)
    check_integer(function, "every", every, 1)
    check_integer(function, "start", start, 0)
    if step is not None:
        check_integer(function, "step", step, 0)
    check_text(function, "clock", clock, optional=True)


def _decay(function: str, decay: DecayLike | str) -> DecayLike:
    """The decay that an argument is or names, or an error of the function."""
    try:
        decay = decay_of(decay) if isinstance(decay, str) else decay
        check_decay(function, decay)
        return decay
    except BadProfile as error:
        raise named(function, error) from None


def _known(
    function: str, files: _files.Files, decays: Mapping[str, DecayLike]
) -> dict[str, tuple[DecayLike, _selection.Average]]:
    """The averages of known decay in a checkpoint: {name: (decay, average)}."""
    averages = _selection.averages_in(files)
    if not averages:
        raise ValueError(
            f"{function}: {files.path} holds no average, and there is nothing to make "
            "another from. `average` merges checkpoints of raw weights."
        )
    found = {}
    for name, decay in decays.items():
        # A whole name goes before one name on the way.
        fitting = [a for a in averages if name == "/".join(a.names)] or [
            a for a in averages if name in a.names
        ]
        if len(fitting) != 1:
            count = "several averages" if fitting else "no average"
            raise Unknown(
                f"{function}: {files.path} has {count} of the name {name!r}; it has "
                f"{_listed(averages)}.",
                "recorded",
            )
        found["/".join(fitting[0].names)] = decay, fitting[0]
    if not decays:
        for one in averages:
            if (spec := _selection.decay_said(one.names)) is not None:
                found["/".join(one.names)] = decay_of(spec), one
    if not found:
        raise advised(
            ValueError,
            f"{function}: {files.path} has no average whose name says its decay, such as "
            f"'power:0.1' in an optax.named_chain; it has {_listed(averages)}.",
            "Say which is what with recorded={name: decay}.",
            "Say which is what with --recorded NAME=DECAY.",
        )
    return found


def _listed(averages: Sequence[_selection.Average]) -> str:
    return ", ".join(repr("/".join(a.names)) for a in averages)


def _is_decay(target: DecayLike | str | ArrayLike) -> bool:
    """Whether a target is a decay, which may count time, and no weights of steps."""
    if isinstance(target, str):
        return not is_annealing(target)
    return callable(target) or isinstance(target, (float, int))


def _target(
    function: str,
    target: DecayLike | str | ArrayLike,
    step: int,
    units: np.ndarray | None = None,
) -> np.ndarray:
    """The weights of all iterates in the average to make, float64 [T+1]."""
    decay: Any = target
    try:
        if isinstance(target, str):
            if units is None or is_annealing(target):
                return weights_of(target, step)
            decay = decay_of(target)
            if not getattr(decay, "of_time", True):
                raise Unknown(
                    f"{function}: {target!r} is a decay of steps, and the recorded "
                    "averages have a clock. Say clock='steps'.",
                    "clock",
                )
    except BadProfile as error:
        raise named(function, error) from None
    if isinstance(target, (list, tuple)) or getattr(target, "ndim", 0):
        return checked_weights(function, target, "target")
    units = None if units is None else units[:step]
    taken = shares_taken(
        function, decay, step, every=1, start=0, debias=False, units=units
    )
    return weights_of_shares(taken)
