"""Meshes over the test machine's devices, and parameters that are placed on them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt

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


def in_form(form, tx, step, params, num_inputs=1):
    """A step (params, state, *inputs) of workers in a form, and their first state.

    Args:
      form: "stacked", "vmap", "shard_map", or "shard_map, unchecked"; the mapped axis of
        the last three is "w".
      num_inputs: How many inputs there are, with a row for each worker.
    """
    if form == "stacked":
        return step, tx.init(params)
    if form == "vmap":
        return jax.vmap(step, axis_name="w"), jax.vmap(tx.init)(params)
    workers = len(jax.tree.leaves(params)[0])
    mesh = jax.make_mesh(
        (workers,),
        ("w",),
        devices=jax.devices()[:workers],
        axis_types=(AxisType.Auto,),
    )
    specs = emaopt.state_specs(tx, params, "w")
    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P("w"), specs, *[P("w")] * num_inputs),
        out_specs=(P("w"), specs),
        check_vma=form == "shard_map",
    )
    return step, tx.init(params)
