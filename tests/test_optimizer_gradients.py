"""`compute_gradients`: of what, with respect to what, and None where nothing flows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import emaopt
from emaopt import tf1

RANDOM = np.random.default_rng(0)
PARAMS = {
    "encoder": {
        "bias": jnp.asarray(RANDOM.normal(size=2), jnp.float32),
        "kernel": jnp.asarray(RANDOM.normal(size=(3, 2)), jnp.float32),
    },
    "head": jnp.asarray(RANDOM.normal(size=2), jnp.float32),
}
X = jnp.asarray(RANDOM.normal(size=(4, 3)), jnp.float32)


def outputs(params, x):
    hidden = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    return hidden @ params["head"]


def loss(params, x):
    return jnp.mean(outputs(params, x) ** 2)


def gradients(loss, params, *args, **options):
    return tf1.compute_gradients(loss, params, *args, **options)[1]


def names(tree):
    """Of the leaves that are not None."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}


# With respect to what

ALL = {"encoder/bias", "encoder/kernel", "head"}
VAR_LISTS = {
    "nothing": (None, ALL),
    "tree": (
        {"encoder": {"bias": False, "kernel": True}, "head": True},
        ALL - {"encoder/bias"},
    ),
    "NumPy booleans": ({"encoder": np.bool_(False), "head": np.bool_(True)}, {"head"}),
    "prefix": ({"encoder": True, "head": False}, ALL - {"head"}),
    "whole tree": (True, ALL),
    "name": ("encoder/kernel", {"encoder/kernel"}),
    "list": (["encoder/kernel", "head"], {"encoder/kernel", "head"}),
    "tuple": (("head",), {"head"}),
    "set": ({"head", "encoder/bias"}, {"head", "encoder/bias"}),
    "by_name": (emaopt.by_name("kernel$", "head"), {"encoder/kernel", "head"}),
    "function": (lambda params: {"encoder": False, "head": params is PARAMS}, {"head"}),
    "predicate": (lambda name, leaf: leaf.ndim == 1 and "/" in name, {"encoder/bias"}),
    "predicate with a default": (lambda name, leaf, what="head": name == what, {"head"}),
}


@pytest.mark.parametrize("case", VAR_LISTS)
def test_gradients_are_of_the_chosen_parameters_and_none_elsewhere(case):
    var_list, expected = VAR_LISTS[case]
    actual = gradients(loss, PARAMS, X, var_list=var_list)
    flags = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            jax.tree_util.keystr(path, simple=True, separator="/") in expected
        ),
        PARAMS,
    )
    whole = jax.grad(loss)(PARAMS, X)
    chosen = jax.tree.map(lambda flag, grad: grad if flag else None, flags, whole)
    assert names(actual) == expected
    chex.assert_trees_all_close(actual, chosen, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "params, var_list",
    [
        ([jnp.ones(2), jnp.ones(3)], [False, True]),
        ((jnp.ones(2), jnp.ones(3)), ["1"]),
        ([jnp.ones(2), jnp.ones(3)], lambda name, leaf: leaf.size == 3),
    ],
)
def test_parameters_in_a_list_have_their_positions_for_names(params, var_list):
    actual = gradients(lambda p: p[0].sum() * p[1].sum(), params, var_list=var_list)
    assert actual[0] is None
    np.testing.assert_array_equal(actual[1], 2 * np.ones(3))


def test_integers_and_keys_have_no_gradients():
    params = {
        "w": jnp.ones(2),
        "n": jnp.int32(3),
        "on": jnp.array(True),
        "key": jax.random.key(0),
        "none": None,
    }
    actual = gradients(lambda p: (p["w"] * p["n"] * p["on"]).sum(), params)
    assert names(actual) == {"w"} and jax.tree.structure(
        actual, is_leaf=lambda x: x is None
    ) == jax.tree.structure(params, is_leaf=lambda x: x is None)
    np.testing.assert_array_equal(actual["w"], [3, 3])


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "complex64"]
)
def test_gradients_have_the_parameters_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        values = [3 + 4j, -4 + 3j] if dtype == "complex64" else [1.5, -2.0]
        params = {"w": jnp.array(values, dtype), "v": jnp.ones(2)}
        actual = gradients(lambda p: jnp.sum(jnp.abs(p["w"]) ** 2), params)
        assert actual["w"].dtype == dtype and actual["v"] is None
        np.testing.assert_allclose(actual["w"], 2 * np.array(values), rtol=1e-6)


