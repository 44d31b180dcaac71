"""Options that several functions share: shown in the signature of each, and checked."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def takes_options_of(
    function: Callable[..., object], options: type
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function whose **options are some of those of another.

    Python shows `**options` as one name, and takes any. The decorated function has each
    of them in its signature, gets all of them, with the defaults that `function` gives,
    and refuses unknown ones under its own name.

    Args:
      function: The function that has the options, with their defaults.
      options: A TypedDict of the options that are taken over.
    """
    theirs = inspect.signature(function).parameters
    shared = [theirs[name] for name in options.__annotations__]
    defaults = {parameter.name: parameter.default for parameter in shared}

    def decorated(method: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(method)
        own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        names = [parameter.name for parameter in [*own, *shared]]

        @functools.wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name not in names:
                    near = difflib.get_close_matches(name, names, 1)
                    hint = f"did you mean {near[0]}?" if near else f"it takes {names}."
                    raise TypeError(
                        f"{method.__name__}: there is no option {name}; {hint}"
                    )
            for name, default in defaults.items():
                kwargs.setdefault(name, default)
            return method(*args, **kwargs)

        shown: Any = checked  # a function has no such attribute for type checkers
        shown.__signature__ = signature.replace(parameters=[*own, *shared])
        return checked

    return decorated
