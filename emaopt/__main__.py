"""`python -m emaopt`, and the command `emaopt`."""

import sys

_EXTRAS = {
    "flax": "demo",
    "matplotlib": "demo",
    "rich": "cli",
    "scipy": "demo",
    "sklearn": "demo",
    "typer": "cli",
}


def main() -> None:
    """Runs the command line; if a package for it is missing, says how to install it."""
    try:
        from emaopt import cli

        cli.app(prog_name="emaopt")
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
