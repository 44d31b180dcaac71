"""The forms of local updates give the same numbers: stacked and mapped, on any mesh."""

import contextlib
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from careful import CAREFUL
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt
from emaopt import checkpoint

pytestmark = pytest.mark.quick(1)

WORKERS, STEPS = 4, 7
START = {
    "a": np.random.default_rng(0).normal(size=(3, 2)),
    "b": np.random.default_rng(1).normal(size=5),
}
GRADS = jax.tree.map(
    lambda x: jnp.asarray(
        np.random.default_rng(2).normal(size=(STEPS, WORKERS, *x.shape)), jnp.float32
    ),
    START,
)

CASES = {
    "delta": {},
    "mean_gradient": {"commit": "mean_gradient", "reduce": "sum", "warmup_steps": 2},
    "sequential": {"commit": "mean_delta", "reduce": "sequential"},
    "elastic": {"moving_rate": lambda num_workers: 0.9 / num_workers},
    "elastic, sequential": {"moving_rate": 0.3, "reduce": "sequential"},
    "schedule": {"period": lambda n: jnp.where(n > 3, 2, 1)},
    "bfloat16": {"exchange_dtype": jnp.bfloat16, "error_feedback": True},
    "float8": {"exchange_dtype": jnp.float8_e4m3fn, "commit": "mean_gradient"},
    "int8": {"exchange_dtype": jnp.int8, "error_feedback": True},
    "int8, sequential": {"exchange_dtype": jnp.int8, "reduce": "sequential"},
    "fragments": {"num_fragments": 2, "exchange_dtype": jnp.int8},
    "late": {"delay": 2, "mix": 0.5, "num_fragments": 2},
    "late, carried": {"delay": 3, "mix": "carry", "commit": "mean_gradient"},
    "late, int8": {"delay": 1, "exchange_dtype": jnp.int8, "error_feedback": True},
    "late, eager": {"delay": 3, "eager": True, "num_fragments": 2},
    "late, sequential": {"delay": 3, "mix": 0.5, "reduce": "sequential"},
}
# bfloat16 and float8 are summed in their own precision, and in another order.
TOLERANCE = {"bfloat16": 2**-7, "float8": 2**-2}


def method(case, **form):
    options = {"period": 3, **CASES[case], **form}
    return emaopt.local_updates(
        optax.sgd(0.1, 0.9), optax.sgd(0.7, momentum=0.9, nesterov=True), **options
    )


def begin():
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
    return emaopt.stack_workers(start, WORKERS)


def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(step, params, state, place=lambda tree: tree):
    """The workers' parameters after each step, and the last state."""
    rows = []
    for number in range(STEPS):
        grads = jax.tree.map(lambda g, number=number: g[number], GRADS)
        params, state = step(params, state, place(grads))
        rows.append(params)
    return jax.tree.map(lambda *x: np.stack(x), *rows), state


@functools.cache
def expected(case):
    """Of the stacked form on one device: the parameters and the center."""
    tx = method(case, num_workers=WORKERS)
    params = begin()
    rows, state = run(jax.jit(step_of(tx)), params, tx.init(params))
    return rows, emaopt.get_center(state)


def assert_close(case, rows, center):
    atol = TOLERANCE.get(case, 2e-6)
    for actual, value in zip(
        jax.tree.leaves((rows, center)), jax.tree.leaves(expected(case)), strict=True
    ):
        np.testing.assert_allclose(actual, value, rtol=2e-6, atol=atol)


def mesh_of(kind=AxisType.Auto, **axes):
    axes = axes or {"workers": WORKERS}
    sizes = tuple(axes.values())
    return jax.make_mesh(
        sizes,
        tuple(axes),
        devices=jax.devices()[: math.prod(sizes)],
        axis_types=(kind,) * len(axes),
    )


def in_shard_map(tx, check_vma=True, **axes):
    mesh, params = mesh_of(**axes), begin()
    rows = P(mesh.axis_names)
    specs = emaopt.state_specs(tx, params, mesh.axis_names)
    step = jax.jit(
        jax.shard_map(
            step_of(tx),
            mesh=mesh,
            in_specs=(rows, specs, rows),
            out_specs=(rows, specs),
            check_vma=check_vma,
        )
    )
    return step, params, tx.init(params)


