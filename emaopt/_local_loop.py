"""Functions for a training loop with local updates, beside the optimizer."""

import functools
import operator
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from emaopt._checks import check_axis_name, check_callable, check_integer, check_optimizer
from emaopt._exchange import Exchange, Fixed, Leaf, Part, Voices
from emaopt._fragments import column_of, fragments_of
from emaopt._in_flight import chosen, commit, flights_of, land
from emaopt._leaves import is_array, is_averaged
from emaopt._nodes import is_center_node, replace
from emaopt._reading import find_center, paired, refuse_one_worker
from emaopt._states import InFlight, LocalUpdatesState
from emaopt._tree_checks import check_arrays
from emaopt._turn import Order, update_of
from emaopt._types import AxisName, PyTree
from emaopt._workers import Mapped, Stacked, resized

ValueAndGrad: TypeAlias = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


def stack_workers(params: PyTree, num_workers: int) -> PyTree:
    """Gives every worker a copy of the parameters, on a leading axis.

    Args:
      params: One worker's parameters.
      num_workers: W.

    Returns:
      A tree of leaves [W, ...]; shard the first axis over a mesh with `jax.device_put`.

    Raises:
      ValueError, TypeError: If `num_workers` is not a whole number from 1 on.

    Example:
      >>> print(stack_workers({"w": jnp.array([1.0, 2.0])}, 2)["w"])
      [[1. 2.]
       [1. 2.]]
    """
    check_integer("stack_workers", "num_workers", num_workers, 1)
    check_arrays("stack_workers", "params", params)
    return jax.tree.map(
        lambda leaf: jnp.array(
            jnp.broadcast_to(leaf, (num_workers, *jnp.shape(leaf))), copy=True
        ),
        params,
    )


