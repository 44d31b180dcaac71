"""The centers of an elastic run, computed again from its log."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._checks import check_callable, check_sequence
from emaopt._fragments import column_of
from emaopt._types import PyTree
from emaopt.elastic._attempt import shares_of
from emaopt.elastic._layout import add_up, sum_dtype
from emaopt.elastic._programs import Counts, exchanged
from emaopt.elastic._settings import center_of, programs_for
from emaopt.elastic._workers import Record


def pseudo_gradient(
    optimizer: optax.GradientTransformation, params: PyTree, opt_state: PyTree
) -> PyTree:
    """Returns the commit that `Workers.exchange` would hand in now.

    It is the negative progress since the last exchange: for commit="delta" the center
    minus the parameters. Its norm is what to look at when the outer optimizer is tuned.

    Args:
      optimizer: A transformation with local updates in it, in the form for one worker.
      params: The worker's parameters.
      opt_state: The optimizer's state.

    Returns:
      A tree like the parameters, in the center's dtypes. With an `exchange_dtype`, before
      it is rounded to that. Leaves that are not exchanged are `optax.MaskedNode`s.

    Raises:
      ValueError, TypeError: As `Workers.exchange`.

    Example:
      >>> import emaopt
      >>> tx = emaopt.diloco(optax.sgd(1.0), period=9)
      >>> params = {"w": jnp.zeros(2)}
      >>> updates, state = tx.update(params, tx.init(params), params, exchange=False)
      >>> print(pseudo_gradient(tx, {"w": jnp.array([1.0, 2.0])}, state)["w"])
      [-1. -2.]
    """
    function = "elastic.pseudo_gradient"
    programs = programs_for(function, optimizer, params, opt_state)
    state = center_of(function, params, opt_state)
    treedef = jax.tree.structure(params)
    center = column_of(treedef, state.center)
    nodes: list[PyTree] = [optax.MaskedNode()] * len(center)
    rows = programs.commit(state, params)
    for i, row in zip(exchanged(programs.engine, center), rows, strict=True):
        nodes[i] = row
    return jax.tree.unflatten(treedef, nodes)


def replay(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    log: Sequence[Record],
    commits: Callable[[int, int], PyTree],
) -> list[PyTree]:
    """Computes the centers of an elastic run again.

    On the same hardware, with the same versions, they are equal to those of the run bit
    for bit: a `Record` holds whose commits counted, with which weights, and they are
    added up in the order of the workers.

    Args:
      optimizer: The run's.
      params: One worker's parameters, for their structure.
      opt_state: The state with which the run began, or was before the first record.
      log: `Workers.log`, as far as the numbers follow one another without a gap; for a
        whole run, that of a worker that was always there, such as worker 0. Where the run
        went on from a checkpoint, the last record of each number.
      commits: A function (number, worker) -> the `pseudo_gradient` that this worker
        handed in: what that returned just before the exchange. It is called for those
        whose commits counted.

    Returns:
      The center after each exchange: trees like that of `emaopt.get_center`.

    Raises:
      ValueError: If there is a gap in the log, and as `Workers.exchange`.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> tx = emaopt.local_sgd(optax.sgd(1.0), period=9)
      >>> params = {"w": jnp.zeros(2)}
      >>> log = [Record(1, (0, 1, 2), (2,), (), {0: 1.0, 1: 1.0})]  # 2 has just joined
      >>> def commits(number, worker):
      ...     return {"w": jnp.full(2, 1.0 + 2.0 * worker)}
      >>> (center,) = replay(tx, params, tx.init(params), log, commits)
      >>> print(center["w"])
      [-2. -2.]
    """
    function = "elastic.replay"
    check_sequence(function, "log", log, "records")
    if others := [one for one in log if not isinstance(one, Record)]:
        raise TypeError(
            f"{function}: log must be a sequence of Records, as Workers.log is; got "
            f"{others[0]!r}."
        )
    check_callable(function, "commits", commits, 2)
    programs = programs_for(function, optimizer, params, opt_state)
    state = center_of(function, params, opt_state)
    treedef = jax.tree.structure(params)
    positions = exchanged(programs.engine, column_of(treedef, state.center))
    centers = []
    for before, record in zip([None, *log], log, strict=False):
        if before is not None and record.number != before.number + 1:
            raise ValueError(
                f"{function}: in log, exchange {record.number} follows {before.number}, "
                "but the numbers have to go up by one. Take the log of a worker that was "
                "in all; if a run went on from a checkpoint, the last record of each."
            )
        leaves = column_of(treedef, state.center)
        rows, scales = [], []
        for worker in record.weights:
            commit = column_of(treedef, commits(record.number, worker))
            codes, factors = programs.coded([jnp.asarray(commit[i]) for i in positions])
            rows.append([np.asarray(code) for code in codes])
            scales.append(factors)
        sums = []
        for k, i in enumerate(positions):
            code = rows[0][k].dtype if rows else leaves[i].dtype
            out = np.empty(leaves[i].size, sum_dtype(code, leaves[i].dtype))
            is_integer = jnp.issubdtype(code, jnp.integer)
            factors = [float(row[k]) for row in scales] if is_integer else None
            columns = [row[k].reshape(-1) for row in rows]
            add_up(out, columns, shares_of(record.weights), factors)
            sums.append(jnp.asarray(out.reshape(leaves[i].shape)))
        counts = Counts(len(record.weights), len(record.left_out), False, False)
        state = programs.move(len(record.live), state, params, sums, counts)
        centers.append(state.center)
    return centers
