"""One worker of an elastic run: says the center after each exchange."""

import argparse
import hashlib
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import emaopt


def main():
    given = parsed()
    optimizer = emaopt.diloco(optax.adam(1e-2), period=3)
    key = jax.random.key(given.worker)
    params = {"w": jnp.ones(given.size), "b": jnp.zeros((3, 2), jnp.bfloat16)}
    state = optimizer.init(params)
    saved = Path(given.checkpoints) if given.checkpoints else None
    if saved is not None and (newest := steps(saved)):
        tree = emaopt.checkpoint.restore(
            saved / str(newest[-1]), {"params": params, "opt_state": state}
        )
        params, state = tree["params"], tree["opt_state"]

    @jax.jit
    def step(params, state, key):
        grads = jax.tree.map(
            lambda x: x - 2 + jax.random.normal(key, x.shape, x.dtype), params
        )
        updates, state = optimizer.update(grads, state, params, exchange=False)
        return optax.apply_updates(params, updates), state

    number = 0
    with emaopt.elastic.connect(
        given.address,
        num_workers=given.num_workers,
        worker=given.worker,
        heartbeat_timeout_seconds=given.seconds,
    ) as workers:
        while number < given.rounds:
            for _ in range(3):
                key, now = jax.random.split(key)
                params, state = step(params, state, now)
            if given.commits:
                commit = emaopt.elastic.pseudo_gradient(optimizer, params, state)
            if given.kill_at == number + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            params, state, number, live, joined = workers.exchange(
                optimizer, params, state, weight=given.weight
            )
            if given.commits:
                leaves = [np.asarray(x, np.float32) for x in jax.tree.leaves(commit)]
                np.savez(Path(given.commits) / f"{number}-{given.worker}.npz", *leaves)
            record = workers.log[-1]
            say(
                number=number,
                live=live,
                joined=joined,
                left_out=record.left_out,
                weights=list(record.weights.items()),
                center=hashed(emaopt.get_center(state)),
                shared=hashed((state.center, state.outer_state)),
                loss=float(jnp.mean(jnp.abs(emaopt.get_center(state)["w"] - 2))),
            )
            if saved is not None and given.worker == min(live):
                emaopt.checkpoint.save(
                    saved / str((steps(saved) or [0])[-1] + 1),
                    {"params": params, "opt_state": state},
                )


def steps(directory):
    names = directory.iterdir() if directory.exists() else []
    return sorted(int(path.name) for path in names if path.name.isdecimal())


def hashed(tree):
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def say(**what):
    print(json.dumps(what), flush=True)


def parsed():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("worker", type=int)
    parser.add_argument("--num-workers", type=int)
    parser.add_argument("--rounds", type=int, default=10**6)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=5)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--commits")
    parser.add_argument("--checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    main()