def state_specs(
    optimizer: optax.GradientTransformation, params: PyTree, axis_name: AxisName
) -> PyTree:
    """Returns how an optimizer's state is sharded over the workers.

    The specs are for `in_specs` and `out_specs` of `jax.shard_map` or, as
    `NamedSharding`, for the `out_shardings` of a jitted `init`:

        specs = emaopt.state_specs(tx, params, "workers")
        step = jax.shard_map(step, in_specs=(P("workers"), specs, P("workers")), ...)

    Args:
      optimizer: A transformation with local updates in it.
      params: The workers' parameters outside of `shard_map`, as `init` gets them there:
        leaves [W, ...], arrays or `jax.ShapeDtypeStruct`s.
      axis_name: The mesh axis or axes over the workers.

    Returns:
      A tree of `PartitionSpec` like the state: each worker's own slots and scalars are
      split along `axis_name`, the rest is replicated. In the mapped form each worker has
      a copy of the center, equal to all others.

    Raises:
      ValueError: If there is no center in the state, or several.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> tx = emaopt.local_sgd(optax.adam(1.0), period=2, num_workers=4)
      >>> specs = state_specs(tx, jnp.zeros((4, 3)), "workers")
      >>> specs.inner_state[0].mu == PartitionSpec("workers")
      True
      >>> specs.center == PartitionSpec()
      True
    """
    check_optimizer("state_specs", "optimizer", optimizer)
    check_arrays("state_specs", "params", params)
    check_axis_name("state_specs", "axis_name", axis_name)
    if any(not jnp.ndim(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "state_specs: params are those of all workers, leaves [W, ...], but one is a "
            "scalar. Call emaopt.stack_workers(params, W) first."
        )
    try:
        state = jax.eval_shape(optimizer.init, params)
    except ValueError as error:
        raise ValueError(
            f"state_specs: optimizer.init refuses params: {error}"
        ) from error
    center = find_center("state_specs", state, None)
    pairs = zip(
        jax.tree.structure(params).flatten_up_to(center.center),
        jax.tree.leaves(params),
        strict=True,
    )
    # In the stacked form the center lacks the axis of workers; in the mapped form, where
    # `init` runs on every worker, it has it.
    stacked = any(hasattr(c, "ndim") and c.ndim < len(jnp.shape(p)) for c, p in pairs)

    rows, everywhere = PartitionSpec(axis_name), PartitionSpec()
    workers = next((len(leaf) for leaf in jax.tree.leaves(params)), 0)
    if stacked:
        own = {"inner_state", "accumulated", "pulled", "residual"}
        own |= {"num_missed", "has_missed"}
        shared = {"num_steps", "num_present"}  # of what is in flight

        def specs(node: PyTree) -> PyTree:
            if not is_center_node(node):  # a leaf of a transformation around the engine
                return rows if jnp.shape(node)[:1] == (workers,) else everywhere

            def of(field: str, part: PyTree) -> PyTree:
                if isinstance(part, InFlight):
                    pairs = part._asdict().items()
                    return InFlight(*(all_of(x, f not in shared) for f, x in pairs))
                return all_of(part, field in own)

            def all_of(part: PyTree, own: bool) -> PyTree:
                return jax.tree.map(lambda _: rows if own else everywhere, part)

            return LocalUpdatesState(*map(of, *zip(*node._asdict().items(), strict=True)))

        return jax.tree.map(specs, state, is_leaf=is_center_node)
    # A leaf that each worker has for itself is longer with one more worker.
    more = jax.eval_shape(optimizer.init, resized(params, workers + 1))
    return jax.tree.map(
        lambda x, y: everywhere if x.shape == y.shape else rows, state, more
    )


def local_round(
    optimizer: optax.GradientTransformation,
    value_and_grad: ValueAndGrad,
    params: PyTree,
    opt_state: PyTree,
    batches: PyTree,
) -> tuple[PyTree, PyTree, PyTree]:
    """Takes local steps in a scan, and exchanges once.

    This is one round, whatever the optimizer's period. It equals calls of `update` with
    exchange=False, the last with True, up to rounding, and compiles to no conditional:
    all fragments are exchanged together, so with `num_fragments` they take turns by
    `update` only. Afterwards the parameters are exactly what the workers pulled, not only
    up to rounding, if there is neither delay nor mix.

    With a `delay` the exchange is that of the commits of the round before. It comes
    first and apart from the steps: nothing in them waits for it, nor does it wait for
    them, until the workers pull it after `delay` steps, or after the last one; so it
    equals calls of `update` if the step before the round made commits. What of the
    communication passes under the steps is up to the compiler. Between TPU slices XLA
    lets all of it pass; within a slice and on GPUs nothing.

    Args:
      optimizer: A transformation with local updates in it.
      value_and_grad: (params, batch) -> (value, gradients), as `jax.value_and_grad` makes
        it; in the stacked form for all workers, `jax.vmap(jax.value_and_grad(loss))`.
      params: The workers' parameters.
      opt_state: The optimizer's state.
      batches: A tree of leaves [steps, ...]: a batch for each local step; in the stacked
        form [steps, W, ...].

    Returns:
      (params, opt_state, values), with the values of all steps, [steps, ...].

    Raises:
      ValueError: If there is no step, if the state has no center or several, or if a
        wrapper does not take extra arguments.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> tx = emaopt.local_sgd(optax.sgd(1.0), period=2, num_workers=2)
      >>> params = emaopt.stack_workers(jnp.zeros(()), 2)
      >>> distance = jax.vmap(jax.value_and_grad(lambda x, to: (x - to) ** 2 / 2))
      >>> batches = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> params, state, _ = local_round(tx, distance, params, tx.init(params), batches)
      >>> print(params)
      [3.5 3.5]
    """
    check_optimizer("local_round", "optimizer", optimizer)
    check_callable("local_round", "value_and_grad", value_and_grad, 2)
    check_arrays("local_round", "params", params)
    check_arrays("local_round", "batches", batches)
    steps = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(steps) != 1 or steps <= {(), (0,)}:
        raise ValueError(
            "local_round: every leaf of batches has a leading axis with one entry for "
            f"each of the local steps, at least one; got {sorted(steps)}."
        )
    state = find_center("local_round", opt_state, None)
    paired("local_round", state.center, params, stacked=True)
    update = update_of("local_round", optimizer)
    ((num_steps, *_),) = steps

    late = isinstance(state.in_flight, InFlight)
    local: Order | bool = Order() if late else False

    def step(
        carry: tuple[PyTree, PyTree], batch: PyTree, order: Order | bool = local
    ) -> tuple[tuple[PyTree, PyTree], PyTree]:
        params, opt_state = carry
        value, grads = value_and_grad(params, batch)
        updates, opt_state = update(grads, opt_state, params, exchange=order)
        return (optax.apply_updates(params, updates), opt_state), value

    # Steps with an exchange stand outside of scans: they need no conditional then.
    orders: list[tuple[int, Order | bool]] = [(num_steps - 1, True)]
    if late:
        # What is in flight lands first; the steps know nothing of it until they pull.
        batch = jax.tree.map(operator.itemgetter(0), batches)
        land, nothing = Order(land=True), _no_gradients(value_and_grad, params, batch)
        _, after = update(nothing, opt_state, params, exchange=land)
        landed = find_center("local_round", after, None)
        if land.delay < num_steps:
            pull, last = Order(landed=landed), Order(commit=True)
            orders = [(land.delay - 1, pull), (num_steps - 1, last)]
        else:
            orders = [(num_steps - 1, Order(commit=True, landed=landed))]
    carry, pieces, start = (params, opt_state), [], 0
    for number, order in orders:
        early = jax.tree.map(operator.itemgetter(slice(start, number)), batches)
        carry, values = lax.scan(step, carry, early)
        one = jax.tree.map(operator.itemgetter(number), batches)
        carry, value = step(carry, one, order)
        pieces += [values, jax.tree.map(lambda leaf: leaf[None], value)]
        start = number + 1
    values = jax.tree.map(lambda *all_: jnp.concatenate(all_), *pieces)
    params, opt_state = carry
    if state.in_flight is None:  # else workers keep something of their own, or pull early
        params = pulled_params(find_center("local_round", opt_state, None), params)
    return params, opt_state, values


def _no_gradients(value_and_grad: ValueAndGrad, params: PyTree, batch: PyTree) -> PyTree:
    """Zeros where there will be gradients, None where there will be none."""
    _, grads = jax.eval_shape(value_and_grad, params, batch)
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, treedef.flatten_up_to(grads), strict=True)
    return treedef.unflatten([None if g is None else jnp.zeros_like(p) for p, g in pairs])


