"""The step of a primal averaging: z, its average x, and the parameters y between them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emaopt._checks import (
    check_choice,
    check_dtype,
    check_given,
    check_number,
    check_optimizer,
)
from emaopt._leaves import at_least_float32, is_averaged, is_masked
from emaopt._recursion import Placed, make_recursion, move_to
from emaopt._rounding import lead, rounded_to, settled
from emaopt._sharding import Place
from emaopt._states import PrimalAveragingState
from emaopt._tree_checks import refuse_unlike
from emaopt._types import Count, DecayLike, DTypeLike, Leaf, PyTree


class Step:
    """`primal_averaging` with the time of its clock beside the optimizer's arguments."""

    def __init__(
        self,
        function: str,
        optimizer: optax.GradientTransformation,
        decay: DecayLike,
        interpolation: float,
        inner_params: str,
        inner_dtype: DTypeLike | None,
        **options: Any,
    ):
        check_optimizer(function, "optimizer", optimizer)
        check_number(function, "interpolation", interpolation, 0, 1)
        check_choice(function, "inner_params", inner_params, ["z", "y"])
        self._dtype = check_dtype(function, "inner_dtype", inner_dtype)
        self._recursion = make_recursion(function, decay, **options)
        if interpolation > 0 and options["zero_init"]:
            raise ValueError(
                f"{function}: zero_init=True would move the parameters to zero: they lie "
                "between the average and its iterates."
            )
        self._function, self._c, self._at = function, interpolation, inner_params
        self._inner = optax.with_extra_args_support(optimizer)

    def init(self, params: PyTree) -> PyTree:
        averaging = self._recursion.init(params)
        if self._c == 0:
            return PrimalAveragingState(self._inner.init(params), None, averaging)
        where = self._recursion.places(params)
        base = _started(params, averaging.average, where)
        inner_state = self._inner.init(self._given(params, base))
        return PrimalAveragingState(inner_state, base, averaging)

    def update(
        self,
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        num_updates: Count | None,
        time: Mapping[str, object],
        extra_args: Mapping[str, object],
    ) -> tuple[PyTree, PyTree]:
        self._check(state, params)
        entries, where = self._recursion.check(params, state.averaging)
        count = {} if num_updates is None else {"num_updates": num_updates}
        has_base = self._c > 0
        try:
            given, seen_grads = params, grads
            if has_base:
                seen_grads = self._given(grads, state.base)
                if self._at == "z":
                    given = _whole(params, state.base, where)
                given = self._given(given, state.base)
            updates, inner_state = self._inner.update(
                seen_grads, state.inner_state, given, **count, **extra_args
            )
            # Rounded here: with c > 0 they go into z, and z into the state.
            updates = settled(updates, selected=has_base)
            seen = _applied(params, updates, state.base)
        except (TypeError, ValueError, AttributeError) as error:
            refuse_unlike(self._function, params, error, updates=grads)
            raise
        if not has_base:
            averaging = self._recursion.update(seen, state.averaging, num_updates, time)
            return updates, PrimalAveragingState(inner_state, None, averaging)
        treedef = jax.tree.structure(params)
        steps = treedef.flatten_up_to(updates)
        base = [
            z if is_masked(z) else place.fetched(z) + place.part(u.astype(z.dtype))
            for z, u, place in zip(
                treedef.flatten_up_to(state.base), steps, where, strict=True
            )
        ]
        averaging = self._recursion.update(
            seen, state.averaging, num_updates, time, Placed(base, entries, where)
        )

        def led(p: Leaf, g: Leaf, z: Leaf, x: Leaf, u: Leaf, place: Place) -> Leaf:
            if is_masked(z):
                return u
            y = move_to(place.fetched(x), z, 1 - self._c)
            # In the parameter's dtype before it is gathered. The update has the dtype of
            # the gradient: wrappers choose between it and zeros like that.
            dtype = jnp.asarray(p).dtype
            y = rounded_to(y, dtype).astype(dtype)
            return lead(p, place.whole(y), g, True)

        leaves = map(treedef.flatten_up_to, (params, grads))
        average = treedef.flatten_up_to(averaging.average)
        leads = map(led, *leaves, base, average, steps, where)
        kept = [
            z if is_masked(z) else place.kept(z)
            for z, place in zip(base, where, strict=True)
        ]
        return treedef.unflatten(leads), PrimalAveragingState(
            inner_state, treedef.unflatten(kept), averaging
        )

    def _check(self, state: PyTree, params: PyTree) -> None:
        check_given(self._function, "moves the parameters to a mean", params)
        if not isinstance(state, PrimalAveragingState):
            raise TypeError(
                f"{self._function}: the state must be a PrimalAveragingState as init "
                f"makes it, got {type(state).__name__}."
            )
        if (self._c > 0) != (state.base is not None):
            raise ValueError(
                f"{self._function}: interpolation={self._c}, but the state was made with "
                f"{'0' if self._c else 'another'}. It cannot change in mid-run from or "
                "to 0."
            )

    def _given(self, tree: PyTree, base: PyTree) -> PyTree:
        """Gradients or parameters in the dtype that the optimizer is to see."""

        def given(z: Leaf, leaf: Leaf) -> Leaf:
            if is_masked(z) or self._dtype is None:
                return leaf
            # Rounded to what it has: XLA may hold 16 bits in float32, in some programs.
            leaf = jnp.asarray(leaf)
            dtype = z.dtype if jnp.iscomplexobj(leaf) else self._dtype
            return rounded_to(leaf, leaf.dtype).astype(dtype)

        return jax.tree.map(given, base, tree, is_leaf=is_masked)


def _applied(params: PyTree, updates: PyTree, base: PyTree) -> PyTree:
    """The parameters after the updates, as far as they have no z."""
    if base is None:
        return optax.apply_updates(params, updates)

    def applied(z: Leaf, p: Leaf, u: Leaf) -> Leaf:
        return optax.apply_updates(p, u) if is_masked(z) else p

    return jax.tree.map(applied, base, params, updates, is_leaf=is_masked)


def _started(params: PyTree, average: PyTree, where: Sequence[Place]) -> PyTree:
    """z at first: copies of the averaged leaves, MaskedNode for the others."""
    leaves, treedef = jax.tree.flatten(params)

    def started(leaf: Leaf, entry: Leaf, place: Place) -> Leaf:
        if not is_averaged(entry):
            return optax.MaskedNode()
        leaf = jnp.asarray(leaf)
        return place.start(jnp.array(leaf, at_least_float32(leaf.dtype), copy=True))

    entries = treedef.flatten_up_to(average)
    return treedef.unflatten(map(started, leaves, entries, where))


def _whole(params: PyTree, base: PyTree, where: Sequence[Place]) -> PyTree:
    """z as parameters: whole, and in their dtypes; itself where there is none."""
    leaves, treedef = jax.tree.flatten(params)

    def whole(leaf: Leaf, z: Leaf, place: Place) -> Leaf:
        if is_masked(z):
            return leaf
        dtype = jnp.asarray(leaf).dtype
        z = rounded_to(place.fetched(z), dtype).astype(dtype)
        return place.whole(z)

    return treedef.unflatten(map(whole, leaves, treedef.flatten_up_to(base), where))
