"""Records TrainStates as flax.serialization writes them.

pip install jax==0.10.2 flax==0.12.8 optax==0.2.8
python make_msgpack.py OUT
"""

from typing import Any

import common
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from flax.training import checkpoints, train_state

PACKAGES = ["flax", "jax", "optax", "msgpack"]


class TrainState(train_state.TrainState):
    ema_params: Any
    ema_decay: Any  # a NumPy scalar: npscalar
    phase: Any  # a Python complex number: native_complex
    spectrum: Any  # a complex array
    empty: Any


def main():
    params = jax.tree.map(jnp.asarray, common.weights(0))
    state = TrainState.create(
        apply_fn=None,
        params=params,
        tx=optax.adam(0.1),
        ema_params=params,
        ema_decay=np.float64(common.DECAY),
        phase=1.5 - 2j,
        spectrum=np.array([1 + 2j, 3 - 4j], np.complex64),
        empty=np.zeros((0, 3), np.float16),
    )
    for step in range(common.UPDATES):
        state = state.apply_gradients(grads=common.gradients(step))
        average = optax.incremental_update(
            state.params, state.ema_params, 1 - common.DECAY
        )
        state = state.replace(ema_params=average)
    known = {
        "params": state.params,
        "average": state.ema_params,
        "packages": PACKAGES,
        "decay": common.DECAY,
        "step": common.UPDATES,
        "params_at": "params",
        "average_at": "ema_params",
    }

    out = common.folder("msgpack")
    (out / "state.msgpack").write_bytes(serialization.to_bytes(state))
    common.expect(out, **known, file="state.msgpack")

    # An array above MAX_CHUNK_SIZE is written in pieces: the limit is lowered, so that
    # small ones are.
    out = common.folder("msgpack_chunked")
    limit, serialization.MAX_CHUNK_SIZE = serialization.MAX_CHUNK_SIZE, 20
    (out / "state.msgpack").write_bytes(serialization.to_bytes(state))
    serialization.MAX_CHUNK_SIZE = limit
    common.expect(out, **known, file="state.msgpack")

    # flax.training.checkpoints without Orbax: the same bytes, called checkpoint_STEP.
    out = common.folder("msgpack_legacy")
    flax.config.update("flax_use_orbax_checkpointing", False)
    checkpoints.save_checkpoint(out / "checkpoint", state, step=common.UPDATES)
    common.expect(out, **known, file=f"checkpoint/checkpoint_{common.UPDATES}")


if __name__ == "__main__":
    main()
