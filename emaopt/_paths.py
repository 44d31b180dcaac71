"""Checks of the paths that users give: whether they can be read or written."""

import errno
import os

from emaopt._output import is_url
from emaopt._types import Path

# Access is asked for the user that the process acts as now, not the one it started as.
_EFFECTIVE = os.access in os.supports_effective_ids


def check_path(function: str, argument: str, path: object) -> None:
    """Raises unless `path` can be a path, and its directory lets this user look."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{function}: {argument} must be a path, got {path!r}.")
    if is_url(path):
        return
    try:
        os.stat(path)
    except PermissionError as error:
        raise _refused(function, argument, path, error) from None
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever needs what is missing says so
    except (OSError, ValueError) as error:  # too long, or with a null byte
        raise ValueError(
            f"{function}: {argument} cannot be a path here, got {path!r}: {error}."
        ) from None


def check_readable(function: str, argument: str, path: Path) -> None:
    """Raises unless `path` can be a path, and a directory there can be entered."""
    check_path(function, argument, path)
    if not may_enter(path):
        raise _refused(function, argument, path, PermissionError())


def may_enter(path: Path) -> bool:
    """Whether this user may enter a path, if it is a local directory."""
    local = not is_url(path) and os.path.isdir(path)
    return not local or _may(path, os.R_OK | os.X_OK)


def check_writable(function: str, argument: str, path: Path) -> None:
    """Raises unless something can be made at `path`, with directories on the way."""
    check_path(function, argument, path)
    if is_url(path):
        return
    # A rename would replace a device such as /dev/null by a file.
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError(
            f"{function}: {argument} is a device, a pipe or a socket, got {path!r}; it "
            "is not replaced. Give a file or directory to make."
        )
    # What a link leads to is written. The first directory that exists decides.
    above = os.path.dirname(os.path.realpath(path))
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise NotADirectoryError(
            errno.ENOTDIR,
            f"{function}: {argument} cannot be made, {above} is no directory",
            os.fspath(path),
        )
    if not _may(above, os.W_OK | os.X_OK):
        raise _refused(function, argument, path, PermissionError())


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=_EFFECTIVE)


def _refused(function: str, argument: str, path: Path, error: OSError) -> OSError:
    return PermissionError(
        error.errno or errno.EACCES,
        f"{function}: {argument} must be where this user may go",
        os.fspath(path),
    )
