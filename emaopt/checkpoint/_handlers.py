"""CheckpointManager: the swap on the way to disk and back, in Orbax's stock handler."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import orbax.checkpoint as ocp

from emaopt.checkpoint import _checksums, _files, _restoring, _trees
from emaopt.checkpoint._files import Names


def handler_registry(
    *,
    name: str | None = None,
    items: Iterable[str] = (),
    metrics_of: Literal["raw", "averaged"] | None = None,
    report: Callable[[str], Any] | None = None,
    checksums: bool = False,
) -> ocp.handlers.CheckpointHandlerRegistry:
    """Makes a CheckpointManager serve the average; its calls stay as they are.

        manager = ocp.CheckpointManager(directory, handler_registry=handler_registry())
        manager.save(step, args=ocp.args.StandardSave(state))
        state = manager.restore(step, args=ocp.args.StandardRestore(state))

    also with Composite(params=StandardSave(...), opt_state=StandardSave(...)), where the
    swap goes across the items, and whatever options the manager has: asynchronous saves,
    max_to_keep, best_fn, preemption. The files are those of Orbax's stock handler: a
    manager without the registry restores the averages under the parameters' names.

    What to watch: one registry for one manager; StandardSave and StandardRestore only;
    an error in saving comes from `manager.save`, or from `wait_until_finished` and the
    next save if saves are asynchronous. A run that has dropped its average needs no
    registry.

    Args:
      name: Which average, if the state holds several.
      items: Names of items, besides "default", that `manager.restore(step)` without
        arguments shall return as they were saved, not as they are on disk.
      metrics_of: Which weights the metrics given to `manager.save` were measured on; goes
        on record, in custom_metadata["emaopt"]["metrics_of"] of each item.
      report: As for `restore`; default the warning function of the logger "emaopt".
      checksums: As for `save`. They are computed before `manager.save` returns.

    Returns:
      A registry for `ocp.CheckpointManager(..., handler_registry=...)`.

    Raises:
      ValueError: If `metrics_of` is something else. From the manager: as `save` and
        `restore` do.

    Example:
      >>> import emaopt, jax.numpy as jnp, optax, tempfile
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5, zero_init=True)
      >>> state = {"params": jnp.ones(2), "opt_state": tx.init(jnp.ones(2))}
      >>> directory = tempfile.mkdtemp()
      >>> with ocp.CheckpointManager(
      ...     directory, handler_registry=handler_registry()
      ... ) as manager:
      ...     saved = manager.save(0, args=ocp.args.StandardSave(state))
      ...     restored = manager.restore(0, args=ocp.args.StandardRestore(state))
      >>> print(restored["params"])
      [1. 1.]
      >>> with ocp.CheckpointManager(directory) as manager:
      ...     print(manager.restore(0)["params"])
      [0. 0.]
    """
    if metrics_of not in (None, "raw", "averaged"):
        raise ValueError(
            "handler_registry: metrics_of must be 'raw', 'averaged' or None, got "
            f"{metrics_of!r}."
        )
    # An instance of the stock handler with two methods replaced, not a subclass: Orbax
    # writes a handler's type on disk and looks its arguments up by it, and a type of ours
    # would keep readers without emaopt out.
    handler = ocp.StandardCheckpointHandler()
    report = report or _restoring.log_warning
    swapping = _Swapping(handler, name, metrics_of, report, checksums)
    for method in ("async_save", "restore"):
        setattr(handler, method, getattr(swapping, method))
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in (None, "default", *items):
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    return registry


class _Swapping:
    """The methods that stand in for the stock handler's."""

    def __init__(
        self, handler: Any, name: Any, metrics_of: Any, report: Any, checksums: bool
    ):
        self._save = handler.async_save
        self._name, self._metrics_of, self._report = name, metrics_of, report
        self._checksums = checksums
        self._steps: dict[str, dict[str, Any]] = {}  # directory of step -> item -> args

    def async_save(
        self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None
    ) -> Any:
        """Notes the item, and returns the coroutine that saves it.

        Orbax calls this for all items of a step before it runs any of the coroutines, so
        each of them knows the whole step.
        """
        args = args or ocp.args.StandardSave(item, save_args)
        step = self._steps.setdefault(str(directory.parent), {})
        key = directory.name.partition(".orbax-checkpoint-tmp")[0]
        step[key] = args
        return self._save_item(directory, key, step)

    async def _save_item(self, directory: Any, key: str, step: dict[str, Any]) -> Any:
        self._steps.pop(str(directory.parent), None)
        try:
            item, marker = self._swapped_item(key, step)
        except ValueError as error:
            # Raised here, it would leave a thread of Orbax waiting for minutes.
            return [_Failed(error)]
        custom_metadata = {**(step[key].custom_metadata or {}), **marker}
        args = ocp.args.StandardSave(item, step[key].save_args, custom_metadata)
        return await self._save(directory, args=args)

    def _swapped_item(self, key: str, step: dict[str, Any]) -> tuple[Any, dict]:
        """The item as it goes to disk, and the marker."""
        state, prefix = _as_one({k: _trees.plain(args.item) for k, args in step.items()})
        state, where = _trees.served("CheckpointManager.save", state, self._name)
        marker = _trees.marker(state, where)
        if self._metrics_of is not None:
            marker[_files.KEY]["metrics_of"] = self._metrics_of
        item = _trees.without_empty(state[key] if prefix else state)
        if self._checksums:
            marker[_files.KEY]["checksums"] = _checksums.checksums(item)
        return item, marker

    def restore(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        target = item if args is None else args.item
        whole = directory.name in _files.WHOLE
        files = _files.open_files(
            "CheckpointManager.restore", directory if whole else directory.parent
        )
        scope: Names = () if whole else (directory.name,)
        if target is None:
            return _restoring.as_saved(files, scope)
        state = target
        if not whole:
            state = _restoring.with_other_items(files, directory.name, target)
        fallback = getattr(args, "fallback_sharding", None)
        state = _restoring.restored(
            files,
            state,
            report=self._report,
            scope=scope,
            fallback=fallback,
        )
        return state if whole else state[directory.name]


class _Failed:
    """A future of Orbax's that raises: in save, or wait_until_finished if async."""

    def __init__(self, error: ValueError):
        self.error = error

    def result(self, timeout: float | None = None) -> None:
        del timeout
        raise self.error


def _as_one(items: dict[str, Any]) -> tuple[Any, bool]:
    """The items of a step as one tree, and whether their names are a part of it."""
    if len(items) == 1 and (key := next(iter(items))) in _files.WHOLE:
        return items[key], False
    return items, True
