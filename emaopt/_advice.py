"""Errors that say what to do: with an argument in Python, with an option in a shell."""

from collections.abc import Callable
from typing import TypeVar

E = TypeVar("E", bound=Exception)


def advised(kind: Callable[[str], E], what: str, advice: str, in_shell: str) -> E:
    """An error whose message ends in advice.

    Args:
      kind: The class of the error, or a function from its message to it.
      what: What is wrong.
      advice: What to do, in the words of a Python program: "Say with at= where."
      in_shell: The same in the words of the command line: "Say with --at where."
    """
    error = kind(f"{what} {advice}")
    vars(error)["in_shell"] = f"{what} {in_shell}"
    return error


def named(function: str, error: E) -> E:
    """The error again, with the name of the function that was called in front."""
    again = type(error)(f"{function}: {error}")
    if "in_shell" in vars(error):
        vars(again)["in_shell"] = f"{function}: {said_in_shell(error)}"
    return again


def said_in_shell(error: Exception) -> str:
    """The message of an error, in words that fit the command line if it has them."""
    return vars(error).get("in_shell", str(error))