def in_pmap(tx):
    devices = jax.devices()[:WORKERS]
    pmap = functools.partial(jax.pmap, axis_name="workers", devices=devices)
    return pmap(step_of(tx)), begin(), pmap(tx.init)(begin())


def in_vmap(tx):
    step = jax.jit(jax.vmap(step_of(tx), axis_name="workers"))
    return step, begin(), jax.vmap(tx.init)(begin())


MAPS = {
    "shard_map": functools.partial(in_shard_map, check_vma=True),
    "shard_map, unchecked": functools.partial(in_shard_map, check_vma=False),
    "pmap": in_pmap,
    "vmap": in_vmap,
}


def the_same(centers):
    """The center, which all workers have, to the bit."""
    for leaf in jax.tree.leaves(centers):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], centers)


FORMS = [
    *(("shard_map", case) for case in CASES),
    *(
        (form, case)
        for form in ("shard_map, unchecked", "pmap", "vmap")
        for case in ("mean_gradient", "elastic, sequential", "fragments")
    ),
]


@pytest.mark.parametrize("form, case", FORMS)
def test_mapped_form_is_the_stacked_one(form, case):
    rows, state = run(*MAPS[form](method(case, axis_name="workers")))
    assert_close(case, rows, the_same(emaopt.get_center(state)))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["delta", "int8, sequential"])
def test_workers_may_be_on_several_mapped_axes(case):
    tx = method(case, axis_name=("hosts", "workers"))
    rows, state = run(*in_shard_map(tx, hosts=2, workers=2))
    assert_close(case, rows, the_same(emaopt.get_center(state)))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["elastic, sequential", "fragments"])
def test_mapped_spread_and_end_are_the_stacked_ones(case):
    def end(params, state, axis_name=None):
        spread = emaopt.worker_spread(state, params)
        params, state = emaopt.synchronize(state, params, axis_name=axis_name)
        return params, emaopt.get_center(state), spread.reshape(-1)

    stacked, mapped = (
        method(case, **form)
        for form in ({"num_workers": WORKERS}, {"axis_name": "workers"})
    )
    params = begin()
    rows, state = run(jax.jit(step_of(stacked)), params, stacked.init(params))
    last = jax.tree.map(lambda x: jnp.asarray(x[-1]), rows)
    expected = jax.jit(end)(last, state)
    rows, state = run(*in_shard_map(mapped))
    specs = emaopt.state_specs(mapped, params, "workers")
    mapped_end = jax.shard_map(
        functools.partial(end, axis_name="workers"),
        mesh=mesh_of(),
        in_specs=(P("workers"), specs),
        out_specs=P("workers"),
    )
    params, centers, spread = jax.jit(mapped_end)(last, state)
    chex.assert_trees_all_equal(params, centers)
    actual = params, the_same(centers), spread
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind, set_mesh, case",
    [
        *((AxisType.Auto, False, case) for case in ("elastic", "fragments")),
        *((AxisType.Auto, True, case) for case in ("delta", "sequential", "int8")),
        *((AxisType.Explicit, True, case) for case in ("delta", "sequential", "int8")),
        (AxisType.Explicit, False, "mean_gradient"),
    ],
)
def test_stacked_form_may_be_sharded_over_a_mesh(kind, set_mesh, case):
    mesh = mesh_of(kind)

    def place(tree):
        """With the specs as compiled programs write them: another spelling compiles."""

        def spec(leaf):
            explicit = kind == AxisType.Explicit
            return P("workers", *[None] * (leaf.ndim - 1)) if explicit else P("workers")

        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), tree
        )

    tx = method(case, num_workers=WORKERS)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        params, step = place(begin()), jax.jit(step_of(tx))
        rows, state = run(step, params, tx.init(params), place)
    assert step._cache_size() == 1
    center = emaopt.get_center(state)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(center))
    assert_close(case, rows, center)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mean_gradient", "sequential"])
def test_stacked_parameters_may_be_sharded_over_a_second_axis(case):
    mesh = mesh_of(workers=WORKERS, model=2)
    tx = method(case, num_workers=WORKERS)

    def place(tree):
        spec = {"a": P("workers", None, "model"), "b": P("workers")}
        return {
            n: jax.device_put(x, NamedSharding(mesh, spec[n])) for n, x in tree.items()
        }

    params, step = place(begin()), jax.jit(step_of(tx))
    rows, state = run(step, params, tx.init(params), place)
    center = emaopt.get_center(state)
    split = NamedSharding(mesh, P(None, "model"))
    assert center["a"].sharding.is_equivalent_to(split, 2)
    assert_close(case, rows, center)


