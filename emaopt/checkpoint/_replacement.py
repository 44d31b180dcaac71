"""A checkpoint that takes its place, or another's, and what a kill on the way leaves.

It is written in a directory of its own, which no other writer touches while this one
lives. If something stands at its path that it may replace, it becomes `path`.replacement
when it is complete. Then `path` is moved aside, to `path`.replaced, the new one takes its
place, and the old one is removed. Directories cannot be exchanged in one step everywhere,
so a kill may leave nothing at `path`; but at every moment one of the three is complete.
What stands there is `path` if there is one, else the newest complete one. Of several
writers one at a time does this, and the last one's stays.
"""

import contextlib
import functools
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

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
from emaopt.checkpoint import _completion

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl: Any = None

P = ParamSpec("P")
T = TypeVar("T")

_log_warning = logging.getLogger("emaopt").warning
_PATIENCE, _PAUSE = 60.0, 0.02  # seconds: for a lock, and between two tries
_ATTEMPTS = 5  # to read what is replaced meanwhile
_LONGEST = 1000  # bytes of an error that the first process tells the others
# What was read beside its path: the run that saves there next has gone on from it.
_taken_up: set[str] = set()


def followed(path: Any) -> Any:
    """The directory that a link leads to: it is what is replaced, and the link stays."""
    if is_url(path) or not os.path.islink(path):
        return path
    return epath.Path(os.path.realpath(path))


def _replacement(path: Any) -> Any:
    return path.with_name(path.name + ".replacement")


@contextlib.contextmanager
def taking_place(
    function: str, path: Any, *, force: bool, report: Callable[[str], Any]
) -> Iterator[Any]:
    """Gives a place to write what is to stand at a path; it takes it at the end.

    All processes enter, and get the same place. With `force` what stands at the path is
    replaced, and what an earlier run left beside it settled.
    """
    if path.exists() and not force:
        raise exists_already(ValueError, function, path)
    if is_url(path):  # where nothing can be locked, and Orbax takes the place itself
        if not force:
            yield path
            return
        settle(path, report)
        written = _replacement(path)
        _by_the_first(lambda: written.rmtree(missing_ok=True), path)  # a kill left it
        yield written
        _take_place(function, path, written, force)
        return
    with contextlib.ExitStack() as held:

        def make() -> str:
            held.enter_context(making_parents(path))
            with _locked(path.parent):
                _remove_dead(path)
                own = epath.Path(own_name(os.fspath(path), _mark(path)))
                own.mkdir()
                held.enter_context(_locked(own))
            return own.name

        own = path.with_name(_by_the_first(make, path))
        try:
            if force:
                settle(path, report)
            yield (written := own / path.name)
            _take_place(function, path, written, force)
        except BaseException:
            if jax.process_index() == 0:
                clear(own)
            raise
        if jax.process_index() == 0:
            _remove(own)


def _mark(path: Any) -> str:
    """What tells the directories in which what is to stand at a path is written."""
    return f"{zlib.crc32(os.fsencode(path.name)):08x}."


def _remove_dead(path: Any) -> None:
    """Removes what writers left that are no more: nobody has the lock on it."""
    for left in path.parent.iterdir():
        if left.name.startswith(f".{_mark(path)}") and left.name.endswith(UNFINISHED):
            with _locked(left, wait=False) as alone:
                if alone:
                    _remove(left)


def _remove(directory: Any) -> None:
    """Removes what is in nobody's way, if that may be."""
    with contextlib.suppress(OSError):
        directory.rmtree(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: Any, *, wait: bool = True) -> Iterator[bool]:
    """Holds a directory for itself, and says whether it does; a kill ends it.

    Where a file system has no locks, or somebody else keeps this one, all are let in, as
    if nobody else was there.
    """
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
        with contextlib.suppress(OSError):  # a process that was forked has it, too
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)


def _lock(number: int, directory: Any, patience: float) -> bool:
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() - began >= patience:
                break
            time.sleep(_PAUSE)
    if patience:
        _log_warning(
            f"save: another process has held the lock on {directory} for {patience:g} s; "
            "it is not waited for any longer."
        )
    return bool(patience)


def _aside(path: Any) -> Any:
    return path.with_name(path.name + ".replaced")


def _complete(path: Any) -> bool:
    marks = ("_CHECKPOINT_METADATA", "_METADATA")
    there = any((path / mark).exists() for mark in marks)
    return there and _completion.unfinished(path) is None


