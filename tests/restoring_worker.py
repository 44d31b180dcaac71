"""Restores what other optimizers saved, on all devices: prints a digest of each state.

    python restoring_worker.py DIRECTORY [--processes 2 --index 0 --port 1234]

In DIRECTORY stand checkpoints of `SAVED`; each is restored into the state of each of
`TARGETS`, split over the devices.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import digest, join

import emaopt
from emaopt import checkpoint

ADAM = optax.adam(0.1)


def local(workers):
    return emaopt.diloco(ADAM, period=2, num_workers=workers)


SAVED = {"plain": (ADAM, None), "four workers": (local(4), 4)}
TARGETS = {
    "four workers": (local(4), 4),
    "eight workers": (local(8), 8),
    "averaged": (emaopt.averaged(ADAM, 0.5), None),
}


def begin(tx, workers):
    params = {f"w{i}": jnp.arange(8.0) + i for i in range(6)}
    if workers:
        params = emaopt.stack_workers(params, workers)
    return {"params": params, "opt_state": tx.init(params)}


def placed(state, mesh):
    """Split along the first axis where that is possible."""

    def place(leaf):
        split = leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
        spec = PartitionSpec("devices") if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def main():
    args = join()
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), (AxisType.Auto,))
    for old, new in itertools.product(SAVED, TARGETS):
        state = placed(begin(*TARGETS[new]), mesh)
        state = checkpoint.restore(args.directory / old, state, report=lambda _: None)
        state = multihost_utils.process_allgather(state, tiled=True)
        said = {"old": old, "new": new, "digest": digest(jax.tree.map(np.asarray, state))}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
