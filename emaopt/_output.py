"""Files and directories that stand under their names whole or not at all."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from emaopt._advice import advised
from emaopt._interrupts import undisturbed

E = TypeVar("E", bound=Exception)

_PAUSE, _ABSENT = 0.05, 4  # seconds, and after how many of them a directory stays away
_LONGEST = 20.0  # seconds that cleaning up may take
UNFINISHED = ".unfinished"  # how the names end that nobody but their writer knows


def own_name(path: str, mark: str = "") -> str:
    """A place beside a path that no other writer takes, whatever the path is called."""
    name = f".{mark}{secrets.token_hex(8)}{UNFINISHED}"
    return os.path.join(os.path.dirname(path), name)


def is_url(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def exists(path: str | os.PathLike) -> bool:
    """Whether anything stands at a path, be it a link that leads nowhere, or a URL."""
    if is_url(path):
        return url(path).exists()
    return os.path.lexists(path)


def refuse_existing(function: str, path: str | os.PathLike) -> None:
    """Raises if anything stands where a file is to be made."""
    if exists(path):
        raise exists_already(FileExistsError, function, path)


def exists_already(kind: Callable[[str], E], function: str, path: Any) -> E:
    """The error that something stands where something is to be made."""
    return advised(
        kind,
        f"{function}: {path} already exists;",
        "pass force=True to replace it.",
        "--force replaces it.",
    )


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file that takes its name when it is written; of several, the last does.

    It is written beside its place under a name of its own, which is removed if the
    writing fails. A link at `path` is replaced, and what it leads to stays.
    """
    if is_url(path):
        with _writing_url(url(path)) as file:
            yield file
        return
    path = os.path.abspath(os.fspath(path))
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(making_parents(path))
        unfinished = own_name(path)
        # "x" makes a file or fails: it follows no link, and nothing of others' is lost.
        file = cleanup.enter_context(open(unfinished, "xb"))
        cleanup.callback(_remove, unfinished)
        with naming(path):
            yield file
            file.close()  # whose errors, such as a full disk, come before the rename
        with undisturbed():
            os.replace(unfinished, path)
            cleanup.pop_all()


@contextlib.contextmanager
def naming(place: Any) -> Iterator[None]:
    """Makes the system's errors ones of where files should go: see `of_system`."""
    try:
        yield
    except Exception as error:
        if plain := of_system(error, place):
            raise plain from error
        raise


def of_system(error: BaseException, place: Any) -> OSError | None:
    """The system's error of which TensorStore tells, as one of where files should go.

    TensorStore names what it was writing, which is a file that the user never named, as
    those under a name of the writer's own are; and an error in writing names nothing.
    """
    if isinstance(error, OSError):
        known = error.filename is not None and UNFINISHED not in str(error.filename)
        if error.errno is None or known:
            return None
        return OSError(error.errno, os.strerror(error.errno), os.fspath(place))
    if (number := re.search(r"os_error_code='(\d+)'", str(error))) is None:
        return None
    code = int(number[1])
    return OSError(code, os.strerror(code), os.fspath(place))


def url(path: str | os.PathLike) -> Any:
    """What opens a URL; ValueError if nothing does."""
    from etils import epath

    try:
        return epath.Path(os.fspath(path))
    except KeyError as error:
        raise ValueError(
            f"{path} is no kind of URL that can be opened: {error}"
        ) from None


@contextlib.contextmanager
def _writing_url(path: Any) -> Iterator[BinaryIO]:
    """`writing` in a store, where what is closed is there, whole or not."""
    unfinished = path.parent / os.path.basename(own_name(path.name))
    try:
        with unfinished.open("wb") as file:
            yield file
        with undisturbed():
            unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def making_parents(path: str | os.PathLike) -> Iterator[None]:
    """Makes the directories above a path; if what is done in them fails, removes them.

    Only those that it made, and that are still empty.
    """
    made, above = [], os.path.dirname(os.path.abspath(path))
    while not is_url(path) and not os.path.lexists(above):
        made.append(above)
        above = os.path.dirname(above)
    try:
        if not is_url(path):
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for directory in made:
                os.rmdir(directory)
        raise


def clear(*paths: Any) -> None:
    """Removes directories that threads may still be writing to, until they have ended.

    For TensorStore makes a directory anew that it does not find.
    """
    absent, end = 0, time.monotonic() + _LONGEST
    while absent < _ABSENT and time.monotonic() < end:
        left = [path for path in paths if path.exists()]
        absent = 0 if left else absent + 1
        for path in left:
            with contextlib.suppress(OSError):
                path.rmtree()
        time.sleep(_PAUSE)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
