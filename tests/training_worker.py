"""A training run to be killed: prints its state's digest at each step as a JSON line.

    python training_worker.py DIRECTORY [--processes 2 --index 0 --port 1234] [...]

Runs on all devices, which must be four in all: as a mesh of 2 × 2, every sum across
devices has two terms, so the digests do not depend on who adds them up in which order.
Resumes from the latest step in the directory, if there is one. Its last state is saved
once more as DIRECTORY.last, over what is there.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from processes import digest, join

import emaopt
from emaopt import checkpoint

TX = emaopt.averaged(optax.adam(1e-2), 0.9)


def start():
    def normal(seed, shape, dtype=jnp.float32):
        return jax.random.normal(jax.random.key(seed), shape, dtype)

    params = {
        "hidden": {"bias": jnp.zeros(8), "kernel": normal(0, (16, 8))},
        "out": {"kernel": normal(1, (8, 4), jnp.bfloat16)},
    }
    return {"params": params, "opt_state": TX.init(params)}


def shardings(mesh, specs=("data", "model")):
    """Matrices split over both axes of the mesh, vectors over the second."""

    def place(leaf):
        spec = specs[len(specs) - min(leaf.ndim, len(specs)) :]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, jax.eval_shape(start))


def abstract(places):
    """The training state as shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(start),
        places,
    )


def batch(step, mesh):
    """A pure function of the step, each process making its part."""
    rng = np.random.default_rng(step)
    place = NamedSharding(mesh, PartitionSpec("data"))
    return tuple(
        jax.make_array_from_callback(x.shape, place, lambda index, x=x: x[index])
        for x in (
            rng.normal(size=(8, 16)).astype(np.float32),
            rng.normal(size=(8, 4)).astype(np.float32),
        )
    )


def advance(state, batch):
    def loss(params):
        hidden = jnp.tanh(
            batch[0] @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        )
        return jnp.mean((hidden @ params["out"]["kernel"] - batch[1]) ** 2)

    grads = jax.grad(loss)(state["params"])
    updates, opt_state = TX.update(grads, state["opt_state"], state["params"])
    return {
        "params": optax.apply_updates(state["params"], updates),
        "opt_state": opt_state,
    }


def say(what, step, state):
    state = multihost_utils.process_allgather(state, tiled=True)
    average = emaopt.get_average(state["opt_state"])
    line = {what: step, "state": digest(state), "average": digest(average)}
    print(json.dumps(line), flush=True)


def train(directory, steps, every, pause):
    mesh = jax.make_mesh(
        (2, 2),
        ("data", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    places = shardings(mesh)
    advance_all = jax.jit(advance, out_shardings=places)
    with ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(save_interval_steps=every),
        handler_registry=checkpoint.handler_registry(checksums=True),
    ) as manager:
        if (latest := manager.latest_step()) is None:
            latest, state = 0, jax.jit(start, out_shardings=places)()
        else:
            arguments = ocp.args.StandardRestore(abstract(places))
            state = manager.restore(latest, args=arguments)
            say("restored", latest, state)
        for step in range(latest + 1, steps + 1):
            state = advance_all(state, batch(step, mesh))
            say("step", step, state)
            stop = manager.reached_preemption(step)
            manager.save(step, args=ocp.args.StandardSave(state), force=stop)
            if stop:
                manager.wait_until_finished()
                say("preempted", step, state)
                return
            time.sleep(pause)
    checkpoint.save(directory.with_suffix(".last"), state, force=True)


if __name__ == "__main__":
    args = join()
    train(args.directory, args.steps, args.every, args.pause)
