"""One process of benchmarks/elastic.py: a worker, which says in JSON what it does."""

import argparse
import hashlib
import json
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import emaopt
from emaopt.elastic._attempt import SUMMED

SECONDS = 5.0  # the heartbeat timeout


class Summed(logging.Handler):
    """Keeps what the log says of the last sum."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == SUMMED:
            assert isinstance(record.args, tuple)
            _, self.seconds, self.nbytes = record.args


def say(**what) -> None:
    print(json.dumps(what), flush=True)


def tree(megabytes: float):
    size = int(megabytes * 2**20 / 4 / 2)
    return {"a": jnp.ones(size), "b": jnp.zeros((size // 64, 64))}


def hashed(center) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(center):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def kills(given: argparse.Namespace) -> None:
    """Trains until the group has made `rounds` exchanges."""
    optimizer = emaopt.diloco(optax.adam(1e-3), period=3)
    params = tree(given.megabytes)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, key):
        grads = jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), params)
        updates, state = optimizer.update(grads, state, params, exchange=False)
        return optax.apply_updates(params, updates), state

    key, number = jax.random.key(given.worker), 0
    with connected(given) as workers:
        while number < given.rounds:
            for _ in range(3):
                key, now = jax.random.split(key)
                params, state = step(params, state, now)
            jax.block_until_ready(params)
            start = time.perf_counter()
            params, state, number, live, joined = workers.exchange(
                optimizer, params, state
            )
            seconds = time.perf_counter() - start
            digest = hashed(emaopt.get_center(state))
            say(
                number=number,
                live=live,
                joined=joined,
                center=digest,
                seconds=seconds,
                at=time.time(),
            )


def exchanges(given: argparse.Namespace) -> None:
    """Seconds of exchanges, and of their sums."""
    optimizer, params = local(given, None)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = optimizer.update(grads, state, params, exchange=False)
        return optax.apply_updates(params, updates), state

    summed = Summed()
    logger = logging.getLogger("emaopt.elastic")
    logger.addHandler(summed)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    with connected(given) as workers:
        for _ in range(given.rounds):
            params, state = jax.block_until_ready(step(params, state))
            start = time.perf_counter()
            params, state, *_ = workers.exchange(optimizer, params, state)
            seconds = time.perf_counter() - start
            say(whole=seconds, sums=summed.seconds, nbytes=summed.nbytes)


def collectives(given: argparse.Namespace) -> None:
    """Seconds of one psum, and of an exchange of the mapped form."""
    jax.distributed.initialize(given.address, given.workers, given.worker)
    mesh = Mesh(np.array(jax.devices()), "workers")
    rows, everywhere = PartitionSpec("workers"), PartitionSpec()
    optimizer, params = local(given, "workers")
    params = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            NamedSharding(mesh, rows), np.asarray(x)[None]
        ),
        params,
    )
    psum = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "workers"),
            mesh=mesh,
            in_specs=rows,
            out_specs=everywhere,
        )
    )
    specs = emaopt.state_specs(optimizer, params, "workers")

    def mapped(body, in_specs, out_specs):
        return jax.jit(
            jax.shard_map(
                body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
        )

    state = mapped(optimizer.init, rows, specs)(params)

    def update(exchange):
        def body(params, state):
            grads = jax.tree.map(jnp.ones_like, params)
            updates, state = optimizer.update(grads, state, params, exchange=exchange)
            return optax.apply_updates(params, updates), state

        return mapped(body, (rows, specs), (rows, specs))

    exchanging, alone = update(True), update(False)
    for _ in range(given.rounds):
        found = []
        for run in (
            lambda: psum(params),
            lambda: alone(params, state),
            lambda: exchanging(params, state),
        ):
            start = time.perf_counter()
            jax.block_until_ready(run())
            found.append(time.perf_counter() - start)
        say(psum=found[0], whole=found[2] - found[1])


def local(given: argparse.Namespace, axis_name: str | None):
    """An optimizer and its start."""
    optimizer = emaopt.local_sgd(optax.sgd(1e-3), period=9, axis_name=axis_name)
    return optimizer, tree(given.megabytes)


def connected(given: argparse.Namespace) -> emaopt.elastic.Workers:
    return emaopt.elastic.connect(
        given.address,
        num_workers=given.workers,
        worker=given.worker,
        heartbeat_timeout_seconds=SECONDS,
    )


ROLES = {"kills": kills, "exchanges": exchanges, "collectives": collectives}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("address")
    parser.add_argument("worker", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--megabytes", type=float)
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    ROLES[given.role](given)
