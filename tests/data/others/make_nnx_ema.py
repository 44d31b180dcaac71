"""Records flax's nnx.EMA beside its model, as Orbax writes them.

pip install jax==0.10.2 flax==0.12.8 optax==0.2.8 orbax-checkpoint==0.12.8
python make_nnx_ema.py OUT
"""

import common
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

PACKAGES = ["flax", "jax", "optax", "orbax-checkpoint"]


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.dense_0 = nnx.Linear(3, 2, rngs=rngs)
        self.dense_1 = nnx.Linear(2, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.encoder = Encoder(rngs)
        self.head = nnx.Linear(2, 2, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])


def main():
    model = Model(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(jnp.asarray, common.weights(0)))
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    ema = nnx.EMA(model, common.DECAY, only=nnx.Param)
    for step in range(common.UPDATES):
        grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        pure = nnx.to_pure_dict(grads)
        for top, tree in common.gradients(step).items():
            for name, value in tree.items():
                pure[top][name] = value
        nnx.replace_by_pure_dict(grads, jax.tree.map(jnp.asarray, pure))
        optimizer.update(model, grads)
        ema.update(model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    average = nnx.to_pure_dict(nnx.state(ema))["params"]
    known = {
        "params": params,
        "average": average,
        "packages": PACKAGES,
        "decay": common.DECAY,
        "step": common.UPDATES,
    }

    # Three items, each the nnx.State that nnx.split and nnx.state give.
    out = common.folder("nnx_ema")
    with ocp.CheckpointManager(out / "checkpoint") as manager:
        items = {
            "model": ocp.args.StandardSave(nnx.state(model)),
            "optimizer": ocp.args.StandardSave(nnx.state(optimizer)),
            "ema": ocp.args.StandardSave(nnx.state(ema)),
        }
        manager.save(common.UPDATES, args=ocp.args.Composite(**items))
    places = {"params_at": "model: ", "average_at": "ema: params", "suffix": "value"}
    common.expect(out, **known, **places)

    # One item: pure dictionaries, as flax's guide on checkpoints recommends.
    out = common.folder("nnx_ema_pure")
    with ocp.StandardCheckpointer() as checkpointer:
        states = {"model": nnx.state(model), "ema": nnx.state(ema)}
        pure = {name: nnx.to_pure_dict(state) for name, state in states.items()}
        checkpointer.save(out / "checkpoint", pure)
    common.expect(out, **known, params_at="model", average_at="ema/params")


if __name__ == "__main__":
    main()
