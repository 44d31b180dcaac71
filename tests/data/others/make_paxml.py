"""Records checkpoints laid out as paxml's are. Neither paxml nor praxis runs here.

praxis 1.4.0 needs jax 0.4.26 and lingvo with TensorFlow 2.9 (Python 3.10 at most). So the
names, the order and the formulas are those of the sources (paxml b397693:
train_states.py, checkpoint_paths.py and PaxCheckpointHandler in checkpoints.py; praxis
feeaff1: apply_ema_weights in optimizers.py). The files are Orbax's and TensorStore's.

    pip install jax==0.10.2 flax==0.12.8 optax==0.2.8 orbax-checkpoint==0.12.8
    python make_paxml.py OUT
"""

from typing import Any

import common
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import tensorstore
from flax import struct

PACKAGES = ["flax", "jax", "optax", "orbax-checkpoint", "tensorstore"]


class TrainState(struct.PyTreeNode):
    step: Any
    mdl_vars: Any
    opt_states: Any
    extra_state: Any = ()


def variables(step):
    """The collections of a praxis model."""
    statistics = {"moving_mean": jnp.full(2, step / 4, jnp.float32)}
    return {
        "params": jax.tree.map(jnp.asarray, common.weights(step)),
        "non_trainable": {"encoder": {"norm": statistics}},
    }


def trained() -> TrainState:
    """The average takes in the weights before each step, with TF's warm-up."""
    average, count = variables(0), 0
    for step in range(common.UPDATES):
        decay = min(common.DECAY, (1 + count) / (10 + count))
        mix = lambda old, new: old - (1 - decay) * (old - new)  # noqa: B023, E731
        average = jax.tree.map(mix, average, variables(step))
        count += 1
    adam = {
        "count": jnp.int32(count),
        "m": jax.tree.map(jnp.ones_like, variables(0)["params"]),
    }
    ema = {"count": jnp.int32(count), "ema": average}
    empty = optax.EmptyState()
    return TrainState(
        step=jnp.int32(common.UPDATES),
        mdl_vars=variables(common.UPDATES),
        opt_states=[{"no_prefix": (empty, empty, adam, empty, ema)}],
    )


def names(tree, name=""):
    """The names of extract_prefixed_keys_from_nested_map: dots, and _0 for an index."""
    if isinstance(tree, dict):
        found = (names(tree[key], f"{name}.{key}") for key in tree)
    elif isinstance(tree, (list, tuple)):
        found = (names(child, f"{name}_{i}") for i, child in enumerate(tree))
    else:
        return {name: tree}
    return {key: value for part in found for key, value in part.items()}


def main():
    state = trained()
    average = state.opt_states[0]["no_prefix"][4]
    known = {
        "params": state.mdl_vars,
        "average": average["ema"],
        "count": average["count"],
        "packages": PACKAGES,
        "decay": common.DECAY,
        "step": common.UPDATES,
        "item": "state",
        "note": "laid out as the sources of paxml and praxis say; not written by them",
    }

    # tensorstore_use_ocdbt=True
    out = common.folder("paxml")
    step = out / "checkpoint" / f"checkpoint_{common.UPDATES:08}"
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = {
            "state": ocp.args.PyTreeSave(state),
            "metadata": ocp.args.JsonSave({"version": 1.2}),
        }
        checkpointer.save(step, args=ocp.args.Composite(**items))
    places = {
        "params_at": "mdl_vars",
        "average_at": "opt_states/0/no_prefix/4/ema",
        "count_at": "opt_states/0/no_prefix/4/count",
    }
    common.expect(out, **known, folder=f"checkpoint/{step.name}", **places)

    # tensorstore_use_ocdbt=False, the default: a zarr folder for each leaf, no index.
    out = common.folder("paxml_zarr")
    step = out / "checkpoint" / f"checkpoint_{common.UPDATES:08}"
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(step / "metadata", {"version": 1.1})
    leaves = {
        "step": state.step,
        **names(state.mdl_vars, "mdl_vars"),
        **names(state.opt_states, "opt_states"),
    }
    for name, value in leaves.items():
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(step / "state" / name)},
            "metadata": {"compressor": {"id": "zstd"}},
        }
        array = tensorstore.open(
            spec, create=True, dtype=value.dtype.name, shape=value.shape
        ).result()
        array.write(jax.device_get(value)).result()
    places = {
        "params_at": "mdl_vars.",
        "average_at": "opt_states_0.no_prefix_4.ema.",
        "count_at": "opt_states_0.no_prefix_4.count",
    }
    common.expect(out, **known, folder=f"checkpoint/{step.name}", **places)


if __name__ == "__main__":
    main()
