"""Training with everything split over 8 devices, and serving on one.

    python examples/fsdp.py

Parameters are split over all devices (FSDP); the optimizer's moments and the average
follow them, by `emaopt.state_shardings`. The checkpoint is written split. A server loads
the average alone, onto one device, whatever the sharding of the run was.

On a machine without accelerators it makes 8 devices of the CPU. It prints how much of
each tree a device holds, and the held-out loss of the average on all devices and on one.
"""

import argparse
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import emaopt
from emaopt import checkpoint, digits

jax.config.update("jax_num_cpu_devices", 8)  # before jax looks for its devices

TRAIN, HELD_OUT = digits.load()
TX = optax.chain(optax.adamw(3e-3), emaopt.average_params(0.98, debias=True))


def init(key):
    first, second, third = jax.random.split(key, 3)
    he = jax.nn.initializers.he_normal()
    return {
        "hidden1": {"w": he(first, (64, 256)), "b": jnp.zeros(256)},
        "hidden2": {"w": he(second, (256, 256)), "b": jnp.zeros(256)},
        "last": {"w": he(third, (256, 10)), "b": jnp.zeros(10)},
    }


def loss(params, images, labels):
    x = images.reshape(len(images), 64)
    for name in ("hidden1", "hidden2"):
        x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
    logits = x @ params["last"]["w"] + params["last"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def train_step(params, opt_state, images, labels):
    grads = jax.grad(loss)(params, images, labels)
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


evaluate = jax.jit(loss)


def split(leaf, mesh):
    """The sharding of a parameter: along its first dimension that the mesh divides."""
    for dimension, size in enumerate(leaf.shape):
        if size % mesh.size == 0:
            return NamedSharding(mesh, P(*[None] * dimension, "data"))
    return NamedSharding(mesh, P())


def share(tree):
    """The part of a tree's bytes that is on the first device."""
    leaves = jax.tree.leaves(tree)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return held / sum(leaf.nbytes for leaf in leaves)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    key = jax.random.key(args.seed)
    shapes = jax.eval_shape(init, key)
    shardings = jax.tree.map(lambda leaf: split(leaf, mesh), shapes)
    # Made where they belong: no device ever holds all of them.
    params = jax.jit(init, out_shardings=shardings)(key)
    shardings = emaopt.state_shardings(TX, params)
    opt_state = jax.jit(TX.init, out_shardings=shardings)(params)

    batches = NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(args.seed)
    for _ in range(args.steps):
        chosen = rng.integers(len(TRAIN.labels), size=64)
        batch = jax.device_put((TRAIN.images[chosen], TRAIN.labels[chosen]), batches)
        params, opt_state = train_step(params, opt_state, *batch)
        # With several steps in flight, devices of one CPU may wait for each other.
        jax.block_until_ready(params)

    average = emaopt.get_average(opt_state, params)
    print(f"of {mesh.size} devices, one holds")
    for name, tree in (("parameters", params), ("average", average)):
        print(f"  {share(tree):.1%} of the {name}")
    print(f"  {share(opt_state):.1%} of the optimizer's state")
    on_all = evaluate(average, HELD_OUT.images, HELD_OUT.labels)

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/{args.steps}"
        checkpoint.save(path, {"params": params, "opt_state": opt_state})
        device = SingleDeviceSharding(jax.devices()[-1])
        served = checkpoint.load_averaged(path, sharding=device)
    assert all(leaf.sharding == device for leaf in jax.tree.leaves(served))
    same = jax.tree.map(
        lambda a, b: (np.asarray(a) == np.asarray(b)).all(), served, average
    )
    assert all(jax.tree.leaves(same))
    on_one = evaluate(served, HELD_OUT.images, HELD_OUT.labels)
    np.testing.assert_allclose(on_one, on_all, rtol=1e-5)
    print(f"held-out loss on all devices {on_all:.4f}, served on one {on_one:.4f}")


if __name__ == "__main__":
    main()
