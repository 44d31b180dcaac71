"""Values that are rounded where the arithmetic says, whatever the compiler would do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from emaopt._jax_internals import inside_conditional
from emaopt._leaves import at_least_float32
from emaopt._types import Leaf, PyTree, Scalar
from emaopt._xla import as_in_memory


def applied(params: PyTree, updates: PyTree) -> PyTree:
    """The parameters that `optax.apply_updates` returns, bit for bit also under jit.

    XLA may keep a 16-bit sum in float32 for consumers in the same program. An average of
    that sum would be one of values that the parameters never had.
    """
    return jax.tree.map(
        lambda leaf: rounded_to(leaf, jnp.asarray(leaf).dtype),
        optax.apply_updates(params, updates),
    )


def lead(param: Leaf, target: jax.Array, update: Leaf, due: Scalar | bool) -> jax.Array:
    """The update that sets a parameter to a target where `due`, else the given update.

    Its dtype is the wider one of the parameter's and the update's, because wrappers that
    choose between updates need them alike. With 32 bits or more, `optax.apply_updates`
    reaches the target up to its own rounding. In fewer bits the difference is rounded
    first; it is exact if parameter and target are within a factor of two.
    """
    p, u = jnp.asarray(param), jnp.asarray(update)
    # JAX refuses to promote an 8-bit floating dtype with another, so it is left out.
    widths = [x.dtype for x in (p, u) if x.dtype.itemsize > 1]
    dtype = jnp.result_type(*widths) if widths else p.dtype
    wide = at_least_float32(dtype)
    # The target is rounded as the parameter will be, so that the step leads there.
    step = rounded_to(target.astype(wide), p.dtype) - p.astype(wide)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        limit = float(jnp.finfo(dtype).max)  # float16 ends at 65504
        step = jnp.clip(step, -limit, limit)
    return jnp.where(due, step.astype(dtype), u.astype(dtype))


def rounded_to(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """A value, rounded to `dtype` even where the compiler would drop the rounding.

    The result has the dtype of `value`.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return value
    info = jnp.finfo(dtype)
    # A value of 16 bits is rounded to its own dtype as well: within a program XLA may
    # hold it in float32.
    if dtype in (jnp.bfloat16, jnp.float16) or info.bits < jnp.finfo(value.dtype).bits:
        if info.bits >= 16:
            return lax.reduce_precision(value, info.nexp, info.nmant)
        # reduce_precision would make 0 of a float8's subnormals, and inf of the largest
        # numbers of one without infinities. A compiler may cancel two casts in a row.
        return lax.optimization_barrier(value.astype(dtype)).astype(value.dtype)
    # The value has 8 bits already; the barrier keeps XLA from holding it in more.
    if info.bits < 16:
        return lax.optimization_barrier(value)
    return value


def rounded_product(factor: jax.Array, x: jax.Array) -> jax.Array:
    """factor · x, rounded before a sum can be fused with it: see `as_in_memory`."""
    if jnp.iscomplexobj(x):
        parts = (rounded_product(factor, part) for part in (x.real, x.imag))
        return lax.complex(*parts)
    return as_in_memory(factor * x)


def settled(updates: PyTree, *, selected: bool = False) -> PyTree:
    """Updates whose sum with the parameters is the same wherever it is computed.

    Updates mostly end in a product with the learning rate, which XLA fuses with a sum
    that it sees beside it (FMA). In one program with `optax.apply_updates` all consumers
    see the same sum, and the updates stay as they are. But updates that a wrapper
    computes in a conditional are rounded on the way out to `optax.apply_updates`. So are
    updates that the caller selects afterwards, with `selected` (on CPUs XLA hoists that
    choice; elsewhere it may not). Both are rounded here, before any sum.
    """
    if not (selected or any(map(inside_conditional, jax.tree.leaves(updates)))):
        return updates  # the same object

    def leaf_settled(leaf: Leaf) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if jnp.iscomplexobj(leaf):
            return lax.complex(*map(as_in_memory, (leaf.real, leaf.imag)))
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return as_in_memory(rounded_to(leaf, leaf.dtype))
        return leaf

    return jax.tree.map(leaf_settled, updates)


def rounded_stochastically(value: jax.Array, s: Scalar) -> jax.Array:
    """Rounds float32 to bfloat16 up or down at random, in proportion to the distances.

    The noise is a hash of the element's index and the update's number s: nothing to
    store, the same on every replica and after a restart, and fused into the update, where
    `jax.random` bits would cost a multiple of it. Leaves of one shape share their noise
    (a constant per leaf would compile a kernel per leaf); each stays unbiased.
    """
    if value.dtype != jnp.float32:
        return value  # complex
    index = jnp.zeros(value.shape, jnp.uint32)
    for axis, size in enumerate(value.shape):
        index = index * size + lax.broadcasted_iota(jnp.uint32, value.shape, axis)
    # The noise covers the 16 bits that bfloat16 drops. Where their sum has a carry, the
    # value is rounded up, away from 0.
    noise = hashed(index + hashed(jnp.asarray(s, jnp.uint32))) >> 16
    bits = lax.bitcast_convert_type(value, jnp.uint32) + noise
    rounded = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    # A carry would make -0 of some NaNs.
    return jnp.where(jnp.isfinite(value), rounded, value)


def hashed(x: jax.Array) -> jax.Array:
    """Mixes 32 bits: two rounds of xor-shift and multiply.

    C. Wellons found these constants to have the least bias,
    https://nullprogram.com/blog/2018/07/31/
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
