"""A reader of published versions: the newest one, whole, on the reader's own devices."""

import dataclasses
import logging
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding

from emaopt._beside import as_present, check_served, leaves_below
from emaopt._checks import check_callable, check_number
from emaopt._leaves import opened
from emaopt._likeness import Likeness, likeness
from emaopt._names import is_below, joined, leaves_with_keys, split
from emaopt._paths import check_readable
from emaopt._types import Json, Leaf, Path, PyTree, Report
from emaopt.checkpoint import (
    _arrays,
    _completion,
    _files,
    _match,
    _read,
    _record,
    _replacement,
    _trees,
)
from emaopt.checkpoint._files import Names
from emaopt.checkpoint._orbax import CUSTOM, STEP
from emaopt.checkpoint._publish import is_complete, numbered

_log_warning = logging.getLogger("emaopt").warning
_ATTEMPTS = 5  # to read a version that may be removed meanwhile, or is damaged


class Published(NamedTuple):
    """A version that `watch` has read."""

    version: int
    params: PyTree  # in the containers, dtypes and places of `like`
    served: dict[str, PyTree]  # what was asked for beside them, by its keys
    custom_metadata: Json  # what its publisher gave to readers
    path: str  # the checkpoint that it was read from


class Watch:
    """What `watch` returns: an iterator over the versions in a directory."""

    def __init__(
        self,
        directory: Path,
        like: PyTree,
        served: Mapping[str, PyTree],
        poll_seconds: float,
        report: Report,
    ):
        self._directory = _files.absolute(directory)
        self._poll_seconds, self._report = poll_seconds, report
        # What the arrays are like, without the arrays: the reader's first weights would
        # stay in memory beside the two versions.
        self._like = jax.tree.map(_like, like)
        self._served = {k: jax.tree.map(_like, x) for k, x in served.items()}
        self._last: _replacement.Identity = None  # of the version that was read last
        self._failures: dict[_replacement.Identity, int] = {}  # to read a version
        self._closed = threading.Event()

    def __iter__(self) -> "Watch":
        return self

    def __next__(self) -> Published:
        """Waits for a version that was not read yet, and reads it."""
        while not self._closed.is_set():
            if (published := self.poll()) is not None:
                return published
            self._closed.wait(self._poll_seconds)
        raise StopIteration

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the iteration, also from another thread that waits in it."""
        self._closed.set()

    def poll(self) -> Published | None:
        """Reads the newest version, or returns None if it was the last one that was read.

        Raises:
          ValueError: If the version has other names, shapes or kinds of numbers than
            `like`, or not what is `served`. Call it again for the next version.
        """
        for left in reversed(range(_ATTEMPTS)):
            path, found = self._newest()
            if path is None or found == self._last:
                return None
            try:
                published = self._read(path)
            except (OSError, ValueError) as error:
                # Its publisher may have removed it meanwhile; there is a newer one then.
                if left and _replacement.identity(path) != found:
                    continue
                if isinstance(error, _Misfit):
                    self._last = found
                    raise ValueError(str(error)) from None
                self._failures[found] = self._failures.get(found, 0) + 1
                if self._failures[found] == 1:
                    self._report(f"{error} It waits for another version.")
                return None
            self._last = found
            return published
        return None

    def _newest(self) -> tuple[epath.Path | None, _replacement.Identity]:
        """The newest version that is not known to be damaged."""
        for path in reversed(numbered(self._directory).values()):
            try:
                found = _replacement.identity(path) if is_complete(path) else None
            except OSError:  # removed while it was looked at
                continue
            if found and self._failures.get(found, 0) < _ATTEMPTS:
                return path, found
        return None, None

    def _read(self, path: epath.Path) -> Published:
        files = _files.open_files("watch", path, lazy=True)
        if files.combination is None:
            raise _Misfit(f"watch: {path} was not published by checkpoint.publish.")
        plans, likes = self._wanted(files)
        values = _read.read("watch", files, plans)
        try:
            for n, (name, plan) in plans.items():
                _trees.check_kinds("watch", path, {name: values[n]}, {name: plan})
        except ValueError as error:
            raise _Misfit(str(error)) from None
        # One after the other, so that an array of NumPy's goes when its copy is there.
        made = {
            n: like.made(values.pop(n) if n in values else _trees.zeros(like.plan))
            for n, like in likes.items()
        }
        filled = {
            key: jax.tree.unflatten(
                jax.tree.structure(tree), [x for n, x in made.items() if n[0] == key]
            )
            for key, tree in {"": self._like, **self._served}.items()
        }
        custom = _completion.json_of(path / STEP).get(CUSTOM) or {}
        return Published(
            int(path.name),
            filled.pop(""),
            filled,
            {k: value for k, value in custom.items() if k != _record.RECORD},
            str(path),
        )

    def _wanted(
        self, files: _files.Files
    ) -> tuple[dict[Names, tuple[Names, Leaf]], dict[Names, "_Like"]]:
        """What to read as what, and what it is to be like, by key and name."""
        assert files.combination is not None
        params = tuple(files.combination["params"])
        trees = {
            key: (as_present(split(key), files.saved), like)
            for key, like in self._served.items()
        }
        trees[""] = params, self._like
        # Here, so that a damaged file does not pass for another shape.
        with _files.explained("watch", files.path):
            _arrays.open_all(
                leaf
                for names, leaf in files.saved.items()
                if any(is_below(names, way) for way, _ in trees.values())
            )
        ways = [tuple(one) for one in files.combination.get("beside", ())]
        beside = {n for n in files.saved if any(is_below(n, way) for way in ways)}
        plans: dict[Names, tuple[Names, Leaf]] = {}
        likes: dict[Names, _Like] = {}
        for key, (way, tree) in trees.items():
            own = dict(leaves_below(way, tree, files.saved))
            full = {n: x.plan for n, x in own.items() if not _trees.is_empty(x.plan)}
            # `like` may leave out what goes with the parameters, and the others these.
            there = {
                n: leaf
                for n, leaf in files.saved.items()
                if is_below(n, way) and (n in own or (n in beside) == bool(key))
            }
            try:
                _match.check_fit("watch", files.path, full, there)
            except ValueError as error:
                raise _Misfit(str(error)) from None
            likes |= {(key, *n): like for n, like in own.items()}
            plans |= {(key, *n): (n, plan) for n, plan in full.items()}
        return plans, likes


def watch(
    directory: Path,
    like: PyTree,
    *,
    served: Mapping[str, PyTree] | None = None,
    poll_seconds: float = 1.0,
    report: Report = _log_warning,
) -> Watch:
    """Reads the versions that `publish` writes to a directory, as they come.

        with watch(directory, params) as watching:
            for published in watching:  # in a thread, beside a server
                weights = published.params

    Each is checked by its checksums and delivered whole: read to the end, in the dtypes
    and on the devices of `like`, so that a compiled function takes the next version as it
    took the one before. What was published in between is left out. Memory holds the
    version in use and the one that is being read; drop the old one then.

    The newest version that stands in the directory counts: after it was removed, as to
    take it back, the one before it is delivered again. One that cannot be read is
    reported, tried at the next polls, and after five times passed over.

    Args:
      directory: Where `publish` writes; it may not exist yet.
      like: Parameters whose containers, shapes, dtypes and shardings the result takes:
        arrays, or `jax.ShapeDtypeStruct`. A structure without a sharding goes to the
        default device. Arrays that no device was chosen for (`committed` is False) and
        weak types are like that again. Parameters among which something is `served` may
        be given without it. It is not kept.
      served: What else to read, such as {"batch_stats": like}, by the keys that `publish`
        got it with, or any above or below them.
      poll_seconds: Seconds between two looks at the directory.
      report: Called with a sentence on a version that cannot be read, once for each; by
        default the warning function of the logger "emaopt".

    Returns:
      A `Watch`: an iterator over (version, params, served, custom_metadata, path), which
      waits for the next one; `poll()` does not wait, and `close()`, or the end of a
      `with`, ends the iteration, from any thread. From `next` and `poll`: a ValueError if
      a version is not like `like`.

    Raises:
      ValueError: If arrays in `like` span several processes: each reads for itself; or if
        a key of `served` is empty.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> print(watch(tempfile.mkdtemp(), {"w": jnp.ones(2)}).poll())
      None
    """
    check_readable("watch", "directory", directory)
    check_served("watch", served)
    check_number("watch", "poll_seconds", poll_seconds, 0, above=True)
    check_callable("watch", "report", report, 1)
    like, beside = opened(like), opened(dict(served or {}))
    for argument, tree in (("like", like), ("served", beside)):
        for names, leaf in leaves_with_keys({argument: tree}):
            place = getattr(leaf, "sharding", None)
            if isinstance(place, Sharding) and not place.is_fully_addressable:
                raise ValueError(
                    f"watch: {joined(names)} spans several processes, which would have "
                    "to take the same version. Give each process arrays of its own "
                    "devices."
                )
    return Watch(directory, like, beside, poll_seconds, report)


class _Misfit(ValueError):
    """A version that is not what its reader asked for."""


@dataclasses.dataclass(frozen=True)  # a NamedTuple would be a tree
class _Like:
    """What a leaf is to be read as, and made of what was read."""

    plan: Leaf
    likeness: Likeness | None = None  # None: as it was read
    scalar: type[Any] | None = None  # of a scalar of NumPy's, its type

    def made(self, value: Leaf) -> Leaf:
        if self.scalar is not None:
            return self.scalar(value)
        return value if self.likeness is None else self.likeness.made(value)


def _like(leaf: Leaf) -> _Like:
    # Arrays of NumPy's that nobody writes to take no memory.
    if isinstance(leaf, np.generic):
        return _Like(np.empty((), leaf.dtype), scalar=type(leaf))
    if isinstance(leaf, np.ndarray):
        return _Like(np.empty(leaf.shape, leaf.dtype))
    if not isinstance(leaf, jax.Array):
        return _Like(_trees.as_plan(leaf))
    found = likeness(leaf)
    if not found.committed and found.impl is None:
        return _Like(np.empty(leaf.shape, leaf.dtype), found)
    as_read = found.impl is None and not found.weak
    return _Like(_trees.as_plan(leaf), None if as_read else found)
