"""Reads averages and centers out of any optimizer state."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._checks import check_text
from emaopt._leaves import at_least_float32, is_averaged, is_masked
from emaopt._names import Names, leaves_with_keys
from emaopt._nodes import (
    as_state,
    average_nodes,
    center_nodes,
    field_of,
    fits,
    is_swapped,
    only_node,
    refuse_unknown_name,
    views_of,
)
from emaopt._sharding import near
from emaopt._states import CENTER, AverageState, LocalUpdatesState
from emaopt._tree_checks import check_arrays, check_state
from emaopt._types import Leaf, PyTree

NO_AVERAGE = (
    "Put emaopt.average_params(decay) last in optax.chain, or wrap the optimizer in "
    "emaopt.averaged(optimizer, decay), before init."
)
RAW = "raw"  # the view of the parameters themselves
_NO_CENTER = (
    "Wrap the optimizer in emaopt.diloco, emaopt.agn or another method of local updates, "
    "before init."
)


def get_average(
    opt_state: PyTree, params: PyTree = None, *, name: str | None = None
) -> PyTree:
    """Reads the average (EMA, Polyak average) out of any optimizer state.

    Args:
      opt_state: A state that holds one `AverageState`, however deep: inside of
        `optax.chain`, `named_chain`, `masked`, `partition`, `MultiSteps`,
        `apply_if_finite`, `inject_hyperparams`, a Flax TrainState or an
        `nnx.Optimizer`.
      params: The parameters, or None. With them, the result has their containers, dtypes
        and shardings (under jit, as far as their types tell), and leaves that are not
        averaged are taken from them.
      name: Which average, if there are several: a key on the way to it, such as its name
        in `optax.named_chain`.

    Returns:
      The average: a tree like the parameters; without `params`, in the accumulator's
      dtypes. Leaves may be the state's own arrays: copy before donating the state.

    Raises:
      ValueError: If there is no average, several, a swapped one, or one that leaves out
        parameters while `params` is None.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> tx = optax.chain(optax.sgd(1.0), emaopt.average_params(0.5))
      >>> params = {"w": jnp.zeros(2)}
      >>> _, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> print(get_average(state)["w"])
      [-0.5 -0.5]
    """
    if params is not None:
        return _as_params("get_average", opt_state, params, name)
    average = find_average("get_average", opt_state, name).average
    nodes = jax.tree.leaves(average, is_leaf=is_masked)
    if masked := sum(map(is_masked, nodes)):
        raise ValueError(
            f"get_average: {masked} of {len(nodes)} leaves are not averaged: call "
            "get_average(opt_state, params) to take them from the parameters."
        )
    return average


def _as_params(
    function: str, opt_state: PyTree, params: PyTree, name: str | None
) -> PyTree:
    """The average in the parameters' containers, dtypes and shardings."""
    average = find_average(function, opt_state, name).average
    averages, _ = paired(function, average, params, bool(center_nodes(opt_state)))

    def read(keys: Names, leaf: Leaf) -> Leaf:
        value = averages.get(keys, leaf)
        if not is_averaged(value):
            return value
        return near(value, leaf).astype(jnp.asarray(leaf).dtype)

    return map_with_keys(read, params)


def views(opt_state: PyTree, params: PyTree) -> dict[str, PyTree]:
    """Returns the raw parameters and every average of them, by name.

    A loop over them evaluates all, under jit too:

        metrics = {
            f"{view}/loss": evaluate(weights)
            for view, weights in emaopt.views(opt_state, params).items()
        }

    These names are the ones that `checkpoint.best` looks for in the metrics of a run.

    Args:
      opt_state: An optimizer state, as for `get_average`, or one without an average.
      params: The parameters.

    Returns:
      {"raw": the parameters, and for each average its name in `optax.named_chain`, or
      "average": the average as `get_average` reads it}. Of several averages that nobody
      named, and of two alike names, all keys that lead to them, joined with "/". Local
      updates add "center".

    Raises:
      ValueError: If an average is swapped, of other parameters, or called "raw", or
        "center" beside one.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5)
      >>> params = jnp.ones(2)
      >>> print(views(tx.init(params), params))
      {'raw': Array([1., 1.], dtype=float32), 'average': Array([1., 1.], dtype=float32)}
    """
    check_state("views", "opt_state", opt_state)
    check_arrays("views", "params", params, others=True)
    centers = [*center_nodes(opt_state)]
    named = [CENTER.field] if len(centers) == 1 else map("/".join, centers)
    others = dict(zip(named, centers, strict=True))
    found = views_of(average_nodes(opt_state))
    for taken in {RAW, *others} & set(found):
        raise ValueError(
            f"views: an average is called {taken!r}, which is the view of "
            f"{'the parameters themselves' if taken == RAW else 'a center'}. Give it "
            "another name in optax.named_chain."
        )
    averages = {
        view: _as_params("views", opt_state, params, "/".join(way))
        for view, way in found.items()
    }
    served = {
        view: find_center("views", opt_state, "/".join(way)).center
        for view, way in others.items()
    }
    return {RAW: params, **averages, **served}


