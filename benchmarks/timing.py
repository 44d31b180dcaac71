"""Times that are compared only within one run; figures with their spread; tables."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np


def in_turn(rivals: list[Callable[[], Any]], rounds: int) -> list[list[Any]]:
    """What each rival returns in each round, after one to warm up."""
    found: list[list[Any]] = [[] for _ in rivals]
    for number in range(-1, rounds):
        order = range(len(rivals))
        for i in order if number % 2 else reversed(order):
            result = rivals[i]()
            if number >= 0:
                found[i].append(result)
    return found


def spread(values: list[float], form: str) -> str:
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def error(values: Any, form: str) -> str:
    """The mean over seeds ± its standard error."""
    values = np.asarray(values, np.float64)
    deviation = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{values.mean():{form}} ± {deviation:{form.lstrip('+')}}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = (f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        yield f"| {' | '.join(cells)} |"
