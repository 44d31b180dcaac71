"""Compiles local updates and gates for chips that are not here, for `test_ahead_of_time`.

    python aot_worker.py TARGET DIRECTORY

Each worker trains a model of 0.5 billion parameters, whose matrices are spread along both
axes over the worker's chips. For each program, its text goes to a file in the directory,
and a JSON line tells the bytes that it needs on each chip.
"""

import argparse
import functools
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import aot_averages
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import emaopt
from emaopt import tf1

METHODS = {
    "diloco": lambda **form: emaopt.diloco(optax.adamw(1e-3), **form),
    "agn": lambda **form: emaopt.agn(optax.adam(1e-3), **form),
}
FORMS = ("stacked", "mapped")
AXIS = "workers"
ROWS = P(AXIS)
SPECS = {  # a row of each leaf, one for each worker
    "up": P(AXIS, "data", "model"),
    "down": P(AXIS, "model", "data"),
    "bias": P(AXIS),
}
WIDTH, HIDDEN = 8192, 32768
SHAPES = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "bias": (WIDTH,)}

# What the compiler asks of a GPU; without one, it has to be told.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84978630656
  memory_bandwidth: 3352000000000
  clock_rate_ghz: 1.98
}
"""


class Target(NamedTuple):
    topology: dict  # for get_topology_desc
    shape: tuple[int, int, int]  # chips along the axes; a worker is a slice or a host


TARGETS = {
    "TPU v5p, a slice of 256": Target(
        {"platform": "tpu", "topology_name": "v5p:4x8x8"}, (16, 4, 4)
    ),
    "TPU v5e, 16 slices of 16": Target(
        {"platform": "tpu", "topology_name": "v5e:4x4", "num_slices": 16}, (16, 4, 4)
    ),
    "H100, 4 hosts of 8": Target(
        {
            "platform": "cuda",
            "topology_name": "h100",
            "topology": "1x4x8",
            "target_config": H100,
        },
        (4, 2, 4),
    ),
}


def make_mesh(target):
    devices = topologies.get_topology_desc(**target.topology).devices
    devices.sort(key=lambda device: getattr(device, "slice_index", 0))
    devices = np.array(devices).reshape(target.shape)
    return Mesh(devices, (AXIS, "data", "model"), axis_types=(AxisType.Auto,) * 3)


class Training:
    """One method in one form on a mesh of chips, all of it as shapes and shardings."""

    def __init__(self, method, form, mesh, **options):
        self.mesh, self.form = mesh, form
        self.num_workers = mesh.shape[AXIS]
        where = (
            {"num_workers": self.num_workers}
            if form == "stacked"
            else {"axis_name": AXIS}
        )
        self.tx = METHODS[method](**where, **options)
        rows = {
            name: jax.ShapeDtypeStruct((self.num_workers, *shape), jnp.float32)
            for name, shape in SHAPES.items()
        }
        self.state_specs = emaopt.state_specs(self.tx, rows, AXIS)
        self.params = jax.tree_util.tree_map_with_path(self.placed, rows)
        self.state = jax.tree_util.tree_map_with_path(
            self.placed, jax.eval_shape(self.tx.init, rows)
        )
        self.batch = jax.ShapeDtypeStruct(
            (self.num_workers, 64, WIDTH),
            jnp.float32,
            sharding=NamedSharding(mesh, P(AXIS, "data")),
        )

    def placed(self, path, leaf):
        """Sharded as the parameter of its name; as one worker's if it has no row each."""
        name = getattr(path[-1], "key", None)
        spec = SPECS.get(name, P(AXIS) if leaf.ndim else P())
        if name in SPECS and leaf.ndim == len(SHAPES[name]):
            spec = P(*spec[1:])
        place = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def update(self, params, state, grads, **extra):
        updates, state = self.tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def step(self, params, state, batch):
        return self.update(params, state, jax.vmap(jax.grad(loss))(params, batch))

    def round(self, params, state, batches):
        """Local steps with one exchange; `batches` has the steps before the workers."""
        one = jax.value_and_grad(loss)
        params, state, _ = emaopt.local_round(
            self.tx, jax.vmap(one), params, state, batches
        )
        return params, state

    @property
    def batches(self):
        """For a round of four steps."""
        place = NamedSharding(self.mesh, P(None, AXIS, "data"))
        shape = (4, *self.batch.shape)
        return jax.ShapeDtypeStruct(shape, self.batch.dtype, sharding=place)

    def compiled(self, advance, third, third_spec=ROWS):
        """The program of a function of (params, state, third), the first two donated."""
        if self.form == "mapped":
            specs = self.state_specs
            advance = jax.shard_map(
                advance,
                mesh=self.mesh,
                in_specs=(ROWS, specs, third_spec),
                out_specs=(ROWS, specs),
                axis_names={AXIS},
            )
        places = jax.tree.map(lambda leaf: leaf.sharding, (self.params, self.state))
        jitted = jax.jit(advance, donate_argnums=(0, 1), out_shardings=places)
        return jitted.lower(self.params, self.state, third).compile()


