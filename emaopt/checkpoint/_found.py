"""An average of weights in a tree that other code wrote."""

from typing import NamedTuple

from emaopt._names import Names

# Whose ways of keeping an average are known; `adopt` has them in its docstring.
LAYOUTS = (
    "train_state",
    "openpi",
    "kauldron",
    "praxis",
    "swag",
    "nnx",
    "levanter",
    "diffusers",
    "tf1",
    "tf1_swapped",
    "tf2",
    "tf2_swapped",
)


class Found(NamedTuple):
    """Where such an average stands, and what it is of."""

    layout: str  # one of LAYOUTS
    average: Names  # the names that lead to its tree
    params: Names | None  # to the parameters; None: the only tree that it can be of
    updates: Names | int | None = None  # its number of them, or the names to it
    more: int = 0  # how many updates the number there leaves out
