"""What tf.train.Optimizer had on every optimizer, for any Optax transformation.

Steps:     minimize, compute_gradients, apply_gradients
Slots:     get_slot, get_slot_names, variables
Updates:   constrain, gate_gradients with GATE_NONE, GATE_OP, GATE_GRAPH

For those who come from TensorFlow 1: gradients of chosen parameters, parameters without
one that are left alone, sparse gradients of embeddings, the optimizer's variables by
name. MIGRATING.md has each of its calls beside the one here.
"""

from emaopt.tf1._constraint import constrain
from emaopt.tf1._gates import GATE_GRAPH, GATE_NONE, GATE_OP, gate_gradients
from emaopt.tf1._gradients import compute_gradients
from emaopt.tf1._optimizer import apply_gradients, minimize
from emaopt.tf1._slots import get_slot, get_slot_names, variables

__all__ = [
    "GATE_GRAPH",
    "GATE_NONE",
    "GATE_OP",
    "apply_gradients",
    "compute_gradients",
    "constrain",
    "gate_gradients",
    "get_slot",
    "get_slot_names",
    "minimize",
    "variables",
]
