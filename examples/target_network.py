"""Q-learning with a target network that is an average.

    python examples/target_network.py

The values that a Q network is trained towards are computed by a slowly moving copy of it,
the target network. That is an average of the network's weights: `emaopt.average_tree`
keeps it, with any decay and option of an average, in place of a line with
`optax.incremental_update`. Its state is saved with the rest, and the checkpoint serves
the target network.

The agent finds its way through a room of 6 × 6 fields with walls: each step costs 1, the
goal ends the episode. Environment, replay memory and learning are one compiled loop. It
prints the number of steps that the greedy agent takes from the start, as it learns, and
the fewest that are possible.

Mnih et al., 2015, https://doi.org/10.1038/nature14236; Lillicrap et al., 2016,
https://arxiv.org/abs/1509.02971 (the moving average)
"""

import argparse
import functools
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import emaopt
from emaopt import checkpoint

ROOM = ["S.#...", "..#.#.", ".##.#.", "....#.", ".##.#.", "....#G"]
MOVES = jnp.array([(-1, 0), (1, 0), (0, -1), (0, 1)])
FREE = jnp.array([[field != "#" for field in row] for row in ROOM])
START, GOAL = jnp.array([0, 0]), jnp.array([5, 5])
SHORTEST, LIMIT, DISCOUNT, MEMORY, BATCH = 16, 50, 0.97, 4096, 32
TX, TARGET = optax.adam(1e-3), emaopt.average_tree(0.98)


class Transition(NamedTuple):
    place: jax.Array
    move: jax.Array
    reached: jax.Array
    done: jax.Array


def moved(place, move):
    """The environment: where a move leads."""
    new = jnp.clip(place + MOVES[move], 0, len(ROOM) - 1)
    return jnp.where(FREE[tuple(new)], new, place)


def init(key):
    first, second = jax.random.split(key)
    he = jax.nn.initializers.he_normal()
    return {
        "hidden": {"w": he(first, (FREE.size, 64)), "b": jnp.zeros(64)},
        "last": {"w": he(second, (64, 4)) * 0.1, "b": jnp.zeros(4)},
    }


def values(params, place):
    """The value of each move."""
    x = jax.nn.one_hot(place @ jnp.array([len(ROOM), 1]), FREE.size)
    x = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return x @ params["last"]["w"] + params["last"]["b"]


def loss(params, target, batch):
    """Double Q-learning: `params` choose the next move, `target` tells its value."""
    best = values(params, batch.reached).argmax(axis=1, keepdims=True)
    later = jnp.take_along_axis(values(target, batch.reached), best, axis=1)[:, 0]
    wanted = jax.lax.stop_gradient(-1 + DISCOUNT * later * ~batch.done)
    got = jnp.take_along_axis(values(params, batch.place), batch.move[:, None], axis=1)
    return optax.huber_loss(got[:, 0], wanted).mean()


def step(carry, key):
    """One step in the room, and one of learning from the memory."""
    params, opt_state, target, memory, place, age, number = carry
    keys = jax.random.split(key, 3)
    explore = jax.random.bernoulli(keys[0], 0.2)
    greedy = values(params, place).argmax()
    move = jnp.where(explore, jax.random.randint(keys[1], (), 0, 4), greedy)
    reached = moved(place, move)
    done = (reached == GOAL).all()
    new = Transition(place, move, reached, done)
    memory = jax.tree.map(lambda old, x: old.at[number % MEMORY].set(x), memory, new)
    over = done | (age + 1 == LIMIT)
    place, age = jnp.where(over, START, reached), jnp.where(over, 0, age + 1)

    drawn = jax.random.randint(keys[2], (BATCH,), 0, jnp.minimum(number + 1, MEMORY))
    batch = jax.tree.map(lambda x: x[drawn], memory)
    grads = jax.grad(loss)(params, target.average, batch)
    updates, opt_state = TX.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    target = TARGET.update(params, target)
    carry = params, opt_state, target, memory, place, age, number + 1
    return carry, None


@functools.partial(jax.jit, static_argnames="steps")
def learn(carry, key, steps):
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[0]


def steps_to_goal(params):
    """How many steps the greedy agent takes, LIMIT if it does not arrive."""
    place = START
    for number in range(LIMIT):
        if (place == GOAL).all():
            return number
        place = moved(place, values(params, place).argmax())
    return LIMIT


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    key = jax.random.key(args.seed)
    params = init(key)
    one = Transition(START, jnp.int32(0), START, jnp.array(False))
    memory = jax.tree.map(lambda x: jnp.zeros((MEMORY, *x.shape), x.dtype), one)
    carry = params, TX.init(params), TARGET.init(params), memory, START, 0, 0
    print(f"before learning: {steps_to_goal(params)} steps to the goal")
    for number in range(1, 5):
        carry = learn(carry, jax.random.fold_in(key, number), args.steps // 4)
        taken = steps_to_goal(carry[0])
        print(f"after {number * (args.steps // 4)} steps: {taken} to the goal")

    params, opt_state, target, *_ = carry
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/{args.steps}"
        state = {"params": params, "opt_state": opt_state, "target": target}
        checkpoint.save(path, state)
        served = checkpoint.load_averaged(path)
    print(
        f"the target network, served from a checkpoint: {steps_to_goal(served)} steps, "
        f"of {SHORTEST} that are needed"
    )


if __name__ == "__main__":
    main()
