"""What a leaf is, and where what stands beside one is put."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def test_integers_of_numpy_are_taken_as_jax_has_them():
    averager = emaopt.average_tree(0.9)
    tree = {"w": jnp.ones(2), "step": np.int64(3), "seed": np.uint64(5)}
    state = averager.update(tree, averager.init(tree))  # warnings are errors
    found = {name: leaf.dtype for name, leaf in state.average.items()}
    assert found == {"w": jnp.float32, "step": jnp.int32, "seed": jnp.uint32}


@jax.tree_util.register_pytree_node_class
class OfArrays:
    """A container that takes nothing but arrays."""

    def __init__(self, array):
        assert hasattr(array, "shape"), array
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize(
    "option", [{"mask": {"s": True}}, {"sharding": "data"}, {"sharding": {"s": "data"}}]
)
def test_no_container_of_the_users_is_filled_with_flags_or_axes(option):
    mesh = jax.make_mesh(
        (2,),
        ("data",),
        devices=jax.devices()[:2],
        axis_types=(AxisType.Auto,),
    )
    with jax.set_mesh(mesh):
        params = {"s": OfArrays(jnp.ones(4))}
        state = emaopt.average_tree(0.5, **option).init(params)
    np.testing.assert_array_equal(state.average["s"].array, np.ones(4))
