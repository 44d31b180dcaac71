"""Values that equal others, and that XLA must not see to be equal.

XLA moves and merges operations as long as the numbers stay the same to the last bit; it
even changes the last bit where it fuses a product with a sum. Where the order of two
operations or a rounding matters, only arithmetic that XLA cannot simplify holds in all
passes. `optimization_barrier` does not: on CPU and GPU it is gone before collectives are
combined, buffers are assigned and loops are fused.

Each function below says what it prevents. tests/test_internals.py compiles each of them,
and fails for one that a release of XLA sees through.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from emaopt._types import PyTree


def as_in_memory(x: jax.Array) -> jax.Array:
    """A real value, rounded to its dtype before a sum can be fused with it.

    LLVM fuses a product with a sum that it sees beside it (FMA), which skips a rounding:
    averages would differ by an ulp between jit and NumPy. LLVM sees through
    `reduce_precision` to the same width, through `optimization_barrier`, and through a
    select or xor with a scalar, which it hoists out of the loop. A select on the data
    stays, because its branches differ where x is NaN: in the sign, which has no meaning.
    """
    # The other branch is -x and not a constant NaN, at which jax_debug_nans would stop.
    return lax.select(lax.ne(x, x), lax.neg(x), x)


def always(flags: jax.Array) -> jax.Array:
    """Flags that are all on, which XLA knows only when `flags` (or counts) are computed.

    What is computed of them can therefore not be moved before `flags`.
    """
    # As integers, flags are 0 or 1, and counts are >= 0. XLA tracks no ranges through the
    # cast, so it keeps the comparison.
    return flags.astype(jnp.int32) >= 0


def held_until(true: Callable[[jax.Array], jax.Array], tree: PyTree) -> PyTree:
    """The tree, to be read only when true(leaf), which is always true, is computed."""

    def held(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.number):
            return leaf
        # The branches differ, so the select stays and waits for its condition.
        return jnp.where(true(leaf), leaf, jnp.zeros_like(leaf))

    return jax.tree.map(held, tree)


def held_until_there(leaf: jax.Array, result: jax.Array) -> jax.Array:
    """The leaf, to be read only when the first element of a result is computed."""
    # No number is below -inf, nor is NaN: the condition is always true, and XLA does not
    # fold the comparison.
    first = jnp.real(result[(0,) * result.ndim])
    return held_until(lambda _: ~(first < -jnp.inf), leaf)


def unknown_one(count: jax.Array, dtype: np.dtype) -> jax.Array:
    """The number 1, made of a count >= 0 so that no compiler knows its value.

    XLA simplifies a quotient by a constant 1 away; the scalar arithmetic that is left is
    so cheap that XLA computes it again in the kernel of each leaf. A quotient by an
    unknown number is computed once.
    """
    return (count >= 0).astype(dtype)
