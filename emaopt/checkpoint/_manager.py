"""CheckpointManager: the swap on the way to disk and back, in Orbax's stock handler."""

import dataclasses
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import orbax.checkpoint as ocp
from etils import epath

from emaopt._beside import Served, check_served, names_beside, put
from emaopt._checks import (
    check_callable,
    check_choice,
    check_flag,
    check_iterable,
    check_mapping,
    check_text,
)
from emaopt._places import Choice, Place, Ways, check_choices
from emaopt._swap import exchange
from emaopt._types import Json, PyTree, Report
from emaopt.checkpoint import (
    _checksums,
    _files,
    _orbax,
    _record,
    _replacement,
    _restore,
    _trees,
)
from emaopt.checkpoint._files import Names

Save: TypeAlias = ocp.args.StandardSave | ocp.args.PyTreeSave
Restore: TypeAlias = ocp.args.StandardRestore | ocp.args.PyTreeRestore
Measured: TypeAlias = Literal["raw", "averaged"] | None


def handler_registry(
    *,
    name: Choice = None,
    params: Ways = None,
    optional: bool = False,
    rename: Mapping[str, str] | None = None,
    items: Iterable[str] = (),
    metrics_of: Measured = None,
    served: Callable[[PyTree], Mapping[str, PyTree]] | None = None,
    report: Report | None = None,
    checksums: bool = True,
) -> ocp.handlers.CheckpointHandlerRegistry:
    """Makes a CheckpointManager serve the average; its calls stay as they are.

        manager = ocp.CheckpointManager(directory, handler_registry=handler_registry())
        manager.save(step, args=ocp.args.StandardSave(state))
        state = manager.restore(step, args=ocp.args.StandardRestore(state))

    PyTreeSave works as well, and so does Composite(params=StandardSave(...),
    train_state=PyTreeSave(...)), where the swap goes across the items. All options of the
    manager work: asynchronous saves, max_to_keep, best_fn, preemption. The files are
    those of Orbax's stock handlers, so a manager without the registry restores the served
    weights: the averages, under the parameters' names. PyTreeSave's save_args and
    PyTreeRestore's restore_args hold for the leaves that they are given for; transforms
    are refused.

    A manager with item_handlers of its own takes no registry. Swap before and after it:

        swapped = swap_state({"params": params, "train_state": train_state})
        args = {item: ocp.args.PyTreeSave(tree) for item, tree in swapped.items()}
        manager.save(
            step, args=ocp.args.Composite(**args), custom_metadata=metadata(swapped)
        )

    What to watch: each manager needs a registry of its own. An error in saving is raised
    by `manager.save`, or, if saves are asynchronous, by `wait_until_finished` and the
    next save. A run that adopts or drops an average keeps the registry, with
    optional=True, as long as it restores older steps.

    Args:
      name, params: As for `save`. In a Composite, keys begin with the item's name.
      optional: Save a state without an average as it is, in place of an error.
      rename: As for `restore`.
      items: Names of items, besides "default", that `manager.restore(step)` without
        arguments returns as they were saved, not as they are on disk.
      metrics_of: "raw" or "averaged": the weights that the metrics given to
        `manager.save` were measured on. It is recorded in
        `custom_metadata["emaopt"]["metrics_of"]` of each item.
      served: A function of the state that is saved, of a Composite as {item: tree}, which
        returns what else is served, as for `save`. It runs in each `manager.save`.
      report: As for `restore`; by default the warning function of the logger "emaopt".
      checksums: As for `save`, computed before `manager.save` returns. Arrays that
        save_args cast have none.

    Returns:
      A registry for `ocp.CheckpointManager(..., handler_registry=...)`.

    Raises:
      ValueError: If `metrics_of` is none of these. From the manager: as `save` and
        `restore` raise it.
      TypeError: If an argument is of another kind.

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
    check_choices("handler_registry", name, params)
    check_flag("handler_registry", "optional", optional)
    check_mapping("handler_registry", "rename", rename, optional=True, of_text=True)
    check_iterable("handler_registry", "items", items, "names")
    items = [*items]
    for item in items:
        check_text("handler_registry", "each of items", item)
    check_choice("handler_registry", "metrics_of", metrics_of, ("raw", "averaged", None))
    check_callable("handler_registry", "served", served, 1, optional=True)
    check_callable("handler_registry", "report", report, 1, optional=True)
    check_flag("handler_registry", "checksums", checksums)
    swapping = _Swapping(
        name,
        params,
        optional,
        metrics_of,
        report or _restore.log_warning,
        checksums,
        rename,
        served,
    )
    # One handler for all kinds of arguments: Orbax records one handler for each item.
    handler = ocp.StandardCheckpointHandler()
    swapping.saves = {
        ocp.args.StandardSave: handler.async_save,
        ocp.args.PyTreeSave: ocp.PyTreeCheckpointHandler().async_save,
    }
    _orbax.replace_methods(
        handler, async_save=swapping.async_save, restore=swapping.restore
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    # The entry None is for items of all other names.
    for item in (None, "default", *items):
        for args in (*swapping.saves, ocp.args.StandardRestore, ocp.args.PyTreeRestore):
            registry.add(item, args, handler)
    return registry


class _Step(NamedTuple):
    """A step that is being saved."""

    items: dict[str, Any]  # name of the item -> its `Save`
    save: str  # an id: on disk it tells its items from those of another save
    served: list[Served]  # what else is served, once it was made


class _Swapping:
    """The methods that stand in for the stock handler's."""

    def __init__(
        self,
        name: Choice,
        params: Ways,
        optional: bool,
        metrics_of: Measured,
        report: Report,
        checksums: bool,
        rename: Mapping[str, str] | None,
        served: Callable[[PyTree], Mapping[str, PyTree]] | None,
    ):
        self._name, self._params, self._optional = name, params, optional
        self._rename, self._served = rename, served
        self._metrics_of, self._report = metrics_of, report
        self._checksums = checksums
        self.saves: dict[type, Callable[..., Awaitable[Any]]] = {}  # by their args
        self._steps: dict[str, _Step] = {}  # by the directory of the step

    def async_save(
        self,
        directory: epath.Path,
        item: PyTree = None,
        save_args: PyTree = None,
        args: Save | None = None,
    ) -> Awaitable[Any]:
        """Notes the item, and returns the coroutine that saves it.

        Orbax calls this for all items of a step before it runs any of the coroutines.
        Each coroutine therefore knows the whole step.
        """
        args = args or ocp.args.StandardSave(item, save_args)
        new = _Step({}, secrets.token_hex(8), [])
        step = self._steps.setdefault(str(directory.parent), new)
        key = directory.name.partition(_orbax.UNFINISHED)[0]
        step.items[key] = args
        return self._save_item(directory, key, step)

    async def _save_item(self, directory: epath.Path, key: str, step: _Step) -> Any:
        # All items are noted now. A step that is kept would keep its arrays in memory.
        self._steps.pop(str(directory.parent), None)
        # Where Orbax renames finished steps, this one still has its temporary name.
        in_place = _orbax.UNFINISHED not in directory.parent.name
        try:
            args = self._swapped(key, step, in_place)
            return await self.saves[type(args)](directory, args=args)
        except Exception as error:
            # Raised here, it would leave a thread of Orbax waiting for minutes, and the
            # process could not end.
            return [_Failed(error)]

    def _swapped(self, key: str, step: _Step, in_place: bool) -> Save:
        """The arguments that save an item with averages under the parameters' names."""
        args = step.items[key]
        items = {k: _trees.plain(args.item) for k, args in step.items.items()}
        state, prefix = _as_one(items)
        function = "CheckpointManager.save"
        state, places = _trees.served(
            function,
            state,
            self._name,
            self._params,
            self._optional,
            lambda: self._beside(step),
        )
        if not places:
            return args  # no average: as it is
        beside = names_beside(state, places[0].average)
        item = _trees.without_empty(state[key] if prefix else state)
        more: Json = {"save": step.save} if prefix else {}
        if in_place:
            more[_record.IN_PLACE] = True
        if self._metrics_of is not None:
            more["metrics_of"] = self._metrics_of
        each = args.save_args
        # save_args are like the user's tree, whose leaves have changed places since.
        if each is not None and not places[0].swapped:
            each = _exchanged_args(
                each, key if prefix else None, step.items, places, beside
            )
        if self._checksums:
            told = _files.names_of(each).items()
            cast = {names for names, one in told if getattr(one, "dtype", None)}
            kept = [x for x in _files.names_of(item).items() if x[0] not in cast]
            # Orbax casts the others on their way: their bits on disk are not these.
            more["checksums"] = _checksums.of_leaves(kept, together=True)
        marker = _trees.marker(function, state, places, **more)
        return dataclasses.replace(
            args,
            item=item,
            save_args=each,
            custom_metadata={**(args.custom_metadata or {}), **marker},
        )

    def _beside(self, step: _Step) -> Served:
        """What else is served, of the user's own trees; made once for all items."""
        if self._served is None:
            return None
        if not step.served:
            state, _ = _as_one({k: args.item for k, args in step.items.items()})
            made = self._served(state)
            check_served("CheckpointManager.save", made)
            step.served.append(made)
        return step.served[0]

    @_replacement.whole
    def restore(
        self,
        directory: epath.Path,
        item: PyTree = None,
        restore_args: PyTree = None,
        args: Restore | None = None,
    ) -> PyTree:
        """Restores an item with raw parameters, and from its step what else it needs."""
        target = item if args is None else args.item
        # The step is opened, not the item, which may be called `default` beside others.
        files = _files.open_files(
            "CheckpointManager.restore",
            directory.parent,
            at=self._params if isinstance(self._params, str) else None,
        )
        whole = () in files.items
        scope: Names = () if whole else (directory.name,)
        if getattr(args, "transforms", None) or getattr(
            args, "legacy_transform_fn", None
        ):
            raise ValueError(
                f"CheckpointManager.restore: {directory}: PyTreeRestore(transforms=...) "
                "would act on the averages. Give the target as item, and "
                "partial_restore=True to leave out what it lacks."
            )
        restore_args = getattr(args, "restore_args", restore_args)
        if target is None:
            if restore_args is None:
                return _restore.as_saved(files, scope)
            target = _restore.with_other_items(files)
            target = target[directory.name] if scope else target
        if restore_args is not None:
            target = jax.tree.map(_trees.as_told, target, restore_args)
        state = target
        if not whole:
            state = _restore.with_other_items(files, directory.name, target)
        state = _restore.restored(
            files,
            state,
            ignore_extra=getattr(args, "partial_restore", False),
            report=self._report,
            scope=scope,
            fallback=getattr(args, "fallback_sharding", None),
            params=self._params,
            rename=self._rename,
        )
        return state if whole else state[directory.name]


def _exchanged_args(
    each: PyTree,
    key: str | None,
    step: dict[str, Any],
    places: list[Place],
    beside: Iterable[Names],
) -> PyTree:
    """The save_args of each leaf, where the leaf stands after the exchange."""
    if key is not None:
        items = {k: _trees.plain(args.item) for k, args in step.items()}
        each = jax.tree.map(lambda _: ocp.SaveArgs(), items) | {key: each}
    own = _files.names_of(each)
    each = exchange(each, places)
    each = put(each, places[0], {names: own[names] for names in beside})
    return each if key is None else each[key]


class _Failed:
    """A future of Orbax's that raises: in save, or wait_until_finished if async."""

    def __init__(self, error: Exception):
        self.error = error

    def result(self, timeout: float | None = None) -> None:
        del timeout
        raise self.error


def _as_one(items: dict[str, PyTree]) -> tuple[PyTree, bool]:
    """The items of a step as one tree, and whether the tree has their names as keys."""
    if len(items) == 1 and (key := next(iter(items))) in _orbax.WHOLE:
        return items[key], False
    return items, True
