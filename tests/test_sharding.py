"""Where averages live: split over mesh axes, in host memory, and nothing else changed."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import HAS_HOST, KINDS, ON_HOST, make_mesh, start

import emaopt
from emaopt import checkpoint

pytestmark = pytest.mark.quick(1)

ADAM = optax.adam(0.05)
WAYS = {
    "chained": lambda **kw: optax.chain(ADAM, emaopt.average_params(0.9, **kw)),
    "averaged": lambda **kw: emaopt.averaged(ADAM, 0.9, **kw),
}
OPTIONS = {
    "plain": {},
    "every": {"every": 2},
    "start and debias": {"start": 2, "debias": True},
    "skip_nonfinite": {"skip_nonfinite": True},
    "bfloat16": {"accumulator_dtype": jnp.bfloat16, "stochastic_rounding": True},
}
# The mesh, the parameters' specs, the option, and the averages' specs.
ALONG = {
    "data alone": ((8,), {"w": P(), "b": P()}, "data", {"w": P("data"), "b": P("data")}),
    "beside a model's axis": (
        (2, 4),
        {"w": P(None, "model"), "b": P()},
        "data",
        {"w": P("data", "model"), "b": P("data")},
    ),
    "in the dimension that is free": (
        (2, 4),
        {"w": P("model"), "b": P()},
        {"w": P(None, "data"), "b": "like_params"},
        {"w": P("model", "data"), "b": P()},
    ),
    "two axes": (
        (2, 4),
        {"w": P(), "b": P()},
        ("data", "model"),
        {"w": P(("data", "model")), "b": P(("data", "model"))},
    ),
    "a mesh of its own": (
        (2, 4),
        {"w": P(None, "model"), "b": P()},
        lambda params: NamedSharding(params["w"].sharding.mesh, P("data")),
        {"w": P("data", "model"), "b": P("data")},
    ),
}
COLLECTIVES = r" (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"


def option_of(along, params):
    """The option: one that is made from concrete parameters, or as it is."""
    option = ALONG[along][2]
    return option(params) if callable(option) else option


def step(tx, params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, params, steps=5, state=None):
    one = jax.jit(lambda *args: step(tx, *args), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, params), state or tx.init(params)
    sizes = []
    for _ in range(steps):
        params, state = one(params, state)
        sizes.append(one._cache_size())
    assert sizes[1:] == sizes[1:2] * (steps - 1)  # optax's counters start on one device
    return params, state


def average_of(state):
    return emaopt.get_average(state)


def is_sharded(tree, mesh, specs):
    """Whether the leaves are, in whichever memory."""
    places = {
        k: NamedSharding(mesh, specs[k], memory_kind=leaf.sharding.memory_kind)
        for k, leaf in tree.items()
    }
    return all(x.sharding.is_equivalent_to(places[k], x.ndim) for k, x in tree.items())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("way", WAYS)
def test_split_average_has_the_bits_of_a_whole_one(way, along, kind):
    shape, specs, _, expected = ALONG[along]
    mesh = make_mesh(shape, kind)
    with jax.set_mesh(mesh):
        params = start(mesh, specs)
        whole = train(WAYS[way](), params)
        split = train(WAYS[way](sharding=option_of(along, params)), params)
    assert is_sharded(average_of(split[1]), mesh, expected)
    assert is_sharded(split[0], mesh, specs)
    chex.assert_trees_all_equal(split, whole)


@pytest.mark.parametrize("width, expected", [(32, P(("model", "data"))), (4, P("model"))])
def test_explicit_axes_split_further_what_divides(width, expected):
    mesh = make_mesh((2, 4), AxisType.Explicit)
    tx = emaopt.average_params(0.9, sharding=P("data"))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.ones(width), NamedSharding(mesh, P("model")))}
        shardings = emaopt.state_shardings(tx, params).average
        for init in (tx.init, jax.jit(tx.init)):
            assert is_sharded(init(params).average, mesh, {"w": expected})
        assert shardings == {"w": NamedSharding(mesh, expected)}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_average_is_split_in_the_first_dimension_that_divides(kind):
    mesh = make_mesh((4, 2), kind)
    shapes = {"w": (6, 8, 4), "none": (3, 5), "empty": (4, 0), "scalar": ()}
    tx = emaopt.average_params(0.9, sharding="data")
    with jax.set_mesh(mesh):
        params = {k: jnp.ones(shape) for k, shape in shapes.items()}
        params = jax.device_put(params, NamedSharding(mesh, P()))
        expected = {k: P() for k in shapes} | {"w": P(None, "data")}
        assert is_sharded(tx.init(params).average, mesh, expected)


def test_leaves_that_lack_the_dimension_stay_whole():
    mesh = make_mesh((8,))
    params = start(mesh, {"w": P(), "b": P()})
    state = emaopt.average_params(0.9, sharding=P(None, "data")).init(params)
    assert is_sharded(state.average, mesh, {"w": P(None, "data"), "b": P()})


def test_constants_in_shard_map_are_split_too():
    mesh = make_mesh((8,))
    params = start(mesh, {"w": P(), "b": P()})
    tx = emaopt.average_params(0.9, sharding="data")
    init = jax.shard_map(
        lambda: tx.init(params).average, mesh=mesh, in_specs=(), out_specs=P("data")
    )
    chex.assert_trees_all_equal(jax.device_get(jax.jit(init)()), jax.device_get(params))


@pytest.mark.slow
def test_eager_training_is_as_compiled_one():
    mesh = make_mesh((4, 2))
    memory = {"memory_kind": "pinned_host"} if HAS_HOST else {}
    tx = emaopt.averaged(optax.identity(), 0.9, sharding="data", **memory)
    with jax.set_mesh(mesh):
        params = start(mesh, {"w": P(None, "model"), "b": P()})
        grads = jax.tree.map(jnp.ones_like, params)
        state = compiled = tx.init(params)
        for _ in range(2):
            _, state = tx.update(grads, state, params)
            _, compiled = jax.jit(tx.update)(grads, compiled, params)
    places = jax.tree.map(lambda x: x.sharding, average_of(state))
    assert is_sharded(average_of(state), mesh, {"w": P("data", "model"), "b": P("data")})
    if HAS_HOST:
        assert {place.memory_kind for place in places.values()} == {"pinned_host"}
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(compiled))


@pytest.mark.parametrize("options", OPTIONS)
def test_split_average_has_the_bits_of_a_whole_one_with_every_option(options):
    mesh = make_mesh((8,))
    with jax.set_mesh(mesh):
        params = start(mesh, {"w": P(), "b": P()})
        whole = train(WAYS["averaged"](**OPTIONS[options]), params)
        split = train(WAYS["averaged"](**OPTIONS[options], sharding="data"), params)
    assert is_sharded(average_of(split[1]), mesh, {"w": P("data"), "b": P("data")})
    chex.assert_trees_all_equal(split, whole)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("along", ALONG)
def test_split_average_adds_no_collective_and_moves_no_slot(along, every, kind):
    shape, specs, _, expected = ALONG[along]
    mesh = make_mesh(shape, kind)
    with jax.set_mesh(mesh):
        params = start(mesh, specs)
        option = option_of(along, params)
        tx = emaopt.averaged(ADAM, 0.9, sharding=option, every=every)
        state = tx.init(params)
        one = jax.jit(lambda *args: step(tx, *args), donate_argnums=(0, 1))
        program = one.lower(params, state).compile()
    assert not re.findall(COLLECTIVES, program.as_text())
    new_params, new_state = program.output_shardings
    for k, spec in specs.items():
        own = NamedSharding(mesh, spec)
        slots = new_state.inner_state[0]
        for sharding in (new_params[k], slots.mu[k], slots.nu[k]):
            assert sharding.is_equivalent_to(own, params[k].ndim)
        assert new_state.averaging.average[k].is_equivalent_to(
            NamedSharding(mesh, expected[k]), params[k].ndim
        )
    donated = sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((params, state))
    )
    assert program.memory_analysis().alias_size_in_bytes == donated


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("options", ["plain", "every", "skip_nonfinite"])
def test_inside_of_shard_map_each_device_keeps_its_part(options, check_vma):
    mesh = make_mesh((8,))
    tx = emaopt.averaged(ADAM, 0.9, sharding="data", **OPTIONS[options])
    with jax.set_mesh(mesh):
        params = start(mesh, {"w": P(), "b": P()})
        plain, state = train(emaopt.averaged(ADAM, 0.9, **OPTIONS[options]), params)
        mine = tx.init(params)
        specs = jax.tree.map(lambda x: x.sharding.spec, mine)
        one = jax.jit(
            jax.shard_map(
                lambda *args: step(tx, *args),
                in_specs=(P(), specs),
                out_specs=(P(), specs),
                check_vma=check_vma,
            )
        )
        for _ in range(5):
            params, mine = one(params, mine)
        text = one.lower(params, mine).compile().as_text()
    assert not re.findall(COLLECTIVES, text)
    assert mine.averaging.average["w"].addressable_shards[0].data.shape == (3, 16)
    chex.assert_trees_all_close(average_of(mine), average_of(state), rtol=1e-6)
    chex.assert_trees_all_close(params, plain, rtol=1e-6)


def test_what_does_not_divide_stays_with_its_parameter():
    mesh = make_mesh((8,))
    params = {"w": jnp.ones((12, 16)), "b": jnp.ones(12), "s": jnp.ones(()), "n": None}
    params["none"], params["i"] = jnp.ones((0, 8)), jnp.arange(8)
    params = jax.device_put(params, NamedSharding(mesh, P()))
    tx = emaopt.averaged(optax.set_to_zero(), 0.9, sharding="data")
    with jax.set_mesh(mesh):
        _, state = train(tx, params)
    specs = jax.tree.map(lambda x: x.sharding.spec, average_of(state))
    assert specs.pop("w") == P(None, "data")
    assert all(not any(spec) for spec in jax.tree.leaves(specs))


def test_a_sharding_brings_its_mesh_along():
    mesh = make_mesh((8,))
    params = start(mesh, {"w": P(), "b": P()})
    there = NamedSharding(mesh, P("data"))
    params, state = train(emaopt.averaged(ADAM, 0.9, sharding=there), params)
    assert is_sharded(average_of(state), mesh, {"w": P("data"), "b": P("data")})


@ON_HOST
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sharding", ["like_params", "data"])
def test_average_in_host_memory_has_the_bits_of_one_on_the_device(sharding, options):
    mesh = make_mesh((8,))
    with jax.set_mesh(mesh):
        params = start(mesh, {"w": P(), "b": P()})
        plain = train(WAYS["averaged"](**OPTIONS[options]), params)
        tx = WAYS["averaged"](
            **OPTIONS[options], sharding=sharding, memory_kind="pinned_host"
        )
        hosted = train(tx, params)
    kinds = {x.sharding.memory_kind for x in average_of(hosted[1]).values()}
    assert kinds == {"pinned_host"}
    assert hosted[0]["w"].sharding.memory_kind == "device"
    chex.assert_trees_all_equal(jax.device_get(hosted), jax.device_get(plain))


@ON_HOST
def test_host_memory_without_a_mesh():
    params = {"w": jnp.ones(3)}
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, memory_kind="pinned_host")
    params, state = train(tx, params, 1)
    assert state.averaging.average["w"].sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(emaopt.get_average(state, params)["w"], 0.5)


# Reading


@pytest.fixture
def trained():
    mesh = make_mesh((8,))
    memory = {"memory_kind": "pinned_host"} if HAS_HOST else {}
    tx = emaopt.averaged(ADAM, 0.9, sharding="data", **memory)
    with jax.set_mesh(mesh):
        yield (tx, *train(tx, start(mesh, {"w": P(), "b": P()})))


def test_get_average_gathers_it_beside_the_parameters(trained):
    _, params, state = trained
    average = emaopt.get_average(state, params)
    assert jax.tree.map(lambda x: x.sharding, average) == jax.tree.map(
        lambda x: x.sharding, params
    )
    chex.assert_trees_all_equal(
        jax.device_get(average), jax.device_get(average_of(state))
    )
    compiled = jax.jit(emaopt.get_average)(state, params)
    assert compiled["w"].sharding.memory_kind == "device"
    chex.assert_trees_all_equal(compiled, average)


@pytest.mark.parametrize("spec", [P(), P(None, "model")])
def test_compiled_get_average_gathers_along_explicit_axes(spec):
    mesh = make_mesh((2, 4), AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = start(mesh, {"w": spec, "b": P()})
        params, state = train(emaopt.averaged(ADAM, 0.9, sharding="data"), params)
        average = jax.jit(emaopt.get_average)(state, params)
        reset = average_of(jax.jit(emaopt.reset_average)(state, params))
    assert is_sharded(average, mesh, {"w": spec, "b": P()})
    where = {k: x.sharding.spec for k, x in average_of(state).items()}
    assert is_sharded(reset, mesh, where)


def test_average_distance_is_that_of_the_gathered_average(trained):
    _, params, state = trained
    average = emaopt.get_average(state, params)
    apart = optax.tree.norm(optax.tree.sub(params, average)) / optax.tree.norm(params)
    for distance in (emaopt.average_distance, jax.jit(emaopt.average_distance)):
        np.testing.assert_allclose(distance(state, params), apart, rtol=1e-6)


def test_average_of_a_center_is_not_spread_over_the_workers():
    mesh = jax.make_mesh((8,), ("workers",), axis_types=(AxisType.Auto,))
    outer = emaopt.averaged(optax.sgd(1.0), 0.5)
    tx = emaopt.local_updates(optax.sgd(0.1), outer, period=1, num_workers=8)
    rows = emaopt.stack_workers({"w": jnp.arange(16.0).reshape(8, 2)}, 8)
    rows = jax.device_put(rows, NamedSharding(mesh, P("workers")))
    params, state = train(tx, rows, 2)
    for read in (emaopt.get_average, jax.jit(emaopt.get_average)):
        average = read(state, params)["w"]
        assert average.sharding.is_fully_replicated
        np.testing.assert_allclose(average, emaopt.get_average(state)["w"])


def test_swap_exchanges_places_too_and_back(trained):
    _, params, state = trained
    there = jax.tree.map(lambda x: x.sharding, (params, state))
    again = emaopt.swap(*emaopt.swap(params, state))
    assert jax.tree.map(lambda x: x.sharding, again) == there
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get((params, state)))


def test_reset_average_keeps_the_place(trained):
    tx, params, state = trained
    there = jax.tree.map(lambda x: x.sharding, average_of(state))
    state = emaopt.reset_average(state, params)
    assert jax.tree.map(lambda x: x.sharding, average_of(state)) == there
    chex.assert_trees_all_equal(jax.device_get(average_of(state)), jax.device_get(params))
    train(tx, params, 2, state)


@pytest.mark.slow
def test_checkpoint_keeps_the_place_and_serves_the_average(trained, tmp_path):
    tx, params, state = trained
    run = {"params": params, "opt_state": state}
    checkpoint.save(tmp_path / "run", run)
    restored = checkpoint.restore(tmp_path / "run", run)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, run
    )
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(run))
    whole = params["w"].sharding
    served = checkpoint.load_averaged(tmp_path / "run", sharding=whole)
    assert served["w"].sharding == whole
    chex.assert_trees_all_equal(jax.device_get(served), jax.device_get(average_of(state)))
    train(tx, restored["params"], 2, restored["opt_state"])


def test_checkpoint_is_restored_into_shapes_that_explicit_axes_give(tmp_path):
    mesh = make_mesh((8,), AxisType.Explicit)
    tx = emaopt.averaged(ADAM, 0.9, sharding="data")
    with jax.set_mesh(mesh):
        params, state = train(tx, start(mesh, {"w": P(), "b": P()}), 2)
        run = {"params": params, "opt_state": state}
        checkpoint.save(tmp_path / "run", run)
        shapes = jax.eval_shape(lambda: run)
        restored = checkpoint.restore(tmp_path / "run", shapes)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(run))


# The shardings of a state


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "memory_kind", [None, pytest.param("pinned_host", marks=ON_HOST)]
)
@pytest.mark.parametrize("along", ALONG)
def test_state_shardings_are_those_of_init(along, memory_kind, kind):
    shape, specs, *_ = ALONG[along]
    mesh = make_mesh(shape, kind)
    with jax.set_mesh(mesh):
        params = start(mesh, specs)
        option = option_of(along, params)
        tx = emaopt.averaged(ADAM, 0.9, sharding=option, memory_kind=memory_kind)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
        shardings = emaopt.state_shardings(tx, shapes)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        eager = tx.init(params)
        train(tx, params, 2, state)
    for made, wanted, one in zip(
        *map(jax.tree.leaves, (state, shardings, eager)), strict=True
    ):
        for sharding in (made.sharding, one.sharding):
            if one.ndim:  # eagerly, optax puts counters on one device
                assert sharding.is_equivalent_to(wanted, one.ndim)
        assert made.sharding.memory_kind == one.sharding.memory_kind


OPTIMIZERS = {
    name: getattr(optax, name)
    for name in ("adam", "adafactor", "lion", "sm3", "adagrad", "lbfgs", "novograd")
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_shardings_of_any_optimizer_fit_its_state(name):
    mesh = make_mesh((2, 4))
    params = start(mesh, {"w": P("data", "model"), "b": P()})
    tx = emaopt.averaged(OPTIMIZERS[name](1e-3), 0.9)
    shardings = emaopt.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    own = params["w"].sharding
    alike = [x for x in jax.tree.leaves(state) if x.shape == params["w"].shape]
    assert alike and all(x.sharding.is_equivalent_to(own, 2) for x in alike)