def average_distance(
    opt_state: PyTree, params: PyTree, *, name: str | None = None
) -> jax.Array:
    """Returns how far the parameters are from their average: ‖θ - a‖ / ‖θ‖.

    Args:
      opt_state: A state that holds one average, as for `get_average`.
      params: The parameters θ.
      name: Which average, if there are several.

    Returns:
      Scalar of the accumulator's dtype, at least float32, over all averaged leaves
      together: 0 if there are none, inf if the parameters are 0 and the average is not,
      NaN if either holds a NaN. May be called under jit.

    Raises:
      ValueError: As for `get_average`.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5, zero_init=True)
      >>> params = jnp.ones(2)
      >>> print(average_distance(tx.init(params), params))
      1.0
    """
    state = find_average("average_distance", opt_state, name)
    averages, raw = paired(
        "average_distance", state.average, params, bool(center_nodes(opt_state))
    )
    theta, difference = {}, {}
    for keys, average in averages.items():
        if is_averaged(average):
            dtype = at_least_float32(average.dtype)
            theta[keys] = jnp.asarray(raw[keys], dtype)
            difference[keys] = theta[keys] - near(average, raw[keys]).astype(dtype)
    distance = optax.tree.norm(difference)
    # Where both are 0, 0 is divided by 1: 0 / 0 is a NaN, which jax_debug_nans reports.
    return distance / jnp.where(distance == 0, 1, optax.tree.norm(theta))


def get_center(opt_state: PyTree, *, name: str | None = None) -> PyTree:
    """Reads the center of local updates out of any optimizer state.

    The center is the global parameters, or slow weights, as those of `lookahead`. It
    changes at exchanges only.

    Args:
      opt_state: A state of `local_updates` or of a method by name, however deep.
      name: Which center, if there are several: a key on the way to it.

    Returns:
      The center: a tree like the parameters of one worker, at least float32. In the
      mapped form, like the parameters that `init` saw: outside of `shard_map` [W, ...]
      with W equal copies, of which one is served: `jax.tree.map(lambda c: c[0], center)`.
      Leaves may be the state's own arrays: copy before donating the state.

    Raises:
      ValueError: If there is no center, several, or a swapped one.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> tx = emaopt.local_sgd(optax.sgd(1.0), period=2, num_workers=4)
      >>> state = tx.init(emaopt.stack_workers({"w": jnp.zeros(2)}, 4))
      >>> print(get_center(state)["w"])
      [0. 0.]
    """
    return find_center("get_center", opt_state, name).center


def worker_spread(
    opt_state: PyTree, params: PyTree, *, name: str | None = None
) -> jax.Array:
    """Returns how far each worker is from the center: ‖θ_w - c‖ / ‖c‖.

    This consensus distance grows between exchanges. Workers that drift apart by more than
    they gain need a shorter period or smaller local steps.

    Args:
      opt_state: A state of local updates, as for `get_center`.
      params: The workers' parameters θ_w.
      name: Which center, if there are several.

    Returns:
      [num_workers] float32 in the stacked form; () for the own worker in the mapped form.
      For a center of zeros, ‖θ_w‖. May be called under jit.

    Raises:
      ValueError: As for `get_center`, and if the center is of other parameters.
      TypeError: If an argument is of another kind.

    Example:
      >>> import emaopt
      >>> params = emaopt.stack_workers(jnp.ones(2), 2)
      >>> tx = emaopt.local_sgd(optax.sgd(1.0), period=9, num_workers=2)
      >>> print(worker_spread(tx.init(params), params * jnp.array([[1.0], [3.0]])))
      [0. 2.]
    """
    state = find_center("worker_spread", opt_state, name)
    centers, rows = paired("worker_spread", state.center, params, stacked=True)
    distance, size = jnp.float32(0), jnp.float32(0)
    for keys, center in centers.items():
        if is_averaged(center):
            row = jnp.asarray(rows[keys]).astype(center.dtype)
            if row.ndim == center.ndim:
                refuse_one_worker("worker_spread", state)
            workers = range(row.ndim - center.ndim)
            square = jnp.abs(row - jnp.expand_dims(center, tuple(workers))) ** 2
            distance += jnp.sum(square, axis=tuple(range(len(workers), row.ndim)))
            size += jnp.sum(jnp.abs(center) ** 2)
    # From a center of zeros the distance is ‖θ_w - c‖ itself, in place of inf or NaN.
    return jnp.sqrt(distance / jnp.where(size > 0, size, 1))


