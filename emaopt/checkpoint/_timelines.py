"""What time it was at each step of a run, by the averages in its checkpoints."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from emaopt._clock import check_of_time, time_of
from emaopt._names import Names, Unknown
from emaopt._types import DecayLike
from emaopt._weights import check_num_steps
from emaopt.checkpoint import _files, _selection, _stream

STEPS = "steps"  # what an average without a clock counts


class Snapshot(NamedTuple):
    """An average in one of the checkpoints."""

    average: _selection.Average
    updates: int
    elapsed: float | None  # the time on its clock


class Timeline(NamedTuple):
    """The time that each step of a run took, on the clock of an average."""

    clock: str | None  # None: it counts steps
    units: np.ndarray | None  # float64 [T]; None for steps


def snapshot(function: str, files: _files.Files, one: _selection.Average) -> Snapshot:
    """An average of a checkpoint, with its count and its time, which are read."""
    updates = int(_read(function, files, one.counter, 0))
    time = time_of(_read(function, files, one.elapsed, 1)) if one.elapsed else None
    return Snapshot(one, updates, time)


def _read(function: str, files: _files.Files, names: Names, ndim: int) -> np.ndarray:
    """An array of `ndim` dimensions, or the one that all copies of it are."""
    leaves = _stream.stored(function, files, [names])
    (value,) = next(_stream.prefetched([lambda: _stream.read(function, leaves)]))
    while value.ndim > ndim:  # a copy for each device of `jax.pmap`
        if not value.size or (value != value[:1]).any():
            raise ValueError(
                f"{function}: {files.path}: the copies of {'/'.join(names)} differ: "
                f"{value.tolist()}. Save one of them."
            )
        value = value[0]
    return value


def timeline(
    function: str, name: str, decay: DecayLike, taken: Sequence[Snapshot], start: int
) -> Timeline:
    """The time of each step, from those of an average's snapshots."""
    clocks = {one.average.elapsed[-1] if one.average.elapsed else None for one in taken}
    if len(clocks) > 1:
        both = " and ".join(sorted(clock or STEPS for clock in clocks))
        raise ValueError(f"{function}: {name} counts {both} in different checkpoints.")
    (clock,) = clocks
    if clock is None:
        return Timeline(None, None)
    check_of_time(function, f"{name}, which counts {clock},", decay)
    check_num_steps(function, max(one.updates for one in taken), 0)
    steps, times = [0, start], [0.0, 0.0]
    for one in taken:
        if one.updates > steps[-1]:
            steps.append(one.updates)
            times.append(one.elapsed or 0.0)
    return Timeline(clock, np.diff(np.interp(np.arange(steps[-1] + 1), steps, times)))


def chosen_timeline(
    function: str, times: Mapping[str, Timeline], clock: str | None
) -> Timeline:
    """The time on the clock of the target, of the averages' timelines by name."""
    known: dict[str, tuple[str, Timeline]] = {}  # clock -> what has counted longest
    for name, one in times.items():
        other, longest = known.setdefault(one.clock or STEPS, (name, one))
        if one.units is None or longest.units is None:
            continue  # steps
        both = min(longest.units.size, one.units.size)
        if not np.allclose(longest.units[:both], one.units[:both], rtol=1e-6):
            raise Unknown(
                f"{function}: {other} and {name} count {one.clock}, and say of the same "
                "updates that they took different times. Name averages of one timeline "
                "with recorded=.",
                "recorded",
            )
        if one.units.size > both:
            known[str(one.clock)] = name, one
    if clock is None and len(known) > 1:
        raise Unknown(
            f"{function}: the recorded averages count {' and '.join(sorted(known))}. Say "
            "with clock= which of these the target does.",
            "clock",
        )
    clock = next(iter(known)) if clock is None else clock
    if clock != STEPS and clock not in known:
        raise Unknown(
            f"{function}: no recorded average counts {clock!r}; they count "
            f"{', '.join(sorted(known))}.",
            "clock",
        )
    return known[clock][1] if clock in known else Timeline(None, None)
