"""The average is found, read, exchanged and started anew in any optimizer state."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from models import Net, train_step

import emaopt

AVERAGE = emaopt.average_params(0.9)
SGD = optax.sgd(0.1)
PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.arange(3.0)}}


def labels(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key, params)


WRAPPERS = {
    "chain": optax.chain(SGD, AVERAGE),
    "named_chain": optax.named_chain(("sgd", SGD), ("average", AVERAGE)),
    "averaged": emaopt.averaged(SGD, 0.9),
    "averaged twice wrapped": optax.chain(optax.clip(1.0), emaopt.averaged(SGD, 0.9)),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.sgd(learning_rate), AVERAGE)
    )(0.1),
    "injected decay": optax.chain(
        SGD,
        optax.inject_hyperparams(emaopt.average_params, static_args=("every", "start"))(
            0.9
        ),
    ),
    "MultiSteps": optax.MultiSteps(
        optax.chain(SGD, AVERAGE), every_k_schedule=1
    ).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.chain(SGD, AVERAGE), 3),
    "masked": optax.chain(SGD, optax.masked(AVERAGE, {"dense": True})),
    "partition": optax.partition(
        {"all": optax.chain(SGD, AVERAGE)},
        lambda tree: jax.tree.map(lambda _: "all", tree),
    ),
}


def train(tx, params, steps=3):
    """Steps under jit; returns parameters, state and the average by its definition."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: 0.3 * p + 1, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    expected = jax.tree.map(np.asarray, params)
    for _ in range(steps):
        params, state = step(params, state)
        expected = jax.tree.map(
            lambda a, q: a + np.float32(1 - 0.9) * (np.asarray(q) - a), expected, params
        )
    return params, state, expected


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("tx", WRAPPERS.values(), ids=WRAPPERS)
def test_average_is_read_through_the_wrapper(tx):
    params, state, expected = train(tx, PARAMS)
    tolerance = {"rtol": 1e-6} if tx is WRAPPERS["injected decay"] else {"rtol": 0}
    for average in (emaopt.get_average(state), emaopt.get_average(state, params)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **tolerance), average, expected
        )


@pytest.mark.parametrize("tx", WRAPPERS.values(), ids=WRAPPERS)
def test_swap_is_an_involution_through_the_wrapper(tx):
    params, state, _ = train(tx, PARAMS)
    served, kept = emaopt.swap(params, state)
    assert_same(served, emaopt.get_average(state, params))
    again = emaopt.swap(served, kept)
    assert_same(again, (params, state))


@pytest.mark.parametrize("tx", WRAPPERS.values(), ids=WRAPPERS)
def test_swapped_state_refuses_to_train_and_to_be_read(tx):
    served, kept = emaopt.swap(*train(tx, PARAMS)[:2])
    with pytest.raises(TypeError, match=r"this state is swapped.*swap back first"):
        jax.jit(tx.update)(served, kept, served)
    with pytest.raises(ValueError, match="get_average: this state is swapped"):
        emaopt.get_average(kept)


LOSS_WRAPPERS = {
    "freeze": optax.chain(
        optax.transforms.freeze({"dense": {"kernel": False, "bias": True}}), SGD, AVERAGE
    ),
    "around MultiSteps": optax.chain(
        optax.MultiSteps(SGD, 3).gradient_transformation(), AVERAGE
    ),
    "skip_not_finite": optax.chain(
        optax.MultiSteps(SGD, 2, should_skip_update_fn=optax.skip_not_finite), AVERAGE
    ),
    "around apply_if_finite": optax.chain(optax.apply_if_finite(SGD, 3), AVERAGE),
    "around schedule_free": optax.chain(optax.contrib.schedule_free_sgd(0.01), AVERAGE),
    "around lbfgs": emaopt.averaged(optax.lbfgs(), 0.9),
    "polyak_sgd": emaopt.averaged(optax.polyak_sgd(), 0.9),
    "reduce_on_plateau": optax.chain(SGD, optax.contrib.reduce_on_plateau(), AVERAGE),
    "muon": emaopt.averaged(optax.contrib.muon(0.01), 0.9),
    "keep_params_nonnegative": optax.chain(SGD, optax.keep_params_nonnegative(), AVERAGE),
    "flatten": optax.chain(optax.flatten(optax.adam(0.1)), AVERAGE),
}


