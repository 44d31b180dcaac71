"""Averages against their definition, and each option against what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import weighted_average

import emaopt

DECAYS = {
    "0.9": (0.9, lambda t: 0.9),
    "warmup": (emaopt.warmup_decay(0.95), lambda t: min(0.95, (1 + t) / (10 + t))),
    "uniform": (emaopt.uniform_decay(), lambda t: (t - 1) / t if t > 1 else 0.0),
    "polynomial": (
        emaopt.polynomial_decay(2),
        lambda t: (t - 1) / (t + 2) if t > 1 else 0.0,
    ),
    "power": (
        emaopt.power_decay(gamma=4),
        lambda t: (1 - 1 / t) ** 5 if t > 1 else 0.0,
    ),
    "own": (lambda t: jnp.where(t % 3 == 0, 1.0, 0.5), lambda t: 0.5 if t % 3 else 1.0),
}


def follow(averager, iterates):
    """The average after each of the iterates θ_1 ... θ_T, as [T, ...]."""

    def step(state, iterate):
        state = averager.update({"w": iterate}, state)
        return state, state.average["w"]

    state = averager.init({"w": iterates[0]})
    return jax.lax.scan(step, state, iterates[1:])


def path(steps, shape=(3, 2), seed=0):
    walk = np.random.default_rng(seed).standard_normal((steps + 1, *shape))
    return jnp.asarray(np.cumsum(walk, axis=0), jnp.float32)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    decay=st.sampled_from(sorted(DECAYS)),
    every=st.integers(1, 5),
    start=st.integers(0, 8),
    debias=st.booleans(),
    mask=st.booleans(),
    steps=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_average_is_its_weighted_sum(decay, every, start, debias, mask, steps, seed):
    decay, betas = DECAYS[decay]
    iterates = path(steps, seed=seed)
    averager = emaopt.average_tree(
        decay, every=every, start=start, debias=debias, mask={"w": mask}
    )
    state, averages = follow(averager, iterates)
    if not mask:
        assert state.average["w"] == optax.MaskedNode()
        return
    expected, weights = weighted_average(
        betas, start, every, debias, np.asarray(iterates, np.float64)
    )
    scale = np.abs(iterates).max()
    np.testing.assert_allclose(averages[-1], expected, rtol=1e-6, atol=2e-6 * scale)
    np.testing.assert_allclose(
        emaopt.decay_weights(decay, steps, every=every, start=start, debias=debias),
        weights,
        atol=1e-6,
    )


@pytest.mark.parametrize("every, rtol", [(1, 2e-3), (100, 2e-5)])
def test_long_uniform_average_is_limited_by_float32_unless_thinned(every, rtol):
    steps = 200_000
    ramp = jnp.arange(steps + 1, dtype=jnp.float32) / steps
    final, _ = follow(emaopt.average_tree(emaopt.uniform_decay(), every=every), ramp)
    np.testing.assert_allclose(final.average["w"], 0.5 + 0.5 * every / steps, rtol=rtol)


@pytest.mark.parametrize("every", [2, 7])
def test_between_updates_the_average_stands_still(every):
    iterates = path(20)
    _, averages = follow(emaopt.average_tree(0.9, every=every), iterates)
    moved = np.any(np.diff(averages, axis=0) != 0, axis=(1, 2))
    np.testing.assert_array_equal(moved, np.arange(2, 21) % every == 0)


def test_until_start_the_average_is_a_copy_bit_for_bit():
    iterates = path(10).at[3].set(-0.0).at[4].set(jnp.inf)
    _, averages = follow(emaopt.average_tree(0.9, start=8), iterates)
    assert averages[:7].tobytes() == np.asarray(iterates[1:8]).tobytes()


@pytest.mark.quick(1000)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize(
    "options, then",
    [({}, 0.1), ({"start": 1}, 0.1), ({"start": 2}, 1), ({"debias": True}, 1)],
)
def test_zero_init_starts_from_zeros(options, then, dtype):
    averager = emaopt.average_tree(0.9, zero_init=True, **options)
    state = averager.init({"w": jnp.ones(2, dtype)})
    assert not state.average["w"].any()
    state = averager.update({"w": jnp.ones(2, dtype)}, state)
    np.testing.assert_allclose(state.average["w"], then, rtol=1e-6)


def test_counting_the_updates_ends_where_int32_does():
    # One more would be -2**31, which is before every start.
    last = jnp.int32(2**31 - 1)
    averager = emaopt.average_tree(0.5)
    state = averager.init(jnp.float32(0))._replace(num_updates=last)
    state = averager.update(jnp.float32(1), state)
    assert state.num_updates == last and state.average == 0.5


def test_num_updates_replaces_t():
    tx = emaopt.average_params(emaopt.warmup_decay(0.999))
    params = jnp.zeros(1)
    _, state = tx.update(jnp.ones(1), tx.init(params), params, num_updates=90)
    np.testing.assert_allclose(state.average, 1 - 0.91, rtol=1e-6)


@pytest.mark.quick(1000)
@pytest.mark.parametrize("every, debias", [(1, False), (1, True), (3, False), (3, True)])
def test_num_updates_replaces_t_and_nothing_else(every, debias):
    # Until when the average is a copy and when it moves are told by s, as ever.
    start = 4
    tx = emaopt.average_params(
        emaopt.warmup_decay(0.999), every=every, start=start, debias=debias
    )
    iterates = path(12)
    update, state = jax.jit(tx.update), tx.init(iterates[0])
    for s, iterate in enumerate(iterates[1:], start=1):
        zeros = jnp.zeros_like(iterate)
        _, state = update(iterate, state, zeros, num_updates=5 * s)
        expected, _ = weighted_average(
            lambda t: (1 + 5 * (t + start)) / (10 + 5 * (t + start)),
            start,
            every,
            debias,
            np.asarray(iterates[: s + 1], np.float64),
        )
        np.testing.assert_allclose(state.average, expected, rtol=1e-6, atol=1e-5)
        assert state.num_updates == s


def test_num_updates_passes_through_a_chain_and_a_wrapper():
    params = jnp.zeros(1)
    for tx in (
        optax.chain(optax.sgd(1.0), emaopt.average_params(emaopt.warmup_decay())),
        emaopt.averaged(optax.sgd(1.0), emaopt.warmup_decay()),
    ):
        _, state = tx.update(-jnp.ones(1), tx.init(params), params, num_updates=90)
        np.testing.assert_allclose(emaopt.get_average(state), 0.09, rtol=1e-5)


# Leaves and dtypes.


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float8_e4m3fn, jnp.float32),
        (jnp.complex64, jnp.complex64),
        (jnp.int32, jnp.int32),
        (jnp.bool_, jnp.bool_),
    ],
)
def test_average_is_kept_at_least_in_float32(dtype, expected):
    averager = emaopt.average_tree(0.5)
    state = averager.init(jnp.ones(3, dtype))
    state = averager.update(jnp.zeros(3, dtype), state)
    assert state.average.dtype == expected
    newest_or_average = 0 if expected in (jnp.int32, jnp.bool_) else 0.5
    np.testing.assert_array_equal(state.average, np.full(3, newest_or_average, expected))


@pytest.mark.parametrize(
    "dtype, of_complex",
    [
        (jnp.bfloat16, jnp.complex64),
        (jnp.float16, jnp.complex64),
        (jnp.float32, jnp.complex64),
        (jnp.float64, jnp.complex128),
    ],
)
def test_accumulator_dtype_is_the_averages_dtype(dtype, of_complex):
    with jax.enable_x64(True):
        averager = emaopt.average_tree(0.5, accumulator_dtype=dtype)
        for width in (jnp.float32, jnp.float64):
            state = averager.init([jnp.ones(2, width), jnp.ones(2, width) * 1j])
            assert [leaf.dtype for leaf in state.average] == [dtype, of_complex]


def test_float64_parameters_keep_a_float64_average_under_x64():
    with jax.enable_x64(True):
        iterates = np.random.default_rng(0).standard_normal((30, 4))
        final, _ = follow(emaopt.average_tree(0.999), jnp.asarray(iterates))
        expected, _ = weighted_average(lambda t: 0.999, 0, 1, False, iterates)
        assert final.average["w"].dtype == jnp.float64
        np.testing.assert_allclose(final.average["w"], expected, rtol=1e-13)


@pytest.mark.parametrize("options", [{"every": 2}, {"skip_nonfinite": True}])
def test_leaves_that_no_average_exists_of_hold_the_newest_value(options):
    # Also in a step that leaves the average as it is.
    tree = {
        "int": jnp.int32(1),
        "bool": jnp.array([True]),
        "key": jax.random.key(0),
        "none": None,
        "function": jax.nn.relu,
        "empty": jnp.zeros((0, 3)),
        "float": 1.0,
    }
    newer = {
        **tree,
        "int": jnp.int32(7),
        "bool": jnp.array([False]),
        "key": jax.random.key(1),
        "float": jnp.nan,
    }
    averager = emaopt.average_tree(0.5, **options)
    average = averager.update(newer, averager.init(tree)).average
    assert average["int"] == 7 and not average["bool"][0] and average["none"] is None
    assert average["key"] == jax.random.key(1) and average["function"] is jax.nn.relu
    assert average["empty"].shape == (0, 3) and average["float"] == 1.0


@pytest.mark.parametrize("tree", [{}, (), None, {"a": None}])
def test_trees_without_leaves(tree):
    averager = emaopt.average_tree(0.5, every=2, debias=True, skip_nonfinite=True)
    state = averager.update(tree, averager.init(tree))
    assert state.average == tree and state.num_updates == 1 and state.num_skipped == 0


def test_masked_leaves_are_not_averaged_and_cost_nothing():
    params = {"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    for mask in (
        emaopt.by_name("kernel$"),
        {"dense": {"kernel": True, "bias": False}},
        lambda tree: jax.tree.map_with_path(lambda p, _: p[-1].key == "kernel", tree),
    ):
        state = emaopt.average_tree(0.5, mask=mask).init(params)
        assert state.average["dense"]["bias"] == optax.MaskedNode()
        assert len(jax.tree.leaves(state.average)) == 1
    for mask in ({"dense": False}, False):  # prefixes
        state = emaopt.average_tree(0.5, mask=mask).init(params)
        assert not jax.tree.leaves(state.average)


def test_average_never_aliases_the_parameters():
    params = {"w": jnp.ones(4), "n": jnp.int32(3)}
    tx = emaopt.averaged(optax.set_to_zero(), 0.5, start=3)

    def pointers(tree):
        return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}

    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        assert not pointers(params) & pointers(state)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
        assert not pointers(params) & pointers(state)


# The exact values that apply_updates returns.


@pytest.mark.parametrize("wrap", ["chain", "averaged"])
@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.05), optax.sgd(0.05, 0.9, nesterov=True), optax.adamw(1e-2)],
    ids=["sgd", "nesterov", "adamw"],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("every", [1, 3])
def test_average_under_jit_is_bit_for_bit_of_the_parameters_that_the_step_returned(
    dtype, optimizer, wrap, every
):
    if wrap == "chain":
        tx = optax.chain(optimizer, emaopt.average_params(0.99, every=every))
    else:
        tx = emaopt.averaged(optimizer, 0.99, every=every)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((64, 33)), dtype)}
    state = tx.init(params)
    expected = np.asarray(params["w"], np.float32)
    step_size = np.float32(1 - 0.99**every)
    for s in range(1, 101):
        grads = {"w": jnp.asarray(rng.uniform(0.5, 2, (64, 33)), dtype)}
        params, state = step(params, state, grads)
        if s % every == 0:
            newest = np.asarray(params["w"], np.float32)
            expected = expected + step_size * (newest - expected)
    actual = emaopt.get_average(state)["w"]
    if every == 1:
        np.testing.assert_array_equal(actual, expected)
    else:  # the step size itself is a float32 product
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    assert step._cache_size() == 1


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("decay", [0.9, *(d for d, _ in DECAYS.values())])
def test_bits_are_the_same_in_and_out_of_jit(decay, debias, every):
    averager = emaopt.average_tree(decay, debias=debias, every=every)
    iterates = path(12, shape=(257,))
    eager = compiled = averager.init(iterates[0])
    update = jax.jit(averager.update)
    for iterate in iterates[1:]:
        eager, compiled = averager.update(iterate, eager), update(iterate, compiled)
        np.testing.assert_array_equal(eager.average, compiled.average)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("decay", [0.9, emaopt.uniform_decay()])
def test_bits_are_the_same_in_a_scan_that_holds_init(decay, every):
    averager = emaopt.average_tree(decay, every=every)
    iterates = path(12, shape=(257,))
    state = averager.init({"w": iterates[0]})
    for iterate in iterates[1:]:
        state = averager.update({"w": iterate}, state)
    compiled, _ = jax.jit(lambda iterates: follow(averager, iterates))(iterates)
    np.testing.assert_array_equal(state.average["w"], compiled.average["w"])


def test_updates_pass_through_untouched():
    tx = emaopt.average_params(0.9)
    params = {"w": jnp.ones(2), "none": None}
    updates = {"w": jnp.ones(2), "none": None}
    returned, _ = tx.update(updates, tx.init(params), params)
    assert returned is updates


# averaged


def test_num_updates_reaches_an_average_inside_too():
    tx = emaopt.averaged(emaopt.averaged(optax.sgd(1.0), emaopt.warmup_decay()), 0.5)
    _, state = tx.update(
        -jnp.ones(1), tx.init(jnp.zeros(1)), jnp.zeros(1), num_updates=90
    )
    np.testing.assert_allclose(state.inner_state.averaging.average, 0.09, rtol=1e-5)


@pytest.mark.slow
def test_overwrite_sets_complex_and_float64_parameters():
    with jax.enable_x64(True):
        params = {"c": jnp.array([1 + 2j]), "d": jnp.array([1 / 3])}
        tx = emaopt.averaged(optax.sgd(0.1), 0.9, overwrite_every=1)
        grads = {"c": jnp.ones(1, jnp.float32), "d": jnp.ones(1, jnp.float32)}
        updates, state = tx.update(grads, tx.init(params), params)
        new = optax.apply_updates(params, updates)
        for key in params:
            np.testing.assert_allclose(new[key], state.averaging.average[key], rtol=1e-15)


def test_not_sequential_averages_the_parameters_before_the_step():
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, sequential=False)
    params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    seen = []
    for _ in range(3):
        updates, state = tx.update(-jnp.ones(1), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(emaopt.get_average(state)[0]))
    assert seen == [0.0, 0.5, 1.25]  # of 0, 1, 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_overwrite_sets_the_parameters_to_the_average_every_k_steps(dtype):
    tx = emaopt.averaged(optax.sgd(0.1), 0.9, overwrite_every=3)
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.standard_normal(1000), dtype),
        "b": jnp.zeros(2, dtype),
    }
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for s in range(1, 10):
        grads = jax.tree.map(
            lambda p: jnp.asarray(rng.standard_normal(p.shape), dtype), params
        )
        params, state = step(params, state, grads)
        distance = emaopt.average_distance(state, params)
        assert (distance < 1e-7 if dtype == jnp.float32 else distance < 3e-3) == (
            s % 3 == 0
        )
        assert params["w"].dtype == dtype
    assert step._cache_size() == 1


# Numbers that are not finite.


def test_nan_propagates_by_default():
    averager = emaopt.average_tree(0.5)
    state = averager.update(jnp.array([jnp.nan]), averager.init(jnp.ones(1)))
    assert np.isnan(state.average[0])


COPIES = {
    "decay of 0": (0, {}, 0),
    "uniform": (emaopt.uniform_decay(), {}, 0),
    "debias": (0.5, {"debias": True}, 0),
    "start": (0.5, {"start": 2}, 0),
    "many updates at once": (0.5, {"every": 40}, 39),
    "many updates that were left out": (0.5, {"every": 2, "skip_nonfinite": True}, 99),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_an_update_that_leaves_nothing_of_the_old_is_an_exact_copy(name, jit):
    # 1e8 + 1.0 (1.0 - 1e8) is 0 or 8 in float32.
    decay, options, before = COPIES[name]
    averager = emaopt.average_tree(decay, **options)
    update = jax.jit(averager.update) if jit else averager.update
    state = averager.init(jnp.float32(1e8))
    for _ in range(before):
        state = update(jnp.float32(jnp.nan), state)
    assert update(jnp.float32(1), state).average == 1


@pytest.mark.parametrize("jit", [False, True])
def test_a_decay_that_is_nan_shows(jit):
    averager = emaopt.average_tree(lambda t: jnp.where(t == 2, jnp.nan, 0.9))
    update = jax.jit(averager.update) if jit else averager.update
    state = averager.init(jnp.float32(0))
    found = []
    for value in range(3):
        state = update(jnp.float32(value), state)
        found.append(float(state.average))
    assert found[0] == 0 and np.isnan(found[1:]).all()


@pytest.mark.slow
def test_a_nonfinite_leaf_holds_back_all_the_others_and_the_weight():
    decay, every, steps = 0.5, 3, 12
    values = np.arange(1, steps + 1) ** 2.0
    averager = emaopt.average_tree(decay, every=every, debias=True, skip_nonfinite=True)
    state = averager.init({"a": jnp.float32(0), "b": jnp.float32(0)})
    average, weight, pending = 0.0, 0.0, 0.0
    for t, value in enumerate(values, start=1):
        bad = t == 6
        pair = {"a": value, "b": np.nan if bad else value}
        state = averager.update(jax.tree.map(jnp.float32, pair), state)
        was, pending = pending, pending + (1 - decay) * (1 - pending)
        if t % every == 0 and not bad:
            weight += pending * (1 - weight)
            average += pending / weight * (value - average)
            pending = 0.0
        elif bad:
            pending = was
        for leaf in state.average.values():
            np.testing.assert_allclose(leaf, average, rtol=1e-6)
        np.testing.assert_allclose(state.weight, weight, rtol=1e-6)
        np.testing.assert_allclose(state.pending, pending, rtol=1e-6)


@pytest.mark.parametrize("every, start", [(1, 0), (2, 0), (1, 99), (2, 99)])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_skip_nonfinite_leaves_the_average_and_counts(bad, every, start):
    averager = emaopt.average_tree(
        0.5, skip_nonfinite=True, every=every, start=start, debias=True
    )
    update = jax.jit(averager.update)
    good = {"a": jnp.ones(3), "b": jnp.ones(2)}
    state = averager.init(jax.tree.map(jnp.zeros_like, good))
    for _ in range(2 * every):
        state = update(good, state)
    for _ in range(every):
        skipped = update({"a": jnp.array([1.0, bad, 1.0]), "b": 2 * jnp.ones(2)}, state)
        state = skipped
    np.testing.assert_array_equal(state.average["a"], np.ones(3))
    np.testing.assert_array_equal(state.average["b"], np.ones(2))
    # Until the start it copies at every step, or would.
    assert state.num_skipped == (every if start else 1)
    assert state.num_updates == 3 * every


@pytest.mark.quick(1000)
@pytest.mark.parametrize("bad", ["a", "b", "c", "left out"])
def test_skip_nonfinite_looks_at_all_averaged_leaves_and_at_no_other(bad):
    names = ["a", "b", "c", "left out"]
    averager = emaopt.average_tree(
        0.5, skip_nonfinite=True, mask={name: name != "left out" for name in names}
    )
    state = averager.init({name: jnp.zeros(2) for name in names})
    newest = {name: jnp.ones(2) for name in names} | {bad: jnp.array([1, jnp.nan])}
    state = jax.jit(averager.update)(newest, state)
    assert state.num_skipped == (bad != "left out")
    average = np.concatenate(jax.tree.leaves(state.average))
    np.testing.assert_array_equal(average, np.full(6, 0.5 if bad == "left out" else 0))


@pytest.mark.parametrize("options", [{"zero_init": True}, {"skip_nonfinite": True}])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.bfloat16, jnp.complex64])
def test_options_that_look_at_the_values_take_every_dtype(dtype, options):
    averager = emaopt.average_tree(0.5, **options)
    state = averager.init(jnp.ones(2, dtype))
    state = jax.jit(averager.update)(jnp.full(2, jnp.nan, dtype), state)
    assert bool(jnp.isnan(state.average).all()) == ("zero_init" in options)
