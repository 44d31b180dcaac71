"""A checkpoint that takes another's place, and what a kill on the way leaves.

The new one is completed as `path`.replacement. Then `path` is moved aside, to
`path`.replaced, the new one takes its place, and the old one is removed. Directories
cannot be exchanged in one step everywhere, so a kill may leave nothing at `path`; but at
every moment one of the three is complete, and the newest such is what stands there.
"""

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from emaopt.checkpoint import _finished

P = ParamSpec("P")
T = TypeVar("T")

_ATTEMPTS = 5  # to read what is replaced meanwhile
_LONGEST = 1000  # bytes of an error that the first process tells the others
# What was read beside its path: the run that saves there next has gone on from it.
_taken_up: set[str] = set()


def followed(path: Any) -> Any:
    """The directory that a link leads to: it is what is replaced, and the link stays."""
    if "://" in os.fspath(path) or not os.path.islink(path):
        return path
    return epath.Path(os.path.realpath(path))


def replacement(path: Any) -> Any:
    """Where a checkpoint that is to take another's place is written."""
    return path.with_name(path.name + ".replacement")


def _aside(path: Any) -> Any:
    return path.with_name(path.name + ".replaced")


def _complete(path: Any) -> bool:
    marks = ("_CHECKPOINT_METADATA", "_METADATA")
    there = any((path / mark).exists() for mark in marks)
    return there and _finished.unfinished(path) is None


def standing(path: Any) -> Any:
    """Where the newest complete checkpoint of a path stands; None if nowhere.

    A `path` that exists is what it is, complete or not.
    """
    path = followed(path)
    if path.exists():
        return path
    return next(filter(_complete, (replacement(path), _aside(path))), None)


def identity(path: Any) -> Any:
    """What tells the checkpoint at a path from the one that takes its place."""
    if (found := standing(path)) is None:
        return None
    told = [os.fspath(found)]
    try:
        if "://" not in told[0]:
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
        beside = [p for p in (replacement(path), _aside(path)) if _complete(p)]
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

    _by_the_first(act, path)


def _free(path: Any) -> Any:
    """A name beside a path that nothing has: path.kept1, path.kept2, and so on."""
    number = 1
    while (place := path.with_name(f"{path.name}.kept{number}")).exists():
        number += 1
    return place


def replace(path: Any) -> None:
    """Puts the replacement in its place; all processes wait for the first, or fail."""

    def act():
        if not (new := replacement(path)).exists():
            raise OSError(f"save: {new} was not completed; {path} is as it was.")
        aside = _aside(path)
        if path.exists():
            aside.rmtree(missing_ok=True)
            path.rename(aside)
        new.rename(path)
        aside.rmtree(missing_ok=True)

    _by_the_first(act, path)
    _taken_up.discard(os.fspath(path))


def _by_the_first(act: Callable[[], Any], path: Any) -> None:
    """Lets the first process act; its error is one of all, none of which waits for it."""
    failed = None
    if jax.process_index() == 0:
        try:
            act()
        except Exception as error:
            failed = error
    if jax.process_count() > 1:
        said = np.zeros(_LONGEST, np.uint8)
        if failed is not None:
            text = f"{type(failed).__name__}: {failed}".encode()[:_LONGEST]
            said[: len(text)] = np.frombuffer(text, np.uint8)
        said = multihost_utils.broadcast_one_to_all(said)
        text = bytes(np.asarray(said, np.uint8)).rstrip(bytes(1)).decode(errors="replace")
        if text and failed is None:
            raise OSError(f"save: the first process could not replace {path}: {text}")
    if failed is not None:
        raise failed
