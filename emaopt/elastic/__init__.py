"""Elastic training: workers die, come back and join, and the run goes on.

Each worker is one process with its own devices. It takes local steps that wait for
nobody and, every few hundred of them, exchanges with the workers that live: `connect` in
place of `jax.distributed.initialize`, an optimizer with local updates in the form for one
worker, and `Workers.exchange`.

    tx = emaopt.diloco(optax.adamw(4e-4), period=500)
    state = tx.init(params)
    with emaopt.elastic.connect("10.0.0.1:8476", num_workers=8, worker=rank) as workers:
        while number < 200:
            for batch in local_batches:
                params, state = step(params, state, batch)  # update(..., exchange=False)
            params, state, number, live, joined = workers.exchange(tx, params, state)

No collective of JAX's crosses processes, because one that has lost a peer does not
return. The commits travel over TCP: each worker adds up one part of them and pulls the
other parts, so that all apply the same sum, bit for bit. An exchange has happened on all
workers that live or on none: if one dies in it, the others begin it anew.

A small service in the process of worker 0 knows who lives. If that process dies, the run
ends for all, which a `ConnectionError` says, and all start again from the checkpoint.
Messages carry neither code nor a password: as with JAX's own service, only trusted
machines should reach the ports.
"""

import jax

from emaopt._checks import check_integer, check_number
from emaopt.elastic._messages import parsed_address
from emaopt.elastic._replay import pseudo_gradient, replay
from emaopt.elastic._session import Session
from emaopt.elastic._workers import Exchanged, Record, Workers

__all__ = ["Exchanged", "Record", "Workers", "connect", "pseudo_gradient", "replay"]


def connect(
    coordinator_address: str,
    *,
    num_workers: int,
    worker: int,
    heartbeat_timeout_seconds: float = 10,
    number: int = 0,
) -> Workers:
    """Connects this process to an elastic run, in place of `jax.distributed.initialize`.

    At the start of a run it waits for all workers, but not longer than the heartbeat
    timeout after worker 0 has called it; the run begins with those that are there. Later
    it returns at once. A process that is started again gives the number that the dead one
    had.

    A worker counts as dead when its connection ends, which is at once when its process
    does, or when nothing is heard of it for the heartbeat timeout, as when its machine is
    gone. If it only stood still, it joins again at its next exchange.

    Args:
      coordinator_address: "host:port" of worker 0, the same on all workers. With
        "localhost" or "127.0.0.1" all are on one machine, and no other can connect. The
        other workers listen on ports that the system chooses.
      num_workers: How many workers there are at most.
      worker: The number of this one, from 0 to num_workers - 1.
      heartbeat_timeout_seconds: How long a machine may be silent. A process that computes
        is not: a thread answers for it.
      number: Of the last exchange before, when a run goes on from a checkpoint; the next
        one has the number after worker 0's. A worker that joins later gets the group's.

    Returns:
      The `Workers`, to exchange with and to close.

    Raises:
      ConnectionError: If there is no worker 0 for 5 minutes.
      ValueError: If an argument is out of its range, if another process has this number,
        if num_workers is not that of worker 0, if the other workers could not reach this
        one, or if `jax.distributed` has been initialized.
      OSError: On worker 0, if its port is taken.

    Example:
      >>> import emaopt, jax.numpy as jnp, optax, socket
      >>> with socket.create_server(("127.0.0.1", 0)) as free:
      ...     port = free.getsockname()[1]
      >>> tx = emaopt.local_sgd(optax.sgd(0.5), period=2)
      >>> params = jnp.zeros(())
      >>> state = tx.init(params)
      >>> with connect(f"127.0.0.1:{port}", num_workers=1, worker=0) as workers:
      ...     for target in (1.0, 3.0):
      ...         grad = params - target
      ...         updates, state = tx.update(grad, state, params, exchange=False)
      ...         params = optax.apply_updates(params, updates)
      ...     params, state, number, live, joined = workers.exchange(tx, params, state)
      >>> print(number, live, joined, emaopt.get_center(state))
      1 (0,) () 1.75
    """
    function = "elastic.connect"
    address = parsed_address(function, coordinator_address)
    check_integer(function, "num_workers", num_workers, 1)
    check_integer(function, "worker", worker, 0)
    if worker >= num_workers:
        raise ValueError(
            f"{function}: worker must be less than num_workers={num_workers}, got "
            f"{worker}."
        )
    check_number(
        function, "heartbeat_timeout_seconds", heartbeat_timeout_seconds, 0, above=True
    )
    check_integer(function, "number", number, 0)
    if jax.distributed.is_initialized():
        raise ValueError(
            f"{function}: jax.distributed is initialized, so collectives would wait for "
            "processes that may die. Leave jax.distributed.initialize out."
        )
    seconds = float(heartbeat_timeout_seconds)
    return Workers(Session(address, num_workers, worker, seconds, number))
