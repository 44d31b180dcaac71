"""Files and directories that get their names when they are whole, or not at all."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING

from emaopt._advice import E, advised
from emaopt._interrupts import undisturbed
from emaopt._types import Path

if TYPE_CHECKING:
    from etils import epath


_PAUSE, _ABSENT = 0.05, 4  # seconds; pauses without a directory, until it is gone
_LONGEST = 20.0  # seconds that cleaning up may take
UNFINISHED = ".unfinished"  # the end of names that only their writers know


def own_name(path: str, mark: str = "") -> str:
    """A place beside a path that no other writer takes, whatever the path is called."""
    # A fixed name would be shared by writers, and might be a link to a user's file.
    name = f".{mark}{secrets.token_hex(8)}{UNFINISHED}"
    return os.path.join(os.path.dirname(path), name)


def is_url(path: Path) -> bool:
    return "://" in os.fspath(path)


def exists(path: Path) -> bool:
    """Whether anything stands at a path or URL; a link that leads nowhere counts."""
    if is_url(path):
        return url(path).exists()
    return os.path.lexists(path)


def refuse_existing(function: str, path: Path) -> None:
    """Raises if anything stands where a file is to be made."""
    if exists(path):
        raise exists_already(FileExistsError, function, path)


def exists_already(kind: Callable[[str], E], function: str, path: Path) -> E:
    """The error for a path at which something stands already."""
    return advised(
        kind,
        f"{function}: {path} already exists;",
        "pass force=True to replace it.",
        "--force replaces it.",
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that gets its name when it is complete; the last of several keeps it.

    It is written beside its place, under a name of its own, and removed if the writing
    fails. A link at `path` is replaced, and what it leads to stays.
    """
    if is_url(path):
        with _writing_url(url(path)) as file:
            yield file
        return
    path = os.path.abspath(os.fspath(path))
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(making_parents(path))
        unfinished = own_name(path)
        # "x" makes a file or fails: it follows no link, and overwrites nobody's file.
        file = cleanup.enter_context(open(unfinished, "xb"))
        cleanup.callback(_remove, unfinished)
        with naming(path):
            yield file
            # Before the rename: a full disk may show only when the buffer is written.
            file.close()
        with undisturbed():
            os.replace(unfinished, path)
            cleanup.pop_all()


@contextlib.contextmanager
def naming(place: Path) -> Iterator[None]:
    """Lets the system's errors name the place where a file should go: see `of_system`."""
    try:
        yield
    except Exception as error:
        if plain := of_system(error, place):
            raise plain from error
        raise


def of_system(error: BaseException, place: Path) -> OSError | None:
    """The system's error behind an error in writing, with the name of `place`; or None.

    TensorStore, and a writer under a name of its own, name a file that the user does not
    know; a failed write names none. An error that names a user's file stays as it is.
    """
    if isinstance(error, OSError):
        known = error.filename is not None and UNFINISHED not in str(error.filename)
        if error.errno is None or known:
            return None
        return OSError(error.errno, os.strerror(error.errno), os.fspath(place))
    # TensorStore raises no OSError; the system's number is in the text of its error.
    if (number := re.search(r"os_error_code='(\d+)'", str(error))) is None:
        return None
    code = int(number[1])
    return OSError(code, os.strerror(code), os.fspath(place))


def url(path: Path) -> "epath.Path":
    """The path that opens a URL; raises ValueError if nothing does."""
    # Imported here: the core needs no etils, which comes with Orbax.
    from etils import epath

    try:
        return epath.Path(os.fspath(path))
    except KeyError as error:
        raise ValueError(
            f"{path} is no kind of URL that can be opened: {error}"
        ) from None


@contextlib.contextmanager
def _writing_url(path: "epath.Path") -> Iterator[IO[bytes]]:
    """`writing` for a store, where a file appears when it is closed, whole or not."""
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
def making_parents(path: Path) -> Iterator[None]:
    """Makes the directories above a path, and removes them if the block fails.

    It removes only directories that it made and that are still empty.
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


def clear(*paths: "epath.Path") -> None:
    """Removes directories again and again, until no thread writes to them any more."""
    # TensorStore makes a directory anew that it does not find. After an error its threads
    # go on for a while, and nothing tells when they have ended.
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
