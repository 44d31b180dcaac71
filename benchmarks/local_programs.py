"""Training steps whose gradients cost nothing, for the benchmarks of local updates.

The shapes are those of two models, in the order in which they use them. Each worker's
loss is ½‖θ - x‖² with a number x of its own, so that the gradient is computed as the
parameters are read, and a step is what the optimizer and the communication cost.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import emaopt

AXIS = "workers"
SMALL = 2**20  # bytes
Shapes = list[tuple[int, ...]]


class Program(NamedTuple):
    """(params, state, data[, exchange]) -> (params, state), which are donated."""

    step: Any
    arguments: Any  # shapes, dtypes and shardings

    def lower(self) -> Any:
        return self.step.lower(*self.arguments)

    def start(self) -> Any:
        """(params, state, data) to call it with: of 1, 0 and 0.5."""

        def fill(tree, value):
            return jax.tree.map(lambda leaf: filled(leaf, value), tree)

        params, state, data, *_ = self.arguments
        return fill(params, 1), fill(state, 0), fill(data, 0.5)


def filled(like: Any, value: Any) -> jax.Array:
    """An array of this shape, dtype and sharding, also across processes."""

    def part(index):
        shape = np.broadcast_to(0, like.shape)[index].shape
        return np.full(shape, value, like.dtype)

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def resnet50() -> Shapes:
    """ResNet-50 (He et al., 2015): 161 arrays, 25,557,032 parameters."""
    shapes: Shapes = [(7, 7, 3, 64), (64,), (64,)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            wide = 4 * width
            kernels = [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, wide)]
            if block == 0:
                kernels.append((1, 1, channels, wide))
            for kernel in kernels:
                shapes += [kernel, kernel[-1:], kernel[-1:]]
            channels = wide
    return [*shapes, (channels, 1000), (1000,)]


def gpt2_small() -> Shapes:
    """GPT-2 small (Radford et al., 2019): 148 arrays, 124,439,808 parameters."""
    w = 768
    block = [(w,), (w,), (w, 3 * w), (3 * w,), (w, w), (w,)]
    block += [(w,), (w,), (w, 4 * w), (4 * w,), (4 * w, w), (w,)]
    return [(50257, w), (1024, w), *block * 12, (w,), (w,)]


MODELS = {"ResNet-50": resnet50, "GPT-2 small": gpt2_small}


def size(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(map(math.prod, shapes))


def make_mesh(num_workers: int) -> Mesh:
    return jax.make_mesh(
        (num_workers,),
        (AXIS,),
        devices=jax.devices()[:num_workers],
        axis_types=(AxisType.Auto,),
    )


def local(
    tx: Any, shapes: Shapes, mesh: Mesh, form: str, *, exchange: bool | str | None = None
) -> Program:
    """A step of local updates.

    Args:
      form: "stacked" or "mapped", whichever `tx` was made for.
      exchange: As the update takes it, or "argument": the step gets it as its last one.
    """
    flags = []
    if exchange == "argument":
        flags = [_scalar(jnp.bool, mesh)]

    def step(params, state, data, *flags):
        due = flags[0] if flags else exchange
        updates, state = tx.update(_gradients(params, data), state, params, exchange=due)
        return optax.apply_updates(params, updates), state

    return _of_form(step, tx, shapes, mesh, form, *flags)


def in_rounds(tx: Any, shapes: Shapes, mesh: Mesh, form: str, period: int) -> Program:
    """`period` local steps in one scan, and an exchange."""

    def gradients(rows, data):
        return (), _gradients(rows, data)

    def round_(params, state, data):
        batches = jnp.broadcast_to(data, (period, *data.shape))
        return emaopt.local_round(tx, gradients, params, state, batches)[:2]

    return _of_form(round_, tx, shapes, mesh, form)


def by_hand(tx: Any, shapes: Shapes, mesh: Mesh, period: int) -> Program:
    """Local steps and, in a conditional, the mean of the parameters: nothing else."""
    rows = _arrays([(mesh.size, *shape) for shape in shapes], mesh, PartitionSpec(AXIS))
    state = jax.eval_shape(tx.init, rows)
    specs = jax.tree.map(lambda x: PartitionSpec(*[AXIS] * (x.ndim > 0)), state)
    state = {"tx": _placed(state, mesh, specs), "steps": _scalar(jnp.int32, mesh)}
    specs = {"tx": specs, "steps": PartitionSpec()}

    def mean(params):
        return [lax.pcast(lax.pmean(p, AXIS), AXIS, to="varying") for p in params]

    def step(params, state, data):
        updates, inner = tx.update(_gradients(params, data), state["tx"], params)
        steps = state["steps"] + 1
        params = optax.apply_updates(params, updates)
        params = lax.cond(steps % period == 0, mean, list, params)
        return params, {"tx": inner, "steps": steps}

    workers = PartitionSpec(AXIS)
    step = jax.shard_map(
        step, mesh=mesh, in_specs=(workers, specs, workers), out_specs=(workers, specs)
    )
    return _program(step, rows, state, _data(mesh))


def synchronous(tx: Any, shapes: Shapes, mesh: Mesh, *, pack: bool = False) -> Program:
    """A step with the mean of all workers' gradients, `pack`: the small ones in one."""
    params = _arrays(shapes, mesh, PartitionSpec())
    state = jax.eval_shape(tx.init, params)
    state = _placed(state, mesh, jax.tree.map(lambda _: PartitionSpec(), state))

    def step(params, state, data):
        grads = [leaf - data[0] for leaf in params]
        grads = _packed_mean(grads) if pack else lax.pmean(grads, AXIS)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    whole = PartitionSpec()
    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(whole, whole, PartitionSpec(AXIS)),
        out_specs=(whole, whole),
    )
    return _program(step, params, state, _data(mesh))


