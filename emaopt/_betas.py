"""What a decay is: β as a function of t, which may know 1 - β and Π β better itself."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from emaopt._types import DecayLike


@dataclasses.dataclass(frozen=True)
class Decay:
    """A decay that also knows 1 - β, which β itself cannot carry in float32.

    Near 1, float32 steps by 6e-8: of a uniform average over 1e6 iterates, 1 - β = 1e-6
    would be read back with an error of several percent.

    log_kept: (i, T) -> log Π β over the steps i < t <= T, where that has a closed form;
    i, in [0, T], is float64 and need not be whole. breaks: the t at which it has a kink.
    """

    description: str
    beta: Callable[[Any, Any], Any] = dataclasses.field(repr=False)
    complement: Callable[[Any, Any], Any] = dataclasses.field(repr=False)
    log_kept: Callable[[np.ndarray, int], np.ndarray] | None = None
    breaks: tuple[float, ...] = ()

    def __call__(self, t: ArrayLike) -> Any:
        return self.beta(*_namespace(self, t))

    def one_minus(self, t: ArrayLike) -> Any:
        return self.complement(*_namespace(self, t))

    def __repr__(self) -> str:
        return self.description


def _namespace(decay: Any, t: ArrayLike) -> tuple[Any, Any]:
    """The array functions to compute with, and t as a floating-point array."""
    if isinstance(t, np.ndarray) and t.dtype.kind in "iuf":
        return np, t.astype(np.float64)
    try:
        return jnp, jnp.asarray(t, dtype=float)
    except (TypeError, ValueError):
        raise TypeError(f"{decay}: t must be a number, got {t!r}.") from None


def one_minus(decay: DecayLike, t: ArrayLike) -> Any:
    """Returns 1 - β at t, as exactly as the decay knows it.

    A Python number is subtracted in Python (float32 holds 1 - 0.9999 only to 1.7e-4),
    a decay of this module is asked, and what any other function returns is used as it
    comes.
    """
    if isinstance(decay, Decay):
        return decay.one_minus(t)
    if callable(decay):
        return 1 - jnp.asarray(decay(t))
    return 1 - decay


def evaluate(decay: DecayLike, t: np.ndarray) -> np.ndarray:
    """1 - β at every t, float64; decays of other makers at the precision they have."""
    if callable(decay) and not isinstance(decay, Decay):
        steps = jnp.asarray(t, jnp.int32)
        return np.asarray(jax.vmap(lambda i: one_minus(decay, i))(steps), np.float64)
    return np.broadcast_to(np.asarray(one_minus(decay, t), np.float64), t.shape)


def log_kept_of(decay: DecayLike) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """`Decay.log_kept` of a decay, a constant one too; None if it has no closed form."""
    if callable(decay):
        return decay.log_kept if isinstance(decay, Decay) else None
    if isinstance(decay, jax.Array):
        return None
    log_beta = math.log(decay) if decay > 0 else -math.inf
    return lambda i, last: np.where(i < last, np.maximum(last - i, 1e-9) * log_beta, 0.0)
