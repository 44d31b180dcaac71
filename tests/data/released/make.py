"""Writes the checkpoints of this version to 1.2/ here, for the tests of all later ones.

    python tests/data/released/make.py

A directory that was part of a release is never written again.
"""

import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import emaopt
from emaopt import checkpoint

HERE = Path(__file__).parent
STEPS = 3  # in the middle of a round of the local updates
WORKERS = 2


def params():
    return {
        "dense": {"kernel": jnp.arange(6.0).reshape(3, 2) / 8, "bias": jnp.ones(2)},
        "head": jnp.linspace(-1, 1, 4, dtype=jnp.bfloat16),
        "unused": jnp.zeros((0, 3)),
    }


def optimizers():
    """The optimizer of each kind of checkpoint, as its first release built it."""
    averages = optax.named_chain(
        ("adam", optax.adam(1e-2)),
        ("power:0.1", emaopt.average_params(emaopt.power_decay(sigma_rel=0.1))),
        ("ema:0.9", emaopt.average_params(0.9, debias=True)),
    )
    local = emaopt.diloco(optax.sgd(0.1), period=2, num_workers=WORKERS)
    return {
        "average": averages,
        "beside": emaopt.averaged(optax.sgd(0.1, momentum=0.9), 0.9, every=2),
        "center": local,
    }


def blank(kind):
    """A state of this kind that has seen nothing, to restore into."""
    begin = params()
    if kind == "center":
        begin = emaopt.stack_workers(begin, WORKERS)
    state = {"params": begin, "opt_state": optimizers()[kind].init(begin)}
    return state | ({"batch_stats": {"mean": jnp.zeros(2)}} if kind == "beside" else {})


def trained(kind):
    tx, state = optimizers()[kind], blank(kind)
    begin, opt_state = state["params"], state["opt_state"]
    for step in range(1, STEPS + 1):
        grads = jax.tree.map(lambda x, step=step: (x + step) / 4, begin)
        updates, opt_state = tx.update(grads, opt_state, begin)
        begin = optax.apply_updates(begin, updates)
    return state | {"params": begin, "opt_state": opt_state}


def options(kind):
    """Of `save`."""
    if kind == "average":
        return {"name": "power:0.1"}
    return {"served": {"batch_stats": {"mean": jnp.ones(2)}}} if kind == "beside" else {}


def flat(tree):
    """Arrays by name, as .npz holds them: bfloat16 as float32, which holds it exactly."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(
            leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def main():
    with tempfile.TemporaryDirectory() as name:  # some files say where they were written
        directory = Path(name) / "run"
        directory.mkdir()
        for kind in optimizers():
            state = trained(kind)
            checkpoint.save(directory / kind, state, **options(kind))
            np.savez_compressed(directory / f"{kind}.npz", **flat(state))
            served = checkpoint.load_averaged(directory / kind)
            np.savez_compressed(directory / f"{kind}-served.npz", **flat(served))
        out = directory / "combination"
        checkpoint.combine([directory / "average"] * 2, [0.25, 0.5], out)
        served = checkpoint.load_averaged(out)
        np.savez_compressed(directory / "combination-served.npz", **flat(served))
        shutil.copytree(directory, HERE / emaopt.__version__.rpartition(".")[0])


if __name__ == "__main__":
    main()
