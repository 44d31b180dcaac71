"""Small models that several tests train."""

import jax.numpy as jnp
from flax import nnx


class Net(nnx.Module):
    """A list of layers, BatchNorm, and Dropout with its own random numbers."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(self.norm(self.layers[0](x))))


@nnx.jit
def train_step(model, optimizer):
    grads = nnx.grad(lambda m: m(jnp.arange(6.0).reshape(2, 3)).sum())(model)
    optimizer.update(model, grads)