def synchronize(
    opt_state: PyTree,
    params: PyTree,
    *,
    axis_name: AxisName = None,
    name: str | None = None,
) -> tuple[PyTree, PyTree]:
    """Ends local updates: brings the workers together, exactly.

    The center moves by the mean of the workers' deltas since the last exchange, an outer
    step of optax.sgd(1.0), and all workers get the center, bit for bit. Without a step
    since then, the center stays as it is. To end with a step of the optimizer's own outer
    optimizer, pass `exchange=True` to the last update before.

    With a `delay`, commits in flight land first, by such a step as well; so an exchange
    forced at the last update is one of the mean, too. To land by the outer optimizer,
    take `delay` more steps with exchange=False before. That is needed for
    commit="mean_gradient" and a number for `mix` where commits were made at a step at
    which others landed, as with delay=period: sums of gradients in flight, after which
    the workers have pulled the center, are dropped here.

    Args:
      opt_state: A state of local updates, at any depth.
      params: The workers' parameters.
      axis_name: The mapped axis, in the mapped form.
      name: The name of the center, if there are several.

    Returns:
      (params, opt_state).

    Raises:
      ValueError: If there is no center or several, or if the parameters do not fit it.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> tx = emaopt.local_sgd(optax.sgd(1.0), period=9, num_workers=2)
      >>> params = emaopt.stack_workers(jnp.zeros(1), 2)
      >>> grads = jnp.array([[1.0], [3.0]])
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> params, state = synchronize(state, optax.apply_updates(params, updates))
      >>> print(params.ravel(), emaopt.get_center(state))
      [-2. -2.] [-2.]
    """
    state = find_center("synchronize", opt_state, name)
    check_arrays("synchronize", "params", params, others=True)
    if axis_name is not None:
        check_axis_name("synchronize", "axis_name", axis_name)
    leaves, treedef = jax.tree.flatten(params)
    paired("synchronize", state.center, params, stacked=True)
    center = treedef.flatten_up_to(state.center)
    pulled = [None] * len(leaves)
    if state.pulled is not None:
        pulled = treedef.flatten_up_to(state.pulled)
    # Parameters with one axis more than the center are those of the stacked form.
    workers: Mapped | Stacked = Mapped(axis_name)
    for leaf, row in zip(center, leaves, strict=True):
        if is_averaged(leaf) and leaf.ndim < jnp.ndim(row):
            workers = Stacked(len(row))
    if isinstance(workers, Mapped) and axis_name is None:
        refuse_one_worker("synchronize", state)
    if isinstance(workers, Stacked) and axis_name is not None:
        raise ValueError(
            f"synchronize: axis_name={axis_name!r} is for the mapped form, but the "
            "parameters have a leading axis of workers that the center has not."
        )
    workers.check("synchronize", leaves)
    exchange = Exchange(workers, optax.sgd(1.0), "delta", "mean", None, None)
    num_left_out, since = state.num_left_out, state.since_exchange
    fragments = fragments_of("synchronize", center, len(since))
    column = functools.partial(column_of, treedef)
    flights = flights_of(workers, state.in_flight, fragments, column)
    for number, fragment in enumerate(fragments):
        steps, missed = since[number], workers.loaded(state.has_missed[number])
        changing = [Leaf(pulled[i], None, center[i]) for i in fragment]
        rows = [Fixed(jnp.asarray(leaves[i]), None) for i in fragment]
        outer_state = exchange.outer.init([leaf.center for leaf in changing])
        part = Part(changing, outer_state, num_left_out, None)
        voices = Voices(~missed, None)
        if flights:
            flight = flights[number]
            if state.accumulated is not None and flight.progress is None:
                # Gradients without an outer optimizer: what counts is where workers are.
                steps = jnp.maximum(steps, flight.num_steps)
                flight = flight._replace(num_steps=jnp.zeros_like(steps))
            new = commit(exchange, part, flight, rows, steps, voices)
            for one in (flight._replace(sums=flight.rows), new):
                after, _ = land(exchange, part, one, [True] * len(fragment), list)
                part = chosen(one.num_steps > 0, after, part)
        else:

            def read(ready: jax.Array, rows: list[Fixed] = rows) -> list[Fixed]:
                return workers.held(ready, rows)

            # Without a step since the exchange nothing changes, not even by a rounding.
            part = chosen(steps > 0, exchange(part, read, steps, voices, list), part)
        num_left_out = part.num_left_out
        for i, leaf in zip(fragment, part.leaves, strict=True):
            center[i] = leaf.center
    in_flight = state.in_flight
    if isinstance(in_flight, InFlight):
        numbers = jax.tree.map(jnp.zeros_like, in_flight.num_steps)
        in_flight = in_flight._replace(num_steps=numbers)
    new = state._replace(
        num_left_out=num_left_out,
        since_exchange=jax.tree.map(jnp.zeros_like, since),
        has_missed=jax.tree.map(jnp.zeros_like, state.has_missed),
        pulled=None,
        in_flight=in_flight,
        center=jax.tree.unflatten(treedef, center),
    )
    params = pulled_params(new, params)
    if state.pulled is not None:
        new = new._replace(
            pulled=jax.tree.map(
                lambda old, p: _own(p, p.astype(old.dtype)) if is_array(p) else old,
                state.pulled,
                params,
            )
        )
    return params, replace(opt_state, state, new)


def pulled_params(state: LocalUpdatesState, params: PyTree) -> PyTree:
    """The parameters, set to the values that the workers pulled."""
    target = state.center if state.pulled is None else state.pulled

    def of(p: PyTree, t: PyTree) -> PyTree:
        if not is_averaged(p) or not is_array(t):  # a masked leaf is not in the center
            return p
        return _own(t, jnp.broadcast_to(t, p.shape).astype(p.dtype))

    return jax.tree.map(of, params, target)


def _own(old: jax.Array, new: jax.Array) -> jax.Array:
    """The new array, or a copy if it is the old one, because both may be donated."""
    return jnp.array(new, copy=True) if new is old else new
