"""What averages refuse, and in which words."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt._recursion import make_recursion

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
            lambda: emaopt.averaged(optax.sgd(1.0), 0.9, overwrite_every=3, every=2),
            ValueError,
            "averaged: overwrite_every=3 must be a multiple of every=2",
        ),
        (
            lambda: emaopt.averaged(optax.sgd(1.0), 0.9, sequential="no"),
            TypeError,
            "averaged: sequential must be True or False, got 'no'",
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


@pytest.mark.parametrize("n", [-5, float("nan"), 1.5, True, "x", jnp.arange(2), 2**40])
def test_what_is_no_count_is_refused(n):
    averager = emaopt.average_tree(emaopt.warmup_decay(0.9))
    state = averager.init(jnp.float32(0))
    message = "^average_tree: num_updates must be "
    with pytest.raises((ValueError, TypeError), match=message):
        averager.update(jnp.float32(1), state, n)


@pytest.mark.parametrize("n", [-(2**31), -5, -1, 0, 1, 2**31 - 1])
@pytest.mark.parametrize(
    "decay", [emaopt.warmup_decay(0.9), lambda t: (1 + t) / (10 + t)]
)
def test_a_traced_count_leaves_the_average_between_the_iterates(decay, n):
    averager = emaopt.average_tree(decay)
    state = averager.init(jnp.float32(0))
    found = jax.jit(averager.update)(jnp.float32(1), state, jnp.int32(n)).average
    assert 0 <= found <= 1
    if n <= 0:
        np.testing.assert_allclose(found, 0.9, rtol=1e-6)  # 1 - β(0)


def test_a_traced_count_of_few_bits_is_clipped():
    averager = emaopt.average_tree(emaopt.warmup_decay(0.9))
    state = averager.init(jnp.float32(0))
    update = jax.jit(averager.update)
    np.testing.assert_allclose(update(1.0, state, jnp.int8(-3)).average, 0.9, rtol=1e-6)


OUTSIDE = {
    "above": lambda t: 1 + 0.1 * t,
    "below": lambda t: -0.1 * t,
    "NaN": lambda t: 0.5 * t / (t - 1),
    "Python's control flow": lambda t: jnp.float32(1.1 if t > 0 else 0.9),
}


@pytest.mark.parametrize("decay", OUTSIDE.values(), ids=OUTSIDE)
def test_a_decay_function_out_of_its_range_is_refused_when_it_is_built(decay):
    for build in (emaopt.average_tree, jax.jit(lambda: emaopt.average_params(decay))):
        with pytest.raises(
            ValueError, match=r"decay must stay in \[0, 1\], .* at t = 1\."
        ):
            build(decay) if build is emaopt.average_tree else build()


def test_a_decay_function_that_leaves_its_range_later_is_refused_or_clipped():
    averager = emaopt.average_tree(lambda t: 0.75 * t - 0.25)  # 0.5, 1.25, ...
    state = averager.update(jnp.float32(1), averager.init(jnp.float32(0)))
    with pytest.raises(
        ValueError, match=r"^average_tree: decay must .* is 1.25 at t = 2"
    ):
        averager.update(jnp.float32(1), state)
    assert jax.jit(averager.update)(jnp.float32(1), state).average == 0.5


def test_a_decay_that_is_injected_out_of_its_range_is_refused_or_clipped():
    tx = optax.inject_hyperparams(
        emaopt.average_params,
        static_args=("every", "start"),
        hyperparam_dtype=jnp.float32,
    )(decay=0.5)
    params = jnp.ones(1)
    state = tx.init(params)
    state = state._replace(hyperparams={**state.hyperparams, "decay": jnp.float32(2)})
    with pytest.raises(ValueError, match=r"^average_params: decay must stay in \[0, 1\]"):
        tx.update(params, state, params)
    _, state = jax.jit(tx.update)(params, state, params)
    assert emaopt.get_average(state) == 1


# Options


def keywords(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


def test_every_way_of_averaging_has_the_options_and_defaults_of_average_params():
    options = keywords(emaopt.average_params)
    assert keywords(emaopt.average_tree) == options
    own = {"sequential": True, "overwrite_every": None}
    assert keywords(emaopt.averaged) == own | options
    for function in (emaopt.primal_averaging, emaopt.gpa, emaopt.schedule_free):
        assert keywords(function).items() >= options.items()
    # The recursion has no defaults of its own that could be others.
    assert keywords(make_recursion) == dict.fromkeys(options, inspect.Parameter.empty)


def test_the_state_of_the_other_kind_is_refused():
    params = jnp.ones((2, 1))
    local = emaopt.local_sgd(optax.sgd(0.1), period=1, num_workers=2)
    average = emaopt.average_params(0.5)
    with pytest.raises(TypeError, match=r"an AverageState .* got LocalUpdatesState"):
        average.update(params, local.init(params), params)
    with pytest.raises(TypeError, match=r"a LocalUpdatesState .* got AverageState"):
        local.update(params, average.init(params), params)


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_every_is_looked_at_before_it_divides(every):
    with pytest.raises((ValueError, TypeError), match=f"averaged: every must .*{every}"):
        emaopt.averaged(optax.sgd(0.1), 0.9, overwrite_every=3, every=every)
