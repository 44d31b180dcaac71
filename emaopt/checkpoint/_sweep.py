"""Averages of several widths from one run, evaluated, and judged against a baseline."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from emaopt._checks import (
    check_callable,
    check_integer,
    check_number,
    check_sequence,
    check_text,
)
from emaopt._judging import Selection, select
from emaopt._paths import check_readable
from emaopt._profiles import BadProfile, weights_of
from emaopt._types import DecayLike, Path, PyTree, Report
from emaopt.checkpoint import _replacement, _restore, _selection
from emaopt.checkpoint._merge import Progress
from emaopt.checkpoint._synthesis import check_recorded, synthesized

# Read again, if a save replaces what it reads.
_synthesized = _replacement.whole(synthesized)


class Sweep(NamedTuple):
    """What `sweep` found; the first candidate is the baseline.

    candidates: their names. losses: float64 [candidates, examples]. residuals: how far
    each profile is from the one that was wanted, None for the baseline. selection: the
    `posthoc.Selection` among them. step: the number of updates they are after.
    """

    candidates: list[str]
    losses: np.ndarray
    residuals: list[float | None]
    selection: Selection
    step: int

    @property
    def chosen(self) -> str | None:
        """The name of the candidate that is better than the baseline, or None."""
        found = self.selection.chosen
        return None if found is None else self.candidates[found]


def sweep(
    directory: Path,
    evaluate: Callable[[PyTree], Any],
    targets: Sequence[str],
    *,
    baseline: str = "raw",
    recorded: Mapping[str, DecayLike | str] | None = None,
    every: int = 1,
    start: int = 0,
    clock: str | None = None,
    at: str | None = None,
    target: PyTree | None = None,
    level: float = 0.025,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    report: Report = _restore.log_warning,
) -> Sweep:
    """Synthesizes averages, evaluates each, and says whether one is worth shipping.

    The weights of the run's newest checkpoint are the baseline. The averages are made one
    after the other, in a temporary directory, and `posthoc.select` judges them: the best
    of many widths looks better than it is, so half of the examples choose, and the other
    half judge.

    Args:
      directory: The directory of a CheckpointManager, as for `synthesize`.
      evaluate: A function from the parameters to the loss of each held-out example,
        [examples], in the same order at every call.
      targets: The averages to make, by name: "power:0.1", "half-life:500", "cosine:0.2".
      baseline: Which weights of the newest checkpoint: "raw", "average", or an average's
        name.
      recorded, every, start, clock, at: As for `synthesize`.
      target: Parameters whose containers `evaluate` takes, as for `load_averaged`. None:
        nested dicts, as on disk.
      level, seed: As for `posthoc.select`.
      progress: Called with the number of evaluations done, and that of all.
      report: As for `synthesize`.

    Returns:
      A `Sweep`, whose `chosen` is None if no average proved better than the baseline.

    Raises:
      FileNotFoundError, ValueError: As `synthesize` and `posthoc.select` do; if
        `evaluate` returns no vector of finite losses, or of another length than before.
      TypeError: If an argument is of another kind.

    References:
      Karras et al., 2024, §3.2, https://arxiv.org/abs/2312.02696 (the sweep)
    """
    name = "sweep"
    check_readable(name, "directory", directory)
    check_callable(name, "evaluate", evaluate, 1)
    check_sequence(name, "targets", targets, "names of averages")
    if len(targets) == 0:
        raise ValueError(f"{name}: targets must name at least one average.")
    for one in targets:
        check_text(name, "each of targets", one)
        try:
            weights_of(one, 1)
        except BadProfile as error:
            raise ValueError(f"{name}: {error}") from None
    check_text(name, "baseline", baseline)
    check_recorded(name, recorded, every, start, None, clock)
    check_text(name, "at", at, optional=True)
    check_number(name, "level", level, 0, 0.5, above=True)
    check_integer(name, "seed", seed, 0)
    check_callable(name, "progress", progress, 2)
    check_callable(name, "report", report, 1)
    found, _ = _selection.in_order(name, [directory], None, report)
    total = len(targets) + 1
    progress(0, total)
    rows = [_losses(evaluate, _read(str(found[-1]), baseline, at, target), None)]
    residuals: list[float | None] = [None]
    last = 0
    for number, one in enumerate(targets, 1):
        progress(number, total)
        with tempfile.TemporaryDirectory() as own:
            made = _synthesized(
                name,
                directory,
                f"{own}/average",
                target=one,
                step=None,
                recorded=recorded,
                every=every,
                start=start,
                clock=clock,
                at=at,
                report=report,
            )
            params = _read(f"{own}/average", "served", None, target)
        rows.append(_losses(evaluate, params, rows[0].size))
        residuals.append(made.solution.residual)
        last = made.step
    progress(total, total)
    losses = np.stack(rows)
    selection = select(losses, level=level, seed=seed)
    return Sweep([baseline, *targets], losses, residuals, selection, last)


@_replacement.whole
def _read(path: str, which: str, at: str | None, target: PyTree | None) -> PyTree:
    found = _selection.select("sweep", path, which, at)
    return _restore.weights(
        "sweep", found.files, found.prefix, found.places, target, None, None
    )


def _losses(
    evaluate: Callable[[PyTree], Any], params: PyTree, count: int | None
) -> np.ndarray:
    found = evaluate(params)
    try:
        losses = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        losses = np.zeros(())
    if losses.ndim != 1 or not losses.size or not np.isfinite(losses).all():
        raise ValueError(
            "sweep: evaluate must return the finite loss of each example, [examples], "
            f"got {found!r:.200}."
        )
    if count is not None and losses.size != count:
        raise ValueError(
            f"sweep: evaluate returned {losses.size} losses, and {count} before: they "
            "must be of the same examples."
        )
    return losses
