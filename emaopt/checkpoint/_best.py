"""The best weights of a run, by the metrics that its manager kept."""

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from emaopt._checks import check_choice, check_dtype, check_flag, check_text
from emaopt._leaves import opened
from emaopt._names import Unknown
from emaopt._paths import check_readable
from emaopt._reading import RAW
from emaopt._types import DTypeLike, Path, PyTree
from emaopt.checkpoint import (
    _completion,
    _files,
    _items,
    _orbax,
    _record,
    _replacement,
    _restore,
    _selection,
)

# What `handler_registry(metrics_of=)` calls the weights that were measured -> their view.
_MEASURED = {"raw": RAW, "averaged": "average"}


class Best(NamedTuple):
    """What `best` found; `load` reads the weights.

    step: the step's number. view: "raw", "average" or the average's name, as
    `emaopt.views` gives it. value: of the metric. path: the step's directory.
    """

    step: int
    view: str
    value: float
    path: str

    def load(
        self,
        *,
        target: PyTree | None = None,
        sharding: jax.sharding.Sharding | PyTree | None = None,
        dtype: DTypeLike | None = None,
        at: str | None = None,
        ignore_extra: bool = False,
    ) -> PyTree:
        """Loads exactly the weights that were measured.

        Args:
          target, sharding, at, ignore_extra: As for `load_averaged`.
          dtype: As for `load_averaged`. None: the target's, else the raw parameters',
            which is what `emaopt.views` gives.

        Returns:
          The parameters.

        Raises:
          FileNotFoundError, ValueError, TypeError: As for `load_averaged`.
        """
        check_dtype("Best.load", "dtype", dtype)
        check_text("Best.load", "at", at, optional=True)
        check_flag("Best.load", "ignore_extra", ignore_extra)
        target = opened(target)
        found = _selection.select("Best.load", self.path, self.view, at)
        raw = found
        if self.view != RAW:
            way = "/".join(found.prefix) or None
            raw = _selection.select("Best.load", self.path, RAW, way)
        present = _files.all_leaves(raw.files)
        kinds = {
            names: np.dtype(present[place].dtype)
            for names, place in raw.places.items()
            if hasattr(present[place], "dtype")
        }
        places = found.places
        if target is not None:
            # The target may lack a model's other variables, which have no average.
            needed = set() if ignore_extra else places.keys() - found.kept
            names = _restore.below_a_key(target).keys() | needed
            places = {n: place for n, place in places.items() if n in names}
        return _restore.weights(
            "Best.load",
            found.files,
            found.prefix,
            places,
            target,
            sharding,
            dtype,
            kinds,
        )


