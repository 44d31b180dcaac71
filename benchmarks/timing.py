"""Times that are compared only within one run, as medians with their ends."""

import statistics
from collections.abc import Callable
from typing import Any


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
