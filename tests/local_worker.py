"""Training with local updates, to be stopped and killed; `training_worker` is its model.

    python local_worker.py DIRECTORY [--processes 2 --index 0 --port 1234] [...]

Each device is a worker with data of its own. Three methods train in both forms side by
side, each to an optimizer state that it would have alone. At each step, a process prints
one JSON line for each of its workers with the digests of all that this worker holds, for
which it asks no other process. Resumes from the latest step in the directory.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from processes import digest, join

import emaopt

PERIOD = 5
METHODS = {
    "agn": lambda **form: emaopt.agn(optax.adam(1e-2), PERIOD, **form),
    "diloco": lambda **form: emaopt.diloco(optax.adam(1e-2), period=PERIOD, **form),
    "late": lambda **form: emaopt.diloco(
        optax.adam(1e-2), period=PERIOD, delay=PERIOD, mix="carry", **form
    ),
}
CASES = [f"{method}_{form}" for method in METHODS for form in ("stacked", "mapped")]
AXIS = "workers"


class Training:
    """One method in one form: how its state starts, stands on the mesh and advances."""

    def __init__(self, case, mesh):
        method, form = case.split("_")
        self.num_workers = mesh.size
        self.tx = METHODS[method](
            **{"num_workers": mesh.size} if form == "stacked" else {"axis_name": AXIS}
        )
        params = self.start()["params"]
        specs = {
            "params": jax.tree.map(lambda _: PartitionSpec(AXIS), params),
            "opt_state": emaopt.state_specs(self.tx, params, AXIS),
        }
        self.places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        advance = self.advance
        if form == "mapped":
            advance = jax.shard_map(
                advance,
                mesh=mesh,
                in_specs=(specs, PartitionSpec(AXIS)),
                out_specs=specs,
            )
        self.step = jax.jit(advance, out_shardings=self.places)

    def start(self):
        kernel = jax.random.normal(jax.random.key(0), (6, 2))
        params = {"bias": jnp.zeros(2), "kernel": kernel}
        params = emaopt.stack_workers(params, self.num_workers)
        return {"params": params, "opt_state": self.tx.init(params)}

    def placed(self):
        return jax.tree.map(place, self.start(), self.places)

    def abstract(self):
        """The training state as shapes, dtypes and shardings."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=place
            ),
            jax.eval_shape(self.start),
            self.places,
        )

    def advance(self, state, batch):
        grads = jax.vmap(jax.grad(loss))(state["params"], batch)
        updates, opt_state = self.tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}


def loss(params, batch):
    return jnp.mean((batch[0] @ params["kernel"] + params["bias"] - batch[1]) ** 2)


def batch(step, mesh):
    """A pure function of the step: [workers, 4, ...]."""
    rng = np.random.default_rng(step)
    workers = NamedSharding(mesh, PartitionSpec(AXIS))
    return tuple(
        place(rng.normal(size=(mesh.size, 4, width)).astype(np.float32), workers)
        for width in (6, 2)
    )


def place(array, sharding):
    """A global array of which each process makes its part."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def advanced(states, first, last, trainings, mesh):
    """Yields (step, states) for each step from the first to the last."""
    for step in range(first, last + 1):
        now = batch(step, mesh)
        states = {case: t.step(states[case], now) for case, t in trainings.items()}
        yield step, states


def digests(states, mesh):
    """(worker, {case: digest of all that it holds}) for each worker of this process."""
    for worker, device in enumerate(mesh.devices.flat):
        if device.process_index == jax.process_index():
            held = {case: held_by(device, state) for case, state in states.items()}
            yield worker, {case: digest(shards) for case, shards in held.items()}


def held_by(device, state):
    return [
        shard.data
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == device
    ]


def say(what, step, states, mesh):
    for worker, held in digests(states, mesh):
        line = {what: step, "worker": worker, "time": time.time()}
        print(json.dumps(line | held), flush=True)


def make_mesh(num_workers):
    devices = jax.devices()[:num_workers]
    return jax.make_mesh(
        (num_workers,), (AXIS,), devices=devices, axis_types=(AxisType.Auto,)
    )


def train(directory, steps, every, pause):
    mesh = make_mesh(jax.device_count())
    trainings = {case: Training(case, mesh) for case in CASES}
    options = ocp.CheckpointManagerOptions(save_interval_steps=every)
    with ocp.CheckpointManager(directory, options=options) as manager:
        if (latest := manager.latest_step()) is None:
            latest, states = 0, {case: t.placed() for case, t in trainings.items()}
        else:
            wanted = {case: t.abstract() for case, t in trainings.items()}
            states = manager.restore(latest, args=ocp.args.StandardRestore(wanted))
            say("restored", latest, states, mesh)
        for step, now in advanced(states, latest + 1, steps, trainings, mesh):
            say("step", step, now, mesh)
            manager.save(step, args=ocp.args.StandardSave(now))
            time.sleep(pause)


if __name__ == "__main__":
    args = join()
    train(args.directory, args.steps, args.every, args.pause)
