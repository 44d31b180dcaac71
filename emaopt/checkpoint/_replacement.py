"""How a checkpoint takes its place or replaces another, and what a kill leaves.

It is written in a directory of its own, which no other writer touches while this one
lives. If it replaces what stands at its path, it is renamed to `path`.replacement when it
is complete. Then `path` is moved aside, to `path`.replaced, the new checkpoint takes its
place, and the old one is removed. Not every system exchanges two directories in one step,
so a kill may leave nothing at `path`; but at every moment one of the three is complete.
Readers take `path` if it exists, else the newest complete one. Of several writers one at
a time does this, and the checkpoint of the last one stays.
"""

import contextlib
import functools
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from emaopt._interrupts import undisturbed
from emaopt._output import (
    UNFINISHED,
    clear,
    exists_already,
    is_url,
    making_parents,
    own_name,
)
from emaopt._types import Report
from emaopt.checkpoint import _completion
from emaopt.checkpoint._orbax import ITEM, STEP

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl: Any = None

P = ParamSpec("P")
T = TypeVar("T")
Identity: TypeAlias = tuple[str | int, ...] | None

_log_warning = logging.getLogger("emaopt").warning
_PATIENCE, _PAUSE = 60.0, 0.02  # seconds: for a lock, and between two tries
_ATTEMPTS = 5  # to read a checkpoint that saves replace meanwhile
_LONGEST = 1000  # bytes of an error that the first process tells the others
# Paths that this process has restored: its next save there goes on from what it read.
_taken_up: set[str] = set()


def followed(path: epath.Path) -> epath.Path:
    """The directory that a link leads to: a save replaces it, and the link stays."""
    if is_url(path) or not os.path.islink(path):
        return path
    return epath.Path(os.path.realpath(path))


def _replacement(path: epath.Path) -> epath.Path:
    return path.with_name(path.name + ".replacement")


@contextlib.contextmanager
def taking_place(
    function: str, path: epath.Path, *, force: bool, report: Report
) -> Iterator[epath.Path]:
    """Yields a place to write a checkpoint to, which is moved to the path at the end.

    All processes enter, and get the same place. With `force`, what stands at the path is
    replaced, and what an earlier run left beside it is settled.
    """
    if path.exists() and not force:
        raise exists_already(ValueError, function, path)
    if is_url(path):  # where nothing can be locked, and Orbax takes the place itself
        if not force:
            yield path
            return
        settle(function, path, report)
        written = _replacement(path)
        by_the_first(lambda: written.rmtree(missing_ok=True), path)  # a kill left it
        yield written
        _take_place(function, path, written, force)
        return
    with contextlib.ExitStack() as held:

        def make() -> str:
            held.enter_context(making_parents(path))
            # The lock on the parent is held until `own` is locked: another writer would
            # take a directory without a lock for a dead writer's.
            with _locked(path.parent):
                _remove_dead(path)
                own = epath.Path(own_name(os.fspath(path), _mark(path)))
                own.mkdir()
                held.enter_context(_locked(own))
            return own.name

        own = path.with_name(by_the_first(make, path))
        try:
            if force:
                settle(function, path, report)
            yield (written := own / path.name)
            _take_place(function, path, written, force)
        except BaseException:
            # Threads of TensorStore may still write there; `clear` waits for their end.
            if jax.process_index() == 0:
                clear(own)
            raise
        if jax.process_index() == 0:
            _remove(own)


def _mark(path: epath.Path) -> str:
    """The beginning of the names of the directories that a path's writers make."""
    return f"{zlib.crc32(os.fsencode(path.name)):08x}."


def _remove_dead(path: epath.Path) -> None:
    """Removes the directories of writers that are dead, on which nobody has a lock."""
    for left in path.parent.iterdir():
        if left.name.startswith(f".{_mark(path)}") and left.name.endswith(UNFINISHED):
            with _locked(left, wait=False) as alone:
                if alone:
                    _remove(left)


def _remove(directory: epath.Path) -> None:
    """Removes a directory that is in nobody's way, if this user may."""
    with contextlib.suppress(OSError):
        directory.rmtree(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: epath.Path, *, wait: bool = True) -> Iterator[bool]:
    """Locks a directory, and says whether it could; a kill ends the lock.

    Where a file system has no locks, or another process keeps this one for long, a writer
    that waits goes on as if it were alone.
    """
    # Who does not wait asks whether a writer is dead. Without locks nobody knows: False.
    if fcntl is None:
        yield wait
        return
    try:
        number = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            alone = _lock(number, directory, _PATIENCE if wait else 0)
        except OSError:
            alone = wait
        yield alone
    finally:
        # A forked process has the file open, too: closing it here would not unlock it.
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)


def _lock(number: int, directory: epath.Path, patience: float) -> bool:
    began = time.monotonic()
    while True:
        # flock knows no time limit, so it is asked again and again.
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() - began >= patience:
                break
            time.sleep(_PAUSE)
    if patience:
        _log_warning(
            f"another process has held the lock on {directory} for {patience:g} s; "
            "it is not waited for any longer."
        )
    return bool(patience)


def _aside(path: epath.Path) -> epath.Path:
    return path.with_name(path.name + ".replaced")


def complete(path: epath.Path) -> bool:
    """Whether a whole checkpoint stands at a path."""
    there = any((path / mark).exists() for mark in (STEP, ITEM))
    return there and _completion.unfinished(path) is None


def standing(path: epath.Path) -> epath.Path | None:
    """Where the newest complete checkpoint of a path stands; None if nowhere.

    A `path` that exists is returned, complete or not.
    """
    path = followed(path)
    if path.exists():
        return path
    # In this order: the replacement was complete before `path` was moved aside.
    return next(filter(complete, (_replacement(path), _aside(path))), None)


