"""The library's errors and warnings, as the command line says them."""

import contextlib
import logging
from collections.abc import Iterator

from emaopt._advice import said_in_shell
from emaopt.cli._terminal import stop, warn


def quiet_cpu() -> None:
    """Sets JAX to the CPU, and silences Orbax."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    quiet_logs()


def quiet_logs() -> None:
    """Silences what Orbax logs of every file that it opens."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)


class _Warnings(logging.Handler):
    """Prints the library's log records as warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


@contextlib.contextmanager
def _warning() -> Iterator[None]:
    """Prints warnings that the library logs inside the block."""
    logger, handler = logging.getLogger("emaopt"), _Warnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def failing(command: str, *, devices: bool = False) -> Iterator[None]:
    """Turns errors that a user can mend into one line and an exit status.

    With `devices`, JAX keeps those that it finds, for a model that is to be run.
    """
    # Before JAX is used: it chooses its devices once.
    quiet_logs() if devices else quiet_cpu()
    from emaopt._names import Unknown
    from emaopt._profiles import BadProfile

    try:
        with _warning():
            yield
    except BadProfile as error:
        stop(_as_said_here(command, error), 2)
    except Unknown as error:
        # Where the option has another name than the argument of the function.
        named = {"name": "weights", "path": "plot"}
        option = named.get(error.argument, error.argument)
        stop(_as_said_here(command, error, f"--{option}: "), 2)
    except BrokenPipeError:
        raise  # an OSError, but one that `_ending` takes
    except ModuleNotFoundError:
        raise  # an extra is missing: `emaopt.__main__.main` says which
    except MemoryError as error:
        stop(f"emaopt {command}: out of memory: {error}", 1)
    except (ImportError, OSError, TypeError, ValueError) as error:
        stop(_as_said_here(command, error), 1)


def _as_said_here(command: str, error: Exception, option: str = "") -> str:
    """The message with the command in front, in the words of the shell."""
    said = said_in_shell(error)
    # Messages open with the name of the Python function; the command stands in its place.
    first, colon, rest = said.partition(": ")
    said = rest if colon and first.isidentifier() else said
    return f"emaopt {command}: {option}{said}"
