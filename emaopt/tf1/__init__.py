"""What tf.train.Optimizer had on every optimizer, for any Optax transformation.

Steps:     minimize, compute_gradients, apply_gradients
Slots:     get_slot, get_slot_names, variables
Updates:   constrain, gate_gradients with GATE_NONE, GATE_OP, GATE_GRAPH

For users of TensorFlow 1: gradients of chosen parameters, no update of parameters without
a gradient, sparse gradients of embeddings, an optimizer's variables by name. MIGRATING.md
lists each call of TensorFlow's with its counterpart here.
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
