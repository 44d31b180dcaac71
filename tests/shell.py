"""The command line, run in this process as from a shell."""

from typer.testing import CliRunner

from emaopt.cli import app


def emaopt_command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})
