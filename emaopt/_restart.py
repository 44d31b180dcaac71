"""An average that starts anew, or goes on with other leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._checks import check_arrays, check_optimizer, checked_count
from emaopt._leaves import is_averaged, is_masked
from emaopt._names import leaves_with_keys
from emaopt._nodes import average_nodes, in_place_of, replace
from emaopt._reading import find_average, map_with_keys, paired
from emaopt._recursion import Averager
from emaopt._sharding import near
from emaopt._states import AverageState

_LEFT_OUT = object()  # a leaf


def reset_average(
    opt_state: Any, params: Any, *, name: str | None = None, num_updates: Any = 0
) -> Any:
    """Starts the average anew: it becomes a copy of `params`, its counters 0.

    For adopting an average in a run that had none, or after a change of the task. With
    `num_updates`, the average goes on as after so many updates: that of another program
    is adopted with its count.

        opt_state = reset_average(opt_state, their_average, num_updates=their_count)

    Args:
      opt_state: A state that holds one average, as for `get_average`.
      params: The parameters, or the average, to start from.
      name: Which average, if there are several.
      num_updates: n: the next update is number s = n + 1, and t = n + 1 - start. A whole
        number or an integer scalar, may be traced: below 0, it then is 0. With `every`,
        what the average left out since it last moved is forgotten: take an n at which it
        moved. Default 0.

    Returns:
      The state with the average replaced, in the accumulator's dtypes; a de-biased
      average forgets `params` as it would forget the initial parameters.

    Raises:
      ValueError: If there is no average, several, a swapped one, or it is of other
        parameters; if `num_updates` is negative, or not 0 with `debias`: how much the
        adopted average weighs, W = 1 - Πβ, is then needed, and the state knows no decay.
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
    (node,) = average_nodes(opt_state, name).values()
    _, raw = paired("reset_average", state.average, params)
    count = checked_count("reset_average", "num_updates", num_updates)
    if state.weight is not None and not (isinstance(count, int) and count == 0):
        raise ValueError(
            f"reset_average: num_updates={num_updates} with debias=True: what an average "
            "weighs after so many updates depends on the decay, which the state does not "
            "hold. Adopt it without debias: it has no start that is to be forgotten."
        )

    def restart(keys, leaf):
        new = raw[keys]
        return _copy(new, leaf) if hasattr(leaf, "dtype") else new

    counters = AverageState(*jax.tree.map(jnp.zeros_like, state[:-1]), average=None)
    fresh = counters._replace(
        num_updates=jax.tree.map(lambda s: s + count, counters.num_updates),
        average=map_with_keys(restart, state.average),
    )
    return replace(opt_state, node, in_place_of(node, fresh))


def change_mask(
    opt_state: Any,
    params: Any,
    optimizer: optax.GradientTransformation | Averager,
    *,
    name: str | None = None,
) -> Any:
    """Changes which leaves are averaged; the average of those that stay goes on.

    A leaf that comes in is averaged as if it had stood still at its present value all the
    time, which is what a frozen one did. Its average is a copy, with all the weight that
    the other leaves' averages have, by any decay, with `every` and `debias` (not with
    `zero_init` alone, whose averages weigh less).

        optimizer = emaopt.averaged(optax.adam(1e-3), 0.999)  # without its mask
        opt_state = emaopt.change_mask(opt_state, params, optimizer)

    The optimizer's own slots stay as they are. Those of parameters that it did not train
    before, inside of `optax.masked` or `optax.partition`, start as its `init` makes them.

    Args:
      opt_state: A state that holds one average, as for `get_average`, made by an
        optimizer like `optimizer` but for the mask.
      params: The parameters.
      optimizer: The optimizer to go on with, whose mask, `optax.masked` or
        `optax.partition` chooses other leaves; or an `Averager`, for a state of its.
      name: Which average, if there are several.

    Returns:
      The state, with an average of the leaves that `optimizer` averages. What comes in
      is where `optimizer.init` puts it, in the accumulator's dtype.

    Raises:
      ValueError: If there is no average, several, or a swapped one, in the state or in
        what `optimizer.init` returns; if it is of other parameters; if one of the two is
        de-biased; if the optimizer has other counts, or slots of other shapes.
      TypeError: If `optimizer` is none.

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

    def entry(keys, _):
        leaf = new[keys]
        if leaf is _LEFT_OUT:
            return optax.MaskedNode()
        if keys in kept:
            return kept[keys]
        return _copy(raw[keys], leaf) if is_averaged(leaf) else leaf

    had, has = _whole(state.average), _whole(fresh.average)
    old, new = dict(leaves_with_keys(had)), dict(leaves_with_keys(has))
    # In the state's own containers, which `nnx.Optimizer` makes of others, where they can
    # hold it: optax.masked leaves out whole parts of a tree.
    average = map_with_keys(entry, had if old.keys() == new.keys() else has)
    changed = replace(opt_state, node, in_place_of(node, state._replace(average=average)))
    if type(changed) is not type(begun):
        return changed
    return _with_slots(changed, begun, params)


def _with_slots(state: Any, begun: Any, params: Any) -> Any:
    """The state with the slots that an optimizer for more or fewer leaves has."""
    have, need = dict(leaves_with_keys(state)), leaves_with_keys(begun)
    # What has no parameter's name, such as a count, no mask changes. Where slots have
    # positions in the place of names, another mask would give them to other leaves.
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


def _is_named(names: tuple[str, ...], params: Any) -> bool:
    """Whether a name has a parameter's in it."""
    return any(
        names[i : i + len(rest)] == rest
        for rest, _ in leaves_with_keys(params)
        for i in range(len(names) - len(rest) + 1)
    )


def _whole(average: Any) -> Any:
    """The average with a leaf in place of each that is not averaged."""
    return jax.tree.map(
        lambda node: _LEFT_OUT if is_masked(node) else node, average, is_leaf=is_masked
    )


def _copy(new: Any, leaf: Any) -> Any:
    """A copy in the dtype and the place of a leaf of an average."""
    return near(jnp.array(new, dtype=leaf.dtype), leaf)
