"""Saves an array in two processes, damages the second's half, and restores it.

    python damaged_worker.py DIRECTORY --processes 2 --index 0 --port 1234

Prints the error of each process as a JSON line.
"""

import json

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import join

import emaopt
from emaopt import checkpoint

ZSTD = bytes.fromhex("28b52ffd")  # what the compressed parts of arrays begin with


def main():
    args = join()
    mesh = jax.make_mesh((2,), ("devices",), (AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("devices"))
    noise = np.random.default_rng(0).standard_normal((2048, 64)).astype(np.float32)
    whole = jax.make_array_from_callback(noise.shape, place, lambda index: noise[index])
    tx = emaopt.averaged(optax.sgd(1.0), 0.5)
    state = {"params": whole, "opt_state": jax.jit(tx.init)(whole)}
    checkpoint.save(args.directory, state)
    if args.index == 0:
        for file in (args.directory / "ocdbt.process_1" / "d").iterdir():
            content = file.read_bytes()
            assert content.count(ZSTD) < 10
            file.write_bytes(content.replace(ZSTD, bytes(4)))
    multihost_utils.sync_global_devices("damaged")
    try:
        checkpoint.restore(args.directory, state)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