# None where no gradient flows: b is a parameter, and the gradient of a is 2 a


@jax.custom_jvp
def ignoring(a, b):
    return jnp.sum(a**2) + jnp.sum(b)


@ignoring.defjvp
def _(primals, tangents):
    return ignoring(*primals), jnp.sum(2 * primals[0] * tangents[0])


@jax.custom_vjp
def squares(a):
    return jnp.sum(a**2)


squares.defvjp(lambda a: (squares(a), a), lambda a, cotangent: (2 * a * cotangent,))


def of_a(params):
    return jnp.sum(params["a"] ** 2)


def of_both(params):
    return of_a(params), jnp.sum(params["b"])


def in_scan(params):
    def body(carry, _):
        return tuple(c + x for c, x in zip(carry, of_both(params), strict=True)), None

    sums, _ = lax.scan(body, (jnp.zeros(()), jnp.zeros(())), None, length=3)
    return sums[0] / 3


def in_loop(params):
    def body(_, carry):
        return tuple(c + x for c, x in zip(carry, of_both(params), strict=True))

    return lax.fori_loop(0, 4, body, (0.0, 0.0))[0] / 4


def in_cond(params):
    return lax.cond(
        params["b"][0] > 0, lambda p, _: of_a(p), lambda p, _: of_a(p), params, 0
    )