@_replacement.whole
def best(
    directory: Path, metric: str, *, mode: str = "min", view: str | None = None
) -> Best:
    """Finds the step and the weights of a run whose metric was best.

    The metrics are those that CheckpointManager keeps, one for each view of the weights:

        options = ocp.CheckpointManagerOptions(best_fn=lambda m: m["average/loss"])
        manager = ocp.CheckpointManager(directory, options, handler_registry=...)
        metrics = {
            f"{view}/loss": float(evaluate(weights))
            for view, weights in emaopt.views(opt_state, params).items()
        }
        manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)
        ...
        weights = checkpoint.best(directory, "loss").load()

    Raw weights and every average compete, unless `view` names some, so that what is
    shipped is what was measured. To choose among several by chance no more often than is
    stated, see `posthoc.select`.

    What to watch: Orbax keeps metrics only where its options have a best_fn, and throws
    them away else. With max_to_keep it keeps the steps that are best by best_fn, so let
    it be the metric and view that you will ask for; without max_to_keep it keeps all.

    Args:
      directory: The directory of a CheckpointManager: any run of Orbax's, with emaopt's
        handlers or without.
      metric: Its name behind the view: "loss" for "raw/loss" and "average/loss"; or one
        of these, for that view alone. Metrics without a view are those of the weights
        that `handler_registry(metrics_of=...)` recorded.
      mode: "min" or "max".
      view: Of which weights: "raw", "average" or an average's name. None: of any.

    Returns:
      A `Best(step, view, value, path)` with `load()`. Of equal values, the earliest step.

    Raises:
      FileNotFoundError: If there is no directory.
      ValueError: If no step has that metric, or it says not of which weights, or it is
        never a finite number.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt, jax.numpy as jnp, optax, orbax.checkpoint as ocp, tempfile
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params, run = {"w": jnp.full(2, 3.0)}, tempfile.mkdtemp()
      >>> opt_state = tx.init(params)
      >>> options = ocp.CheckpointManagerOptions(best_fn=lambda found: found["raw/loss"])
      >>> with ocp.CheckpointManager(run, options=options) as manager:
      ...     for step in range(5):
      ...         updates, opt_state = tx.update({"w": jnp.ones(2)}, opt_state, params)
      ...         params = optax.apply_updates(params, updates)
      ...         views = emaopt.views(opt_state, params)
      ...         losses = {v: float(jnp.abs(x["w"]).sum()) for v, x in views.items()}
      ...         state = {"params": params, "opt_state": opt_state}
      ...         saved = manager.save(
      ...             step,
      ...             args=ocp.args.StandardSave(state),
      ...             metrics={f"{view}/loss": loss for view, loss in losses.items()},
      ...         )
      >>> found = best(run, "loss")
      >>> print(found.step, found.view, found.value, found.load()["w"])
      2 raw 0.0 [0. 0.]
    """
    check_readable("best", "directory", directory)
    check_text("best", "metric", metric)
    check_choice("best", "mode", mode, ("min", "max"))
    check_text("best", "view", view, optional=True)
    sign = 1 if mode == "min" else -1
    steps = measured("best", _files.absolute(directory))
    rows = [
        (sign * value, step, of, path)
        for step, (path, metrics) in steps.items()
        for of, value in _views_of(path, metrics, metric)
        if math.isfinite(value) and view in (None, of)
    ]
    if not rows:
        raise _without(directory, steps, metric, view)
    for of, path in {of: path for *_, of, path in rows}.items():
        _check_view(of, path, metric.removeprefix(f"{of}/"))
    value, step, of, path = min(rows, key=lambda row: row[:2])
    return Best(step, of, sign * value, str(path))


@_replacement.whole
def metrics(directory: Path) -> dict[int, dict[str, float]]:
    """Reads the metrics that CheckpointManager kept with the steps of a run.

    Args:
      directory: The directory of a CheckpointManager.

    Returns:
      {step: {name: value}} of all finished steps, in their order; a step without metrics
      has an empty dict.

    Raises:
      FileNotFoundError: If there is no directory.
      ValueError: If it has no finished step, or a file of metrics is damaged.
      TypeError: If `directory` is no path.

    Example:
      >>> import jax.numpy as jnp, orbax.checkpoint as ocp, tempfile
      >>> run = tempfile.mkdtemp()
      >>> options = ocp.CheckpointManagerOptions(best_fn=lambda found: found["raw/loss"])
      >>> with ocp.CheckpointManager(run, options=options) as manager:
      ...     args = ocp.args.StandardSave({"w": jnp.ones(2)})
      ...     saved = manager.save(7, args=args, metrics={"raw/loss": 0.5})
      >>> print(metrics(run))
      {7: {'raw/loss': 0.5}}
    """
    check_readable("metrics", "directory", directory)
    found = measured("metrics", _files.absolute(directory))
    if not found:
        raise ValueError(f"metrics: {directory} has no finished step of a manager.")
    return {step: one for step, (_, one) in found.items()}


def is_run(path: Path) -> bool:
    """Whether a path is a directory of steps, and no checkpoint itself."""
    directory = _files.absolute(path)
    return (
        directory.is_dir()
        and not _items.is_checkpoint(directory)
        and bool(_selection.steps_in("inspect", directory)[0])
    )


Measured = dict[int, tuple[epath.Path, dict[str, float]]]


