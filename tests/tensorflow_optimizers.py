"""Which optimizer of Optax is the same as one of TensorFlow's, and its slots."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tensorflow_records import MANIFEST


def hyperparameters(case):
    """As TensorFlow uses them: in float32, for float64 variables too."""
    return {
        name: value if isinstance(value, (bool, str)) else float(np.float32(value))
        for name, value in MANIFEST[case]["hparams"].items()
    }


# The same arguments, and where that is another optimizer: what makes it the same one.


class FtrlState(NamedTuple):
    accum: dict  # Σ g² and its start
    linear: dict


def ftrl(rate, start):
    """McMahan et al., 2013, without its regularisation; Optax has no such optimizer."""

    def init(params):
        full = optax.tree.full_like(params, start)
        return FtrlState(full, optax.tree.zeros_like(params))

    def update(grads, state, params):
        new = jax.tree.map(lambda n, g: n + g * g, state.accum, grads)
        linear = jax.tree.map(
            lambda z, g, n, m, p: z + g - (jnp.sqrt(m) - jnp.sqrt(n)) / rate * p,
            *(state.linear, grads, state.accum, new, params),
        )
        steps = jax.tree.map(
            lambda z, n, p: -rate * z / jnp.sqrt(n) - p, linear, new, params
        )
        return steps, FtrlState(new, linear)

    return optax.GradientTransformation(init, update)


def same_arguments(h):
    """Optax's optimizer with the arguments that TensorFlow's has."""
    rate = h["learning_rate"]
    match h["cls"]:
        case "GradientDescentOptimizer":
            return optax.sgd(rate)
        case "MomentumOptimizer":
            return optax.sgd(rate, h["momentum"], h["use_nesterov"])
        case "AdamOptimizer":
            return optax.adam(rate, h["beta1"], h["beta2"], h["epsilon"])
        case "AdagradOptimizer":
            return optax.adagrad(rate, h["initial_accumulator_value"])
        case "AdadeltaOptimizer":
            return optax.adadelta(rate, h["rho"], h["epsilon"])
        case "RMSPropOptimizer":
            options = {"centered": h["centered"], "momentum": h["momentum"]}
            return optax.rmsprop(rate, h["decay"], h["epsilon"], **options)


def converted(h):
    rate = h["learning_rate"]
    match h["cls"]:
        case "AdamOptimizer":  # ε is added to √v, in Optax to √(v / (1 - β₂^t))
            beta2 = h["beta2"]
            eps = lambda n: h["epsilon"] / jnp.sqrt(1 - beta2 ** (n + 1))  # noqa: E731
            adam = optax.inject_hyperparams(optax.adam)
            return adam(rate, b1=h["beta1"], b2=beta2, eps=eps)
        case "AdagradOptimizer":  # no ε; Optax's 1e-7 shows with a small start only
            return optax.adagrad(rate, h["initial_accumulator_value"], eps=0.0)
        case "RMSPropOptimizer":  # the mean square starts at 1
            return optax.rmsprop(
                rate,
                h["decay"],
                h["epsilon"],
                initial_scale=1.0,
                eps_in_sqrt=True,
                centered=h["centered"],
                momentum=h["momentum"],
            )
        case "FtrlOptimizer":
            return ftrl(rate, h["initial_accumulator_value"])
    return same_arguments(h)


# TensorFlow's slot: Optax's, and the sign (RMSProp's momentum is of steps down).
SLOTS = {
    "GradientDescentOptimizer": {},
    "MomentumOptimizer": {"momentum": ("trace", 1)},
    "AdamOptimizer": {"m": ("mu", 1), "v": ("nu", 1)},
    "AdagradOptimizer": {"accumulator": ("sum_of_squares", 1)},
    "AdadeltaOptimizer": {"accum": ("e_g", 1), "accum_update": ("e_x", 1)},
    "RMSPropOptimizer": {"rms": ("nu", 1), "mg": ("mu", 1), "momentum": ("trace", -1)},
    "FtrlOptimizer": {"accum": ("accum", 1), "linear": ("linear", 1)},
}
