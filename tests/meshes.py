"""Meshes over the test machine's devices, and parameters that are placed on them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding

KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
HAS_HOST = jax.__version_info__ >= (0, 10)
ON_HOST = pytest.mark.skipif(not HAS_HOST, reason="this jax is refused host memory")


def make_mesh(shape, kind=AxisType.Auto):
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def start(mesh, specs):
    params = {"w": jnp.linspace(-1, 1, 24 * 16).reshape(24, 16), "b": jnp.ones(16)}
    return {
        k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()
    }
