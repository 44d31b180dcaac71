"""A bad argument fails at once, and the message says what it is and what is taken."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import emaopt
from emaopt._local_checks import Settings
from emaopt._local_options import Options

pytestmark = pytest.mark.quick(1000)  # all of them are

SGD = optax.sgd(0.1)
UPDATES = {"inner": SGD, "outer": SGD, "period": 2}


def local_updates(**arguments):
    return emaopt.local_updates(**{**UPDATES, **arguments})


ARGUMENTS = [
    (local_updates, {"inner": "adam"}, TypeError, "inner must be an optax.*'adam'"),
    (local_updates, {"outer": 0.7}, TypeError, "outer must be an optax.*0.7"),
    *(
        (local_updates, {"period": value}, error, rf"period must be .*{value}")
        for value, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError))
    ),
    (local_updates, {"period": True}, TypeError, "period must be .*True"),
    (local_updates, {"period": None}, TypeError, "period must be .*None"),
    (local_updates, {"num_workers": 0}, ValueError, "num_workers must be .*0"),
    (local_updates, {"num_workers": 2.0}, TypeError, "num_workers must be .*2.0"),
    (
        local_updates,
        {"num_workers": 2, "axis_name": "w"},
        ValueError,
        "not both; got num_workers=2, axis_name='w'",
    ),
    (
        local_updates,
        {"commit": "gradient"},
        ValueError,
        "commit must be 'delta', 'mean_delta' or 'mean_gradient', got",
    ),
    (
        local_updates,
        {"reduce": "median"},
        ValueError,
        "reduce must be 'mean', 'sum' or 'sequential', got 'median'",
    ),
    *(
        (local_updates, {"moving_rate": value}, ValueError, rf"moving_rate .*{value}")
        for value in (0, -0.1, 1.01, float("nan"))
    ),
    (local_updates, {"moving_rate": "0.5"}, TypeError, "moving_rate must be a number"),
    (
        local_updates,
        {"moving_rate": 0.5, "commit": "mean_delta"},
        ValueError,
        "moving_rate is for commit='delta', got 'mean_delta'",
    ),
    (local_updates, {"warmup_steps": -1}, ValueError, "warmup_steps must be .*-1"),
    (local_updates, {"warmup_steps": None}, TypeError, "warmup_steps must be .*None"),
    (
        local_updates,
        {"exchange_dtype": jnp.float32},
        ValueError,
        "exchange_dtype must be bfloat16, float16.*got float32",
    ),
    *(
        (local_updates, {"exchange_dtype": dtype}, ValueError, f"got {dtype}")
        for dtype in ("float64", "int32", "uint8", "bool", "complex64")
    ),
    (
        local_updates,
        {"exchange_dtype": "half a float"},
        TypeError,
        "exchange_dtype must be a dtype, got 'half a float'",
    ),
    (
        local_updates,
        {"error_feedback": True},
        ValueError,
        "error_feedback is for an exchange_dtype",
    ),
    (
        local_updates,
        {"error_feedback": 1, "exchange_dtype": jnp.int8},
        TypeError,
        "error_feedback must be True or False, got 1",
    ),
    *(
        (
            local_updates,
            {"moving_rate": 0.5, "exchange_dtype": jnp.int8, **more},
            ValueError,
            "with moving_rate, exchange_dtype goes neither with error_feedback nor",
        )
        for more in ({"error_feedback": True}, {"reduce": "sequential"})
    ),
    (local_updates, {"num_fragments": 0}, ValueError, "num_fragments must be .*0"),
    (
        local_updates,
        {"num_fragments": 2, "period": lambda n: 2},
        ValueError,
        "with num_fragments=2 .* period must be a whole number, not a function",
    ),
    (
        local_updates,
        {"num_fragments": 3, "period": 2},
        ValueError,
        "num_fragments=3 fragments cannot take turns in period=2 steps",
    ),
    (emaopt.local_sgd, {"inner": SGD, "period": 0}, ValueError, "period must be .*0"),
    (emaopt.diloco, {"inner": SGD, "outer": 1}, TypeError, "outer must be an optax.*1"),
    (
        emaopt.agn,
        {"optimizer": SGD, "variant": "thesis"},
        ValueError,
        "variant must be 'tf' or 'paper', got 'thesis'",
    ),
    (
        emaopt.agn,
        {"optimizer": SGD, "communication_period": 0},
        ValueError,
        "period must be .*0",
    ),
    (
        emaopt.easgd,
        {"inner": SGD, "period": lambda n: 2},
        ValueError,
        "no default of moving_rate",
    ),
    (emaopt.easgd, {"inner": SGD, "period": 1.5}, TypeError, "period must be .*1.5"),
    (
        emaopt.block_momentum,
        {"inner": SGD, "period": 2, "block_momentum": 1.5},
        ValueError,
        "block_momentum must be in .*1.5",
    ),
    (
        emaopt.block_momentum,
        {"inner": SGD, "period": 2, "block_momentum": 1},
        ValueError,
        r"block_momentum must be in \[0, 1\), got 1",
    ),
    (
        emaopt.block_momentum,
        {"inner": SGD, "period": 2, "block_learning_rate": 0},
        ValueError,
        "block_learning_rate must be .*0",
    ),
    (
        emaopt.lookahead,
        {"inner": SGD, "slow_step_size": 0},
        ValueError,
        "slow_step_size must be in .*0",
    ),
    (
        emaopt.stack_workers,
        {"params": 1.0, "num_workers": 0},
        ValueError,
        "num_workers must be .*0",
    ),
    (
        emaopt.state_specs,
        {"optimizer": SGD, "params": jnp.zeros((2, 3)), "axis_name": "w"},
        ValueError,
        "no center in this optimizer state",
    ),
    (
        emaopt.state_specs,
        {"optimizer": "sgd", "params": jnp.zeros((2, 3)), "axis_name": "w"},
        TypeError,
        "optimizer must be an optax.*'sgd'",
    ),
]


@pytest.mark.parametrize(
    "method, arguments, error, message",
    ARGUMENTS,
    ids=[f"{method.__name__}-{' '.join(given)}" for method, given, *_ in ARGUMENTS],
)
def test_bad_argument_fails_when_the_transformation_is_built(
    method, arguments, error, message
):
    with pytest.raises(error, match=f"^{method.__name__}: .*{message}"):
        method(**arguments)


PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
STACKED = local_updates(num_workers=2)
STATE = STACKED.init(PARAMS)


@pytest.mark.parametrize("call", ["init", "update"])
@pytest.mark.parametrize(
    "shape", [(3, 2), (), (3,)], ids=["other rows", "scalar", "one axis"]
)
def test_leaf_without_the_axis_of_workers(call, shape):
    wrong = {**PARAMS, "b": jnp.zeros(shape)}
    with pytest.raises(ValueError, match=r"^local_updates: .*leading axis of 2.*stack_"):
        STACKED.init(wrong) if call == "init" else STACKED.update(wrong, STATE, wrong)


def test_axis_that_is_not_mapped():
    tx = local_updates(axis_name="w")
    state = tx.init(PARAMS)  # needs no axis
    with pytest.raises(ValueError, match=r"^local_updates: the axis 'w' is not mapped"):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match=r"^synchronize: the axis 'w' is not mapped"):
        emaopt.synchronize(state, PARAMS, axis_name="w")


def test_more_fragments_than_leaves():
    with pytest.raises(ValueError, match="num_fragments=3, but there are only 2 leaves"):
        local_updates(num_workers=2, num_fragments=3, period=3).init(PARAMS)


def test_update_without_params():
    with pytest.raises(ValueError, match=r"^local_updates .*tx.update\(grads, state, p"):
        STACKED.update(PARAMS, STATE)


def test_swapped_state_does_not_train_and_is_not_read():
    served, kept = emaopt.swap(PARAMS, STATE)
    assert jax.tree.map(jnp.shape, served) == {"w": (3,), "b": ()}
    with pytest.raises(TypeError, match=r"^local_updates: this state is swapped"):
        STACKED.update(PARAMS, kept, PARAMS)
    for read in (emaopt.get_center, lambda s: emaopt.worker_spread(s, PARAMS)):
        with pytest.raises(ValueError, match="swapped: the parameters are the center"):
            read(kept)


@pytest.mark.parametrize(
    "state", [SGD.init(PARAMS), tuple(STATE), None], ids=["sgd", "tuple", "None"]
)
def test_state_of_another_transformation(state):
    with pytest.raises(TypeError, match=r"^local_updates: .*must be a LocalUpdatesState"):
        STACKED.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"w": PARAMS["w"]}, "other parameters"),
        ({**PARAMS, "w": jnp.zeros((2, 4))}, "w has shape"),
    ],
    ids=["a leaf less", "another shape"],
)
def test_spread_of_other_parameters(params, message):
    with pytest.raises(ValueError, match=f"^worker_spread: .*{message}"):
        emaopt.worker_spread(STATE, params)


# Options of the methods

NAMED = {
    "local_sgd": lambda **o: emaopt.local_sgd(SGD, period=2, **o),
    "diloco": lambda **o: emaopt.diloco(SGD, **o),
    "agn": lambda **o: emaopt.agn(SGD, 2, **o),
    "easgd": lambda **o: emaopt.easgd(SGD, period=2, **o),
    "block_momentum": lambda **o: emaopt.block_momentum(SGD, period=2, **o),
}


@pytest.mark.parametrize("name", NAMED)
def test_option_that_there_is_not_is_refused_by_the_methods_name(name):
    with pytest.raises(TypeError, match=f"^{name}: .*num_worker;.*mean num_workers"):
        NAMED[name](num_worker=2)
    with pytest.raises(TypeError, match=f"^{name}: .*zzz; it takes .*num_fragments"):
        NAMED[name](zzz=2)


@pytest.mark.parametrize("name", NAMED)
def test_help_shows_every_option_and_its_default(name):
    shown = inspect.signature(getattr(emaopt, name)).parameters
    full = inspect.signature(emaopt.local_updates).parameters
    for option in Options.__annotations__:
        assert shown[option].default == full[option].default, option
        assert shown[option].annotation == full[option].annotation, option
    assert not any(p.kind == p.VAR_KEYWORD for p in shown.values())


def test_defaults_that_are_shown_are_those_that_are_used():
    shown = inspect.signature(emaopt.local_updates).parameters
    for field in dataclasses.fields(Settings):
        if field.name != "function":
            used = field.default
            unset = used is dataclasses.MISSING
            assert shown[field.name].default == (
                inspect.Parameter.empty if unset else used
            )


@pytest.mark.parametrize("form", ["stacked", "mapped"])
@pytest.mark.parametrize("jitted", [True, False])
def test_inner_optimizer_whose_state_grows(form, jitted):
    def update(updates, state, params=None):
        return updates, (*state, updates)

    inner = optax.GradientTransformation(lambda params: (), update)
    named = {"num_workers": 2} if form == "stacked" else {}
    tx = emaopt.local_sgd(inner, period=2, **named)
    step = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises(TypeError, match=r"^local_sgd: the inner optimizer's update"):
        step(PARAMS, tx.init(PARAMS), PARAMS)


def test_specs_of_parameters_without_an_axis_of_workers():
    tx = emaopt.local_sgd(SGD, period=2, axis_name="w")
    params = {"w": jnp.zeros((2, 3)), "scale": jnp.zeros(())}
    with pytest.raises(
        ValueError, match=r"^state_specs: .*one is a scalar.*stack_workers"
    ):
        emaopt.state_specs(tx, params, "w")


# What functions return, and what stands for one worker alone


PERIODS = {
    "text": lambda n: "2",
    "nothing": lambda n: None,
    "three": lambda n: jnp.ones(3),
}


@pytest.mark.parametrize("returned", PERIODS)
def test_period_that_returns_no_number(returned):
    tx = emaopt.local_sgd(SGD, period=PERIODS[returned], num_workers=2)
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(TypeError, match=r"^local_sgd: period must return a number of st"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    "rate, error", [(7.0, ValueError), (-1.0, ValueError), ("a", TypeError)]
)
@pytest.mark.parametrize("reduce", ["sum", "sequential"])
def test_moving_rate_that_returns_another_number(rate, error, reduce):
    tx = local_updates(moving_rate=lambda w: rate, reduce=reduce, num_workers=2, period=1)
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(error, match=r"^local_updates: moving_rate must be"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("name", ["weights", "exchange"])
def test_per_worker_of_what_the_inner_optimizer_does_not_get(name):
    with pytest.raises(ValueError, match=rf"^local_sgd: per_worker .* which {name} is"):
        emaopt.local_sgd(SGD, period=2, num_workers=2, per_worker=[name])


def test_per_worker_that_update_is_not_given():
    tx = emaopt.local_sgd(SGD, period=2, num_workers=2, per_worker=["vaule"])
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(TypeError, match=r"declares \['vaule'\], .* \['value'\]"):
        tx.update(params, tx.init(params), params, value=jnp.ones(2))


def test_state_of_more_workers_than_the_parameters():
    tx = emaopt.local_sgd(SGD, period=9, num_workers=4)
    params = emaopt.stack_workers({"w": jnp.ones(3)}, 4)
    state, one = tx.init(params), {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"^synchronize: the state is of 4 worker"):
        emaopt.synchronize(state, one)
    with pytest.raises(ValueError, match=r"^worker_spread: the state is of 4 worker"):
        emaopt.worker_spread(state, one)
    with pytest.raises(ValueError, match=r"^synchronize: axis_name='w' is for the"):
        emaopt.synchronize(state, params, axis_name="w")