def standing(path: Any) -> Any:
    """Where the newest complete checkpoint of a path stands; None if nowhere.

    A `path` that exists is what it is, complete or not.
    """
    path = followed(path)
    if path.exists():
        return path
    return next(filter(_complete, (_replacement(path), _aside(path))), None)


def identity(path: Any) -> Any:
    """What tells the checkpoint at a path from the one that takes its place."""
    if (found := standing(path)) is None:
        return None
    told = [os.fspath(found)]
    try:
        if not is_url(found):
            now = os.stat(found)
            told += [now.st_dev, now.st_ino]
        if (mark := found / "_CHECKPOINT_METADATA").exists():
            told.append(mark.read_text())  # has the time of the save in it
    except (OSError, ValueError):
        pass  # gone meanwhile, which is another identity, or damaged
    return tuple(told)


_opened: ContextVar[dict[str, Any] | None] = ContextVar("opened", default=None)


def opening(path: Any) -> None:
    """Notes what stands at a path that is about to be read."""
    if (opened := _opened.get()) is not None:
        opened.setdefault(os.fspath(path), identity(path))


class Replaced(ValueError):
    """A checkpoint was replaced while it was read."""


def refuse_replaced() -> None:
    """Raises if what was opened is no longer there: what was read may be of both."""
    for path, before in (_opened.get() or {}).items():
        if identity(epath.Path(path)) != before:
            raise Replaced(
                f"{path} was replaced by a save while it was read, again and again. Read "
                "it between two saves, or have steps saved in directories of their own."
            )


def whole(read: Callable[P, T]) -> Callable[P, T]:
    """Makes a reader begin again if what it reads is replaced, be there an error or not.

    Of several processes none begins again, as the others would not: it is an error.
    """

    @functools.wraps(read)
    def reader(*args: P.args, **kwargs: P.kwargs) -> T:
        if _opened.get() is not None:  # within a reader, which begins again itself
            return read(*args, **kwargs)
        attempts = _ATTEMPTS if jax.process_count() == 1 else 1
        for left in reversed(range(attempts)):
            token = _opened.set({})
            try:
                try:
                    result = read(*args, **kwargs)
                except Exception:
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


def take_up(path: Any) -> None:
    """Notes that this process has read what stands beside `path`."""
    _taken_up.add(os.fspath(followed(path)))


def settle(path: Any, report: Callable[[str], Any]) -> None:
    """Brings what an earlier run left beside `path` in order, before it is saved over.

    A complete checkpoint whose path is empty, or holds none, is moved there if it was
    read from: then it has been gone on from. If not, whoever saves has not seen it and
    has perhaps started over: it is moved out of the way and stays.
    """

    def act():
        beside = [p for p in (_replacement(path), _aside(path)) if _complete(p)]
        if not beside or _complete(path):
            return
        newest = beside[0]
        if not path.exists() and os.fspath(path) in _taken_up:
            newest.rename(path)
            return
        newest.rename(kept := _free(path))
        report(
            f"save: {newest} was complete, but had not taken the place of {path} and was "
            f"not restored by this run; it is kept as {kept}."
        )

    _by_the_first(lambda: _in_turn(path, act), path)


def _in_turn(path: Any, act: Callable[[], Any]) -> None:
    """Acts on what stands at a path and beside it while no other process does."""
    if is_url(path):
        return act()
    with _locked(path.parent):
        return act()


def _free(path: Any) -> Any:
    """A name beside a path that nothing has: path.kept1, path.kept2, and so on."""
    number = 1
    while (place := path.with_name(f"{path.name}.kept{number}")).exists():
        number += 1
    return place


def _take_place(function: str, path: Any, written: Any, force: bool) -> None:
    """Puts what was written in a path's place; all wait for the first, or fail."""

    def act():
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
        aside, new = _aside(path), _replacement(path)
        if written != new:
            new.rmtree(missing_ok=True)  # no complete one, which was settled
            written.rename(new)
        aside.rmtree(missing_ok=True)
        path.rename(aside)
        new.rename(path)
        _remove(aside)

    with undisturbed():
        _by_the_first(lambda: _in_turn(path, act), path)
    _taken_up.discard(os.fspath(path))


def _by_the_first(act: Callable[[], Any], path: Any) -> str:
    """Lets the first process act; what it says, or its error, is that of all."""
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
        raise OSError(f"save: the first process could not replace {path}: {text}")
    return text[1:]
