"""A publisher that is killed, and a reader that checks every number that it gets.

    python publishing_worker.py publish DIRECTORY  # or contend, for ten versions
    python publishing_worker.py read DIRECTORY

Version n is full of numbers made from its metadata, and read ones are compared with
these. Both print a line for each version; the reader ends when a file DIRECTORY/end is
there.
"""

import functools
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt import averaged, checkpoint

SHAPES = {"a": (128, 64), "b": (300,), "layers": {"0": (32, 32), "1": (32, 32)}}
TX = averaged(optax.sgd(0.1), 0.5)


def weights(number):
    """The numbers of version `number`, in every leaf other ones."""
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(number)
    return jax.tree.unflatten(
        treedef, [rng.standard_normal(shape, np.float32) for shape in shapes]
    )


def publish(directory, most=None):
    for number in itertools.count(1):
        params = jax.tree.map(jnp.asarray, weights(number))
        state = {"params": params, "opt_state": TX.init(params)}
        try:
            said = checkpoint.publish(
                directory, state, custom_metadata={"number": number}, max_to_keep=2
            )
        except ValueError as error:  # of another publisher
            said = error
        print(said, flush=True)
        if number == most:
            return


def read(directory):
    with checkpoint.watch(directory, weights(0), poll_seconds=0.005) as watching:
        before = 0
        while not (directory / "end").exists():
            published = watching.poll()
            if published is None:
                continue
            right = weights(published.custom_metadata["number"])
            same = jax.tree.map(
                lambda a, b: bool((a == b).all()), published.params, right
            )
            whole = all(jax.tree.leaves(same)) and published.version > before
            before = published.version
            print("whole" if whole else "torn", published.version, flush=True)


if __name__ == "__main__":
    modes = {"publish": publish, "read": read}
    modes["contend"] = functools.partial(publish, most=10)
    modes[sys.argv[1]](Path(sys.argv[2]))
