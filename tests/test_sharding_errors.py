"""What the placement of averages refuses, and in which words."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import KINDS, ON_HOST, make_mesh, start

import emaopt

pytestmark = pytest.mark.quick(1000)  # all of them are

ADAM = optax.adam(0.05)
MESH = make_mesh((8,))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"memory_kind": "unpinned_host"}, ValueError, "memory_kind must be None"),
        ({"sharding": 3}, TypeError, "sharding must be 'like_params'"),
        ({"sharding": {"w": 1.0}}, TypeError, "the name of a mesh axis"),
        ({"sharding": None}, TypeError, "got NoneType"),
        ({"sharding": {"w": None}}, TypeError, "got NoneType"),
        ({"sharding": make_mesh((8,))}, TypeError, "got Mesh"),
        pytest.param(
            {"sharding": NamedSharding(make_mesh((8,)), P(), memory_kind="pinned_host")},
            ValueError,
            "give memory_kind='pinned_host' itself",
            marks=ON_HOST,
        ),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        emaopt.average_params,
        emaopt.average_tree,
        lambda *a, **k: emaopt.averaged(ADAM, *a, **k),
    ],
)
def test_bad_argument_is_refused_when_the_transformation_is_built(
    make, options, error, message
):
    with pytest.raises(error, match=message):
        make(0.9, **options)


@pytest.mark.parametrize(
    "sharding, spec, message",
    [
        ("rows", P(), "sharding='rows', but the axes of the mesh are data"),
        ("data", P("data"), "the average of w cannot be split along data in dimension 0"),
        ({"v": "data"}, P(), "sharding must be like the parameters or a prefix"),
        (P("data", "data"), P(), "names an axis twice"),
        (P(None, "data"), P("data"), "the average of w cannot be split along data"),
        (lambda params: params, P(), "got ArrayImpl"),
        (
            NamedSharding(
                jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,)), P("rows")
            ),
            P("data"),
            "w is sharded over another mesh",
        ),
    ],
)
def test_sharding_that_does_not_fit_the_parameters_is_refused(sharding, spec, message):
    params = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(MESH, spec))}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        emaopt.average_params(0.9, sharding=sharding).init(params)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_axis_that_the_compiler_would_have_to_gather_is_refused(kind):
    mesh = make_mesh((2, 4), kind)
    tx = emaopt.average_params(0.9, sharding="data")
    with jax.set_mesh(mesh):
        params = start(mesh, {"w": P("model"), "b": P()})
        for function in (tx.init, lambda params: emaopt.state_shardings(tx, params)):
            if kind == AxisType.Auto:
                with pytest.raises(
                    ValueError, match="another PartitionSpec, which names"
                ):
                    function(params)
            else:
                function(params)


def test_parameters_that_differ_along_the_axes_are_refused_in_shard_map():
    mesh = make_mesh((4, 2))

    def init(spec, sharding="data"):
        tx = emaopt.average_params(0.9, sharding=sharding)
        inside = jax.shard_map(
            lambda params: tx.init(params).average,
            mesh=mesh,
            in_specs=({"w": spec},),
            out_specs={"w": P("data")},
            axis_names={"data"},
        )
        return jax.jit(inside)({"w": jnp.arange(32.0)})

    np.testing.assert_array_equal(init(P())["w"], jnp.arange(32.0))
    with pytest.raises(ValueError, match="each device has another value of the param"):
        init(P("data"))
    with pytest.raises(ValueError, match="the shard_map around is over data"):
        init(P(), ("data", "model"))


def test_overwriting_needs_the_average_beside_the_parameters():
    for options in ({"sharding": "data"}, {"memory_kind": "pinned_host"}):
        with pytest.raises(ValueError, match="overwrite_every needs the average where"):
            emaopt.averaged(ADAM, 0.9, overwrite_every=2, **options)


def test_host_memory_is_refused_before_jax_keeps_it(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 9, 2))
    with pytest.raises(ValueError, match=r"memory_kind='pinned_host' needs jax 0\.10"):
        emaopt.average_params(0.9, memory_kind="pinned_host")


def test_axes_without_a_mesh_are_refused():
    tx = emaopt.average_params(0.9, sharding="data")
    with pytest.raises(ValueError, match="no mesh is in use here"):
        jax.jit(tx.init)({"w": jnp.ones(8)})


def test_state_shardings_want_parameters_on_one_mesh():
    with pytest.raises(ValueError, match="state_shardings: the parameters must be"):
        emaopt.state_shardings(ADAM, {"w": jnp.ones(8)})
    meshes = MESH, make_mesh((2, 4))
    apart = [jax.device_put(jnp.ones(8), NamedSharding(m, P("data"))) for m in meshes]
    with pytest.raises(ValueError, match="NamedShardings of one mesh"):
        emaopt.state_shardings(ADAM, apart)