def train_on_a_loss(tx, params, steps):
    """Steps that pass what line searches and others ask for."""

    def loss(params):
        return sum(jnp.sum((x - 0.3) ** 2) for x in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optax.with_extra_args_support(tx).update(
            grads, state, params, value=value, grad=grads, value_fn=loss
        )
        return optax.apply_updates(params, updates), state

    state, iterates = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        iterates.append(params)
    return iterates, state


def by_definition(start, iterates):
    average = jax.tree.map(np.asarray, start)
    for iterate in iterates:
        average = jax.tree.map(
            lambda a, q: a + np.float32(1 - 0.9) * (np.asarray(q) - a), average, iterate
        )
    return average


@pytest.mark.parametrize("tx", LOSS_WRAPPERS.values(), ids=LOSS_WRAPPERS)
def test_average_is_of_what_these_transformations_return(tx):
    iterates, state = train_on_a_loss(tx, PARAMS, 6)
    average = emaopt.get_average(state, iterates[-1])
    jax.tree.map(np.testing.assert_array_equal, average, by_definition(PARAMS, iterates))


def test_inside_multisteps_the_average_moves_once_per_emitted_step():
    tx = optax.MultiSteps(optax.chain(SGD, AVERAGE), 3).gradient_transformation()
    iterates, state = train_on_a_loss(tx, PARAMS, 9)
    average = emaopt.get_average(state)
    jax.tree.map(
        np.testing.assert_array_equal, average, by_definition(PARAMS, iterates[2::3])
    )


def test_inside_apply_if_finite_the_average_does_not_see_rejected_steps():
    def mean_of(tx):
        state = tx.init(jnp.zeros(1))
        for grad in (1.0, jnp.nan, 1.0):
            _, state = tx.update(jnp.array([grad]), state, jnp.zeros(1))
        return emaopt.get_average(state)

    inside = optax.apply_if_finite(optax.chain(SGD, AVERAGE), 3)
    around = optax.chain(optax.apply_if_finite(SGD, 3), AVERAGE)
    assert mean_of(inside) != mean_of(around)


def test_inside_schedule_free_the_average_is_of_its_base_iterates():
    # z, not the parameters y: documented, because it is seldom what one wants.
    inner = optax.chain(optax.sgd(0.01), AVERAGE)
    tx = optax.contrib.schedule_free(inner, 0.01, b1=0.9)
    iterates, state = train_on_a_loss(tx, PARAMS, 6)
    average = emaopt.get_average(state)["dense"]["kernel"]
    expected = by_definition(PARAMS, iterates)["dense"]["kernel"]
    assert np.abs(average - expected).max() > 1e-4


def test_inside_sam_the_average_is_of_the_steps_that_count():
    sharpness = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    tx = optax.contrib.sam(optax.chain(SGD, AVERAGE), sharpness, sync_period=2)
    params, state, _ = train(tx, PARAMS, steps=6)
    outer = []
    p, s = PARAMS, tx.init(PARAMS)
    for i in range(6):
        updates, s = tx.update(jax.tree.map(lambda x: 0.3 * x + 1, p), s, p)
        p = optax.apply_updates(p, updates)
        if i % 2:
            outer.append(p)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        emaopt.get_average(state, params),
        by_definition(PARAMS, outer),
    )


