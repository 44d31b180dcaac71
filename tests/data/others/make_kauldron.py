"""Records checkpoints with kauldron's own Checkpointer, TrainState and ema_params.

    pip install kauldron==1.4.4 flax==0.12.12 orbax-checkpoint==0.12.8   (Python 3.12)
    python make_kauldron.py OUT

`pip install --no-deps kauldron==1.4.4` is enough, and much less, with clu, grain, pandas,
immutabledict, tensorboard, tfds-nightly, etils[all], chex, jaxtyping, typeguard, einops.
"""

import common
import jax
import jax.numpy as jnp
import optax
from kauldron import kd

PACKAGES = ["flax", "jax", "kauldron", "optax", "orbax-checkpoint"]


def trained(tx):
    """Seven steps as kd.train.TrainStep makes them."""
    params = jax.tree.map(jnp.asarray, common.weights(0))
    opt_state = tx.init(params)
    for step in range(common.UPDATES):
        grads = jax.tree.map(jnp.asarray, common.gradients(step))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    statistics = {"encoder": {"norm": {"mean": jnp.arange(2.0), "var": jnp.ones(2)}}}
    return kd.train.TrainState(
        step=jnp.asarray(common.UPDATES),
        params=params,
        collections={"batch_stats": statistics},
        opt_state=opt_state,
    )


def main():
    # The last one averages the head only. (With one MaskedNode in place of the encoder,
    # UseEmaParams(partial_ok=True) of 1.4.4 fails.)
    average = kd.optim.ema_params(decay=common.DECAY)
    named = kd.optim.named_chain(sgd=optax.sgd(1.0), ema_params=average)
    chained = optax.chain(optax.sgd(1.0, momentum=0.0), average)
    mask = jax.tree.map(lambda _: False, common.weights(0)) | {"head": True}
    partial = optax.chain(optax.sgd(1.0), optax.masked(average, mask))
    for name, tx, place in [
        ("kauldron", named, "opt_state/ema_params"),
        ("kauldron_chain", chained, "opt_state/1"),
        ("kauldron_masked", partial, "opt_state/1/inner_state"),
    ]:
        state = trained(tx)
        leaf = lambda x: hasattr(x, "ema_params")  # noqa: E731
        [ema] = [x for x in jax.tree.leaves(state.opt_state, is_leaf=leaf) if leaf(x)]
        average = ema.ema_params
        if name == "kauldron_masked":
            average = {"head": average["head"]}

        out = common.folder(name)
        checkpointer = kd.ckpts.Checkpointer(
            workdir=out / "checkpoint", save_interval_steps=1
        )
        checkpointer.save(state, step=common.UPDATES)
        checkpointer.wait_until_finished()
        checkpointer.close()

        use = kd.optim.UseEmaParams(partial_ok=True)
        served = common.flat(use.transform(state).params)
        for path, value in common.flat(average).items():
            assert (served[path] == value).all()
        common.expect(
            out,
            params=state.params,
            average=average,
            count=ema.count,
            packages=PACKAGES,
            decay=common.DECAY,
            step=common.UPDATES,
            folder=f"checkpoint/checkpoints/ckpt_{common.UPDATES}",
            item="default",
            params_at="params",
            average_at=f"{place}/ema_params",
            count_at=f"{place}/count",
            note="the decay is not stored; in the updates it was "
            "min(decay, (1 + count) / (10 + count))",
        )


if __name__ == "__main__":
    main()
