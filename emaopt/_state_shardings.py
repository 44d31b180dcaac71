"""The shardings that an optimizer's state should have."""

from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from emaopt._checks import check_optimizer
from emaopt._sharding import HOST, auto_axes
from emaopt._types import PyTree


def state_shardings(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Returns the sharding that each array of an optimizer's state should have.

    For `jax.jit(tx.init, out_shardings=...)`, which otherwise replicates slots that start
    as zeros; for the target of a restore; for compiling ahead of time. Slots are sharded
    as their parameters, averages as their `sharding` says; the rest is replicated. Their
    `.spec`s are the specs by which `jax.shard_map` takes and returns the state.

        shardings = emaopt.state_shardings(tx, params)
        opt_state = jax.jit(tx.init, out_shardings=shardings)(params)

    Args:
      optimizer: Any Optax transformation.
      params: The parameters, or `jax.ShapeDtypeStruct`s, whose shardings are
        `NamedSharding`s of one mesh.

    Returns:
      A tree of `NamedSharding` like the state.

    Raises:
      ValueError: If the parameters are not sharded over one mesh.
      TypeError: If an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax.sharding import Mesh, PartitionSpec as P
      >>> mesh = Mesh(jax.devices()[:1], "data")
      >>> params = jax.device_put(jnp.zeros(8), NamedSharding(mesh, P("data")))
      >>> print(tuple(state_shardings(optax.adam(1e-3), params)[0].mu.spec))
      ('data',)
    """
    check_optimizer("state_shardings", "optimizer", optimizer)
    own = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    meshes = {s.mesh if isinstance(s, NamedSharding) else None for s in own}
    mesh = meshes.pop() if len(meshes) == 1 else None
    if not isinstance(mesh, Mesh):
        raise ValueError(
            "state_shardings: the parameters must be arrays or ShapeDtypeStructs with "
            f"NamedShardings of one mesh, got {own[0] if own else 'none'}."
        )
    # In a mesh of Explicit axes, types carry shardings through the tracing of init. Axes
    # of Auto mode are still judged as such: `_place` reads them from the context.
    types = (AxisType.Explicit,) * len(mesh.axis_names)
    explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    typed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(explicit, leaf.sharding.spec)
        ),
        params,
    )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    auto = {axis for axis, kind in kinds.items() if kind == AxisType.Auto}
    token = auto_axes.set(frozenset(auto))
    try:
        with jax.set_mesh(explicit):
            closed, shapes = jax.make_jaxpr(optimizer.init, return_shape=True)(typed)
    finally:
        auto_axes.reset(token)

    def sharding(aval: Any) -> NamedSharding:
        host = aval.memory_space == jax.memory.Space.Host
        spec = aval.sharding.spec
        return NamedSharding(mesh, spec, **({"memory_kind": HOST} if host else {}))

    return jax.tree.unflatten(jax.tree.structure(shapes), map(sharding, closed.out_avals))
