"""The mapped form of local updates in conditionals: refused, or the same numbers."""

import functools

import chex
import jax
import optax
import pytest
from test_local_forms import GRADS, MAPS, in_vmap, method, step_of

import emaopt

pytestmark = pytest.mark.quick(1)

BRANCHES = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 9),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: step < 9
    ),
    "switch": lambda tx: optax.GradientTransformation(
        tx.init,
        lambda updates, state, params: jax.lax.switch(
            (updates["b"][..., 0].sum() > 0).astype(int),
            [tx.update, tx.update, lambda updates, state, _: (updates, state)],
            updates,
            state,
            params,
        ),
    ),
    "apply_if_finite, averaged": lambda tx: optax.apply_if_finite(
        emaopt.averaged(tx, 0.9), 9
    ),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("form", ["shard_map", "shard_map, unchecked", "pmap", "vmap"])
@pytest.mark.parametrize("wrapper", BRANCHES)
def test_mapped_form_is_refused_where_each_worker_takes_a_branch_of_its_own(
    wrapper, form
):
    tx = BRANCHES[wrapper](method("delta", axis_name="workers"))
    step, params, state = MAPS[form](tx)
    grads = jax.tree.map(lambda g: g[0], GRADS)
    with pytest.raises(ValueError, match=r"^local_updates: .*branch.*exchange=False"):
        step(params, state, grads)


@pytest.mark.parametrize("form", ["shard_map", "vmap"])
def test_mapped_form_without_an_exchange_may_stand_in_a_branch(form):
    tx = method("delta", axis_name="workers")
    step, params, state = MAPS[form](tx)

    def update(grads, state, params):
        return jax.lax.cond(
            grads["b"][..., 0].sum() > 0,
            functools.partial(tx.update, exchange=False),
            functools.partial(tx.update, exchange=False),
            grads,
            state,
            params,
        )

    branching = optax.GradientTransformation(tx.init, update)
    branch, *_ = MAPS[form](branching)
    grads = jax.tree.map(lambda g: g[0], GRADS)
    expected, _ = step(params, state, grads)
    actual, _ = branch(params, state, grads)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.quick(3)
@pytest.mark.parametrize("form", ["shard_map", "vmap", "vmap, not jitted"])
def test_mapped_form_may_stand_in_a_conditional_around_the_whole_program(form):
    tx = method("delta", axis_name="workers")
    if form == "vmap, not jitted":
        _, params, state = in_vmap(tx)
        step = jax.vmap(step_of(tx), axis_name="workers")
    else:
        step, params, state = MAPS[form](tx)
    grads = jax.tree.map(lambda g: g[0], GRADS)

    def some(flag):
        return jax.lax.cond(flag, step, lambda p, s, g: (p, s), params, state, grads)[0]

    expected, _ = step(params, state, grads)
    chex.assert_trees_all_close(jax.jit(some)(True), expected, rtol=1e-6)
