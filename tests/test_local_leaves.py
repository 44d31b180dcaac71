"""Which leaves local updates take part of, and in which dtypes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from local_oracle import (
    STARTS,
    WORKERS,
    gradient,
    gradients,
    sgd,
    simulate,
    stepper,
    train,
)

import emaopt

pytestmark = pytest.mark.quick(1)

COMMITS = ["delta", "mean_delta", "mean_gradient"]
NARROW = [jnp.bfloat16, jnp.float16]


def every_second(step, since):
    return step % 2 == 0


# Dtypes


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize(
    "dtype, center",
    [
        *((dtype, jnp.float32) for dtype in (*NARROW, jnp.float32)),
        (jnp.complex64, jnp.complex64),
    ],
)
def test_center_is_at_least_float32_and_updates_are_like_the_parameters(
    dtype, center, commit
):
    tx = emaopt.local_updates(
        optax.sgd(1.0), optax.sgd(0.5), period=1, num_workers=2, commit=commit
    )
    params = emaopt.stack_workers(jnp.zeros(3, dtype), 2)
    updates, state = tx.update(jnp.ones((2, 3), dtype), tx.init(params), params)
    assert (updates.dtype, emaopt.get_center(state).dtype) == (dtype, center)
    np.testing.assert_array_equal(emaopt.get_center(state), np.full(3, -0.5))
    np.testing.assert_array_equal(updates, np.full((2, 3), -0.5))


CHOOSING = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: step != 2
    ),
    "skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ),
}
LEADING = {
    "local_sgd": emaopt.local_sgd(optax.sgd(0.1), period=2, num_workers=2),
    "lookahead": emaopt.lookahead(optax.sgd(0.1), period=2),
    "overwrite_every": emaopt.averaged(optax.sgd(0.1), 0.9, overwrite_every=2),
}


@pytest.mark.parametrize("dtype", [*NARROW, jnp.float32])
@pytest.mark.parametrize("wrapper", [*CHOOSING, "cond"])
@pytest.mark.parametrize("name", LEADING)
def test_wrappers_that_choose_between_updates_take_them(name, wrapper, dtype):
    tx, params = LEADING[name], jnp.ones((2, 3), dtype)
    if wrapper == "cond":
        state = tx.init(params)

        def update(grads, state, params):
            return jax.lax.cond(
                grads[0, 0] > 0, tx.update, lambda g, s, _: (g, s), grads, state, params
            )
    else:
        tx = CHOOSING[wrapper](tx)
        state, update = tx.init(params), tx.update
    updates, _ = jax.jit(update)(params, state, params)
    assert updates.dtype == dtype


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("near", [True, False])
def test_narrow_updates_reach_the_center_to_half_a_unit_of_the_difference(dtype, near):
    random = np.random.default_rng(0)
    rows = random.normal(size=(2, 4096))
    if near:  # within a factor of two of their mean
        rows = rows[0] * random.uniform(0.7, 1.3, rows.shape)
    tx = emaopt.local_sgd(optax.sgd(0.0), period=1, num_workers=2)
    params = jnp.asarray(rows, dtype)
    updates, state = jax.jit(tx.update)(0 * params, tx.init(params), params)
    reached = np.float64(optax.apply_updates(params, updates))
    center = np.float64(emaopt.get_center(state).astype(dtype))
    error = np.abs(reached - center)
    # Half a unit of the difference, and what `apply_updates` rounds of the sum.
    unit = float(jnp.finfo(dtype).eps)
    bound = unit / 2 * np.abs(center - np.float64(params))
    assert np.all(error <= bound * (1 + unit) + unit / 2 * np.abs(reached))
    assert np.any(error) != near


def test_float16_updates_stay_finite_across_its_whole_range():
    tx = emaopt.local_sgd(optax.sgd(0.0), period=1, num_workers=2)
    params = jnp.array([[60000.0], [-60000.0]], jnp.float16)
    state = tx.init(params)._replace(center=jnp.array([60000.0]))
    updates, _ = tx.update(jnp.zeros_like(params), state, params)
    assert updates.dtype == jnp.float16 and np.all(np.isfinite(updates))


def test_float64_parameters_under_x64_have_a_float64_center():
    with jax.enable_x64(True):
        tx = emaopt.local_sgd(optax.sgd(0.1), period=1, num_workers=2)
        params = emaopt.stack_workers(jnp.zeros(3), 2)
        updates, state = tx.update(jnp.ones((2, 3)), tx.init(params), params)
        assert updates.dtype == emaopt.get_center(state).dtype == jnp.float64
        np.testing.assert_allclose(emaopt.get_center(state), -0.1, rtol=1e-15)


@pytest.mark.parametrize("dtype, ulp", [(jnp.bfloat16, 2**-7), (jnp.float16, 2**-10)])
def test_center_keeps_what_is_too_small_for_the_workers(dtype, ulp):
    # A step of the center is 0.12 of an ulp: what the workers hold moves with the fifth.
    tx = emaopt.local_updates(
        optax.sgd(1.0), optax.sgd(0.12), period=1, num_workers=WORKERS
    )
    centers, rows, _ = train(
        tx,
        jnp.ones(4, dtype),
        12,
        lambda params, step: jnp.full((WORKERS, 4), -ulp, dtype),
    )
    exact = 1 + 0.12 * ulp * np.arange(1, 13)
    np.testing.assert_allclose(centers, exact[:, None] * np.ones(4), rtol=2e-6)
    held = 1 + ulp * (np.arange(1, 13) >= 5)
    np.testing.assert_array_equal(
        np.float32(rows), held[:, None, None] * np.ones((WORKERS, 4))
    )


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_of_the_center_is_no_commit(dtype):
    # Workers that stand still commit nothing, though they cannot hold the center.
    tx = emaopt.local_sgd(optax.sgd(0.0), period=1, num_workers=WORKERS)
    params = emaopt.stack_workers(jnp.ones(4, dtype), WORKERS)
    center = jnp.linspace(1.001, 1.009, 4)
    state = tx.init(params)._replace(center=center)
    step = stepper(tx)
    for _ in range(3):
        params = jnp.broadcast_to(center.astype(dtype), params.shape)
        params, state = step(params, state, jnp.ones_like(params))
    np.testing.assert_array_equal(emaopt.get_center(state), center)


@pytest.mark.quick(2)
@pytest.mark.parametrize("dtype", NARROW)
def test_step_that_the_workers_round_away_is_no_commit(dtype):
    # Also where the compiler would keep the sum in float32.
    tx = emaopt.local_sgd(optax.sgd(1.0), period=1, num_workers=2)
    params = jnp.ones((2, 4), dtype)
    grads = jnp.full((2, 4), -float(jnp.finfo(dtype).eps) / 4, dtype)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(emaopt.get_center(state), 1)


def test_complex_leaf_is_the_pair_of_its_parts():
    pair = jax.tree.map(jnp.asarray, {"re": STARTS[0], "im": STARTS[1]})
    options = {"period": 2, "num_workers": WORKERS, "commit": "mean_delta"}
    tx = emaopt.local_updates(optax.sgd(0.1), optax.sgd(0.7, 0.9, True), **options)
    with jax.enable_x64(True):
        parts = train(tx, pair, 5)[:2]
        whole = train(
            tx,
            jnp.asarray(STARTS[0] + 1j * STARTS[1]),
            5,
            lambda z, step: jax.lax.complex(
                *(gradients(x, step) for x in (z.real, z.imag))
            ),
        )[:2]
    for z, part in zip(whole, parts, strict=True):
        np.testing.assert_allclose(z, part["re"] + 1j * part["im"], rtol=1e-6)


@pytest.mark.quick(3)
@pytest.mark.parametrize("form", [{}, {"axis_name": "w"}, {"num_workers": 1}], ids=str)
def test_center_shares_no_memory_with_the_parameters(form):
    tx = emaopt.local_updates(
        optax.sgd(0.1), optax.sgd(1.0), period=2, reduce="sequential", **form
    )
    params = jnp.ones((1, 3))
    state = tx.init(params)
    params.delete()
    assert state.center.sum() == state.pulled.sum() == 3


# Trees


@pytest.mark.parametrize(
    "commit, reduce",
    [("delta", "mean"), ("mean_delta", "sequential"), ("mean_gradient", "mean")],
)
def test_leaves_that_no_mean_exists_of_stand_beside_and_are_kept(commit, reduce):
    start = {
        "w": jnp.asarray(STARTS[0], jnp.float32),
        "int": jnp.arange(3),
        "bool": jnp.array(True),
        "none": None,
        "empty": jnp.zeros((0, 2)),
    }
    tx = emaopt.local_updates(
        optax.sgd(0.1),
        optax.sgd(0.8),
        period=2,
        num_workers=WORKERS,
        commit=commit,
        reduce=reduce,
    )

    def grads(params, step):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {**zeros, "bool": None, "w": gradients(params["w"], step)}

    centers, rows, _ = train(tx, start, 4, grads)
    center, row = (jax.tree.map(lambda x: x[-1], t) for t in (centers, rows))
    options = {"num_workers": WORKERS, "commit": commit, "reduce": reduce}
    expected = simulate(
        STARTS[0], gradient, 4, sgd(0.1), sgd(0.8), every_second, **options
    )
    np.testing.assert_allclose(centers["w"], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows["w"], expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(row["int"], [[0, 1, 2]] * WORKERS)
    np.testing.assert_array_equal(center["int"], [0, 1, 2])
    assert row["bool"].all() and row["int"].dtype == jnp.int32
    assert row["none"] is None and center["none"] is None
    assert row["empty"].shape == (WORKERS, 0, 2) and center["empty"].shape == (0, 2)


@pytest.mark.parametrize("exchange_dtype", [None, jnp.int8])
@pytest.mark.parametrize("reduce", ["mean", "sequential"])
@pytest.mark.parametrize("tree", [{}, (), {"a": None}])
def test_trees_without_leaves(tree, reduce, exchange_dtype):
    tx = emaopt.local_updates(
        optax.sgd(0.1),
        optax.sgd(0.8),
        period=2,
        num_workers=WORKERS,
        reduce=reduce,
        exchange_dtype=exchange_dtype,
    )
    updates, state = tx.update(tree, tx.init(tree), tree, exchange=True)
    assert updates == emaopt.get_center(state) == tree
    assert state.num_steps == 1 and state.num_left_out == 0


@pytest.mark.parametrize("num_fragments", [1, 2])
def test_map_params_knows_what_is_like_the_parameters(num_fragments):
    tx = emaopt.local_updates(
        optax.adam(0.1),
        optax.sgd(0.8, momentum=0.9),
        period=2,
        num_workers=WORKERS,
        commit="mean_gradient",
        num_fragments=num_fragments,
    )
    start = {name: jnp.asarray(STARTS[i]) for i, name in enumerate("ab")}
    *_, state = train(tx, start, 1)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    for field in ("center", "accumulated", "inner_state", "outer_state"):
        chex.assert_trees_all_equal(
            getattr(doubled, field),
            jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, getattr(state, field))
            if field == "inner_state"
            else jax.tree.map(lambda x: 2 * x, getattr(state, field)),
        )


@pytest.mark.parametrize(
    "commit, reduce, num_fragments",
    [
        ("delta", "mean", 1),
        ("delta", "mean", 2),
        ("delta", "sequential", 1),
        ("mean_gradient", "mean", 1),
        ("mean_gradient", "sequential", 2),
    ],
)
def test_leaf_without_a_gradient_is_neither_moved_nor_exchanged(
    commit, reduce, num_fragments
):
    tx = emaopt.local_updates(
        optax.sgd(0.1),
        optax.sgd(0.7, momentum=0.9),
        period=2,
        num_workers=WORKERS,
        commit=commit,
        reduce=reduce,
        num_fragments=num_fragments,
    )
    params = {
        "w": jnp.asarray(np.tile(STARTS[0], (WORKERS, 1)), jnp.float32),
        "frozen": jnp.arange(4.0 * WORKERS).reshape(WORKERS, 4),  # each has its own
    }
    state, first, step = tx.init(params), params, stepper(tx)
    center = emaopt.get_center(state)["frozen"]
    for number in range(1, 5):
        grads = {"w": gradients(params["w"], number), "frozen": None}
        params, state = step(params, state, grads)
    np.testing.assert_array_equal(params["frozen"], first["frozen"])
    np.testing.assert_array_equal(emaopt.get_center(state)["frozen"], center)
    assert np.all(emaopt.get_center(state)["w"] != STARTS[0])


@pytest.mark.parametrize("reduce", ["mean", "sequential"])
def test_outer_optimizer_does_not_decay_a_leaf_without_a_gradient(reduce):
    tx = emaopt.local_updates(
        optax.sgd(0.1),
        optax.adamw(0.1, weight_decay=0.5),
        period=1,
        num_workers=2,
        reduce=reduce,
    )
    params = {"w": jnp.ones((2, 3)), "frozen": jnp.ones((2, 4))}
    grads = {"w": jnp.ones((2, 3)), "frozen": None}
    _, state = tx.update(grads, tx.init(params), params)
    center = emaopt.get_center(state)
    assert np.all(center["w"] != 1)
    np.testing.assert_array_equal(center["frozen"], np.ones(4))


@pytest.mark.parametrize("without", [1, 3])
def test_step_without_a_gradient_counts_as_one_of_zeros(without):
    # Step 3 is the first after an exchange, where the sum of the gradients starts anew.
    tx = emaopt.local_updates(
        optax.sgd(0.1),
        optax.sgd(1.0),
        period=2,
        num_workers=WORKERS,
        commit="mean_gradient",
    )
    params = emaopt.stack_workers(jnp.zeros(4), WORKERS)
    state, step = tx.init(params), stepper(tx)
    for number in range(1, 5):
        grads = None if number == without else jnp.full((WORKERS, 4), 2.0**number)
        params, state = step(params, state, grads)
    means = [sum(2.0**n for n in pair if n != without) / 2 for pair in ((1, 2), (3, 4))]
    np.testing.assert_array_equal(emaopt.get_center(state), np.full(4, -sum(means)))


def test_parameters_in_eight_bits_have_a_center_in_float32():
    params = jnp.ones((2, 4), jnp.float8_e4m3fn)
    tx = emaopt.local_sgd(optax.sgd(0.25), period=1, num_workers=2)
    updates, state = jax.jit(tx.update)(2 * params, tx.init(params), params)
    assert (state.center.dtype, updates.dtype) == (jnp.float32, params.dtype)
    np.testing.assert_array_equal(state.center, np.full(4, 0.5))
    after = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(np.float32(after), np.full((2, 4), 0.5))
