"""Records checkpoints with openpi's own save_state, as its scripts/train.py calls it.

openpi is not on PyPI. CHECKOUT is a clone of github.com/Physical-Intelligence/openpi at
15a9616; the versions are those that it pins (Python 3.11):

    pip install jax==0.5.3 flax==0.10.2 orbax-checkpoint==0.11.13 tensorstore==0.1.74
    pip install "numpy<2" ml-dtypes==0.4.1 jaxtyping==0.2.36 beartype==0.19.0 chex==0.1.90
    pip install torch==2.13.0 numpydantic pydantic augmax safetensors
    python make_openpi.py OUT CHECKOUT

Two modules of openpi are replaced by empty ones, since they need a robot's data and all
of transformers: training.data_loader, used in type hints only, and models_pytorch.
"""

import sys
import types
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

for name in ["openpi.training.data_loader", "openpi.models_pytorch.pi0_pytorch"]:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].DataLoader = object
sys.path.insert(0, str(Path(sys.argv[2], "src")))

import openpi.models.model as _model  # noqa: E402
from openpi.shared import array_typing, normalize  # noqa: E402
from openpi.training import checkpoints, utils  # noqa: E402

PACKAGES = ["flax", "jax", "orbax-checkpoint", "tensorstore"]


class Group(nnx.Module):
    pass


def model(tree):
    """An NNX module that holds the nested dictionary."""
    module = Group()
    for key, value in tree.items():
        child = model(value) if isinstance(value, dict) else nnx.Param(jnp.asarray(value))
        setattr(module, key, child)
    return module


class Loader:
    """Stands in for the data loader: save_state asks it for the statistics only."""

    def data_config(self):
        stats = normalize.NormStats(mean=np.zeros(2), std=np.ones(2))
        return types.SimpleNamespace(asset_id="robot", norm_stats={"state": stats})


def trained(decay):
    """Seven steps as train_step makes them, with plain SGD."""
    graph, params = nnx.split(model(common.weights(0)))
    tx = optax.sgd(1.0, momentum=0.0)
    with array_typing.disable_typechecking():
        state = utils.TrainState(
            step=0,
            params=params,
            model_def=graph,
            tx=tx,
            opt_state=tx.init(params),
            ema_decay=decay,
            ema_params=None if decay is None else params,
        )
        for step in range(common.UPDATES):
            params = nnx.split(model(common.weights(step + 1)))[1]
            state = state.replace(step=jnp.asarray(step + 1), params=params)
            if decay is not None:
                mix = lambda old, new: decay * old + (1 - decay) * new  # noqa: E731
                average = jax.tree.map(mix, state.ema_params, params)
                state = state.replace(ema_params=average)
    return state


def main():
    for name, decay in {"openpi": common.DECAY, "trap_openpi_no_average": None}.items():
        out = common.folder(name)
        state = trained(decay)
        manager, _ = checkpoints.initialize_checkpoint_dir(
            out / "checkpoint", keep_period=None, overwrite=True, resume=False
        )
        checkpoints.save_state(manager, state, Loader(), step=common.UPDATES)
        manager.wait_until_finished()
        manager.close()
        pure = lambda state: state and state.to_pure_dict()  # noqa: E731
        item = out / "checkpoint" / str(common.UPDATES) / "params"
        served = _model.restore_params(item, restore_type=np.ndarray)
        with_average = state.ema_params or state.params
        for path, value in common.flat(pure(with_average)).items():
            np.testing.assert_array_equal(value, common.flat(served)[path])
        common.expect(
            out,
            params=pure(state.params),
            average=pure(state.ema_params),
            packages=PACKAGES,
            openpi="15a9616a00943ada6c20a0f158e3adb39df2ccac",
            decay=decay,
            step=common.UPDATES,
            params_at="train_state: params" if decay else "params: params",
            average_at="params: params" if decay else None,
            suffix="value",
            note="the decay is not stored; without an average the item params holds the "
            "raw weights and train_state has none",
        )


if __name__ == "__main__":
    main()
