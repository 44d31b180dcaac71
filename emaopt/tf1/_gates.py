"""Gates: no gradient is used before it is computed, or before all of them are."""

import jax
import numpy as np
import optax
from jax import lax

from emaopt._tree_checks import check_arrays
from emaopt._types import PyTree

GATE_NONE = 0
GATE_OP = 1
GATE_GRAPH = 2


def gate_gradients(mode: int) -> optax.GradientTransformation:
    """Keeps the compiler from using gradients before they are computed.

    GATE_NONE does nothing. GATE_OP puts a `jax.lax.optimization_barrier` around each
    gradient, GATE_GRAPH one around all of them together. The numbers do not change.

    What to watch: XLA decides the order of operations itself, and a barrier only limits
    its choice. On TPU, and from jax 0.12 on also on CPU, a barrier keeps XLA from fusing
    a gradient with its use, which costs one more pass over the gradients. On CPU before
    jax 0.12 and on GPU (seen with jax 0.10) XLA removes the barrier before fusion, and
    the compiled program has the same operations.

    Args:
      mode: GATE_NONE, GATE_OP or GATE_GRAPH.

    Returns:
      A transformation without state, to stand first in a chain.

    Raises:
      ValueError: If `mode` is none of the three.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> tx = optax.chain(gate_gradients(emaopt.tf1.GATE_GRAPH), optax.adam(1e-3))
    """
    check_gate("gate_gradients", mode)

    def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
        del params
        check_arrays("gate_gradients", "updates", updates)
        return gated(updates, mode)

    return optax.stateless(update)


def check_gate(function: str, mode: object) -> None:
    """Raises unless `mode` is GATE_NONE, GATE_OP or GATE_GRAPH."""
    # True == 1 in Python, but a flag is no gate.
    whole = isinstance(mode, (int, np.integer)) and not isinstance(mode, bool)
    if not whole or mode not in (GATE_NONE, GATE_OP, GATE_GRAPH):
        raise ValueError(
            f"{function}: gate_gradients must be one of: GATE_NONE, GATE_OP, GATE_GRAPH."
            f" Not {mode!r}"
        )


def gated(tree: PyTree, mode: int) -> PyTree:
    """The tree behind the barriers of a gate."""
    if mode == GATE_OP:
        return jax.tree.map(lax.optimization_barrier, tree)
    return lax.optimization_barrier(tree) if mode == GATE_GRAPH else tree
