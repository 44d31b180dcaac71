"""Arrays made like others: as good an argument to what was compiled for these."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from emaopt import _jax_internals
from emaopt._leaves import is_key, key_data
from emaopt._types import Leaf


class Likeness(NamedTuple):
    """What is to be like another array, without that array.

    Whatever differs makes jit compile once more.
    """

    place: Sharding  # of a typed key, that of its integers
    committed: bool  # whether it was put there, or is there by default
    weak: bool  # whether its dtype gives way to others, as that of a number
    impl: Any  # the algorithm of a typed key, else None

    def made(self, value: Leaf) -> jax.Array:
        """An array with these numbers; of a typed key, with these integers or its own."""
        if self.impl is not None:
            value = np.asarray(key_data(value))
        if self.committed:
            return self._made(value, self.place)
        with jax.default_device(next(iter(self.place.device_set))):
            return self._made(value, None)

    def _made(self, value: Leaf, place: Sharding | None) -> jax.Array:
        array = jax.device_put(value, place)
        if self.impl is not None:
            return jax.random.wrap_key_data(array, impl=self.impl)
        if not self.weak:
            return array
        if array.ndim:
            weak = _jax_internals.weak(array)
        else:
            weak = jax.device_put(jnp.asarray(array.item()), place)
        # With x64 a number has 64 bits, and in a mesh that is set it goes there.
        same = (weak.dtype, weak.sharding) == (array.dtype, array.sharding)
        return weak if same else array


def likeness(leaf: jax.Array) -> Likeness:
    """What an array is like."""
    # One sharding of a key is several of its integers, which are what jit looks at.
    numbers = key_data(leaf)
    place = numbers.sharding
    committed = leaf.committed or len(place.device_set) > 1
    impl = jax.random.key_impl(leaf) if is_key(leaf) else None
    return Likeness(place, committed, numbers.weak_type, impl)
