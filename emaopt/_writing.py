"""Files that stand under their names whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO


def own_name(path: str) -> str:
    """A place beside a path that no other writer takes, whatever the path is called."""
    name = f".{secrets.token_hex(8)}.unfinished"
    return os.path.join(os.path.dirname(path), name)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file that takes its name when it is written; of several, the last does.

    It is written beside its place under a name of its own, which is removed if the
    writing fails. A link at `path` is replaced, and what it leads to stays.
    """
    path = os.path.abspath(os.fspath(path))
    os.makedirs(os.path.dirname(path), exist_ok=True)  # as Orbax does for a checkpoint
    with contextlib.ExitStack() as cleanup:
        unfinished = own_name(path)
        # "x" makes a file or fails: it follows no link, and nothing of others' is lost.
        file = cleanup.enter_context(open(unfinished, "xb"))
        cleanup.callback(_remove, unfinished)
        yield file
        file.close()  # whose errors, such as a full disk, come before the rename
        os.replace(unfinished, path)
        cleanup.pop_all()


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
