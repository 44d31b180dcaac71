"""Handwritten digits: the data, a small network, and a server that knows only Orbax.

Run as a script, `python serve.py CHECKPOINT`, this file is the server. It makes
`import emaopt` impossible, restores the checkpoint with plain Orbax, evaluates the
parameters under "params" on digits that training never saw, and prints one line of JSON.
`emaopt demo` trains the network and copies this file unchanged to OUT/serve.py.
"""

import functools
import importlib.util
import json
import pathlib
import sys
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from sklearn.datasets import load_digits

__all__ = [
    "HELD_OUT",
    "Digits",
    "Network",
    "apply",
    "evaluate",
    "init_params",
    "load",
    "loss",
]

# This file imports nothing of emaopt's, its names of types included.
Params: TypeAlias = dict[str, Any]  # nested dicts of arrays

HELD_OUT = 500  # of 1,797 digits
_NONE: Any = object()  # stands for labels where a function takes none


class Digits(NamedTuple):
    """Images of handwritten digits, and the digit that each one shows."""

    images: np.ndarray  # [n, 8, 8, 1] float32 in [0, 1]
    labels: np.ndarray  # [n] int32 in 0..9


class Network(nnx.Module):
    """Two convolutions, each with a pooling, and a linear layer: 6,090 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1: nnx.Conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2: nnx.Conv = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.linear: nnx.Linear = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv1(images)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.linear(x.reshape(len(x), -1))


def load() -> tuple[Digits, Digits]:
    """Loads the digits that ship with scikit-learn.

    Returns:
      (train, held_out): 1,297 and 500 digits, always the same ones.
    """
    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = data.images[order, :, :, None].astype(np.float32) / 16
    labels = data.target[order].astype(np.int32)
    return (
        Digits(images[:-HELD_OUT], labels[:-HELD_OUT]),
        Digits(images[-HELD_OUT:], labels[-HELD_OUT:]),
    )


def init_params(seed: int) -> Params:
    """Draws the network's parameters: nested dicts of arrays.

    Raises:
      ValueError, TypeError: If `seed` is no whole number in [0, 2^32).
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"init_params: seed must be a whole number, got {seed!r}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"init_params: seed must be in [0, 2^32), got {seed!r}.")
    return nnx.to_pure_dict(nnx.split(Network(nnx.Rngs(seed)))[1])


def apply(params: Params, images: ArrayLike) -> jax.Array:
    """Runs the network: images [n, 8, 8, 1] to logits [n, 10].

    Raises:
      ValueError, TypeError: If an argument has other shapes or is no array.
    """
    _check("apply", params, images)
    return nnx.merge(_graph()[0], params)(images)


def loss(params: Params, images: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Returns the mean cross-entropy in nats, a scalar.

    Raises:
      ValueError, TypeError: If an argument has other shapes or is no array.
    """
    _check("loss", params, images, labels)
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def evaluate(params: Params, digits: Digits) -> tuple[float, float]:
    """Returns (loss, accuracy): the mean cross-entropy in nats, the fraction correct.

    Raises:
      ValueError, TypeError: If an argument has other shapes or is no array.
    """
    if not isinstance(digits, Digits):
        raise TypeError(f"evaluate: digits must be Digits, got {digits!r}.")
    _check("evaluate", params, *digits)
    value, correct = _scores(params, *digits)
    return float(value), int(correct) / len(digits.labels)


@jax.jit
def _scores(
    params: Params, images: ArrayLike, labels: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The mean loss, and how many digits are recognized."""
    correct = apply(params, images).argmax(axis=-1) == labels
    return loss(params, images, labels), correct.sum()


@functools.cache
def _graph() -> tuple[nnx.GraphDef, Params]:
    """The network without its parameters, and their shapes and dtypes."""
    # Abstract and cached: the network is built once, and no parameters are drawn.
    graph, params = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(params)


def _check(function: str, params: Params, images: Any, labels: Any = _NONE) -> None:
    """Raises unless the arguments are what the network takes."""
    # Written out here: a server cannot import emaopt._checks.
    leaves = jax.tree.leaves(params)
    like = _graph()[1]
    if jax.tree.structure(params) != jax.tree.structure(like) or any(
        np.shape(leaf) != wanted.shape
        for leaf, wanted in zip(leaves, jax.tree.leaves(like), strict=True)
    ):
        raise ValueError(
            f"{function}: params must be the network's, as init_params makes them, got "
            f"{params!r}."
        )
    # "V" are the narrow floating dtypes of JAX, bfloat16 for one.
    kind = getattr(images, "dtype", np.dtype(object)).kind
    if kind not in "fiuV" or np.shape(images)[1:] != (8, 8, 1) or not len(images):
        raise TypeError(
            f"{function}: images must be [n, 8, 8, 1], floating, n at least 1, got "
            f"{images!r}."
        )
    if labels is not _NONE:
        kind = getattr(labels, "dtype", np.dtype(object)).kind
        if kind not in "iu" or np.shape(labels) != np.shape(images)[:1]:
            raise TypeError(
                f"{function}: labels must be whole numbers [n], one for each of "
                f"{len(images)} images, got {labels!r}."
            )


def main() -> None:
    """Serves a checkpoint: one line of JSON about the digits held out."""
    # An entry of None makes every later `import emaopt` an ImportError.
    sys.modules["emaopt"] = None  # pyright: ignore[reportArgumentType]
    import orbax.checkpoint as ocp

    jax.config.update("jax_platforms", "cpu")
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} CHECKPOINT")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(pathlib.Path(sys.argv[1]).resolve())
    _, held_out = load()
    value, accuracy = evaluate(restored["params"], held_out)
    importable = importlib.util.find_spec("emaopt") is not None
    answer = {"accuracy": accuracy, "loss": value, "emaopt_importable": importable}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
