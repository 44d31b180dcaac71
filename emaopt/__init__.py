"""Averages of the weights for JAX and Optax, and checkpoints that serve them.

Averages:     average_params, averaged, average_tree
Decays:       warmup_decay, uniform_decay, polynomial_decay, power_decay,
              inverse_gamma_decay, half_life_decay, scale_decay
Their weights: decay_weights, weight_summary
Reading:      get_average, swap, reset_average, average_distance, by_name
Modules:      checkpoint, batch_stats
"""

import importlib

from emaopt._averaging import AveragedState as AveragedState
from emaopt._averaging import average_params as average_params
from emaopt._averaging import average_tree as average_tree
from emaopt._averaging import averaged as averaged
from emaopt._decays import half_life_decay as half_life_decay
from emaopt._decays import inverse_gamma_decay as inverse_gamma_decay
from emaopt._decays import polynomial_decay as polynomial_decay
from emaopt._decays import power_decay as power_decay
from emaopt._decays import scale_decay as scale_decay
from emaopt._decays import uniform_decay as uniform_decay
from emaopt._decays import warmup_decay as warmup_decay
from emaopt._names import by_name as by_name
from emaopt._reading import average_distance as average_distance
from emaopt._reading import get_average as get_average
from emaopt._reading import reset_average as reset_average
from emaopt._reading import swap as swap
from emaopt._recursion import Averager as Averager
from emaopt._recursion import AverageState as AverageState
from emaopt._recursion import SwappedState as SwappedState
from emaopt._weights import WeightSummary as WeightSummary
from emaopt._weights import decay_weights as decay_weights
from emaopt._weights import weight_summary as weight_summary


def __getattr__(name: str):
    """Imports a module with dependencies of its own when it is first used."""
    if name in ("batch_stats", "checkpoint"):
        return importlib.import_module(f"emaopt.{name}")
    raise AttributeError(f"module 'emaopt' has no attribute {name!r}")
