"""Records TrainState clones as Orbax writes them, and states that only look like them.

pip install jax==0.10.2 flax==0.12.8 optax==0.2.8 orbax-checkpoint==0.12.8
python make_train_state.py OUT
"""

from typing import Any

import common
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import struct
from flax.training import train_state

PACKAGES = ["flax", "jax", "optax", "orbax-checkpoint"]


class TrainState(train_state.TrainState):
    """As most projects write it: the average is one more field."""

    ema_params: Any = None


@struct.dataclass
class ScoreState:
    """As the projects that come from score_sde write it."""

    step: int
    params: Any
    ema_rate: float
    params_ema: Any


def trained() -> TrainState:
    params = jax.tree.map(jnp.asarray, common.weights(0))
    state = TrainState.create(
        apply_fn=None, params=params, tx=optax.sgd(1.0, momentum=0.0), ema_params=params
    )
    for step in range(common.UPDATES):
        state = state.apply_gradients(grads=common.gradients(step))
        state = state.replace(
            ema_params=optax.incremental_update(
                state.params, state.ema_params, 1 - common.DECAY
            )
        )
    return state


def save(out, item=None, **items):
    """CheckpointManager.save of one item, called default, or of several."""
    args = item if item is not None else ocp.args.Composite(**items)
    with ocp.CheckpointManager(out / "checkpoint") as manager:
        manager.save(common.UPDATES, args=args)
        manager.wait_until_finished()


def main():
    state = trained()
    known = {
        "params": state.params,
        "average": state.ema_params,
        "packages": PACKAGES,
        "decay": common.DECAY,
        "step": common.UPDATES,
    }

    out = common.folder("train_state")
    save(out, ocp.args.StandardSave(state))
    places = {"item": "default", "params_at": "params", "average_at": "ema_params"}
    common.expect(out, **known, **places)

    out = common.folder("train_state_composite")
    metadata = ocp.args.JsonSave({"epoch": 3, "loader": {"ema_params": "not weights"}})
    save(out, state=ocp.args.PyTreeSave(state), metadata=metadata)
    common.expect(out, **known, **{**places, "item": "state"})

    out = common.folder("train_state_nested")
    score = ScoreState(
        step=jnp.int32(common.UPDATES),
        params=state.params,
        ema_rate=common.DECAY,
        params_ema=state.ema_params,
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(out / "checkpoint", {"model": score, "loader": {"epoch": 3}})
    places = {"params_at": "model/params", "average_at": "model/params_ema"}
    common.expect(out, **known, item=None, **places)

    # What is not an average of weights.
    known["average"] = None
    out = common.folder("trap_no_average")
    save(out, ocp.args.StandardSave(state.replace(ema_params=None)))
    common.expect(out, **known, item="default", params_at="params")

    out = common.folder("trap_optax_ema")
    tx = optax.chain(optax.ema(common.DECAY), optax.sgd(1.0))
    momentum = TrainState.create(apply_fn=None, params=state.params, tx=tx)
    for step in range(common.UPDATES):
        momentum = momentum.apply_gradients(grads=common.gradients(step))
    save(out, ocp.args.StandardSave(momentum))
    trap = "opt_state/0 is optax's EmaState(count, ema): a mean of gradients"
    known["params"] = momentum.params
    common.expect(out, **known, item="default", params_at="params", trap=trap)

    # Names that projects use for averages, of something that is no average of weights.
    out = common.folder("trap_names")
    tx = optax.contrib.schedule_free_sgd(0.5)
    params = jax.tree.map(jnp.asarray, common.weights(0))
    free = TrainState.create(apply_fn=None, params=params, tx=tx)
    free = free.apply_gradients(grads=common.gradients(0))
    ones = jax.tree.map(jnp.ones_like, free.params)
    others = {
        "batch_stats": {"encoder": {"norm": {"mean": jnp.ones(2), "var": jnp.ones(2)}}},
        "vq": {"codebook": {"ema_cluster_size": jnp.ones(4), "ema_w": jnp.ones((4, 2))}},
        "metrics": {"ema": jnp.float32(0.5), "loss_ema": jnp.float32(2)},
        "target_params": jax.tree.map(lambda x: 3 * x, ones),
        "ema": {"decay": jnp.float32(common.DECAY), "enabled": jnp.asarray(False)},
        "grads_ema": ones,
    }
    save(out, ocp.args.StandardSave({"state": free, **others}))
    trap = (
        "z of schedule_free, target_params of RL, grads_ema, statistics, a codebook's "
        "averages, an average of the loss, the options of an average"
    )
    known |= {"params": free.params, "step": 1}
    common.expect(out, **known, item="default", params_at="state/params", trap=trap)


if __name__ == "__main__":
    main()
