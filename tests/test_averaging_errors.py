"""What averages refuse, and in which words."""

import jax.numpy as jnp
import optax
import pytest

import emaopt

pytestmark = pytest.mark.quick(1000)  # all of them are


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda f: f(1.5), ValueError, r"NAME: decay must be in \[0, 1\], got 1\.5"),
        (lambda f: f(-0.1), ValueError, r"NAME: decay must be in \[0, 1\], got -0\.1"),
        (lambda f: f(float("nan")), ValueError, "NAME: decay must be in"),
        (lambda f: f("0.9"), TypeError, "NAME: decay must be a number.*got '0.9'"),
        (lambda f: f(True), TypeError, "NAME: decay must be a number"),
        (
            lambda f: f(0.9, start=-1),
            ValueError,
            "NAME: start must be at least 0, got -1",
        ),
        (lambda f: f(0.9, start=1.5), TypeError, "NAME: start must be a whole number"),
        (lambda f: f(0.9, every=0), ValueError, "NAME: every must be at least 1, got 0"),
        (
            lambda f: f(0.9, accumulator_dtype=jnp.int32),
            TypeError,
            "NAME: accumulator_dtype must be a real floating dtype, got int32",
        ),
        (
            lambda f: f(0.9, accumulator_dtype="float31"),
            TypeError,
            "NAME: accumulator_dtype must be a dtype, got 'float31'",
        ),
        (
            lambda f: f(0.9, accumulator_dtype=jnp.float64),
            ValueError,
            "NAME: accumulator_dtype=float64 needs jax_enable_x64",
        ),
        (lambda f: f(lambda: 0.9), TypeError, "NAME: decay must be a function of one"),
        (
            lambda f: f(lambda t: jnp.ones(2)),
            ValueError,
            "NAME: decay must return a float",
        ),
        (
            lambda f: f(lambda t: t),
            ValueError,
            "NAME: decay must return a floating scalar",
        ),
        (lambda f: f(0.9, start=2**40), ValueError, "NAME: start must be in"),
        (lambda f: f(0.9, mask=3), TypeError, "NAME: mask must be a tree of booleans"),
        (lambda f: f(0.9, debias="no"), TypeError, "NAME: debias must be True or False"),
        (lambda f: f(jnp.ones(2)), ValueError, "NAME: decay must be a scalar"),
        (lambda f: f(0.9, every=jnp.array(2)), TypeError, "name it in static_args"),
        (
            lambda f: f(0.999, accumulator_dtype=jnp.bfloat16),
            ValueError,
            r"NAME: an average in bfloat16 would not move.*1 - 0\.999 = 0\.001.*0\.0039",
        ),
    ],
)
@pytest.mark.parametrize("name", ["average_tree", "average_params", "averaged"])
def test_bad_argument_says_what_and_where(name, build, error, message):
    make = getattr(emaopt, name)
    if name == "averaged":
        make = lambda *args, **kwargs: emaopt.averaged(optax.sgd(1.0), *args, **kwargs)  # noqa: E731
    with pytest.raises(error, match=message.replace("NAME", name)):
        build(make)


def test_bfloat16_accumulator_is_taken_where_it_can_move():
    emaopt.average_params(0.99, accumulator_dtype=jnp.bfloat16)
    emaopt.average_params(0.999, every=10, accumulator_dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    "tx", [emaopt.average_params(0.9), emaopt.averaged(optax.sgd(1.0), 0.9)]
)
def test_update_without_parameters_says_what_to_call(tx):
    state = tx.init(jnp.ones(2))
    with pytest.raises(ValueError, match=r"call tx.update\(grads, state, params\)"):
        tx.update(jnp.ones(2), state)


def test_update_with_other_parameters_says_so():
    averager = emaopt.average_tree(0.9)
    state = averager.init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="average_tree: the parameters have another"):
        averager.update({"b": jnp.ones(2)}, state)


@pytest.mark.parametrize(
    "new, message",
    [
        (jnp.ones((3, 2)), r"was floating of shape \(2,\) at init and is .*\(3, 2\) now"),
        (jnp.ones(2, jnp.int32), "was floating .* and is integer"),
        (jnp.ones(2, jnp.complex64), "was floating .* and is complexfloating"),
    ],
)
def test_update_with_another_kind_of_leaf_says_so(new, message):
    averager = emaopt.average_tree(0.9)
    with pytest.raises(ValueError, match=message):
        averager.update({"a": new}, averager.init({"a": jnp.ones(2)}))


@pytest.mark.parametrize("debias", [False, True])
def test_update_with_a_state_of_the_other_debias_says_so(debias):
    state = emaopt.average_tree(0.9, debias=not debias).init(jnp.ones(2))
    with pytest.raises(ValueError, match=f"debias={debias}, but the state was made with"):
        emaopt.average_tree(0.9, debias=debias).update(jnp.ones(2), state)


def test_update_with_a_foreign_state_says_so():
    averager = emaopt.average_tree(0.9)
    with pytest.raises(TypeError, match=r"must be an AverageState.*got dict"):
        averager.update(jnp.ones(2), {"average": jnp.ones(2)})


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: emaopt.averaged("sgd", 0.9), TypeError, "averaged: optimizer must be"),
        (
            lambda: emaopt.averaged(optax.sgd(1.0), 0.9, overwrite_every=0),
            ValueError,
            "averaged: overwrite_every must be at least 1, got 0",
        ),
        (
            lambda: emaopt.by_name(3),
            TypeError,
            "by_name takes regular expressions, got 3",
        ),
        (lambda: emaopt.by_name("("), ValueError, "by_name: '\\(' does not compile"),
        (
            lambda: emaopt.by_name("kernl")({"kernel": 0.0}),
            ValueError,
            "'kernl' matches no leaf; the leaves are kernel",
        ),
        (
            lambda: emaopt.average_tree(0.9, mask={"a": 1.0}).init({"a": 0.0}),
            TypeError,
            "average_tree: mask must hold booleans, got 1.0",
        ),
        (
            lambda: emaopt.average_tree(0.9, mask={"b": True}).init({"a": 0.0}),
            ValueError,
            "average_tree: mask must be like the parameters",
        ),
    ],
)
def test_other_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()