UNCONNECTED = {
    "not used": of_a,
    "unused result": lambda p: of_both(p)[0],
    "jit": lambda p: jax.jit(of_both)(p)[0],
    "checkpoint": lambda p: jax.checkpoint(of_both)(p)[0],
    "scan": in_scan,
    "loop": in_loop,
    "vmap": lambda p: jax.vmap(lambda a: of_both(p | {"a": a})[0])(p["a"]).sum(),
    "stop_gradient": lambda p: of_a(p) + lax.stop_gradient(of_both(p)[1]),
    "stop_gradient in jit": jax.jit(lambda p: of_a(p) + lax.stop_gradient(p["b"]).sum()),
    "choice": in_cond,
    "integers": lambda p: of_a(p) + p["b"].astype(int).sum(),
    "sign": lambda p: of_a(p) + jnp.argmax(p["b"]),
    "custom_jvp": lambda p: ignoring(p["a"], p["b"]),
    "custom_vjp": lambda p: squares(p["a"]),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", UNCONNECTED)
def test_gradient_is_none_where_none_flows(case, compiled):
    params = {"a": jnp.arange(1.0, 4.0), "b": jnp.ones(3)}
    compute = functools.partial(gradients, UNCONNECTED[case])
    actual = (jax.jit(compute) if compiled else compute)(params)
    assert actual["b"] is None
    np.testing.assert_allclose(actual["a"], 2 * params["a"], rtol=1e-6)


CONNECTED = {
    "cancelled": lambda p: of_a(p) + jnp.sum(p["b"] - p["b"]),
    "times zero": lambda p: of_a(p) + 0.0 * jnp.sum(p["b"]),
    "one branch": lambda p: lax.cond(True, of_a, lambda p: of_both(p)[1], p),
    "late in a scan": lambda p: lax.scan(
        lambda carry, x: (carry + x, None), of_a(p), p["b"] * jnp.zeros(3)
    )[0],
}


@pytest.mark.parametrize("case", CONNECTED)
def test_gradient_that_happens_to_be_zero_is_a_gradient(case):
    params = {"a": jnp.arange(1.0, 4.0), "b": jnp.ones(3)}
    actual = jax.jit(functools.partial(gradients, CONNECTED[case]))(params)
    np.testing.assert_array_equal(actual["b"], np.zeros(3))


# Of what


def test_loss_that_is_no_scalar_is_summed():
    value, actual = tf1.compute_gradients(outputs, PARAMS, X)
    expected = jax.grad(lambda p: outputs(p, X).sum())(PARAMS)
    np.testing.assert_allclose(value, outputs(PARAMS, X), rtol=1e-6)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_grad_loss_weighs_the_loss_and_may_have_another_dtype():
    weights = np.arange(4.0)  # float64
    actual = gradients(outputs, PARAMS, X, grad_loss=weights)
    expected = jax.grad(lambda p: outputs(p, X) @ jnp.asarray(weights, jnp.float32))(
        PARAMS
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_auxiliary_data_comes_with_the_value_and_has_no_gradient():
    def with_aux(params, x):
        aux = {
            "outputs": outputs(params, x),
            "count": 4,
            "key": jax.random.key(1),
            "none": None,
            "b": jnp.sum(params["encoder"]["bias"]) * 1e6,
        }
        return loss(params, x), aux

    (value, aux), actual = tf1.compute_gradients(with_aux, PARAMS, X, has_aux=True)
    chex.assert_trees_all_close(actual, jax.grad(loss)(PARAMS, X), rtol=1e-5, atol=1e-6)
    assert aux["count"] == 4 and aux["none"] is None
    assert value == pytest.approx(loss(PARAMS, X)) and aux["outputs"].shape == (4,)


def test_loss_may_branch_on_its_values_outside_of_jit_and_return_anything_besides():
    def branching(params):
        sign = 1 if params["w"].sum() > 0 else -1
        return sign * params["w"].sum(), {"sign": sign, "text": "more"}

    for start, sign in (1.0, 1), (-1.0, -1):
        params = {"w": jnp.full(2, start)}
        (_, aux), actual = tf1.compute_gradients(branching, params, has_aux=True)
        assert aux == {"sign": sign, "text": "more"}
        np.testing.assert_array_equal(actual["w"], [sign, sign])


LOSSES = {
    "plain": loss,
    "jit": jax.jit(loss),
    "checkpoint": jax.checkpoint(loss),
    "vmap": lambda p, x: jax.vmap(lambda row: loss(p, row[None]))(x).mean(),
    "while": lambda p, x: lax.fori_loop(0, 2, lambda _, c: c + loss(p, x), 0.0),
    "with a gradient in it": lambda p, x: jnp.sum(jax.grad(loss, 1)(p, x) ** 2),
}


@pytest.mark.parametrize("case", LOSSES)
def test_value_and_gradients_are_those_of_jax(case):
    actual = jax.jit(functools.partial(tf1.compute_gradients, LOSSES[case]))(PARAMS, X)
    expected = jax.jit(jax.value_and_grad(LOSSES[case]))(PARAMS, X)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_gradients_cost_what_jaxs_do(checkpointed):
    f = jax.checkpoint(loss) if checkpointed else loss
    programs = [
        jax.jit(compute).lower(PARAMS, X).compile().cost_analysis()
        for compute in (
            functools.partial(tf1.compute_gradients, f),
            jax.value_and_grad(f),
        )
    ]
    for measure in ("flops", "transcendentals", "bytes accessed"):
        assert programs[0][measure] == programs[1][measure] > 0


# Inside of transformations


def test_vmap_gives_the_gradients_one_by_one():
    batch = jnp.stack([X, 2 * X])
    together = jax.jit(jax.vmap(lambda x: gradients(loss, PARAMS, x)))(batch)
    alone = [jax.grad(loss)(PARAMS, x) for x in batch]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    chex.assert_trees_all_close(together, expected, rtol=1e-5, atol=1e-6)


def test_gradients_can_be_differentiated():
    def norm(compute):
        return lambda params: sum(jnp.sum(g**2) for g in jax.tree.leaves(compute(params)))

    actual = jax.grad(norm(lambda params: gradients(loss, params, X)))(PARAMS)
    expected = jax.grad(norm(lambda params: jax.grad(loss)(params, X)))(PARAMS)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_inside_of_shard_map_are_those_of_jax(check_vma):
    mesh = jax.make_mesh(
        (2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,)
    )

    def spread(compute):
        def each(params, x):
            return compute(lambda p: lax.pmean(loss(p, x), "data"), params)

        options = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P("data")}
        lead = lambda *args: jax.tree.map(lambda g: g[None], each(*args))  # noqa: E731
        return jax.jit(jax.shard_map(lead, check_vma=check_vma, **options))(PARAMS, X)

    actual = spread(gradients)
    expected = spread(lambda f, params: jax.grad(f)(params))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
