"""The options that all methods of local updates take, shown and checked in one way."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypedDict, TypeVar

import jax

from emaopt._local_updates import Engine

P = ParamSpec("P")
T = TypeVar("T")

Period = int | Callable[[jax.Array], Any]


class Options(TypedDict, total=False):
    """Arguments of `local_updates` that every method takes."""

    num_workers: int | None
    axis_name: Any
    warmup_steps: int
    exchange_dtype: Any
    error_feedback: bool
    num_fragments: int
    per_worker: Iterable[str]


def takes_options(method: Callable[P, T]) -> Callable[P, T]:
    """Shows each option in a method's signature, and refuses others by its name."""
    signature = inspect.signature(method)
    own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    defaults = {field.name: field.default for field in dataclasses.fields(Engine)}
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[name],
            annotation=annotation,
        )
        for name, annotation in Options.__annotations__.items()
    ]
    names = [parameter.name for parameter in [*own, *options]]

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"it takes {names}."
                raise TypeError(f"{method.__name__}: there is no option {name}; {hint}")
        return method(*args, **kwargs)

    shown: Any = checked  # a function has no such attribute for type checkers
    shown.__signature__ = signature.replace(parameters=[*own, *options])
    return checked