def refuse_one_worker(function: str, state: LocalUpdatesState) -> None:
    """Raises for the parameters of one worker, if the state is of several."""
    if (number := state.num_missed.size) > 1:
        raise ValueError(
            f"{function}: the state is of {number} workers, but the parameters are of "
            "one. Give those of all; for a state of the mapped form, call this inside of "
            "the map."
        )


def find_average(function: str, opt_state: PyTree, name: str | None) -> AverageState:
    """The one `AverageState` in a state, or an error that says what is there instead."""
    check_text(function, "name", name, optional=True)
    nodes = average_nodes(opt_state, name)
    if not nodes:
        refuse_unknown_name(function, opt_state, name)
    _, node = only_node(function, nodes, "average", NO_AVERAGE)
    return _not_swapped(function, node)


def find_center(function: str, opt_state: PyTree, name: str | None) -> LocalUpdatesState:
    """The one `LocalUpdatesState` in a state, or an error."""
    check_text(function, "name", name, optional=True)
    nodes = center_nodes(opt_state, name)
    if not nodes:
        refuse_unknown_name(function, opt_state, name)
    _, node = only_node(function, nodes, "center", _NO_CENTER)
    return _not_swapped(function, node)


def _not_swapped(function: str, node: PyTree) -> PyTree:
    if is_swapped(node):
        raise ValueError(
            f"{function}: this state is swapped: the parameters are the "
            f"{field_of(node)}. Call emaopt.swap(params, opt_state) to swap back first."
        )
    return as_state(node)


def paired(
    function: str, average: PyTree, params: PyTree, stacked: bool = False
) -> tuple[dict[Names, Leaf], dict[Names, Leaf]]:
    """The leaves of the average and of the parameters by name; raises if they differ.

    The parameters may have leaves that are not averaged; with `stacked`, an axis of
    workers that the average lacks.
    """
    averages, raw = dict(leaves_with_keys(average)), dict(leaves_with_keys(params))
    if missing := averages.keys() - raw.keys():
        raise ValueError(_other_params(function, missing, averages, raw))
    for names, leaf in averages.items():
        shapes = np.shape(leaf), np.shape(raw[names])
        if not (fits(*shapes) if stacked else shapes[0] == shapes[1]):
            raise ValueError(
                f"{function}: {'/'.join(names) or 'the leaf'} has shape "
                f"{np.shape(raw[names])}, its average {np.shape(leaf)}."
                f"{_in_another_form(averages, raw)}"
            )
    return averages, raw


def map_with_keys(f: Callable[[Names, Leaf], PyTree], tree: PyTree) -> PyTree:
    """The tree with f(names, leaf) in the place of each leaf."""
    leaves = [f(keys, leaf) for keys, leaf in leaves_with_keys(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _other_params(
    function: str,
    missing: Iterable[Names],
    averages: dict[Names, Leaf],
    raw: dict[Names, Leaf],
) -> str:
    names = ", ".join(sorted("/".join(keys) or "one array" for keys in missing))
    return (
        f"{function}: the average is of other parameters than the ones given: it holds "
        f"{names}, which they lack.{_in_another_form(averages, raw)}"
    )


def _in_another_form(averages: dict[Names, Leaf], raw: dict[Names, Leaf]) -> str:
    """Advice, if a wrapper gave its inner transformation parameters in another form."""
    wrapper = None
    if list(averages) == [()] and np.ndim(averages[()]) == 1:
        wrapper = "flatten"
    elif any(n[-1:] in (("real",), ("imaginary",)) and n[:-1] in raw for n in averages):
        wrapper = "contrib.split_real_and_imaginary"
    if wrapper is None:
        return ""
    return (
        f" Inside of optax.{wrapper} parameters have another form, in which nobody can "
        "serve them. Average them outside of it: "
        f"optax.chain(optax.{wrapper}(optimizer), emaopt.average_params(decay))."
    )
