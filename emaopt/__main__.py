"""`python -m emaopt`, and the command `emaopt`."""

import os
import signal
import sys

from emaopt._interrupts import send_again

# The extra of pip that installs each package.
_EXTRAS = {
    "flax": "demo",
    "matplotlib": "demo",
    "rich": "cli",
    "scipy": "demo",
    "sklearn": "demo",
    "typer": "cli",
}


def _unraised(what: "sys.UnraisableHookArgs") -> None:
    """Drops what TensorStore's threads report once Orbax has given up, but no Ctrl-C."""
    # Python drops an exception that is raised in a callback, such as one of its garbage
    # collector; a Ctrl-C that came there is sent again.
    if isinstance(what.exc_value, KeyboardInterrupt):
        send_again(signal.SIGINT)
    elif str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def main() -> None:
    """Runs the command line; if a package is missing, says how to install it."""
    # A closed stdin, stdout or stderr (">&-") leaves its number free. The next file that
    # is opened, such as an output, would get it, and messages be printed into it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.unraisablehook = _unraised
    try:
        from emaopt import cli

        cli.app(prog_name="emaopt")
    except SystemExit as stopped:
        if isinstance(stopped.code, int) and stopped.code > 128:  # by a signal
            # Threads of XLA and TensorStore may still be at work, and Python's own end is
            # not safe with them.
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