def test_lookahead_parameters_are_averaged_pair_by_pair():
    tx = optax.lookahead(optax.chain(SGD, AVERAGE), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    _, state = tx.update(params.fast, tx.init(params), params)
    fast = emaopt.get_average(
        state
    )  # inside: of the fast weights before they synchronise
    assert jax.tree.structure(fast) == jax.tree.structure(PARAMS)
    around = optax.chain(
        optax.lookahead(SGD, sync_period=2, slow_step_size=0.5),
        emaopt.average_params(0.9),
    )
    _, state = around.update(params.fast, around.init(params), params)
    assert isinstance(emaopt.get_average(state), optax.LookaheadParams)


def test_masked_leaves_are_taken_from_the_parameters():
    tx = optax.chain(SGD, emaopt.average_params(0.9, mask=emaopt.by_name("kernel")))
    params, state, expected = train(tx, PARAMS)
    average = emaopt.get_average(state, params)
    np.testing.assert_array_equal(average["dense"]["kernel"], expected["dense"]["kernel"])
    assert average["dense"]["bias"] is params["dense"]["bias"]
    served, kept = emaopt.swap(params, state)
    assert_same(served, average)
    assert_same(emaopt.swap(served, kept), (params, state))
    with pytest.raises(ValueError, match="1 of 2 leaves are not averaged"):
        emaopt.get_average(state)


def test_partition_averages_its_own_part():
    tx = optax.partition({"kernel": optax.chain(SGD, AVERAGE), "bias": SGD}, labels)
    params, state, expected = train(tx, PARAMS)
    average = emaopt.get_average(state, params)
    np.testing.assert_array_equal(average["dense"]["kernel"], expected["dense"]["kernel"])
    np.testing.assert_array_equal(average["dense"]["bias"], params["dense"]["bias"])


def test_average_of_bfloat16_parameters_is_read_in_either_dtype():
    params = jnp.ones(3, jnp.bfloat16)
    state = AVERAGE.init(params)
    assert emaopt.get_average(state).dtype == jnp.float32
    assert emaopt.get_average(state, params).dtype == jnp.bfloat16


FAST_AND_SLOW = optax.named_chain(
    ("sgd", SGD),
    ("fast", emaopt.average_params(0.5)),
    ("slow", emaopt.average_params(0.99)),
)


def test_several_averages_are_told_apart_by_name():
    params, state, _ = train(FAST_AND_SLOW, PARAMS)
    fast = emaopt.average_distance(state, params, name="fast")
    slow = emaopt.average_distance(state, params, name="slow")
    assert 0 < fast < slow
    served, kept = emaopt.swap(params, state, name="slow")
    assert_same(served, emaopt.get_average(state, params, name="slow"))
    assert_same(emaopt.swap(served, kept, name="slow"), (params, state))
    fresh = emaopt.reset_average(state, params, name="slow")
    assert_same(fresh["slow"].average, params)
    assert_same(fresh["fast"], state["fast"])
    with pytest.raises(ValueError, match=r"several averages.*'fast', 'slow'.*name="):
        emaopt.get_average(state)
    with pytest.raises(
        ValueError, match=r"no average under the name 'medium'; there are 'fast', 'slow'"
    ):
        emaopt.get_average(state, name="medium")


def test_two_averages_are_not_swapped_at_once():
    params, state, _ = train(FAST_AND_SLOW, PARAMS)
    swapped = emaopt.swap(params, state, name="fast")
    with pytest.raises(ValueError, match=r"the average at fast is swapped.*name='fast'"):
        emaopt.swap(*swapped, name="slow")


def test_nested_averages_are_told_apart_by_their_whole_names():
    tx = emaopt.averaged(emaopt.averaged(SGD, 0.5), 0.99)
    _, state, _ = train(tx, PARAMS)
    outer = emaopt.get_average(state, name="averaging")
    assert_same(outer, state.averaging.average)
    inner = emaopt.get_average(state, name="inner_state/averaging")
    assert_same(inner, state.inner_state.averaging.average)


@pytest.mark.parametrize("use", [
    emaopt.swap, *(lambda p, s, f=f: f(s, p) for f in (
        emaopt.get_average, emaopt.reset_average, emaopt.average_distance))],
)  # fmt: skip
def test_average_of_parameters_with_other_shapes_says_which(use):
    with pytest.raises(ValueError, match=r"w has shape \(3, 3\), its average \(3,\)"):
        use({"w": jnp.ones((3, 3))}, AVERAGE.init({"w": jnp.ones(3)}))


def test_leaves_that_are_no_floats_are_read_as_they_are():
    tree = {"key": jax.random.key(0), "n": jnp.int32(3), "f": jax.nn.relu, "w": 1.5}
    state = emaopt.average_tree(0.5).init(tree)
    average = emaopt.get_average(state, tree)
    assert average["key"] == tree["key"] and average["n"] == 3 and average["w"] == 1.5
    assert emaopt.average_distance(state, tree) == 0
    other = emaopt.reset_average(state, tree | {"f": jnp.sin, "w": 2.5})
    assert other.average["f"] is jnp.sin and other.average["w"] == 2.5


def test_a_field_called_value_keeps_its_name():
    class Heads(NamedTuple):
        policy: jax.Array
        value: jax.Array

    params = Heads(jnp.ones(2), jnp.zeros(2))
    mask = emaopt.by_name("value")(params)
    assert mask == Heads(False, True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("debias", [False, True])
def test_reset_starts_the_average_anew(debias, dtype):
    momentum = optax.sgd(0.1, momentum=0.9)
    options = {"debias": debias, "every": 2, "skip_nonfinite": True}
    tx = emaopt.averaged(momentum, 0.9, **options)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    update, state = jax.jit(tx.update), tx.init(params)
    # The last step, a NaN, leaves no counter at 0.
    for grad in (1, 1, 1, jnp.nan):
        grads = jax.tree.map(lambda x, grad=grad: jnp.full_like(x, grad), params)
        _, state = update(grads, state, params)
    assert all(jax.tree.leaves(state.averaging[:-1]))
    fresh = emaopt.reset_average(state, params)
    assert_same(fresh.averaging, tx.init(params).averaging)
    assert_same(fresh.inner_state, state.inner_state)


def test_reset_copies_the_parameters():
    # Of an alias, donating both would fail.
    fresh = emaopt.reset_average(AVERAGE.init(PARAMS), PARAMS).average
    for average, leaf in zip(*map(jax.tree.leaves, (fresh, PARAMS)), strict=True):
        assert average.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()


def test_distance_is_relative_to_the_parameters():
    state = emaopt.average_tree(0.9).init({"a": jnp.ones(4), "n": jnp.int32(5)})
    params = {"a": jnp.array([1.0, 1.0, 1.0, 3.0]), "n": jnp.int32(9)}
    distance = jax.jit(emaopt.average_distance)(state, params)
    np.testing.assert_allclose(distance, 2 / np.sqrt(12), rtol=1e-6)
    assert emaopt.average_distance(emaopt.average_tree(0.9).init({}), {}) == 0
    broken = params | {"a": params["a"].at[0].set(jnp.nan)}
    assert jnp.isnan(emaopt.average_distance(state, broken))
    zeros = emaopt.average_tree(0.9).init(jnp.zeros(2))
    assert emaopt.average_distance(zeros, jnp.zeros(2)) == 0
    assert (
        emaopt.average_distance(zeros._replace(average=jnp.ones(2)), jnp.zeros(2))
        == jnp.inf
    )


def test_distance_is_over_scalars_and_complex_numbers_too():
    state = emaopt.average_tree(0.9).init([jnp.float32(0), jnp.array([4j])])
    distance = emaopt.average_distance(state, [jnp.float32(3), jnp.array([4j])])
    np.testing.assert_allclose(distance, 3 / 5, rtol=1e-6)


@pytest.mark.parametrize(
    "accumulator, precision",
    [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (jnp.float64, jnp.float64)],
)
def test_distance_has_the_accumulators_precision_at_least_float32(accumulator, precision):
    with jax.enable_x64(True):
        averager = emaopt.average_tree(0.5, accumulator_dtype=accumulator)
        eps = jnp.finfo(precision).eps
        state = averager.init(jnp.ones(1, precision))
        distance = emaopt.average_distance(state, jnp.ones(1, precision) + eps)
        assert distance.dtype == precision
        np.testing.assert_allclose(distance, eps, rtol=1e-6)


# Other containers.


def test_frozen_dict_and_train_state():
    state = TrainState.create(
        apply_fn=jnp.dot, params=freeze(PARAMS), tx=WRAPPERS["chain"]
    )
    state = state.apply_gradients(grads=state.params)
    assert_same(emaopt.get_average(state), state.opt_state[1].average)
    assert type(emaopt.get_average(state, state.params)) is type(state.params)
    params, opt_state = emaopt.swap(state.params, state.opt_state)
    swapped = state.replace(params=params, opt_state=opt_state)
    with pytest.raises(TypeError, match="this state is swapped"):
        swapped.apply_gradients(grads=state.params)


def test_nnx_model_with_dropout_and_batch_norm():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, WRAPPERS["chain"], wrt=nnx.Param)

    expected = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    for _ in range(3):
        train_step(model, optimizer)
        expected = jax.tree.map(
            lambda a, q: a + np.float32(1 - 0.9) * (np.asarray(q) - a),
            expected,
            nnx.state(model, nnx.Param),
        )
    params = nnx.state(model, nnx.Param)
    average = emaopt.get_average(optimizer, params)
    assert_same(average, jax.tree.map(jnp.asarray, expected))
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    merged = nnx.merge(graph, average, rest, copy=True)
    assert_same(nnx.state(merged, nnx.Param), average)
    assert_same(nnx.state(model, nnx.Param), params)
    served, kept = emaopt.swap(params, optimizer.opt_state)
    assert_same(served, average)
    assert_same(emaopt.swap(served, kept), (params, optimizer.opt_state))
    nnx.update(model, served)
    np.testing.assert_array_equal(
        model.layers[0].kernel[...], expected["layers"][0]["kernel"][...]
    )


def test_equinox_model_with_callables_among_its_leaves():
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    params, state, expected = train(WRAPPERS["chain"], params)
    served, kept = emaopt.swap(params, state)
    assert_same(served, jax.tree.map(jnp.asarray, expected))
    assert eqx.combine(served, static)(jnp.ones(2)).shape == (2,)
    assert_same(emaopt.swap(served, kept), (params, state))
    whole = emaopt.average_tree(0.5)
    average = whole.update(model, whole.init(model)).average
    assert average.activation is model.activation


# Errors.


@pytest.mark.parametrize("read", [emaopt.get_average, lambda s: emaopt.swap(PARAMS, s)])
@pytest.mark.parametrize(
    "state, message",
    [
        (
            SGD.init(PARAMS),
            r"no average in this optimizer state\. Put emaopt\.average_params",
        ),
        (
            {"0": None, "1": emaopt.average_tree(0.9).init(PARAMS)._asdict()},
            r"at 1 stands a plain dict.*restore without a target.*load_averaged\(path\)",
        ),
    ],
)
def test_state_without_a_readable_average_says_what_to_do(read, state, message):
    with pytest.raises(ValueError, match=message):
        read(state)


@pytest.mark.parametrize(
    "use",
    [emaopt.swap, *(lambda p, s, f=f: f(s, p) for f in (
        emaopt.get_average, emaopt.reset_average, emaopt.average_distance))],
)  # fmt: skip
def test_average_of_other_parameters_says_which(use):
    state = AVERAGE.init(PARAMS)
    with pytest.raises(ValueError, match=r"other parameters.*it holds dense/bias, which"):
        use({"dense": {"kernel": PARAMS["dense"]["kernel"]}}, state)
