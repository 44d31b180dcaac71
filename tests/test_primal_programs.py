"""Programs of optimizers whose gradient is taken near an average: one bit for all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import HAS_HOST, make_mesh
from primal_runs import ADAM, PARAMS, SGD, gradients, run, same

import emaopt


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("at", ["z", "y"])
def test_split_sequences_have_the_bits_of_whole_ones(kind, at):
    mesh = make_mesh((8,), kind)
    inner = optax.chain(optax.add_decayed_weights(0.1), ADAM)
    options = {"inner_params": at}
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        tx = emaopt.primal_averaging(inner, 0.9, sharding="data", **options)
        params, state = run(tx, params)
    same((params, state), run(emaopt.primal_averaging(inner, 0.9, **options)))
    assert params["w"].sharding.is_fully_replicated
    for tree in (state.base, state.averaging.average):
        assert tree["w"].sharding.spec[0] == "data"


def test_inside_of_shard_map_each_device_keeps_its_part_of_z():
    mesh = make_mesh((8,), AxisType.Auto)
    tx = emaopt.primal_averaging(ADAM, 0.9, sharding="data")
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        shardings = emaopt.state_shardings(tx, params)
        specs = jax.tree.map(lambda sharding: sharding.spec, shardings)

        def step(params, state):
            updates, state = tx.update(gradients(params), state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(
            jax.shard_map(
                step, in_specs=(P(), specs), out_specs=(P(), specs), check_vma=False
            )
        )
        state = tx.init(params)
        for _ in range(9):
            params, state = step(params, state)
    same((params, state), run(emaopt.primal_averaging(ADAM, 0.9)))


@pytest.mark.skipif(not HAS_HOST, reason="needs jax 0.10")
def test_z_and_x_in_host_memory_have_the_bits_of_those_on_the_device():
    tx = emaopt.primal_averaging(ADAM, 0.9, memory_kind="pinned_host")
    params, state = run(tx)
    same((params, state), run(emaopt.primal_averaging(ADAM, 0.9)))
    for tree in (state.base, state.averaging.average):
        assert tree["w"].sharding.memory_kind == "pinned_host"


def test_scan_donation_and_vmap_give_the_bits_of_the_loop():
    tx = emaopt.schedule_free(ADAM)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradients(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jax.tree.map(jnp.copy, PARAMS)
    looped = run(tx)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=9), donate_argnums=0)(
        (start, tx.init(start))
    )
    same(scanned, looped)
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    mapped = jax.vmap(lambda p: run(tx, p))(rows)
    for i in range(2):
        one = run(tx, jax.tree.map(lambda leaf, i=i: leaf[i], rows))
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-7)


def test_compiled_step_passes_over_z_and_x_alone_and_copies_none():
    """Bytes beside those of the optimizer, which reads y and g and writes y."""
    params = {"w": jnp.ones((256, 256))}

    def bytes_of(tx):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        start = tx.init(params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, start, params)
        return compiled.compile().cost_analysis()["bytes accessed"]

    # On CPUs, where a kernel has one result: z from z and g, x from x and z, y from y, x
    # and z: 10 passes, of which the optimizer had 3. One kernel would have 4 more, not 7.
    more = bytes_of(emaopt.gpa(SGD, 0.9)) - bytes_of(SGD)
    assert more / params["w"].nbytes < 7.01


@pytest.mark.parametrize("inner_dtype", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_narrow_parameters_have_the_same_bits_in_every_program(dtype, inner_dtype):
    params = {"w": jnp.linspace(-2, 2, 64).astype(dtype)}

    def trained(tx, transform):
        def step(params, state):
            grads = {"w": (0.37 * params["w"].astype(jnp.float32) + 0.1).astype(dtype)}
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step, state, at = transform(step), tx.init(params), params
        for _ in range(10):
            at, state = step(at, state)
        return at["w"].astype(jnp.float32), getattr(state, "inner_state", state)

    tx = emaopt.gpa(optax.sgd(0.1), 0.9, inner_dtype=inner_dtype)
    compiled = trained(tx, jax.jit)
    eager = trained(tx, lambda step: step)
    same(compiled[0], eager[0])
    if dtype == jnp.bfloat16:  # Optax's choice of updates has no float8
        wrapped, _ = trained(optax.apply_if_finite(tx, 3), jax.jit)
        same(compiled[0], wrapped)
