"""What other libraries' averages are, measured where they are installed.

Each experiment has an exact answer by definition, and each library gives one of its own:

  every     the decay is 0.99 and the average moves on every 10th step of 1,000: its mean
            age in steps. Exact is that of weights β^10 apart.
  start     averaging begins at step 900 of 1,000 with a decay of 0.99: the weight that
            the parameters before the first step still have. Exact: none.
  bfloat16  parameters in bfloat16 that were 1 and are 2, decay 0.9999: the average after
            20,000 steps. Exact: 2 - 0.9999^20000.
  uniform   the weight of the newest of 2,000 iterates in bfloat16, all of equal weight.
  dropout   a Flax NNX model with Dropout is averaged, or what error there is.
  jit       the average is read inside of a jitted function, or what error there is.

    python benchmarks/peers.py

runs those of Optax, Flax and rollfast that are installed (pip install rollfast), and says
which are not. `tests/test_peers.py` has the same for libraries of PyTorch, by their
formulae.
"""

import argparse
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import emaopt

STEPS, START, EVERY = 1000, 900, 10
SLOW, LONG = 0.9999, 20_000  # of the experiment in bfloat16
EXACT = {
    "every": EVERY * 0.99**EVERY / (1 - 0.99**EVERY),
    "start": 0.0,
    "bfloat16": 2 - SLOW**LONG,
    "uniform": 1 / 2000,
}


def scanned(tx: Any, params: jax.Array, targets: jax.Array) -> Any:
    """The parameters and the state of an optimizer whose updates lead to the targets."""

    def step(carry: Any, target: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(target - params, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda c: jax.lax.scan(step, c, targets)[0])((params, tx.init(params)))


RAMP = jnp.arange(1, STEPS + 1) / STEPS  # so that an average tells its mean age
ZEROS = jnp.zeros(STEPS)  # from 1 on, so that an average tells the weight of the start
LATER = jnp.full(LONG, 2, jnp.bfloat16)


def of_emaopt() -> dict[str, Any]:
    def average(
        decay: Any, begin: jax.Array, targets: jax.Array, **options: Any
    ) -> float:
        tx = emaopt.averaged(optax.sgd(-1.0), decay, **options)
        return float(emaopt.get_average(scanned(tx, begin, targets)[1]))

    zero, one = jnp.zeros(()), jnp.ones(())
    newest = jnp.zeros(2000, jnp.bfloat16).at[-1].set(1)
    return {
        "every": (1 - average(0.99, zero, RAMP, every=EVERY)) * STEPS,
        "start": average(0.99, one, ZEROS, start=START - 1),
        "bfloat16": average(SLOW, one.astype(jnp.bfloat16), LATER),
        "uniform": average(emaopt.uniform_decay(), newest[0], newest),
        "dropout": outcome(nnx_average),
        "jit": outcome(
            lambda: jax.jit(emaopt.get_average)(emaopt.averaged(SGD, 0.9).init(one))
        ),
    }


SGD = optax.sgd(0.1)


def nnx_average() -> Any:
    from flax import nnx

    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, emaopt.averaged(SGD, 0.9), wrt=nnx.Param)
    return emaopt.get_average(optimizer)


def of_optax() -> dict[str, Any]:
    def line(average: Any, params: Any) -> tuple[Any, None]:
        return optax.incremental_update(params, average, 1 - SLOW), None

    average = jax.lax.scan(line, jnp.ones((), jnp.bfloat16), LATER)[0]
    rate = 0.01
    tx = optax.contrib.schedule_free(optax.sgd(rate), rate)
    state = scanned(tx, jnp.zeros((), jnp.bfloat16), jnp.zeros(2000, jnp.bfloat16))[1]
    return {
        "bfloat16": float(average),
        "uniform": rate**2 / float(state.weight_sum),
    }


def of_flax() -> dict[str, Any]:
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones((), jnp.bfloat16))

    model = Model()
    average = nnx.EMA(model, decay=SLOW)
    model.w[...] = LATER[0]
    step = nnx.jit(lambda average, model: average.update(model))
    for _ in range(LONG // 10):  # it stands still from the first step on
        step(average, model)
    kept = jax.tree.leaves(nnx.state(average))

    def dropout() -> Any:
        model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        return nnx.EMA(model, decay=0.9).update(model)

    return {"bfloat16": float(kept[0]), "dropout": outcome(dropout)}


def of_rollfast() -> dict[str, Any]:
    averaging = importlib.import_module("rollfast.finetune.averaging")
    config = importlib.import_module("rollfast.finetune.config")
    off = config.SWAConfig()

    def ran(begin: jax.Array, targets: jax.Array, **options: Any) -> Any:
        ema = config.EMAConfig(enabled=True, source_view="optimizer", **options)
        tx = averaging.wrap_with_averaging(
            optax.sgd(-1.0), ema=ema, swa=off, total_steps=len(targets)
        )
        read = averaging.make_averaging_eval_fn(ema=ema, swa=off)
        return read, scanned(tx, begin, targets)

    def average(*run: Any, **options: Any) -> float:
        read, (params, state) = ran(*run, **options)
        return float(read(params, state, "ema"))

    def under_jit() -> Any:
        read, (params, state) = ran(jnp.zeros(()), RAMP, decay=0.99)
        return jax.jit(lambda params, state: read(params, state, "ema"))(params, state)

    zero, one = jnp.zeros(()), jnp.ones(())
    return {
        "every": (1 - average(zero, RAMP, decay=0.99, update_every=EVERY)) * STEPS,
        "start": average(one, ZEROS, decay=0.99, start_step=START),
        "bfloat16": average(one.astype(jnp.bfloat16), LATER, decay=SLOW),
        "jit": outcome(under_jit),
    }


def outcome(act: Callable[[], Any]) -> str:
    """ "works", or the name of the error."""
    try:
        act()
    except Exception as error:
        return type(error).__name__
    return "works"


PEERS: dict[str, Callable[[], dict[str, Any]]] = {
    "emaopt": of_emaopt,
    "optax": of_optax,
    "flax": of_flax,
    "rollfast": of_rollfast,
}


def measured(names: list[str]) -> dict[str, dict[str, Any]]:
    """The answers of those libraries that are installed."""
    found = {}
    for name in names:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
            continue
        found[f"{name} {version}"] = PEERS[name]()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[*PEERS])
    args = parser.parse_args()
    print(f"jax {jax.__version__}")
    rows = {"exact": EXACT, **measured(args.peers)}
    columns = [*EXACT, "dropout", "jit"]

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if value != str(value) else value

    width = max(map(len, rows))
    print(" " * width, *(f"{column:>10}" for column in columns))
    for name, row in rows.items():
        cells = [cell(row.get(column)) for column in columns]
        print(f"{name:{width}}", *(f"{text:>10}" for text in cells))


if __name__ == "__main__":
    main()
