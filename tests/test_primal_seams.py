"""Seams of primal averaging: what a fault in one line would change."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from primal_runs import run, same

import emaopt
from emaopt import checkpoint
from emaopt._nodes import primal_nodes
from emaopt._sharding import Place

P = {"w": jnp.ones(3)}


def _inner():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.identity().init, update), seen


def test_arguments_reach_the_optimizer_inside():
    for make in (emaopt.gpa, lambda o: emaopt.primal_averaging(o, 0.5)):
        inner, seen = _inner()
        tx = make(inner)
        tx.update(P, tx.init(P), P, num_updates=3, value=5.0)
        assert seen == [{"num_updates": 3, "value": 5.0}]


def test_a_state_without_z_is_refused():
    zero = emaopt.gpa(optax.sgd(0.1), interpolation=0)
    with pytest.raises(
        ValueError, match=r"interpolation=0\.7, but the state was made with 0"
    ):
        emaopt.gpa(optax.sgd(0.1)).update(P, zero.init(P), P)


def test_zero_init_passes_where_y_is_z():
    tx = emaopt.gpa(optax.sgd(0.1), 0.9, interpolation=0, zero_init=True)
    plain = emaopt.averaged(optax.sgd(0.1), 0.9, zero_init=True)
    _, state = tx.update(P, tx.init(P), P)
    _, other = plain.update(P, plain.init(P), P)
    np.testing.assert_array_equal(
        state.averaging.average["w"], other.averaging.average["w"]
    )


def test_complex_parameters_stay_complex_in_inner_dtype():
    params = {"w": jnp.ones(2, jnp.complex64)}
    own = emaopt.gpa(optax.sgd(1.0), 0.5)
    f32 = emaopt.gpa(optax.sgd(1.0), 0.5, inner_dtype=jnp.float32)
    for tx in (own, f32):
        _, state = tx.update(
            {"w": jnp.full(2, 1j, jnp.complex64)}, tx.init(params), params
        )
        np.testing.assert_allclose(state.base["w"], 1 - 1j)


def test_gpa_decays_z():
    inner = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1))
    a = emaopt.gpa(inner, 0.9)
    b = emaopt.primal_averaging(inner, 0.9, inner_params="z")
    pa, pb, sa, sb = P, P, a.init(P), b.init(P)
    for _ in range(3):
        u, sa = a.update(P, sa, pa)
        pa = optax.apply_updates(pa, u)
        u, sb = b.update(P, sb, pb)
        pb = optax.apply_updates(pb, u)
    np.testing.assert_array_equal(pa["w"], pb["w"])


def test_a_state_of_a_schedule_needs_one():
    made = emaopt.schedule_free(optax.sgd(0.1), optax.constant_schedule(0.1)).init(P)
    with pytest.raises(
        ValueError, match="learning_rate is no schedule, and was otherwise"
    ):
        emaopt.schedule_free(optax.sgd(0.1)).update(P, made, P)


def test_weights_of_schedule_free_are_checked():
    for bad in (
        dict(power=-1.0),
        dict(learning_rate_power=-1.0),
        dict(learning_rate=-0.1),
    ):
        with pytest.raises(
            ValueError, match=f"schedule_free: {next(iter(bad))} must be at least 0"
        ):
            emaopt.schedule_free(optax.sgd(0.1), **bad)


def test_a_reset_with_a_count_leaves_z():
    tx = emaopt.gpa(optax.sgd(0.1), 0.9)
    state = tx.init(P)
    base = state.base
    state = emaopt.reset_average(state, {"w": jnp.zeros(3)}, num_updates=4)
    np.testing.assert_array_equal(state.base["w"], base["w"])


def test_a_reset_keeps_z_in_float32():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = emaopt.gpa(optax.sgd(0.1), 0.9)
    state = emaopt.reset_average(tx.init(params), params)
    assert state.base["w"].dtype == jnp.float32 and state.base["w"] is not params["w"]


def test_a_reset_is_of_the_first_named_one_alone():
    tx = optax.named_chain(
        ("a", emaopt.gpa(optax.sgd(0.1), 0.9)), ("b", emaopt.gpa(optax.identity(), 0.5))
    )
    state = tx.init(P)
    state = emaopt.reset_average(state, {"w": jnp.zeros(3)}, name="a")
    assert not np.any(state["a"].base["w"]) and np.all(state["b"].base["w"] == 1)


def test_a_falling_rate_keeps_its_largest_weight():
    rate = optax.linear_schedule(1.0, 0.0, 8)
    tx = emaopt.schedule_free(optax.sgd(0.1), rate, learning_rate_power=1.0)
    params = P
    state = tx.init(P)
    zs = []
    for _ in range(5):
        u, state = tx.update(P, state, params)
        params = optax.apply_updates(params, u)
        zs.append(state.primal.base["w"])
    np.testing.assert_allclose(emaopt.get_average(state)["w"], np.mean(zs, 0), rtol=1e-6)
    np.testing.assert_allclose(state.primal.averaging.elapsed["weight"][0], 5)


def _mesh(shape, names, kind):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_z_is_split_and_gathered_beside_another_axis(kind, compiled):
    """z split in the second dimension along one axis, params along another."""
    tree = {"w": jnp.linspace(-1, 1, 48).reshape(4, 12)}
    mesh = _mesh((2, 4), ("model", "data"), kind)
    spec = PartitionSpec("model") if kind == AxisType.Explicit else PartitionSpec()
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.05))
    with jax.set_mesh(mesh):
        params = jax.device_put(tree, NamedSharding(mesh, spec))
        tx = emaopt.primal_averaging(
            inner, 0.9, sharding={"w": PartitionSpec(None, "data")}
        )
        params, state = run(tx, params, compiled=compiled)
        if kind == AxisType.Explicit:
            assert params["w"].sharding.spec == PartitionSpec("model", None)
        else:
            assert params["w"].sharding.is_fully_replicated
        assert state.base["w"].sharding.spec[1] == "data"
    whole = emaopt.primal_averaging(inner, 0.9)
    same((params, state), run(whole, tree, compiled=compiled))


def test_z_is_split_in_its_second_dimension():
    tree = {"w": jnp.linspace(-1, 1, 24).reshape(3, 8)}
    mesh = _mesh((8,), ("data",), AxisType.Auto)
    tx = emaopt.primal_averaging(optax.adam(0.05), 0.9, sharding="data")
    with jax.set_mesh(mesh):
        params, state = run(
            tx, jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
        )
        assert state.base["w"].sharding.spec[1] == "data"
    same((params, state), run(emaopt.primal_averaging(optax.adam(0.05), 0.9), tree))


def test_a_part_of_z_is_not_begun_unasked(tmp_path):
    masked = emaopt.gpa(optax.sgd(0.1), 0.9, mask={"w": True, "b": False})
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    state = masked.init(params)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": state})
    target = {"params": params, "opt_state": emaopt.gpa(optax.sgd(0.1), 0.9).init(params)}
    with pytest.raises(ValueError, match=r"lacks .*base"):
        checkpoint.restore(tmp_path / "c", target)


def test_schedule_free_goes_on_as_nothing_else(tmp_path):
    tx = emaopt.schedule_free(optax.sgd(0.1))
    checkpoint.save(tmp_path / "c", {"params": P, "opt_state": tx.init(P)})
    other = emaopt.gpa(optax.sgd(0.1))
    with pytest.raises(
        ValueError, match="Of schedule_free, whose x is weighed by learning rates"
    ):
        checkpoint.restore(tmp_path / "c", {"params": P, "opt_state": other.init(P)})


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_reset_reaches_z_in_the_state_of_an_nnx_optimizer(name):
    class M(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))

    model = M()
    tx = emaopt.gpa({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}[name], 0.9)
    state = nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))
    new = jax.tree.map(lambda x: x * 0 + 4, nnx.state(model, nnx.Param))
    out = emaopt.reset_average(state, new)
    assert jax.tree.structure(out) == jax.tree.structure(state)
    assert isinstance(out["opt_state"], type(state["opt_state"]))
    assert float(jax.tree.leaves(out["opt_state"]["averaging"]["average"])[0][0]) == 4
    assert float(jax.tree.leaves(out["opt_state"]["base"])[0][0]) == 4


def test_a_largest_rate_is_not_begun_beside_z_that_is_there(tmp_path):
    tx = emaopt.schedule_free(optax.sgd(0.1))
    checkpoint.save(tmp_path / "c", {"params": P, "opt_state": tx.init(P)})
    other = emaopt.schedule_free(optax.sgd(0.1), optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="it lacks opt_state/largest"):
        checkpoint.restore(tmp_path / "c", {"params": P, "opt_state": other.init(P)})


def test_a_leaf_of_the_users_own_is_not_begun(tmp_path):
    checkpoint.save(
        tmp_path / "c",
        {"params": P, "opt": {"sgd": optax.sgd(0.1).init(P)}},
        optional=True,
    )
    target = {
        "params": P,
        "opt": {"sgd": emaopt.gpa(optax.sgd(0.1)).init(P), "largest": jnp.ones(())},
    }
    with pytest.raises(ValueError, match="it lacks opt/largest"):
        checkpoint.restore(tmp_path / "c", target)


def test_another_base_is_not_z(tmp_path):
    avg = emaopt.averaged(optax.sgd(0.1), 0.9).init(P)
    state = {"params": P, "opt": avg._asdict()}
    checkpoint.save(
        tmp_path / "c", {**state, "opt": {**state["opt"], "base": {"lr": jnp.ones(2)}}}
    )
    with pytest.raises(ValueError, match="it also holds opt/base/lr"):
        checkpoint.restore(tmp_path / "c", state)


@pytest.mark.parametrize("at", ["z", "y"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("inner_dtype", [None, jnp.float32])
def test_the_optimizer_sees_values_rounded_to_their_dtype(dtype, at, inner_dtype):
    """Powers of two: no product of the optimizer's is rounded, none can be fused."""
    inner = (
        optax.chain(optax.add_decayed_weights(0.5), optax.scale(-0.25))
        if inner_dtype
        else optax.stateless(lambda u, p: jax.tree.map(lambda x: -x * 0.25, p))
    )
    tx = emaopt.primal_averaging(inner, 0.9, inner_dtype=inner_dtype, inner_params=at)
    params = {"w": jnp.linspace(-2, 2, 64).astype(dtype)}

    def step(params, state):
        grads = {"w": (0.37 * params["w"].astype(jnp.float32) + 0.1).astype(dtype)}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    out = []
    for f in (jax.jit(step), step):
        p, s = params, tx.init(params)
        for _ in range(10):
            p, s = f(p, s)
        out.append((jax.tree.map(lambda x: x.astype(jnp.float32), p), s.base))
    same(*out)


