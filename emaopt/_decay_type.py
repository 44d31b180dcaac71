"""The type of a decay: β(t), and where it knows them 1 - β and log Π β exactly."""

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from emaopt._types import DecayLike

Array: TypeAlias = jax.Array | np.ndarray
# (the array functions of NumPy or JAX, floating t) -> β or 1 - β
Formula: TypeAlias = Callable[[ModuleType, Array], Array]
# (array functions, i, n) -> log Π β over i < t <= i + n
LogKept: TypeAlias = Callable[[ModuleType, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Decay:
    """A decay that also knows 1 - β, which a β in float32 loses.

    Near 1, float32 has steps of 6e-8: 1 - β = 1e-6, as of a uniform average over 1e6
    iterates, would be off by several percent if computed from β.

    log_kept: (xp, i, n) -> log Π β over the steps i < t <= i + n, or None without a
    closed form; i and n, at least 0 and not both 0, are floating and need not be whole.
    With `of_time` it is as exact as n, in float32 too, however large i is, for n of
    0.01 and above.
    breaks: the t at which it has a kink.
    of_time: whether t may count something else than steps, such as examples.
    of_whole_steps: whether JAX computes with t as an integer, exact up to 2^31.
    """

    description: str
    beta: Formula = dataclasses.field(repr=False)
    complement: Formula = dataclasses.field(repr=False)
    log_kept: LogKept | None = None
    breaks: tuple[float, ...] = ()
    of_time: bool = False
    of_whole_steps: bool = False

    def __call__(self, t: ArrayLike) -> Array:
        return self.beta(*_namespace(self, t))

    def one_minus(self, t: ArrayLike) -> Array:
        return self.complement(*_namespace(self, t))

    def __repr__(self) -> str:
        return self.description


def _namespace(decay: Decay, t: ArrayLike) -> tuple[ModuleType, Array]:
    """The array functions to compute with, and t as an array, floating as a rule."""
    # Profiles are computed in float64 on the host; JAX without x64 has float32 only.
    if isinstance(t, np.ndarray) and t.dtype.kind in "iuf":
        return np, t.astype(np.float64)
    try:
        return jnp, jnp.asarray(t, dtype=jnp.int32 if decay.of_whole_steps else float)
    except (TypeError, ValueError):
        raise TypeError(f"{decay}: t must be a number, got {t!r}.") from None


def one_minus(decay: DecayLike, t: ArrayLike) -> Array | float:
    """Returns 1 - β at t, as exactly as the decay knows it.

    A Python number is subtracted in Python (float32 holds 1 - 0.9999 only to 1.7e-4). A
    `Decay` computes 1 - β itself. The β of any other function is subtracted from 1 at
    the precision that it has.
    """
    if isinstance(decay, Decay):
        return decay.one_minus(t)
    if callable(decay):
        return 1 - jnp.asarray(decay(t))
    return 1 - decay


def evaluate(decay: DecayLike, t: np.ndarray) -> np.ndarray:
    """1 - β at every t, float64; of a user's function at the precision that it has."""
    # A user's function gets what the average gives it: a scalar int32 of JAX's.
    if callable(decay) and not isinstance(decay, Decay):
        steps = jnp.asarray(t, jnp.int32)
        return np.asarray(jax.vmap(lambda i: one_minus(decay, i))(steps), np.float64)
    return np.broadcast_to(np.asarray(one_minus(decay, t), np.float64), t.shape)


def log_kept_of(decay: DecayLike) -> LogKept | None:
    """`Decay.log_kept` of a decay or a constant; None if there is no closed form."""
    if callable(decay):
        return decay.log_kept if isinstance(decay, Decay) else None
    if isinstance(decay, jax.Array):
        return None
    log_beta = math.log(decay) if decay > 0 else -math.inf
    # `where` computes both choices, and 0 · log β is NaN at β = 0: no factor is ever 0.
    # A NaN is no 0, and shows.
    return lambda xp, i, n: xp.where(n == 0, 0.0, xp.maximum(n, 1e-9) * log_beta)


def until(log_kept: LogKept, last: float) -> Callable[[np.ndarray], np.ndarray]:
    """i -> log Π β over the steps i < t <= `last`, in NumPy."""
    return lambda i: np.asarray(log_kept(np, i, last - i))
