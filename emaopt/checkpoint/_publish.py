"""Averages on their way to processes that serve them, while training goes on.

Each version is a checkpoint of its own, directory/<version>, which is there whole or not
at all. A reader takes the newest one; of those before it a few stay, for readers that are
still at them.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from emaopt._beside import as_present, check_served, names_beside, whole_trees
from emaopt._checks import check_integer, check_json
from emaopt._names import joined, nested, num_common, outermost
from emaopt._optimizer_states import Tree
from emaopt._output import is_url, naming
from emaopt._paths import check_writable
from emaopt._places import Choice, Ways, check_choices
from emaopt._types import DTypeLike, Json, Leaf, Path, PyTree
from emaopt.checkpoint import (
    _checksums,
    _completion,
    _files,
    _merge,
    _record,
    _replacement,
    _trees,
)
from emaopt.checkpoint._files import Names
from emaopt.checkpoint._orbax import CUSTOM, STEP

_log_warning = logging.getLogger("emaopt").warning
_REMOVED = ".removed"  # the end of the names of versions that are being removed


def publish(
    directory: Path,
    state: PyTree,
    *,
    name: Choice = None,
    params: Ways = None,
    served: Mapping[str, PyTree] | None = None,
    dtype: DTypeLike | None = None,
    custom_metadata: Json | None = None,
    max_to_keep: int = 3,
) -> int:
    """Publishes the averages of a training state as a new version, for `watch`.

    Written is what a reader serves and nothing else: the parameters under their names, as
    averages (EMA), those that are not averaged as they are, and the leaves that are in
    `served`. It returns when the version is complete. A kill leaves the versions before.

    Args:
      directory: Where the versions stand, as directory/1, directory/2 and so on: local,
        or any URL that Orbax takes. One run publishes there at a time.
      state, name, params, served: As for `save`.
      dtype: Floating dtype to cast floating arrays to. None: as they are, which is
        float32 for averages of bfloat16 parameters.
      custom_metadata: JSON-serializable metadata that readers get with the version, such
        as {"step": 1000}.
      max_to_keep: How many versions stay, the new one included. A reader needs no longer
        for one than for the publication of so many, or it starts over.

    Returns:
      The number of the version: one more than the newest one's.

    Raises:
      ValueError: As for `save`.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt, jax.numpy as jnp, optax, tempfile
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params = {"w": jnp.ones(2)}
      >>> directory = tempfile.mkdtemp()
      >>> publish(directory, {"params": params, "opt_state": tx.init(params)})
      1
      >>> with emaopt.checkpoint.watch(directory, params) as watching:
      ...     published = next(watching)
      >>> print(published.version, published.params["w"])
      1 [1. 1.]
    """
    function = "publish"
    check_writable(function, "directory", directory)
    check_choices(function, name, params)
    check_served(function, served)
    cast = _merge.caster(function, dtype)
    check_json(function, "custom_metadata", custom_metadata)
    for key in (_record.RECORD, _record.KEY):
        if key in (custom_metadata or {}):
            raise ValueError(
                f"{function}: custom_metadata[{key!r}] is where emaopt keeps its own "
                "record; take another key."
            )
    check_integer(function, "max_to_keep", max_to_keep, 1)
    state, places = _trees.served(function, state, name, params, beside=lambda: served)
    ways = [place.params for place in places if place.pairs]
    if not ways:
        raise ValueError(f"{function}: every parameter is masked out of the average.")
    whole = Tree(state)
    beside = [n for place in places for n in names_beside(state, place.average)]
    more = whole_trees(beside, whole.position)
    tree = nested({way: whole.node(way) for way in outermost(more.union(ways))})
    tree = jax.tree.map(lambda leaf: _cast(leaf, cast), tree)
    place = _files.absolute(directory)

    def number() -> int:
        return max(numbered(place), default=0) + 1

    version = int(_replacement.by_the_first(number, place))
    stored = _trees.without_empty(tree)
    # By their names there: a "value" may have lost the arrays beside it.
    names = _files.names_of(tree)
    told = whole_trees((as_present(n, names) for n in beside), names)
    kind = "center" if places[0].field == "center" else "averages"
    record = {
        "params": list(_shared(ways)),
        "beside": [list(way) for way in sorted(told)],
        "weights": f"the {kind} of {', '.join(joined(p.average) for p in places)}",
        "checkpoints": [],
        "coefficients": [],
        "converted": True,
        "checksums": _checksums.checksums(stored),
        **_trees.values_in(tree),
    }
    path = place / str(version)
    taking_place = _replacement.taking_place(
        function, path, force=False, report=_log_warning
    )
    with naming(path), taking_place as written:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = {_record.RECORD: _record.sealed(record)}
            checkpointer.save(
                written, stored, custom_metadata={**(custom_metadata or {}), **metadata}
            )
            checkpointer.wait_until_finished()

    def remove() -> None:
        _replacement.in_turn(path, lambda: _remove_old(place, version, max_to_keep))

    _replacement.by_the_first(remove, place)
    return version


def _cast(leaf: Leaf, cast: Any) -> Leaf:
    kind = getattr(leaf, "dtype", None)
    if kind is None or jnp.issubdtype(kind, jax.dtypes.extended) or cast(kind) == kind:
        return leaf
    return leaf.astype(cast(kind))


def _shared(ways: Sequence[Names]) -> Names:
    """The names that several ways have in common."""
    return ways[0][: min(num_common(ways[0], way) for way in ways)]


def numbered(directory: epath.Path) -> dict[int, epath.Path]:
    """What stands in a directory under a number, complete or not, in ascending order."""
    if not directory.exists():
        return {}
    found = {int(p.name): p for p in directory.iterdir() if p.name.isdecimal()}
    return dict(sorted(found.items()))


def is_complete(path: epath.Path) -> bool:
    """Whether a whole version stands at a path, and none that is being removed."""
    return (path / STEP).exists() and _replacement.complete(path)


def _is_published(path: epath.Path) -> bool:
    custom = _completion.json_of(path / STEP).get(CUSTOM)
    return isinstance(custom, dict) and _record.RECORD in custom


def _remove_old(directory: epath.Path, version: int, max_to_keep: int) -> None:
    """Removes all before the newest complete versions; no reader sees half of one."""
    before = {n: p for n, p in numbered(directory).items() if n <= version}
    # Whatever else has a number, such as a step of a run, is not ours.
    before = {n: p for n, p in before.items() if _is_published(p)}
    kept = [n for n, path in before.items() if is_complete(path)][-max_to_keep:]
    for path in [path for n, path in before.items() if n < kept[0]]:
        if is_url(directory):  # a rename would copy it there
            path.rmtree(missing_ok=True)
        else:
            path.rename(path.with_name(path.name + _REMOVED))
    _remove_left(directory)


def _remove_left(directory: epath.Path) -> None:
    """Removes versions that were being removed when their publisher died."""
    for path in directory.iterdir() if directory.exists() else ():
        if path.name.removesuffix(_REMOVED).isdecimal() and path.name.endswith(_REMOVED):
            path.rmtree(missing_ok=True)