def _packed_mean(leaves: list) -> list:
    small = [i for i, leaf in enumerate(leaves) if leaf.nbytes <= SMALL]
    flat = lax.pmean(jnp.concatenate([leaves[i].ravel() for i in small]), AXIS)
    ends = itertools.accumulate(leaves[i].size for i in small)
    means = {
        i: flat[end - leaves[i].size : end].reshape(leaves[i].shape)
        for i, end in zip(small, ends, strict=True)
    }
    return [
        means[i] if i in means else lax.pmean(leaf, AXIS) for i, leaf in enumerate(leaves)
    ]


def _program(step: Any, params: Any, state: Any, *others: Any) -> Program:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    return Program(jitted, (params, state, *others))


def _of_form(
    step: Any, tx: Any, shapes: Shapes, mesh: Mesh, form: str, *flags: Any
) -> Program:
    rows = _arrays([(mesh.size, *shape) for shape in shapes], mesh, PartitionSpec(AXIS))
    specs = emaopt.state_specs(tx, rows, AXIS)
    state = _placed(jax.eval_shape(tx.init, rows), mesh, specs)
    if form == "mapped":
        workers = PartitionSpec(AXIS)
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(workers, specs, workers, *[PartitionSpec() for _ in flags]),
            out_specs=(workers, specs),
        )
    return _program(step, rows, state, _data(mesh), *flags)


def _gradients(rows: list, data: Any) -> list:
    """Of each worker's loss, at its row of the parameters."""
    return [row - data.reshape(-1, *[1] * (row.ndim - 1)) for row in rows]


def _data(mesh: Mesh) -> Any:
    """A number for each worker."""
    return _arrays([(mesh.size,)], mesh, PartitionSpec(AXIS))[0]


def _scalar(dtype: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct((), dtype, sharding=sharding)


def _arrays(shapes: Shapes, mesh: Mesh, spec: PartitionSpec) -> list:
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return _placed(leaves, mesh, [spec] * len(leaves))


def _placed(tree: Any, mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
        ),
        tree,
        specs,
    )
