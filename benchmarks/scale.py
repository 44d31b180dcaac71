"""Averages of large models on 256 chips: memory, traffic and communication of a step.

From the compiled programs of an optimizer's step, Adam with and without an average; the
gradients come in sharded as the parameters. Nothing is allocated, so no chips are needed:
by default XLA compiles for 256 devices of this host, with `--tpu` for TPU v5p chips that
are not here (pip install 'emaopt[aot]').

The parameters are those of Llama 2 (Touvron et al., 2023), layers stacked, in float32:

  replicated   on every chip, as in plain data parallelism
  fsdp         split over all chips, and the average with them
  model 8      split over 8 chips (tensor parallelism), replicated over the 32 others

Each of the last columns is "without an average, with one, with one that is split over the
chips that have the same parameters" (`sharding="data"`): GiB per chip of what the step
gets, keeps and needs beside it; bytes of memory traffic per parameter of a chip, as the
compiler counts them; collectives of the step; "-" where the compiler for TPUs says that
it does not fit. "gather" is what a chip receives to read the split average whole.

    python benchmarks/scale.py [--tpu]
"""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hlo_bytes import instructions
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt

CHIPS = 256


class Llama(NamedTuple):
    layers: int
    width: int
    hidden: int
    keys: int  # width of keys and values
    vocabulary: int = 32000


MODELS = {
    "7B": Llama(32, 4096, 11008, 4096),
    "70B": Llama(80, 8192, 28672, 1024),
}
# The axes of chips, and how a leaf is split along them: by the dimensions that are of the
# model's width, and of anything else.
PLACEMENTS = {
    "replicated": ((CHIPS, 1), None, None),
    "fsdp": ((CHIPS, 1), "data", None),
    "model 8": ((CHIPS // 8, 8), None, "model"),
}


def shapes(model: Llama) -> dict[str, tuple[str, ...]]:
    """The dimensions of each leaf by name."""
    return {
        "embedding": ("vocabulary", "width"),
        "query": ("layers", "width", "heads"),
        "key": ("layers", "width", "keys"),
        "value": ("layers", "width", "keys"),
        "output": ("layers", "heads", "width"),
        "gate": ("layers", "width", "hidden"),
        "up": ("layers", "width", "hidden"),
        "down": ("layers", "hidden", "width"),
        "norms": ("layers", "width"),
        "head": ("width", "vocabulary"),
    }


def placed(model: Llama, mesh: Mesh, wide: str | None, other: str | None) -> Any:
    """The parameters' shapes and shardings."""
    sizes = model._asdict() | {"heads": model.width}
    axes = dict.fromkeys(sizes, other) | {"layers": None, "width": wide}
    return {
        name: jax.ShapeDtypeStruct(
            [sizes[dim] for dim in dims],
            jnp.float32,
            sharding=NamedSharding(mesh, P(*[axes[dim] for dim in dims])),
        )
        for name, dims in shapes(model).items()
    }


class Step(NamedTuple):
    """What the compiled step says of a chip."""

    gib: float
    bytes_per_param: float
    collectives: int


def compiled(tx: optax.GradientTransformation, params: Any) -> Step | None:
    """None if the compiler finds that the step does not fit on a chip."""
    shardings = emaopt.state_shardings(tx, params)
    state = jax.tree.map(
        lambda leaf, there: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
        jax.eval_shape(tx.init, params),
        shardings,
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    kept = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    for found, wanted, leaf in zip(
        *map(jax.tree.leaves, (program.output_shardings, kept, (params, state))),
        strict=True,
    ):
        if not found.is_equivalent_to(wanted, leaf.ndim):
            raise RuntimeError(f"The step moves {leaf.shape} from {wanted} to {found}.")
    memory: Any = program.memory_analysis()
    cost: Any = program.cost_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Step(
        (memory.argument_size_in_bytes + memory.temp_size_in_bytes + new) / 2**30,
        cost["bytes accessed"] / on_chip(params),
        len(instructions(program.as_text() or "")),
    )


def line(model: Llama, placement: str, devices: Any) -> str:
    sizes, wide, other = PLACEMENTS[placement]
    mesh = Mesh(
        np.array(devices).reshape(sizes),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
    )
    params = placed(model, mesh, wide, other)
    adam = optax.adam(1e-3)
    # In the dimension that the model's axis leaves free.
    split = {
        name: P(*["data" if dim == "width" else None for dim in dims])
        for name, dims in shapes(model).items()
    }
    averages: dict[str, Any] = {} if wide else {"sharding": split}
    ways = [adam, emaopt.averaged(adam, 0.999), emaopt.averaged(adam, 0.999, **averages)]
    with jax.set_mesh(mesh):
        found = [compiled(tx, params) for tx in ways[: 2 if wide else 3]]
    gather = "" if wide else f"{4 * on_chip(params) * (1 - 1 / sizes[0]) / 2**30:.2f} GiB"

    def column(width: int, form: Callable[[Step], str]) -> str:
        return "  ".join(f"{form(step) if step else '-':>{width}}" for step in found)

    columns = (
        column(7, lambda step: f"{step.gib:.2f}"),
        column(4, lambda step: f"{step.bytes_per_param:.1f}"),
        column(3, lambda step: f"{step.collectives}"),
    )
    return f"{columns[0]:25}  {columns[1]:16}  {columns[2]:13}  {gather:>10}"


def on_chip(params: Any) -> int:
    """The number of parameters that a chip has."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in params.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tpu", action="store_true", help="compile for TPU v5p")
    parser.add_argument("--model", choices=MODELS, action="append", help="(all)")
    args = parser.parse_args()
    if args.tpu:
        for name, value in (("SKIP_MDS_QUERY", "1"), ("WORKER_HOSTNAMES", "localhost")):
            os.environ[f"TPU_{name}"] = value
        jax.config.update("jax_platforms", "cpu")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x8x8")
        devices = topology.devices
    else:
        jax.config.update("jax_num_cpu_devices", CHIPS)
        devices = jax.devices()
    print(f"Adam's step on {CHIPS} chips, {devices[0].platform}; an average in float32")
    print(
        f"{'':18}  {'GiB per chip':25}  {'bytes/parameter':16}  {'collectives':13}"
        f"  {'gather':>10}"
    )
    for name in args.model or MODELS:
        for placement in PLACEMENTS:
            print(f"{name:4}  {placement:12}  {line(MODELS[name], placement, devices)}")


if __name__ == "__main__":
    main()
