"""`python -m emaopt`, and the command `emaopt`."""

import os
import signal
import sys
from typing import Any

from emaopt._interrupts import send_again

_EXTRAS = {
    "flax": "demo",
    "matplotlib": "demo",
    "rich": "cli",
    "scipy": "demo",
    "sklearn": "demo",
    "typer": "cli",
}


def _unraised(what: Any) -> None:
    """Drops what TensorStore's threads still tell once Orbax has given up.

    But no Ctrl-C.
    """
    if isinstance(what.exc_value, KeyboardInterrupt):
        send_again(signal.SIGINT)
    elif str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def main() -> None:
    """Runs the command line; if a package for it is missing, says how to install it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # in place of a closed output, whose number no other file shall get
    os.close(number)
    sys.unraisablehook = _unraised
    try:
        from emaopt import cli

        cli.app(prog_name="emaopt")
    except SystemExit as stopped:
        if isinstance(stopped.code, int) and stopped.code > 128:  # by a signal
            # Threads of XLA's and TensorStore's may be at work, which Python's end is
            # not safe with.
            os._exit(stopped.code)
        raise
    except KeyboardInterrupt:  # before a command has begun
        print("emaopt: stopped by SIGINT.", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        sys.exit(
            f"emaopt: {package} is not installed: "
            f"pip install 'emaopt[{_EXTRAS[package]}]'"
        )


if __name__ == "__main__":
    main()
