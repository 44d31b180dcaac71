"""What a leaf is, and where what stands beside one is put."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt
from emaopt import _leaves


def test_a_complex_number_of_python_is_averaged():
    averager = emaopt.average_tree(0.5)
    state = averager.update(2j, averager.init(0j))
    np.testing.assert_array_equal(state.average, 1j)


def test_none_is_no_leaf_that_a_mask_left_out():
    state = emaopt.average_params(0.5).init({"w": jnp.ones(2), "b": None})
    assert emaopt.get_average(state)["b"] is None


def test_rows_on_the_same_mesh_keep_their_other_axes():
    mesh = jax.make_mesh(
        (2, 2),
        ("workers", "model"),
        devices=jax.devices()[:4],
        axis_types=(AxisType.Explicit,) * 2,
    )
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("workers", "model"))
        param = jax.device_put(jnp.ones((2, 4)), rows)
        whole = NamedSharding(mesh, P(None, "model"))
        leaf = jax.device_put(jnp.ones((2, 4)), whole)
        found = jax.jit(_leaves.rows_beside)(param, leaf)
    assert found.sharding.spec == P("workers", "model")
