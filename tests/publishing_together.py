"""Processes that publish what is split over their devices.

python publishing_together.py DIRECTORY [--processes 2 --index 0 --port 1234]
"""

import json

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import join

import emaopt
from emaopt import checkpoint


def weights(number):
    """The averages and the statistics of version `number`."""
    return {"w": jnp.arange(8.0) + number, "b": jnp.full(3, 1.0 * number)}, {
        "mean": jnp.arange(4.0) * number
    }


def main():
    args = join()
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), (AxisType.Auto,))

    def placed(leaf):
        split = leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
        spec = PartitionSpec("devices") if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    tx = emaopt.averaged(optax.sgd(0.1), 0.5)
    for number in (1, 2, 3):
        params, stats = jax.tree.map(placed, weights(number))
        own = jax.tree.map(jnp.zeros_like, stats)
        state = {"params": params, "opt_state": jax.jit(tx.init)(params), "stats": own}
        published = checkpoint.publish(
            args.directory, state, served={"stats": stats}, max_to_keep=2
        )
        print(json.dumps({"published": published}), flush=True)


if __name__ == "__main__":
    main()