@pytest.mark.parametrize("setting", CAREFUL.values(), ids=CAREFUL)
@pytest.mark.parametrize("case", CASES)
def test_what_jax_can_be_told_to_refuse_is_not_done(case, setting):
    tx = method(case, num_workers=WORKERS)
    with setting():
        params = begin()
        rows, state = run(jax.jit(step_of(tx)), params, tx.init(params))
        params = jax.tree.map(lambda row: row[-1], rows)
        emaopt.worker_spread(state, params)
        emaopt.synchronize(state, params)


# What is each worker's own

OWN = {
    "prodigy": optax.contrib.prodigy(1.0, estim_lr0=1e-2),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 9),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 3), optax.sgd(0.1)),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0.01, 8)
    ),
}


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inner", OWN)
def test_each_worker_has_its_own_scalars(inner, check_vma, tmp_path):
    def local(**form):
        return emaopt.local_sgd(OWN[inner], period=3, **form)

    bad = jax.tree.map(lambda g: g.at[1, 2].set(jnp.nan), GRADS)

    def run_on(step, params, state, begin, end):
        for number in range(begin, end):
            grads = jax.tree.map(lambda g, n=number: g[n], bad)
            params, state = step(params, state, grads)
        return params, state

    step, params, state = in_shard_map(local(axis_name="workers"), check_vma)
    saved = run_on(step, params, state, 0, 4)
    went_on = run_on(step, *saved, 4, STEPS)
    checkpoint.save(tmp_path / "1", saved)
    restored = checkpoint.restore(tmp_path / "1", saved)
    chex.assert_trees_all_equal(
        *(
            jax.tree.map(bits, tree)
            for tree in (run_on(step, *restored, 4, STEPS), went_on)
        )
    )
    tx = local(num_workers=WORKERS)
    start = begin()
    expected = run_on(jax.jit(step_of(tx)), start, tx.init(start), 0, STEPS)
    if inner != "noise":  # whose bits go by shapes
        chex.assert_trees_all_close(went_on[0], expected[0], rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(
            went_on[1].inner_state, expected[1].inner_state, rtol=1e-5, atol=1e-5
        )
    np.testing.assert_array_equal(went_on[1].num_missed, [0, 0, 1, 0])


@pytest.mark.parametrize("form", [{"num_workers": WORKERS}, {"axis_name": "workers"}])
def test_shardings_of_the_state_are_those_of_its_specs(form):
    place = NamedSharding(mesh_of(), P("workers"))
    params = jax.tree.map(lambda x: jax.device_put(x, place), begin())
    tx = emaopt.local_sgd(OWN["hyperparameters"], period=3, **form)
    shardings = emaopt.state_shardings(tx, params)
    specs = emaopt.state_specs(tx, params, "workers")

    def same(sharding, spec, leaf):
        expected = NamedSharding(place.mesh, spec)
        assert sharding.is_equivalent_to(expected, leaf.ndim)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)

    state = jax.jit(tx.init, out_shardings=shardings)(params)
    own = ("num_steps", "num_left_out", "num_missed", "since_exchange", "has_missed")
    for field in (*own, "inner_state"):
        jax.tree.map(same, *(getattr(x, field) for x in (shardings, specs, state)))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_run_may_begin_and_go_on_in_one_map(check_vma):
    tx = emaopt.local_sgd(optax.adam(0.1), period=2, axis_name="workers")
    step, params, state = MAPS["shard_map"](tx)
    grads = jax.tree.map(lambda g: g[0], GRADS)
    expected = params, state
    for _ in range(3):
        expected = step(*expected, grads)

    def run(params, grads):
        def one(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, tx.init(params)), length=3)[0][0]

    run = jax.shard_map(
        run,
        mesh=mesh_of(),
        in_specs=P("workers"),
        out_specs=P("workers"),
        check_vma=check_vma,
    )
    chex.assert_trees_all_close(jax.jit(run)(params, grads), expected[0], rtol=1e-6)
