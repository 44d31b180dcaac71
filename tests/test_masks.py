"""Masks that are trees, masks that are functions, and how a mask changes."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt
from emaopt import checkpoint

pytestmark = pytest.mark.quick(1000)  # all of them are


class Equinox(eqx.Module):
    w: object
    b: object

    def __call__(self, x):
        return self.w * x + self.b


@struct.dataclass
class Struct:
    w: object
    b: object

    def __call__(self, x):
        return self.w * x + self.b


class Nnx(nnx.Module):
    def __init__(self, w, b):
        self.w, self.b = nnx.Param(w), nnx.Param(b)

    def __call__(self, x):
        return self.w * x + self.b


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dataclass:
    w: object
    b: object

    def __call__(self, x):
        return self.w * x + self.b


def line(w, b, x):
    return w * x + b


def partial(w, b):
    return jax.tree_util.Partial(line, w, b)


MODELS = {f.__name__: f for f in (Equinox, Struct, Nnx, Dataclass, partial)}


def model(kind):
    return MODELS[kind](jnp.ones(2), jnp.zeros(2))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("around", [lambda tree: tree, lambda tree: {"net": tree}])
def test_model_that_can_be_called_is_a_mask_as_in_optax(kind, around):
    params, mask = around(model(kind)), around(MODELS[kind](True, False))
    own = optax.masked(emaopt.average_params(0.9), mask).init(params)
    state = emaopt.average_params(0.9, mask=mask).init(params)
    sizes = [leaf.size for leaf in jax.tree.leaves(state.average)]
    assert sizes == [leaf.size for leaf in jax.tree.leaves(own.inner_state.average)]
    assert sizes == [2]


@pytest.mark.parametrize(
    "kind", sorted(set(MODELS) - {"partial"})
)  # a tuple of axes is no tree
def test_model_that_can_be_called_says_which_leaves_are_split(kind):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(model(kind), NamedSharding(mesh, P()))
    tx = emaopt.average_params(0.9, sharding=MODELS[kind]("data", "like_params"))
    leaves = jax.tree.leaves(tx.init(params).average)
    specs = {float(leaf[0]): leaf.sharding.spec for leaf in leaves}
    assert specs == {1.0: P("data"), 0.0: P()}
    wrong = MODELS[kind]("data", 3)
    with pytest.raises(TypeError, match="sharding must be 'like_params', the name"):
        emaopt.average_params(0.9, sharding=wrong).init(params)


@pytest.mark.parametrize("kind", sorted(set(MODELS) - {"Nnx"}))
def test_model_that_can_be_called_chooses_variables(kind):
    loss = lambda m: jnp.sum(m(x=1.0) if kind == "partial" else m(1.0))  # noqa: E731
    chosen = MODELS[kind](True, False)
    _, grads = emaopt.compute_gradients(loss, model(kind), var_list=chosen)
    assert [leaf.tolist() for leaf in jax.tree.leaves(grads)] == [[1.0, 1.0]]


def test_model_that_can_be_called_chooses_names_of_averages():
    names = checkpoint.average_names(model("Equinox"), mask=Equinox(True, False))
    assert names == {"w/ExponentialMovingAverage": "w", "b": "b"}


class Choose(eqx.Module):
    """A function of the parameters with a setting, which is no leaf."""

    name: str = eqx.field(static=True)

    def __call__(self, params):
        return {name: name == self.name for name in params}


def equal_to(name, params):
    return {key: key == name for key in params}


FUNCTIONS = {
    "function": lambda params: equal_to("w", params),
    "functools.partial": functools.partial(equal_to, "w"),
    "Partial": jax.tree_util.Partial(equal_to, "w"),
    "Partial without leaves": jax.tree_util.Partial(functools.partial(equal_to, "w")),
    "module without leaves": Choose("w"),
    "by_name": emaopt.by_name("^w$"),
    "module of functions": eqx.nn.Lambda(lambda params: equal_to("w", params)),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_of_the_parameters_are_called(kind):
    function = FUNCTIONS[kind]
    if kind == "module of functions":  # it takes a key, too
        function = functools.partial(function, key=None)
    params = {"w": jnp.ones(2), "b": jnp.zeros(2)}
    state = emaopt.average_params(0.9, mask=function).init(params)
    assert state.average["b"] == optax.MaskedNode() and state.average["w"].size == 2
    _, grads = emaopt.compute_gradients(
        lambda p: jnp.sum(p["w"] + p["b"]), params, var_list=function
    )
    assert grads["b"] is None and grads["w"].size == 2
    assert checkpoint.average_names(params, mask=function)["b"] == "b"


class Empty(eqx.Module):
    def __call__(self, x):
        return x + 1


def test_model_without_leaves_is_not_called():
    tx = emaopt.averaged(optax.sgd(0.1), 0.9, mask=Empty(), sharding=Empty())
    assert tx.update(Empty(), tx.init(Empty()), Empty())[0] == Empty()
    with pytest.raises(ValueError, match="No variables to optimize"):
        emaopt.compute_gradients(lambda m: 1.0, Empty(), var_list=Empty())


def test_mesh_is_neither_a_sharding_nor_a_mask():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(TypeError, match=r"sharding must be .*got Mesh"):
        emaopt.average_params(0.9, sharding=mesh)
    with pytest.raises(TypeError, match="mask must hold booleans, got Mesh"):
        emaopt.average_params(0.9, mask=mesh).init(jnp.ones(2))
