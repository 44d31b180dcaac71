"""Averages of the weights for JAX and Optax, and checkpoints that serve them.

Averages:     average_params, averaged, average_tree
Optimizers:   primal_averaging, gpa, schedule_free
Decays:       warmup_decay, uniform_decay, polynomial_decay, power_decay,
              inverse_gamma_decay, half_life_decay, scale_decay, window_decay,
              annealing_decay
Their weights: decay_weights, weight_summary
Reading:      get_average, views, swap, average_distance
Changing:     reset_average, change_mask, by_name
Placement:    state_shardings
Local updates: local_updates, agn, diloco, local_sgd, easgd, block_momentum, lookahead,
              snoo, get_center, stack_workers, state_specs, worker_spread, local_round,
              synchronize, simulate_async
Modules:      checkpoint, batch_stats, elastic, posthoc, plots, tf1
"""

from typing import TYPE_CHECKING

from emaopt._annealing import annealing_decay, window_decay
from emaopt._asynchronous import AsyncTrace, simulate_async
from emaopt._averaging import average_params, average_tree, averaged
from emaopt._decays import (
    half_life_decay,
    inverse_gamma_decay,
    polynomial_decay,
    power_decay,
    scale_decay,
    uniform_decay,
    warmup_decay,
)
from emaopt._local_loop import local_round, stack_workers, state_specs, synchronize
from emaopt._local_methods import (
    agn,
    block_momentum,
    diloco,
    easgd,
    local_sgd,
    lookahead,
    snoo,
)
from emaopt._local_options import local_updates
from emaopt._names import by_name
from emaopt._primal_averaging import (
    gpa,
    primal_averaging,
    schedule_free,
)
from emaopt._reading import (
    average_distance,
    get_average,
    get_center,
    views,
    worker_spread,
)
from emaopt._recursion import Averager
from emaopt._restart import change_mask, reset_average
from emaopt._state_shardings import state_shardings
from emaopt._states import (
    AveragedState,
    AverageState,
    LocalUpdatesState,
    PrimalAveragingState,
    ScheduleFreeState,
    SwappedLocalUpdatesState,
    SwappedState,
)
from emaopt._swap import swap
from emaopt._weights import WeightSummary, decay_weights, weight_summary

__all__ = [
    "AsyncTrace",
    "AverageState",
    "AveragedState",
    "Averager",
    "LocalUpdatesState",
    "PrimalAveragingState",
    "ScheduleFreeState",
    "SwappedLocalUpdatesState",
    "SwappedState",
    "WeightSummary",
    "agn",
    "annealing_decay",
    "average_distance",
    "average_params",
    "average_tree",
    "averaged",
    "block_momentum",
    "by_name",
    "change_mask",
    "decay_weights",
    "diloco",
    "easgd",
    "get_average",
    "get_center",
    "gpa",
    "half_life_decay",
    "inverse_gamma_decay",
    "local_round",
    "local_sgd",
    "local_updates",
    "lookahead",
    "polynomial_decay",
    "power_decay",
    "primal_averaging",
    "reset_average",
    "scale_decay",
    "schedule_free",
    "simulate_async",
    "snoo",
    "stack_workers",
    "state_shardings",
    "state_specs",
    "swap",
    "synchronize",
    "uniform_decay",
    "views",
    "warmup_decay",
    "weight_summary",
    "window_decay",
    "worker_spread",
]

# Imported when they are first used: some have dependencies of their own.
_LATE = ("batch_stats", "checkpoint", "elastic", "plots", "posthoc", "tf1")

if TYPE_CHECKING:
    from emaopt import batch_stats as batch_stats
    from emaopt import checkpoint as checkpoint
    from emaopt import elastic as elastic
    from emaopt import plots as plots
    from emaopt import posthoc as posthoc
    from emaopt import tf1 as tf1

    __version__: str
else:
    # Hidden from type checkers: for a module with __getattr__ they allow any name.

    def __getattr__(name: str) -> object:
        import importlib.metadata

        if name in _LATE:
            return importlib.import_module(f"emaopt.{name}")
        if name == "__version__":
            return importlib.metadata.version("emaopt")
        raise AttributeError(f"module 'emaopt' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*__all__, *_LATE, "__version__"])
