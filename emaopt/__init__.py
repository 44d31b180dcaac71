"""Averages of the weights for JAX and Optax, and checkpoints that serve them.

Averages:     average_params, averaged, average_tree
Decays:       warmup_decay, uniform_decay, polynomial_decay, power_decay,
              inverse_gamma_decay, half_life_decay, scale_decay
Their weights: decay_weights, weight_summary
Reading:      get_average, swap, average_distance
Changing:     reset_average, change_mask, by_name
Placement:    state_shardings
Local updates: local_updates, agn, diloco, local_sgd, easgd, block_momentum, lookahead,
              get_center, stack_workers, state_specs, worker_spread, local_round,
              synchronize, simulate_async
Optimizers:   compute_gradients, apply_gradients, minimize, gate_gradients, constrain,
              get_slot, get_slot_names, variables
Modules:      checkpoint, batch_stats, posthoc, plots
"""

import importlib

from emaopt._asynchronous import AsyncTrace as AsyncTrace
from emaopt._asynchronous import simulate_async as simulate_async
from emaopt._averaging import AveragedState as AveragedState
from emaopt._averaging import average_params as average_params
from emaopt._averaging import average_tree as average_tree
from emaopt._averaging import averaged as averaged
from emaopt._constraint import constrain as constrain
from emaopt._decays import half_life_decay as half_life_decay
from emaopt._decays import inverse_gamma_decay as inverse_gamma_decay
from emaopt._decays import polynomial_decay as polynomial_decay
from emaopt._decays import power_decay as power_decay
from emaopt._decays import scale_decay as scale_decay
from emaopt._decays import uniform_decay as uniform_decay
from emaopt._decays import warmup_decay as warmup_decay
from emaopt._gates import GATE_GRAPH as GATE_GRAPH
from emaopt._gates import GATE_NONE as GATE_NONE
from emaopt._gates import GATE_OP as GATE_OP
from emaopt._gates import gate_gradients as gate_gradients
from emaopt._gradients import compute_gradients as compute_gradients
from emaopt._local_loop import local_round as local_round
from emaopt._local_loop import stack_workers as stack_workers
from emaopt._local_loop import state_specs as state_specs
from emaopt._local_loop import synchronize as synchronize
from emaopt._local_methods import agn as agn
from emaopt._local_methods import block_momentum as block_momentum
from emaopt._local_methods import diloco as diloco
from emaopt._local_methods import easgd as easgd
from emaopt._local_methods import local_sgd as local_sgd
from emaopt._local_methods import lookahead as lookahead
from emaopt._local_options import local_updates as local_updates
from emaopt._local_updates import LocalUpdatesState as LocalUpdatesState
from emaopt._local_updates import SwappedLocalUpdatesState as SwappedLocalUpdatesState
from emaopt._names import by_name as by_name
from emaopt._optimizer import apply_gradients as apply_gradients
from emaopt._optimizer import minimize as minimize
from emaopt._reading import average_distance as average_distance
from emaopt._reading import get_average as get_average
from emaopt._reading import get_center as get_center
from emaopt._reading import swap as swap
from emaopt._reading import worker_spread as worker_spread
from emaopt._recursion import Averager as Averager
from emaopt._recursion import AverageState as AverageState
from emaopt._recursion import SwappedState as SwappedState
from emaopt._restarting import change_mask as change_mask
from emaopt._restarting import reset_average as reset_average
from emaopt._sharding import state_shardings as state_shardings
from emaopt._slots import get_slot as get_slot
from emaopt._slots import get_slot_names as get_slot_names
from emaopt._slots import variables as variables
from emaopt._weights import WeightSummary as WeightSummary
from emaopt._weights import decay_weights as decay_weights
from emaopt._weights import weight_summary as weight_summary


def __getattr__(name: str):
    """Imports a module with dependencies of its own when it is first used."""
    if name in ("batch_stats", "checkpoint", "plots", "posthoc"):
        return importlib.import_module(f"emaopt.{name}")
    raise AttributeError(f"module 'emaopt' has no attribute {name!r}")
