"""Values that equal others, and that XLA must not see to be equal.

XLA moves and merges operations as long as the numbers stay the same to the last bit or,
where it fuses a product with a sum, not even that. Where the order of two operations or
a rounding matters, the only means that all of its passes respect is arithmetic that it
cannot simplify. `optimization_barrier` is no such means: on CPU and GPU it is gone before
collectives are combined, buffers are assigned and loops are fused.

Each function below says what it prevents. tests/test_internals.py compiles each of them:
one that some release of XLA sees through fails there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def as_in_memory(x: jax.Array) -> jax.Array:
    """A real value, rounded to its dtype before a sum can be fused with it.

    LLVM fuses a product with a sum that it sees beside it (FMA), which skips a rounding:
    averages would differ by an ulp between jit and NumPy. It sees through
    `reduce_precision` to the same width, `optimization_barrier`, and a select or xor with
    a scalar, which it hoists out of the loop. A select on the data stays, for the two
    branches differ where x is NaN: in the sign, which has no meaning.
    """
    return lax.select(lax.ne(x, x), lax.neg(x), x)


def always(flags: jax.Array) -> jax.Array:
    """Flags that are on, which no compiler knows before those given are there."""
    # False and True as integers are 0 and 1; XLA does not track ranges through the cast.
    return flags.astype(jnp.int32) >= 0


def held_until(true: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """The tree, to be read when true(leaf) is there: a value that always is true."""

    def held(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.number):
            return leaf
        return jnp.where(true(leaf), leaf, jnp.zeros_like(leaf))

    return jax.tree.map(held, tree)


def held_until_there(leaf: jax.Array, result: jax.Array) -> jax.Array:
    """The leaf, to be read when the first element of a result is there."""
    # No number is below -inf, and a NaN is not either. XLA does not fold the comparison.
    first = jnp.real(result[(0,) * result.ndim])
    return held_until(lambda _: ~(first < -jnp.inf), leaf)


def unknown_one(count: jax.Array, dtype: Any) -> jax.Array:
    """The number 1, of which no compiler knows that it is, from a count from 0 on.

    A quotient by a constant 1 is simplified away, and what is left of the scalar
    arithmetic is cheap enough for XLA to compute it again in the kernel of each leaf.
    A real quotient it computes once.
    """
    return (count >= 0).astype(dtype)