def measured(function: str, directory: epath.Path) -> Measured:
    """{step: (its directory, its metrics)} of all finished steps of a run."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{function}: {directory} is no directory of a CheckpointManager."
        )
    steps, _ = _selection.steps_in(function, directory)
    return {step: (path, _metrics(function, path)) for step, path in steps.items()}


def _metrics(function: str, path: epath.Path) -> dict[str, float]:
    """The metrics of a step: numbers alone, by name."""
    file = path.joinpath(*_orbax.METRICS)
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{function}: {file} is damaged: it is no JSON.") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{function}: {file} is damaged: it has no metrics by name.")
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _views_of(
    path: epath.Path, metrics: Mapping[str, float], metric: str
) -> list[tuple[str, float]]:
    """(view, value) of each view of which a step has the metric."""
    end = f"/{metric}"
    found = [(n.removesuffix(end), x) for n, x in metrics.items() if n.endswith(end)]
    if not found and metric in metrics:
        view = _named_view(path, metric) or _recorded_view(path)
        view = view or metric.rpartition("/")[0]  # to be refused by its name
        found = [(view, metrics[metric])] * bool(view)
    return found


def _named_view(path: epath.Path, metric: str) -> str | None:
    """The view that a metric's whole name begins with, as in "average/val/loss"."""
    ends = [i for i, letter in enumerate(metric) if letter == "/"]
    # Of two, the longer one says no more: it leads to the only average below the shorter.
    return next((metric[:i] for i in ends if _has_view(path, metric[:i])), None)


def _has_view(path: epath.Path, view: str) -> bool:
    try:
        _selection.select("best", str(path), view)
    except ValueError:  # none of that name, or several; `_check_view` says which
        return False
    return True


def _check_view(view: str, path: epath.Path, metric: str) -> None:
    """Raises unless a checkpoint has the weights that a metric is said to be of."""
    try:
        _selection.select("best", str(path), view)
    except Unknown as error:
        first, _, rest = view.rpartition("/")
        advice = "Metrics begin with the name of a view, as emaopt.views gives it: 'raw/"
        advice += f"{metric}', 'average/{metric}'."
        if first:  # "raw/val" of "raw/val/loss"
            advice = (
                f"If {view!r} is a part of the metric's name, say metric="
                f"{rest + '/' + metric!r}."
            )
        raise Unknown(
            f"best: the metric {view + '/' + metric!r} is of no weights in {path}: "
            f"{error} {advice}",
            "metric",
        ) from None


def _recorded_view(path: epath.Path) -> str | None:
    """The view that metrics without one are of, by emaopt's record in the items."""
    for item in path.iterdir():
        custom = _completion.json_of(item / _orbax.ITEM).get(_orbax.CUSTOM) or {}
        record = custom.get(_record.KEY)
        if isinstance(record, dict) and "metrics_of" in record:
            return _MEASURED.get(record["metrics_of"])
    return None


def _without(
    directory: Path, steps: Measured, metric: str, view: str | None
) -> ValueError:
    names = sorted({name for _, metrics in steps.values() for name in metrics})
    where = f"best: {directory}"
    if not steps:
        return ValueError(f"{where} has no finished step of a CheckpointManager.")
    if not names:
        return ValueError(
            f"{where} has {len(steps)} steps and no metrics. CheckpointManager keeps "
            "what is given to manager.save(metrics=) only if its options have a best_fn: "
            'ocp.CheckpointManagerOptions(best_fn=lambda found: found["average/loss"]).'
        )
    if view is not None and (of := {one for one in names if one.endswith(f"/{metric}")}):
        return Unknown(
            f"{where} has no finite value of the metric {metric!r} of the view {view!r}; "
            f"it has {', '.join(map(repr, sorted(of)))}.",
            "view",
        )
    if metric in names:
        return ValueError(
            f"{where} has the metric {metric!r}, and nothing says of which weights. Give "
            f"manager.save one for each view, as 'raw/{metric}' and 'average/{metric}' "
            "(emaopt.views), or say handler_registry(metrics_of=...)."
        )
    if any(name.endswith(f"/{metric}") for name in names):
        return ValueError(f"{where} has no finite value of the metric {metric!r}.")
    return Unknown(
        f"{where} has no metric {metric!r}; it has {', '.join(map(repr, names))}.",
        "metric",
    )
