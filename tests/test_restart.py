"""An average that is adopted goes on as the run would that had made it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt
from emaopt import tf1

pytestmark = pytest.mark.quick(2)

# β(t) in float64, by formulae of its own.
DECAYS = {
    "constant": (0.9, lambda t: 0.9),
    "warmup": (emaopt.warmup_decay(0.99), lambda t: min(0.99, (1 + t) / (10 + t))),
    "uniform": (emaopt.uniform_decay(), lambda t: (t - 1) / t if t > 1 else 0),
    "polynomial": (
        emaopt.polynomial_decay(3),
        lambda t: 1 - 4 / (t + 3) if t > 1 else 0,
    ),
}
OPTIONS = [(0, 1), (0, 3), (4, 1), (6, 3), (40, 1)]  # start, every


def value(s):
    return np.sin(s + np.arange(3.0))


@pytest.mark.parametrize("n", [0, 1, 9, 30])
@pytest.mark.parametrize("start, every", OPTIONS)
@pytest.mark.parametrize("decay", DECAYS)
def test_adopted_average_goes_on_from_its_count(decay, start, every, n):
    decay, beta = DECAYS[decay]
    averager = emaopt.average_tree(decay, start=start, every=every)
    state = averager.init(jnp.ones(3))
    state = averager.update(jnp.zeros(3), state)  # a count and an average to be replaced
    adopted = np.full(3, 5.0)
    state = emaopt.reset_average(state, jnp.asarray(adopted), num_updates=n)
    update, average, kept = jax.jit(averager.update), adopted, 1.0
    for s in range(n + 1, n + 11):
        state = update(jnp.asarray(value(s)), state)
        kept *= beta(s - start)
        if s < start:
            average, kept = value(s), 1.0
        elif (s - start) % every == 0:
            average, kept = average + (1 - kept) * (value(s) - average), 1.0
        np.testing.assert_allclose(state.average, average, rtol=1e-5, atol=1e-6)
    assert state.num_updates == n + 10


@pytest.mark.parametrize("start, every", OPTIONS)
@pytest.mark.parametrize("decay", DECAYS)
def test_adopted_average_goes_on_bit_for_bit_as_in_its_run(decay, start, every):
    tx = emaopt.averaged(optax.sgd(0.1), DECAYS[decay][0], start=start, every=every)
    update, moved_at = jax.jit(tx.update), start + 3 * every

    def steps(params, state, numbers):
        for s in numbers:
            updates, state = update({"w": jnp.asarray(value(s))}, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params = {"w": jnp.ones(3)}
    params, state = steps(params, tx.init(params), range(moved_at))
    average = emaopt.get_average(state)
    other = emaopt.reset_average(tx.init(params), average, num_updates=moved_at)
    for a, b in zip(
        *(
            jax.tree.leaves(steps(params, s, range(moved_at, moved_at + 7)))
            for s in (state, other)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "n", [7, np.int64(7), np.array(7), jnp.int32(7), jnp.uint8(7)], ids=repr
)
def test_count_is_any_whole_number(n):
    state = emaopt.average_tree(0.5).init(jnp.ones(2))
    for reset in (emaopt.reset_average, jax.jit(emaopt.reset_average)):
        new = reset(state, jnp.zeros(2), num_updates=n)
        assert (new.num_updates, new.num_updates.dtype) == (7, jnp.int32)
        assert jax.typeof(new.num_updates) == jax.typeof(state.num_updates)


@pytest.mark.parametrize(
    "n, error, message",
    [
        (True, TypeError, "must be a whole number or an integer scalar, got True"),
        (np.True_, TypeError, "must be a whole number"),
        (jnp.bool_(True), TypeError, "must be a whole number"),
        (7.0, TypeError, "must be a whole number or an integer scalar, got 7.0"),
        (jnp.float32(7), TypeError, "must be a whole number"),
        (jnp.arange(2), TypeError, "must be a whole number"),
        (None, TypeError, "must be a whole number"),
        ("7", TypeError, "must be a whole number"),
        (-1, ValueError, "must be at least 0, got -1"),
        (jnp.int32(-1), ValueError, "must be at least 0, got -1"),
        (2**31, ValueError, r"must be in \[0, 2147483647\]"),
    ],
    ids=repr,
)
def test_what_is_no_count_is_refused(n, error, message):
    state = emaopt.average_tree(0.5).init(jnp.ones(2))
    with pytest.raises(error, match=f"^reset_average: num_updates {message}"):
        emaopt.reset_average(state, jnp.ones(2), num_updates=n)


def test_count_of_a_debiased_average_is_refused_unless_it_is_zero():
    state = emaopt.average_tree(0.5, debias=True).init(jnp.ones(2))
    message = "num_updates=.* with debias=True.* Adopt it without debias"
    with pytest.raises(ValueError, match=message):
        emaopt.reset_average(state, jnp.ones(2), num_updates=3)
    with pytest.raises(ValueError, match=message):
        jax.jit(emaopt.reset_average)(state, jnp.ones(2), num_updates=0)
    for zero in (0, np.int32(0), jnp.int32(0)):
        new = emaopt.reset_average(state, jnp.ones(2), num_updates=zero)
        assert new.num_updates == new.weight == 0


def test_count_of_one_of_several_averages_and_nothing_else_changes():
    tx = optax.named_chain(
        ("adam", optax.adam(0.1)),
        ("fast", emaopt.average_params(0.5)),
        ("slow", emaopt.average_params(0.9)),
    )
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    new = emaopt.reset_average(state, params, name="slow", num_updates=12)
    assert new["slow"].num_updates == 12 and new["fast"].num_updates == 0
    assert new["adam"] is not None and int(new["adam"][0].count) == 0


def test_count_stays_on_the_mesh_and_compiles_nothing_new():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put({"w": jnp.ones(4)}, NamedSharding(mesh, P()))
    tx = emaopt.averaged(optax.sgd(0.1), 0.5)
    update, state = jax.jit(tx.update), tx.init(params)
    update(params, state, params)
    state = emaopt.reset_average(state, params, num_updates=5)
    update(params, state, params)
    assert update._cache_size() == 1


def test_count_of_an_nnx_optimizer():
    net = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = emaopt.averaged(optax.adam(0.1), emaopt.uniform_decay())
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    params = nnx.state(net, nnx.Param)
    nnx.update(
        optimizer, emaopt.reset_average(nnx.state(optimizer), params, num_updates=3)
    )
    old = net.bias[...]
    optimizer.update(net, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(net))
    average = emaopt.get_average(optimizer, params)["bias"][...]
    np.testing.assert_allclose(average, 0.75 * old + 0.25 * net.bias[...], rtol=1e-6)


@pytest.mark.parametrize("how", ["partition", "masked"])
def test_slots_of_what_was_frozen_start_and_the_others_go_on(how):
    params = {"encoder": jnp.ones(2), "head": jnp.ones(3)}
    average = emaopt.average_params(0.5)

    def optimizer(trained):
        adam = optax.adam(0.1)
        if how == "masked":
            return optax.chain(
                optax.masked(adam, trained), optax.masked(average, trained)
            )
        labels = {name: "train" if on else "freeze" for name, on in trained.items()}
        groups = {"train": optax.chain(adam, average), "freeze": optax.set_to_zero()}
        return optax.partition(groups, labels)

    head = optimizer({"encoder": False, "head": True})
    both = optimizer({"encoder": True, "head": True})
    _, state = head.update(params, head.init(params), params)
    changed = emaopt.change_mask(state, params, both)
    assert jax.tree.structure(changed) == jax.tree.structure(both.init(params))
    slots = {n: v for n, v in tf1.variables(state).items()}
    for name, value in tf1.variables(changed).items():
        if "encoder" not in name:
            np.testing.assert_array_equal(value, slots[name])
        elif "average" in name:
            np.testing.assert_array_equal(value, params["encoder"])
        else:
            np.testing.assert_array_equal(value, jnp.zeros(2))
    jax.jit(both.update)(params, changed, params)  # goes on
    back = emaopt.change_mask(changed, params, head)
    chex.assert_trees_all_equal(back, state)


def test_state_of_another_optimizer_is_refused():
    params = {"w": jnp.ones(3)}
    tx = emaopt.averaged(optax.trace(0.9), 0.5, mask={"w": False})
    state = tx.init(params)._replace(
        inner_state=optax.trace(0.9).init({"w": jnp.ones(2)})
    )
    new = emaopt.averaged(optax.trace(0.9), 0.5)
    with pytest.raises(
        ValueError, match=r"inner_state/trace/w of shape \(3,\), the state"
    ):
        emaopt.change_mask(state, params, new)
    adam = optax.adam(0.1)
    state = emaopt.averaged(adam, 0.5, mask={"w": False}).init(params)
    for other, only in (
        (optax.chain(optax.clip(1.0), adam), "inner_state/0/count, inner_state/1/0/c"),
        (optax.sgd(0.1, momentum=0.9), "inner_state/0/count"),
    ):
        with pytest.raises(ValueError, match=f"only one has {only}.*another optimizer"):
            emaopt.change_mask(state, params, emaopt.averaged(other, 0.5))


@pytest.mark.parametrize("by", ["name", "position"])
def test_slots_of_leaves_by_their_positions_are_not_given_to_others(by):
    def init(params):
        leaves = [[2 * p, 3 * p] for p in jax.tree.leaves(params)]
        named = jax.tree.unflatten(jax.tree.structure(params), leaves)
        return {"factors": named if by == "name" else leaves}

    factors = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    params = {"encoder": jnp.ones(2), "head": jnp.full(2, 5.0)}

    def optimizer(trained):
        average = emaopt.average_params(0.5)
        return optax.chain(optax.masked(factors, trained), optax.masked(average, trained))

    head = optimizer({"encoder": False, "head": True})
    both = optimizer({"encoder": True, "head": True})
    if by == "position":
        with pytest.raises(
            ValueError, match=r"only one has .*/factors/1/0.*no names tell"
        ):
            emaopt.change_mask(head.init(params), params, both)
    else:
        changed = emaopt.change_mask(head.init(params), params, both)
        chex.assert_trees_all_equal(changed, both.init(params))
