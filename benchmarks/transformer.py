"""Python's own help texts, byte by byte, and a causal transformer that learns them."""

import functools
import math
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


class Text(NamedTuple):
    """int32, numbers of the bytes that occur."""

    training: np.ndarray  # [bytes]
    validation: np.ndarray  # [windows, context + 1]
    vocabulary: int


@functools.cache
def load(context: int) -> Text:
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    encoded = "\n\n".join(dict.fromkeys(paragraphs)).encode()
    kinds, text = np.unique(np.frombuffer(encoded, np.uint8), return_inverse=True)
    text = text.astype(np.int32)
    cut = len(text) * 9 // 10
    starts = np.arange(cut, len(text) - context, context)
    windows = text[starts[:, None] + np.arange(context + 1)]
    return Text(text[:cut], windows, len(kinds))


def init_params(
    random: np.random.Generator, vocabulary: int, *, layers: int, width: int, context: int
) -> Any:
    def normal(rows: int, columns: int, deviation: float) -> np.ndarray:
        return random.normal(0, deviation, (rows, columns)).astype(np.float32)

    inner, outer = width**-0.5, (2 * layers * width) ** -0.5
    return {
        "embedding": normal(vocabulary, width, 1.0),
        "position": normal(context, width, 0.3),
        "head": normal(width, vocabulary, inner),
        "layers": [
            {
                "query, key, value": normal(width, 3 * width, inner),
                "attended": normal(width, width, outer),
                "hidden": normal(width, 4 * width, inner),
                "out": normal(4 * width, width, outer / 2),
            }
            for _ in range(layers)
        ],
    }


def normalized(x: Any) -> Any:
    return x * lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def attention(layer: Any, x: Any, heads: int) -> Any:
    batch, length, width = x.shape
    split = (x @ layer["query, key, value"]).reshape(batch, length, 3, heads, -1)
    q, k, v = jnp.moveaxis(split, (2, 3), (0, 2))
    scores = q @ jnp.swapaxes(k, -1, -2) / math.sqrt(width // heads)
    past = jnp.tril(jnp.ones((length, length), bool))
    found = jax.nn.softmax(jnp.where(past, scores, -jnp.inf)) @ v
    return jnp.swapaxes(found, 1, 2).reshape(x.shape) @ layer["attended"]


def apply(params: Any, inputs: Any, heads: int) -> Any:
    """The logits of the byte after each."""
    x = params["embedding"][inputs] + params["position"]
    for layer in params["layers"]:
        x += attention(layer, normalized(x), heads)
        x += jax.nn.relu(normalized(x) @ layer["hidden"]) @ layer["out"]
    return normalized(x) @ params["head"]


def loss(params: Any, windows: Any, heads: int) -> Any:
    """The mean over all bytes of the windows but the first."""
    logits, labels = apply(params, windows[:, :-1], heads), windows[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
