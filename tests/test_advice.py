"""Errors say what to do in Python, and in a shell."""

import pytest

from emaopt import _advice


def test_both_messages_say_what_is_wrong():
    error = _advice.advised(KeyError, "It is gone.", "Say at=.", "Say --at.")
    assert error.args == ("It is gone. Say at=.",)
    assert _advice.said_in_shell(error) == "It is gone. Say --at."


def test_the_words_of_the_shell_outlast_that_an_error_is_raised_again():
    error = _advice.advised(ValueError, "It is gone.", "Say at=.", "Say --at.")
    again = _advice.named("f", error)
    assert type(again) is ValueError and str(again) == "f: It is gone. Say at=."
    assert _advice.said_in_shell(again) == "f: It is gone. Say --at."


@pytest.mark.parametrize("name", ["f", None])
def test_an_error_without_advice_is_said_alike(name):
    error = ValueError("It is gone.")
    error = error if name is None else _advice.named(name, error)
    assert _advice.said_in_shell(error) == str(error)
