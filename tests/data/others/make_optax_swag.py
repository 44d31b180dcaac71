"""Records the states of optax-swag as Orbax writes them.

pip install jax==0.10.2 optax==0.2.8 orbax-checkpoint==0.12.8 flax==0.12.8
pip install --no-deps optax-swag==0.1.0
python make_optax_swag.py OUT
"""

import common
import jax
import jax.numpy as jnp
import optax
import optax_swag
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

PACKAGES = ["flax", "jax", "optax", "optax-swag", "orbax-checkpoint"]
EVERY = 3


def main():
    for name, swag in {
        "optax_swag": optax_swag.swa(EVERY),
        "optax_swag_diagonal": optax_swag.swag_diag(EVERY),
    }.items():
        state = TrainState.create(
            apply_fn=None,
            params=jax.tree.map(jnp.asarray, common.weights(0)),
            tx=optax.chain(optax.sgd(1.0), swag),
        )
        for step in range(7 * EVERY + 1):
            state = state.apply_gradients(grads=common.gradients(step))
        out = common.folder(name)
        with ocp.CheckpointManager(out / "checkpoint") as manager:
            manager.save(int(state.step), args=ocp.args.StandardSave(state))
        common.expect(
            out,
            params=state.params,
            average=state.opt_state[1].mean,
            count=state.opt_state[1].n,
            packages=PACKAGES,
            item="default",
            params_at="params",
            average_at="opt_state/1/mean",
            count_at="opt_state/1/n",
            note="the mean has n + 1 terms: the first weights and n later ones; "
            "step is the steps since the last one",
        )


if __name__ == "__main__":
    main()