def loss(params, batch):
    hidden = jax.nn.relu(batch @ params["up"])
    return jnp.mean((hidden @ params["down"] + params["bias"] - batch) ** 2)


def gated_step(mode, device):
    """A step of Adam on one chip, behind a gate."""
    tx, place = optax.adam(1e-3), SingleDeviceSharding(device)

    def step(params, state):
        return tf1.minimize(tx, layers, state, params, gate_gradients=mode)

    params = {name: jnp.zeros((512, 512)) for name in "abcd"}
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, jax.eval_shape(tx.init, params)),
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()


def layers(params):
    x = jnp.ones((64, 512))
    for kernel in params.values():
        x = jnp.tanh(x @ kernel)
    return jnp.sum(x**2)


def programs(target):
    """(name, program) for each."""
    mesh = make_mesh(target)
    for gate in ("GATE_NONE", "GATE_OP", "GATE_GRAPH"):
        yield gate, gated_step(getattr(tf1, gate), mesh.devices.flat[0])
    for form in FORMS:
        for method in METHODS:
            alone = Training(method, form, mesh)
            yield f"{method} {form}", alone.compiled(alone.update, alone.params)
            if "num_slices" in target.topology:  # where it shows what leaves a worker
                program = alone.compiled(alone.step, alone.batch)
                yield f"{method} {form} step", program
        narrow = Training("diloco", form, mesh, exchange_dtype=jnp.bfloat16)
        program = narrow.compiled(narrow.update, narrow.params)
        yield f"diloco {form} bfloat16", program
        yield from late_programs(form, mesh)
    forced = Training("diloco", "stacked", mesh)
    for exchange in (True, False):
        update = functools.partial(forced.update, exchange=exchange)
        yield f"exchange={exchange}", forced.compiled(update, forced.params)


def late_programs(form, mesh):
    """(name, program) of exchanges that land a round late."""
    late = Training("diloco", form, mesh, delay=500, mix="carry")
    yield f"late {form}", late.compiled(late.update, late.params)
    yield f"late {form} round", late.compiled(late.round, late.batches, P(None, AXIS))


def part_bytes(tree):
    """What one chip holds of it."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def main(target, directory):
    params = part_bytes(Training("diloco", "stacked", make_mesh(target)).params)
    mesh = make_mesh(target)
    averaging = aot_averages.programs(mesh)
    for name, program in itertools.chain(programs(target), averaging):
        (directory / f"{name}.txt").write_text(program.as_text())
        memory = program.memory_analysis()
        line = {
            "name": name,
            "params": params,
            "arguments": memory.argument_size_in_bytes,
            "donated": memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "traffic": (program.cost_analysis() or {}).get("bytes accessed"),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    main(TARGETS[args.target], args.directory)
