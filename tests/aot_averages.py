"""Averages compiled for chips that are not here; `aot_worker` compiles them.

The parameters of one model are split along the last axis of the mesh alone, so that the
averages can be split along the others.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt

WIDTH, HIDDEN = 8192, 32768
SHAPES = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
SPECS = {"up": P(None, "model"), "down": P("model")}
OTHERS = ("workers", "data")
# As many parameters in more arrays.
LAYERS = {f"layer{i}": (WIDTH, 2 * HIDDEN // 32) for i in range(32)}
SPLIT = {"sharding": {"up": P(OTHERS), "down": P(None, OTHERS)}}
ADAM = optax.adam(1e-3)


def averages(*options):
    """Adam, followed by an average with each of the options."""
    names = [(f"a{i}", emaopt.average_params(0.999, **o)) for i, o in enumerate(options)]
    return optax.named_chain(("adam", ADAM), *names)


# The options of the averages in each. Older jax is refused host memory when it is made.
OPTIONS = {
    "adam": [],
    "average": [{}],
    "two averages": [{}, {}],
    "average every 10": [{"every": 10}],
    "average in bfloat16": [
        {"accumulator_dtype": jnp.bfloat16, "stochastic_rounding": True}
    ],
    "split average": [SPLIT],
    "split average every 10": [{"every": 10, **SPLIT}],
    "average on the host": [{"memory_kind": "pinned_host"}],
    "average on the host every 10": [{"every": 10, "memory_kind": "pinned_host"}],
}


def programs(mesh):
    """(name, program) of a step with each optimizer."""

    def of(shapes, specs):
        return {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
            )
            for name, shape in shapes.items()
        }

    params = of(SHAPES, SPECS)
    layers = of(LAYERS, dict.fromkeys(LAYERS, P(None, "model")))
    with jax.set_mesh(mesh):
        yield "averaged", compiled(emaopt.averaged(ADAM, 0.999), params)
        yield "primal averaging", compiled(emaopt.gpa(ADAM), params)
        split = emaopt.gpa(ADAM, **SPLIT)
        yield "split primal averaging", compiled(split, params)
        for name, options in OPTIONS.items():
            if name == "average on the host every 10" and on_gpus(mesh):
                continue  # XLA cannot compile it there
            yield name, compiled(averages(*options), params)
        hosted = averages(*OPTIONS["average on the host"])
        yield "averages of layers on the host", compiled(hosted, layers)


def on_gpus(mesh):
    return mesh.devices.flat[0].platform in ("cuda", "gpu")


def compiled(tx, params):
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(tx.init, params),
        emaopt.state_shardings(tx, params),
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    places = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=places)
    return jitted.lower(params, state, params).compile()