def identity(path: epath.Path) -> Identity:
    """What tells the checkpoint at a path from the one that takes its place."""
    if (found := standing(path)) is None:
        return None
    told: list[str | int] = [os.fspath(found)]
    try:
        if not is_url(found):
            now = os.stat(found)
            told += [now.st_dev, now.st_ino]
        if (mark := found / STEP).exists():
            told.append(mark.read_text())  # holds the time of the save
    except (OSError, ValueError):
        pass  # gone meanwhile, which is another identity, or damaged
    return tuple(told)


# What the reader in this context has opened; None outside of readers.
_opened: ContextVar[dict[str, Identity] | None] = ContextVar("opened", default=None)


def opening(path: epath.Path) -> None:
    """Notes what stands at a path that is about to be read."""
    if (opened := _opened.get()) is not None:
        opened.setdefault(os.fspath(path), identity(path))


class Replaced(ValueError):
    """A checkpoint was replaced while it was read."""


def refuse_replaced() -> None:
    """Raises if a checkpoint was replaced since it was opened."""
    for path, before in (_opened.get() or {}).items():
        if identity(epath.Path(path)) != before:
            raise Replaced(
                f"{path} was replaced by a save while it was read, again and again. Read "
                "it between two saves, or have steps saved in directories of their own."
            )


def whole(read: Callable[P, T]) -> Callable[P, T]:
    """Makes a reader start over if its checkpoint was replaced, be there an error or not.

    With several processes it raises instead: one would start over without the others.
    """

    @functools.wraps(read)
    def reader(*args: P.args, **kwargs: P.kwargs) -> T:
        if _opened.get() is not None:  # within a reader, which starts over itself
            return read(*args, **kwargs)
        attempts = _ATTEMPTS if jax.process_count() == 1 else 1
        for left in reversed(range(attempts)):
            token = _opened.set({})
            try:
                try:
                    result = read(*args, **kwargs)
                except Exception:
                    # Files of two saves look damaged: a replacement is named first.
                    refuse_replaced()
                    raise
                refuse_replaced()
                return result
            except Replaced as error:
                if not left:
                    raise Replaced(f"{read.__name__}: {error}") from error
            finally:
                _opened.reset(token)
        raise AssertionError

    return reader


def take_up(path: epath.Path) -> None:
    """Notes that this process has restored what stands at `path`, or beside it."""
    _taken_up.add(os.fspath(followed(path)))


def settle(function: str, path: epath.Path, report: Report) -> None:
    """Settles what an earlier run left beside `path`, before a save replaces it.

    If nothing complete stands at `path`, a complete checkpoint beside it is kept. If this
    process has restored it, and so goes on from it, it is moved to `path`, if that is
    free. If not, the run may have started over: it gets a name of its own.
    """

    def act() -> None:
        beside = [p for p in (_replacement(path), _aside(path)) if complete(p)]
        if not beside or complete(path):
            return
        newest = beside[0]
        if not path.exists() and os.fspath(path) in _taken_up:
            newest.rename(path)
            return
        newest.rename(kept := _free(path))
        report(
            f"{function}: {newest} was complete, but had not taken the place of {path} "
            f"and was not restored by this run; it is kept as {kept}."
        )

    by_the_first(lambda: in_turn(path, act), path)


def in_turn(path: epath.Path, act: Callable[[], T]) -> T:
    """Acts on what stands at a path and beside it while no other process does."""
    if is_url(path):
        return act()
    with _locked(path.parent):
        return act()


def _free(path: epath.Path) -> epath.Path:
    """A name beside a path that nothing has: path.kept1, path.kept2, and so on."""
    number = 1
    while (place := path.with_name(f"{path.name}.kept{number}")).exists():
        number += 1
    return place


def _take_place(
    function: str, path: epath.Path, written: epath.Path, force: bool
) -> None:
    """Moves what was written to the path; all processes wait for the first, or fail."""

    def act() -> None:
        if not written.exists():
            raise OSError(
                f"{function}: {written} was not completed; {path} is as it was."
            )
        if not path.exists():
            written.rename(path)
            return
        if not force:
            raise ValueError(
                f"{function}: {path} has come to exist; it was left as it is."
            )
        # A kill may come after any line: each leaves one of the three complete.
        aside, new = _aside(path), _replacement(path)
        if written != new:
            new.rmtree(missing_ok=True)  # `settle` has kept what is needed
            written.rename(new)
        aside.rmtree(missing_ok=True)
        path.rename(aside)
        new.rename(path)
        _remove(aside)

    # The exception of a signal between two renames would leave nothing at the path.
    with undisturbed():
        by_the_first(lambda: in_turn(path, act), path)
    # What another process leaves beside the path from now on has not been read.
    _taken_up.discard(os.fspath(path))


def by_the_first(act: Callable[[], object], path: epath.Path) -> str:
    """Lets the first process act; all return what it says, or raise its error."""
    # The text of a success begins with "=", that of an error with its type.
    failed, text = None, ""
    if jax.process_index() == 0:
        try:
            text = f"={act() or ''}"
        except BaseException as error:  # the others wait for any
            failed, text = error, f"{type(error).__name__}: {error}"
    if jax.process_count() > 1:
        said = np.zeros(_LONGEST, np.uint8)
        content = text.encode(errors="replace")[:_LONGEST]
        said[: len(content)] = np.frombuffer(content, np.uint8)
        said = multihost_utils.broadcast_one_to_all(said)
        text = bytes(np.asarray(said, np.uint8)).rstrip(bytes(1)).decode(errors="replace")
    if failed is not None:
        raise failed
    if not text.startswith("="):
        raise OSError(f"the first process failed at {path}: {text}")
    return text[1:]
