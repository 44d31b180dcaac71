"""How long an average makes the compiler work: CPU seconds over those of Adam alone.

A donated step of Adam with a thousand and more small arrays, traced and compiled in turn
with the same step and an average, as emaopt chains it and as one would write it by hand
(optax.incremental_update). The time is that of the processor, of all threads; Python's
caches are cleared in between. Ratios within a round: median (min to max).

    python benchmarks/compile_time.py [--arrays 1500] [--rounds 5]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from timing import in_turn, spread

import emaopt

ADAM = optax.adam(1e-3)


def chained(tx, params):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, jax.eval_shape(tx.init, params))


def by_hand(params):
    alone, (_, state) = chained(ADAM, params)

    def step(params, state, average, grads):
        params, state = alone(params, state, grads)
        return params, state, optax.incremental_update(params, average, 0.001)

    return step, (params, state, params)


def seconds(step, donated, grads):
    jax.clear_caches()
    begin = time.process_time()
    numbers = tuple(range(len(donated)))
    jax.jit(step, donate_argnums=numbers).lower(*donated, grads).compile()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arrays", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    params = [
        jax.ShapeDtypeStruct((1024 * (1 + i % 10),), jnp.float32)
        for i in range(args.arrays)
    ]
    average = emaopt.average_params
    steps = {
        "Adam": chained(ADAM, params),
        "optax.incremental_update in the step": by_hand(params),
        "emaopt": chained(optax.chain(ADAM, average(0.999)), params),
        "emaopt, every=10": chained(optax.chain(ADAM, average(0.999, every=10)), params),
    }
    rivals = [
        lambda step=step, donated=donated: seconds(step, donated, params)
        for step, donated in steps.values()
    ]
    alone, *others = in_turn(rivals, args.rounds)
    print(f"{'Adam':40}  {statistics.median(alone):.1f} s")
    for name, own in zip(list(steps)[1:], others, strict=True):
        ratios = [a / b for a, b in zip(own, alone, strict=True)]
        print(f"{name:40}  {spread(ratios, '.2f')}")


if __name__ == "__main__":
    main()