def test_a_reset_of_an_nnx_state_keeps_its_container_and_reaches_z():
    class M(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))

    model = M()
    state = nnx.state(
        nnx.Optimizer(model, emaopt.gpa(optax.adam(0.1), 0.9), wrt=nnx.Param)
    )["opt_state"]
    new = jax.tree.map(lambda x: x * 0 + 4, nnx.state(model, nnx.Param))
    out = emaopt.reset_average(state, new)
    assert type(out) is type(state)
    assert jax.tree.structure(out) == jax.tree.structure(state)
    assert float(jax.tree.leaves(out["base"])[0][0]) == 4


def test_a_reset_is_of_the_second_named_one_alone():
    tx = optax.named_chain(
        ("a", emaopt.gpa(optax.sgd(0.1), 0.9)), ("b", emaopt.gpa(optax.identity(), 0.5))
    )
    state = emaopt.reset_average(tx.init(P), {"w": jnp.zeros(3)}, name="b")
    assert not np.any(state["b"].base["w"]) and np.all(state["a"].base["w"] == 1)


def test_whole_gathers_its_own_axes_alone():
    mesh = _mesh((2, 4), ("model", "data"), AxisType.Explicit)
    value = jax.device_put(
        jnp.arange(48.0).reshape(4, 12),
        NamedSharding(mesh, PartitionSpec("model", "data")),
    )
    with jax.set_mesh(mesh):
        whole = jax.jit(Place(((1, ("data",)),), mesh, False).whole)(value)
    assert whole.sharding.spec == PartitionSpec("model", None)
    np.testing.assert_array_equal(whole, value)


def test_a_primal_averaging_without_z_is_one_in_nnx():
    class M(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))

    s = nnx.state(
        nnx.Optimizer(
            M(), emaopt.gpa(optax.adam(0.1), 0.9, interpolation=0), wrt=nnx.Param
        )
    )
    assert list(primal_nodes(s)) == [("opt_state",)]


def test_a_largest_rate_is_not_left_out_where_z_stays(tmp_path):
    made = emaopt.schedule_free(optax.sgd(0.1), optax.constant_schedule(0.1))
    checkpoint.save(tmp_path / "c", {"params": P, "opt_state": made.init(P)})
    other = emaopt.schedule_free(optax.sgd(0.1))
    with pytest.raises(ValueError, match="it also holds opt_state/largest"):
        checkpoint.restore(tmp_path / "c", {"params": P, "opt_state": other.init(P)})
