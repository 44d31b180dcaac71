"""Records checkpoints with levanter's own TrainerState and save_checkpoint.

The present layout, from the wheel (Python 3.12; its other dependencies are not needed):

    pip install --no-deps marin-levanter==0.2.227.dev40316220070
    pip install --no-deps marin-haliax==0.2.227.dev40316220070
    pip install --no-deps marin-rigging==0.2.227.dev40316220070
    pip install equinox jax==0.11.2 jaxtyping draccus fsspec jmp "optax<0.2.7"
    pip install "tensorstore<0.1.85" safetensors aqtp requests pydantic humanfriendly
    pip install huggingface-hub s3fs gcsfs braceexpand aiohttp msgspec zstandard
    pip install starlette pyjwt click gitpython
    python make_levanter.py OUT

The layout until 2025, from CHECKOUT, a clone of github.com/stanford-crfm/levanter at
9263f81, with the same packages (levanter/__init__.py is passed over, since it imports the
trackers):

    python make_levanter.py OUT CHECKOUT
"""

import sys
import types
from pathlib import Path

import common

OLD = len(sys.argv) > 2
if OLD:
    sys.modules["levanter"] = types.ModuleType("levanter")
    sys.modules["levanter"].__path__ = [str(Path(sys.argv[2], "src", "levanter"))]

import equinox as eqx  # noqa: E402
import haliax as hax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from levanter.checkpoint import save_checkpoint  # noqa: E402
from levanter.optim.model_averaging import EmaModelAveragingConfig  # noqa: E402
from levanter.trainer_state import TrainerState, saveable_training_mask  # noqa: E402

PACKAGES = ["equinox", "jax", "marin-haliax", "tensorstore"]


class Dense(eqx.Module):
    weight: hax.NamedArray
    bias: jax.Array


class Model(eqx.Module):
    """Haliax arrays and plain ones, and one that is not trained."""

    layers: list
    head: jax.Array
    frozen: jax.Array


def model(step: int) -> Model:
    leaves = common.flat(common.weights(step))
    layers = []
    for i in range(2):
        kernel = jnp.asarray(leaves[f"encoder/dense_{i}/kernel"])
        axes = [hax.Axis(f"in_{i}", kernel.shape[0]), hax.Axis("out", kernel.shape[1])]
        bias = jnp.asarray(leaves[f"encoder/dense_{i}/bias"])
        layers.append(Dense(hax.named(kernel, axes), bias))
    frozen = jnp.arange(3, dtype=jnp.float32)
    return Model(layers, jnp.asarray(leaves["head/kernel"]), frozen)


def arrays(tree):
    """The path that levanter gives each leaf, and its array."""
    leaves = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, hax.NamedArray)
    )[0]
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    values = (x.array if isinstance(x, hax.NamedArray) else x for _, x in leaves)
    return dict(zip(names, values, strict=True))


def main():
    mask = Model(layers=True, head=True, frozen=False)
    state = TrainerState.init(
        optax.sgd(0.1, momentum=0.5),
        model(0),
        key=jax.random.PRNGKey(0),
        is_trainable=mask,
        model_averaging=EmaModelAveragingConfig(beta=common.DECAY),
    )
    for step in range(common.UPDATES):
        then = model(step + 1)
        average = state.model_averaging.update(eqx.filter(then, mask), state.step)
        state = eqx.tree_at(
            lambda s: (s.model, s.model_averaging, s.step),
            state,
            (then, average, state.step + 1),
        )

    out = common.folder("levanter_until_2025" if OLD else "levanter")
    folder = out / "checkpoint" / f"step-{common.UPDATES}"
    save_checkpoint(
        eqx.filter(state, saveable_training_mask(state, mask)),
        step=common.UPDATES,
        checkpoint_path=folder,
        is_temporary=False,
    )
    common.expect(
        out,
        params=arrays(eqx.filter(state.model, mask)),
        average=arrays(state.model_averaging.model_params),
        packages=PACKAGES if OLD else [*PACKAGES, "marin-levanter"],
        **({"levanter": "9263f81e8b453241332c2c0b2d2001bfb2d2241c"} if OLD else {}),
        decay=common.DECAY,
        step=common.UPDATES,
        folder=f"checkpoint/{folder.name}",
        params_at="model",
        average_at="model_averaging/model",
        note="model/frozen is not trained: levanter saves it nowhere",
    )


if __name__ == "__main__":
    main()
