"""An average that starts anew, or goes on with other leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._checks import check_number, check_optimizer, checked_count
from emaopt._clock import split
from emaopt._leaves import is_averaged, is_masked
from emaopt._names import Names, is_below, leaves_with_keys
from emaopt._nodes import average_nodes, in_place_of, primal_nodes, replace
from emaopt._reading import find_average, map_with_keys, paired
from emaopt._recursion import Averager
from emaopt._sharding import near
from emaopt._states import AverageState
from emaopt._tree_checks import check_arrays
from emaopt._types import Count, Leaf, PyTree

_LEFT_OUT = object()  # a leaf, for MaskedNode, which is none and so has no name


def reset_average(
    opt_state: PyTree,
    params: PyTree,
    *,
    name: str | None = None,
    num_updates: Count = 0,
    elapsed: float | None = None,
) -> PyTree:
    """Starts the average anew: it becomes a copy of `params`, its counters 0.

    For adopting an average in a run that had none, or after a change of the task; z of a
    primal averaging becomes a copy as well. With
    `num_updates`, the average goes on as after that many updates, so that the average of
    another program is adopted together with its count.

        opt_state = reset_average(opt_state, their_average, num_updates=their_count)

    Args:
      opt_state: A state that holds one average, as for `get_average`.
      params: The parameters, or the average, to start from.
      name: Which average, if there are several.
      num_updates: n: the next update is number s = n + 1, and t = n + 1 - start. A whole
        number or an integer scalar, may be traced; a traced one below 0 counts as 0. With
        `every`, the steps since the average last moved are forgotten: take an n at which
        it moved. Default 0.
      elapsed: Of an average with a `clock`: the time that it has gone on for, in the
        clock's units, exact up to 10^14. Needed with `num_updates`. Default 0.

    Returns:
      The state with the average replaced, in the accumulator's dtypes; a de-biased
      average forgets `params` as it would forget the initial parameters.

    Raises:
      ValueError: If there is no average, several, a swapped one, or it is of other
        parameters; if `num_updates` or `elapsed` is negative, or not 0 with `debias`: the
        weight of the average, W = 1 - Πβ, depends on the decay, which the state does not
        hold; if `num_updates` comes without `elapsed` where there is a clock, or the time
        without a clock or a count.
      TypeError: If `num_updates` is no integer.

    Example:
      >>> import emaopt
      >>> tx = emaopt.averaged(optax.sgd(1.0), emaopt.uniform_decay())
      >>> mean_of_three = jnp.ones(2)
      >>> state = reset_average(tx.init(jnp.zeros(2)), mean_of_three, num_updates=3)
      >>> params = jnp.full(2, 6.0)
      >>> _, state = tx.update(jnp.ones(2), state, params)  # to 5, the fourth
      >>> print(emaopt.get_average(state))
      [2. 2.]
    """
    state = find_average("reset_average", opt_state, name)
    ((way, node),) = average_nodes(opt_state, name).items()
    _, raw = paired("reset_average", state.average, params)
    count = checked_count("reset_average", "num_updates", num_updates)
    if state.weight is not None and not (isinstance(count, int) and count == 0):
        raise ValueError(
            f"reset_average: num_updates={num_updates} with debias=True: what an average "
            "weighs after so many updates depends on the decay, which the state does not "
            "hold. Adopt it without debias: it has no start that is to be forgotten."
        )
    time = 0.0 if elapsed is None else elapsed
    check_number("reset_average", "elapsed", time, 0)
    begins = isinstance(count, int) and count == 0
    if (time and (begins or not state.elapsed)) or (
        state.elapsed and elapsed is None and not begins
    ):
        there = (
            f"the clock {next(iter(state.elapsed))!r}" if state.elapsed else "no clock"
        )
        raise ValueError(
            f"reset_average: num_updates={num_updates} and elapsed={elapsed}, and the "
            f"average has {there}: elapsed is the time of that many updates on a clock."
        )

    def restart(keys: Names, leaf: Leaf) -> Leaf:
        new = raw[keys]
        return _copy(new, leaf) if hasattr(leaf, "dtype") else new

    # Zeros like the old counters keep dtype and sharding: no step is compiled anew. By
    # jax.tree.map, for in an nnx.Optimizer each counter is a variable around an array.
    counters = AverageState(*jax.tree.map(jnp.zeros_like, state[:-1]), average=None)
    fresh = counters._replace(
        num_updates=jax.tree.map(lambda s: s + count, counters.num_updates),
        elapsed=jax.tree.map(lambda x: x + split(time, x.dtype), counters.elapsed),
        average=map_with_keys(restart, state.average),
    )
    opt_state = replace(opt_state, node, in_place_of(node, fresh))
    return _with_base(opt_state, way, raw) if begins else opt_state


def _with_base(opt_state: PyTree, average: Names, raw: dict[Names, Leaf]) -> PyTree:
    """The state in which z of a primal averaging begins with its average, at `raw`."""
    way, base = average[:-1], (*average[:-1], "base")
    if average[-1:] != ("averaging",) or way not in primal_nodes(opt_state):
        return opt_state

    def begun(keys: Names, leaf: Leaf) -> Leaf:
        return _copy(raw[keys[len(base) :]], leaf) if is_below(keys, base) else leaf

    return map_with_keys(begun, opt_state)


def change_mask(
    opt_state: PyTree,
    params: PyTree,
    optimizer: optax.GradientTransformation | Averager,
    *,
    name: str | None = None,
) -> PyTree:
    """Changes which leaves are averaged; the average of those that stay goes on.

    A new leaf is averaged as if it had been constant from the start, as a frozen leaf is.
    Its average is then a copy, which is exact for any decay, with `every` and with
    `debias` (but not with `zero_init` alone, where the zeros keep a part of the weight).

        optimizer = emaopt.averaged(optax.adam(1e-3), 0.999)  # without its mask
        opt_state = emaopt.change_mask(opt_state, params, optimizer)

    The optimizer's own slots stay as they are. Those of parameters that it did not train
    before, inside of `optax.masked` or `optax.partition`, start as its `init` makes them.

    Args:
      opt_state: A state that holds one average, as for `get_average`, made by an
        optimizer like `optimizer` but for the mask.
      params: The parameters.
      optimizer: The optimizer to go on with, whose mask, `optax.masked` or
        `optax.partition` chooses other leaves; or an `Averager`, if one made the state.
      name: Which average, if there are several.

    Returns:
      The state, with an average of the leaves that `optimizer` averages. Leaves that
      come in are placed as `optimizer.init` places them, in the accumulator's dtype.

    Raises:
      ValueError: If there is no average, several, or a swapped one, in the state or in
        what `optimizer.init` returns; if the average is of other parameters; if
        one of the two alone is de-biased; if the optimizer has other counts, or slots of
        other shapes.
      TypeError: If `optimizer` is neither a transformation nor an `Averager`.

    Example:
      >>> import emaopt
      >>> params = {"encoder": jnp.zeros(1), "head": jnp.zeros(1)}
      >>> tx = emaopt.averaged(optax.sgd(1.0), 0.5, mask=emaopt.by_name("head"))
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> state = change_mask(state, params, emaopt.averaged(optax.sgd(1.0), 0.5))
      >>> list(emaopt.get_average(state))
      ['encoder', 'head']
    """
    if not isinstance(optimizer, Averager):
        check_optimizer("change_mask", "optimizer", optimizer)
    check_arrays("change_mask", "params", params, others=True)
    state = find_average("change_mask", opt_state, name)
    (node,) = average_nodes(opt_state, name).values()
    begun = optimizer.init(params)
    fresh = find_average("change_mask", begun, name)
    if (state.weight is None) != (fresh.weight is None):
        raise ValueError(
            f"change_mask: the optimizer has debias={fresh.weight is not None}, but the "
            f"state was made with debias={state.weight is not None}. It cannot change in "
            "mid-run; reset_average starts a new average."
        )
    kept, _ = paired("change_mask", state.average, params)
    _, raw = paired("change_mask", fresh.average, params)

    def entry(keys: Names, _: Leaf) -> PyTree:
        leaf = new[keys]
        if leaf is _LEFT_OUT:
            return optax.MaskedNode()
        if keys in kept:
            return kept[keys]
        return _copy(raw[keys], leaf) if is_averaged(leaf) else leaf

    had, has = _whole(state.average), _whole(fresh.average)
    old, new = dict(leaves_with_keys(had)), dict(leaves_with_keys(has))
    # In the state's own containers (those of an nnx.Optimizer are others than init's), or
    # in init's where the names differ: optax.masked leaves out whole parts of a tree.
    average = map_with_keys(entry, had if old.keys() == new.keys() else has)
    changed = replace(opt_state, node, in_place_of(node, state._replace(average=average)))
    # Slots are compared with those that init makes. A state inside of something else,
    # such as a TrainState, has other names than these, and keeps its slots.
    if type(changed) is not type(begun):
        return changed
    return _with_slots(changed, begun, params)


def _with_slots(state: PyTree, begun: PyTree, params: PyTree) -> PyTree:
    """The state with the slots of an optimizer that trains more or fewer leaves."""
    have, need = dict(leaves_with_keys(state)), leaves_with_keys(begun)
    # A mask adds or removes only slots under a parameter's name: a count that one side
    # lacks means another optimizer. Slots known by position would go to other leaves.
    other = [n for n in have.keys() ^ dict(need).keys() if not _is_named(n, params)]
    if other:
        names = ", ".join(map("/".join, sorted(other)))
        raise ValueError(
            f"change_mask: of the state and the optimizer, only one has {names}: it was "
            "made by another optimizer, or by one whose slots no names tell apart."
        )
    for names, leaf in need:
        if np.shape(have.get(names, leaf)) != np.shape(leaf):
            raise ValueError(
                f"change_mask: the optimizer has {'/'.join(names)} of shape "
                f"{np.shape(leaf)}, the state of {np.shape(have[names])}: it was made by "
                "another optimizer."
            )
    if have.keys() == {names for names, _ in need}:
        return state  # in its own containers
    leaves = [have.get(names, leaf) for names, leaf in need]
    return jax.tree.unflatten(jax.tree.structure(begun), leaves)


def _is_named(names: Names, params: PyTree) -> bool:
    """Whether the names of a leaf contain those of a parameter."""
    return any(
        names[i : i + len(rest)] == rest
        for rest, _ in leaves_with_keys(params)
        for i in range(len(names) - len(rest) + 1)
    )


def _whole(average: PyTree) -> PyTree:
    """The average with `_LEFT_OUT` for each leaf that is not averaged."""
    return jax.tree.map(
        lambda node: _LEFT_OUT if is_masked(node) else node, average, is_leaf=is_masked
    )


def _copy(new: Leaf, leaf: Leaf) -> Leaf:
    """A copy in the dtype and the place of a leaf of an average."""
    return near(jnp.array(new, dtype=leaf.dtype), leaf)
