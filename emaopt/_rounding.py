"""Values rounded where the arithmetic says, also where a compiler would not."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from emaopt._jax_internals import inside_conditional
from emaopt._leaves import at_least_float32
from emaopt._xla import as_in_memory


def applied(params: Any, updates: Any) -> Any:
    """The parameters that `optax.apply_updates` returns, bit for bit also under jit.

    XLA may keep a 16-bit sum in float32 for the consumers that are compiled with it, so
    an average of it would be of values that the parameters never had.
    """
    return jax.tree.map(
        lambda leaf: rounded_to(leaf, jnp.asarray(leaf).dtype),
        optax.apply_updates(params, updates),
    )


def lead(param: Any, target: Any, update: Any, due: Any) -> jax.Array:
    """The update that sets a parameter to a target where `due`, the given one else.

    In the wider of the dtypes of the parameter and the update, as wrappers want it that
    choose between updates. `optax.apply_updates` then reaches the target up to its own
    rounding, if that dtype has 32 bits or more. In a narrower one the difference is
    rounded first. It is exact if the two are within a factor of two.
    """
    p, u = jnp.asarray(param), jnp.asarray(update)
    widths = [x.dtype for x in (p, u) if x.dtype.itemsize > 1]
    dtype = jnp.result_type(*widths) if widths else p.dtype
    wide = at_least_float32(dtype)
    step = rounded_to(target.astype(wide), p.dtype) - p.astype(wide)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        limit = float(jnp.finfo(dtype).max)  # float16 ends at 65504
        step = jnp.clip(step, -limit, limit)
    return jnp.where(due, step.astype(dtype), u.astype(dtype))


def rounded_to(value: Any, dtype: Any) -> Any:
    """A value that is rounded to `dtype` even if the compiler would drop the rounding.

    The result has the dtype of `value`.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return value
    info = jnp.finfo(dtype)
    if dtype in (jnp.bfloat16, jnp.float16) or info.bits < jnp.finfo(value.dtype).bits:
        if info.bits >= 16:
            return lax.reduce_precision(value, info.nexp, info.nmant)
        # A float8 is no truncated float32.
        return lax.optimization_barrier(value.astype(dtype)).astype(value.dtype)
    if info.bits < 16:
        return lax.optimization_barrier(value)
    return value


def rounded_product(factor: jax.Array, x: jax.Array) -> jax.Array:
    """factor · x, rounded before a sum can be fused with it: see `as_in_memory`."""
    if jnp.iscomplexobj(x):
        parts = (rounded_product(factor, part) for part in (x.real, x.imag))
        return lax.complex(*parts)
    return as_in_memory(factor * x)


def settled(updates: Any, *, selected: bool = False) -> Any:
    """Updates whose sum with the parameters is the same wherever it is computed.

    They mostly end in a product with the learning rate, and XLA fuses it with a sum that
    it sees beside it (FMA). In one program with `optax.apply_updates` all see the same
    sum, and the updates are left as they are. But those that a wrapper computes in a
    conditional are rounded on the way out, where `optax.apply_updates` takes them; so are
    those of which some are `selected` (XLA hoists that choice on CPUs; elsewhere it may
    not). These are rounded here, before any sum.
    """
    if not (selected or any(map(inside_conditional, jax.tree.leaves(updates)))):
        return updates  # the very object

    def leaf_settled(leaf):
        leaf = jnp.asarray(leaf)
        if jnp.iscomplexobj(leaf):
            return lax.complex(*map(as_in_memory, (leaf.real, leaf.imag)))
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return as_in_memory(rounded_to(leaf, leaf.dtype))
        return leaf

    return jax.tree.map(leaf_settled, updates)


def rounded_stochastically(value: Any, s: Any) -> Any:
    """Rounds float32 to bfloat16 up or down at random, in proportion to the distances.

    The noise is a hash of the element's index and the update's number: nothing to store,
    the same on every replica and after a restart, and fused into the update, where
    `jax.random` bits would cost a multiple of it. Leaves of one shape share it (a
    constant per leaf would compile a kernel per leaf); each stays unbiased.
    """
    if value.dtype != jnp.float32:
        return value  # complex
    index = jnp.zeros(value.shape, jnp.uint32)
    for axis, size in enumerate(value.shape):
        index = index * size + lax.broadcasted_iota(jnp.uint32, value.shape, axis)
    noise = _hash(index + _hash(jnp.asarray(s, jnp.uint32))) >> 16
    bits = lax.bitcast_convert_type(value, jnp.uint32) + noise
    rounded = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(value), rounded, value)


def _hash(x: Any) -> Any:
    """Mixes 32 bits: two rounds of xor-shift and multiply.

    The constants are those that C. Wellons found to have the least bias,
    https://nullprogram.com/blog/2018/07/31/
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
