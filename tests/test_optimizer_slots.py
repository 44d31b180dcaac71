"""Slots of every optimizer that Optax exports, and of those of this package."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import Net, train_step

import emaopt
from emaopt import tf1

PARAMS = {"a": jnp.ones((4, 3)), "b": {"c": jnp.ones((2, 2)), "d": jnp.ones(3)}}

# What Optax exports


def exported():
    """Optax's optimizers: all with a learning rate that a number is enough for."""
    found = {}
    for module in (optax, optax.contrib):
        for name, make in vars(module).items():
            if callable(make) and name.islower() and not name.startswith("scale_by"):
                parameters = inspect.signature(make).parameters.values()
                needed = [
                    p.name for p in parameters if p.default is p.empty and p.kind < 2
                ]
                learns = "learning_rate" in [p.name for p in parameters]
                if learns and set(needed) <= {"learning_rate"}:
                    found[name] = make
    return found


OTHERS = {
    "noisy_sgd": lambda rate: optax.noisy_sgd(rate, key=0),
    "schedule_free": lambda rate: optax.contrib.schedule_free(optax.sgd(rate), rate),
    "polyak_sgd": lambda rate: optax.polyak_sgd(),
    "sam": lambda rate: optax.contrib.sam(optax.sgd(rate), optax.sgd(rate)),
    "mechanize": lambda rate: optax.contrib.mechanize(optax.adam(rate)),
    "split_real_and_imaginary": lambda rate: optax.contrib.split_real_and_imaginary(
        optax.adam(rate)
    ),
}
OPTIMIZERS = exported() | OTHERS
del OPTIMIZERS["optimistic_adam"]  # warns that it is deprecated
ADAM = ["mu", "nu"]
NAMES = {
    "sgd": [],
    "adam": ADAM,
    "adamw": ADAM,
    "adamax": ADAM,
    "adamaxw": ADAM,
    "adabelief": ADAM,
    "amsgrad": ["mu", "nu", "nu_max"],
    "lamb": ADAM,
    "lars": ["trace"],
    "lion": ["mu"],
    "nadam": ADAM,
    "nadamw": ADAM,
    "novograd": ADAM,
    "radam": ADAM,
    "rmsprop": ["nu"],
    "adagrad": ["sum_of_squares"],
    "adadelta": ["e_g", "e_x"],
    "adafactor": ["v", "v_col", "v_row"],
    "yogi": ADAM,
    "sm3": ["nu"],
    "rprop": ["prev_updates", "step_sizes"],
    "schedule_free_sgd": ["z"],
    "sam": ["cache"],
    "mechanize": [*ADAM, "x0"],
    "split_real_and_imaginary": ADAM,
    "lbfgs": ["diff_params_memory", "diff_updates_memory", "grad", "params", "updates"],
    "muon": [
        "inner_states/adam/inner_state/0/mu",
        "inner_states/muon/inner_state/0/mu",
        "nu",
    ],
}
WRAPPED = {
    "momentum": (optax.sgd(0.1, 0.9), ["trace"]),
    "chain": (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), ADAM),
    "named_chain": (optax.named_chain(("inner", optax.adam(0.1))), ADAM),
    "masked": (optax.masked(optax.adam(0.1), {"a": True, "b": False}), ADAM),
    "partition": (
        optax.partition(
            {"x": optax.adam(0.1), "y": optax.lion(0.1)}, {"a": "x", "b": "y"}
        ),
        ["inner_states/x/inner_state/0/mu", "inner_states/y/inner_state/0/mu", "nu"],
    ),
    "inject_hyperparams": (optax.inject_hyperparams(optax.adam)(0.1), ADAM),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(0.1), 2), ADAM),
    "MultiSteps": (
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        ["acc_grads", *ADAM],
    ),
    "constrain": (optax.chain(optax.adam(0.1), tf1.constrain(lambda p: p)), ADAM),
    "average_params": (
        optax.chain(optax.adam(0.1), emaopt.average_params(0.9)),
        ["average", *ADAM],
    ),
    "averaged": (emaopt.averaged(optax.adam(0.1), 0.9), ["average", *ADAM]),
    "two averages": (
        optax.chain(emaopt.average_params(0.9), emaopt.average_params(0.99)),
        ["0/average", "1/average"],
    ),
    "lookahead": (emaopt.lookahead(optax.sgd(0.1, 0.9)), ["center", "trace"]),
    "agn": (
        emaopt.agn(optax.sgd(0.1, 0.9), axis_name="workers"),
        ["accumulated", "center", "inner_state/0/trace", "outer_state/0/0/trace"],
    ),
}


def state_of(tx, params=PARAMS):
    """Shapes only: nothing is compiled."""
    return jax.eval_shape(tx.init, params)


def test_the_table_is_of_what_optax_exports():
    assert len(OPTIMIZERS) > 45 and set(NAMES) <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", NAMES)
def test_slots_have_the_names_of_the_fields_that_optax_keeps_them_in(name):
    assert tf1.get_slot_names(state_of(OPTIMIZERS[name](0.1)), PARAMS) == NAMES[name]


@pytest.mark.parametrize("name", WRAPPED)
def test_slots_are_found_through_wrappers(name):
    tx, names = WRAPPED[name]
    assert tf1.get_slot_names(state_of(tx), PARAMS) == names


TRACED = [*OPTIMIZERS, *WRAPPED]
TRACED.remove("agn")  # runs where "workers" is an axis


def made(name):
    return WRAPPED[name][0] if name in WRAPPED else OPTIMIZERS[name](0.1)


def of_a(params):
    return jnp.sum((params["a"] - 2) ** 2)


@pytest.mark.parametrize("name", TRACED)
def test_every_optimizer_minimizes_and_leaves_alone_what_has_no_gradient(name):
    tx = made(name)
    extra = {"obj_fn": of_a} if name == "sophia" else {}

    def step(params, state):
        return tf1.minimize(tx, of_a, state, params, **extra)[1:]

    given = PARAMS, state_of(tx)
    program = jax.make_jaxpr(step)(*given).jaxpr
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(given)[0]]
    moved = {"a": False, "b": False}
    for path, before, after in zip(paths, program.invars, program.outvars, strict=True):
        keys = [getattr(key, "key", None) for key in path]
        for key in set(keys) & set(moved):
            moved[key] |= after is not before
    # sm3 keeps a list of arrays for each parameter, which a gradient of zero leaves as
    # they are: test_optimizer_none.py compares the bits.
    assert moved == {"a": True, "b": name == "sm3"}


# Reading


def test_slot_is_the_tree_in_the_state():
    tx = optax.chain(optax.clip(1.0), optax.adam(0.1))
    state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)[1]
    for name in ("mu", "0/mu", "1/0/mu"):
        assert tf1.get_slot(state, PARAMS, name) is state[1][0].mu


def test_slot_is_found_by_the_name_of_its_transformation():
    names = ("fast", emaopt.average_params(0.9)), ("slow", emaopt.average_params(0.99))
    state = optax.named_chain(("sgd", optax.sgd(0.1)), *names).init(PARAMS)
    assert tf1.get_slot(state, PARAMS, "slow") is state["slow"].average
    assert tf1.get_slot(state, PARAMS, "fast/average") is state["fast"].average


def test_slot_of_masked_parameters_lacks_them():
    state = WRAPPED["masked"][0].init(PARAMS)
    slot = tf1.get_slot(state, PARAMS, "mu")
    assert slot["a"].shape == (4, 3) and jax.tree.leaves(slot["b"]) == []


def test_slots_of_unnamed_parameters_are_told_by_their_shapes():
    tx = emaopt.averaged(optax.adam(0.1), 0.5)
    for params in (
        [jnp.ones(2), jnp.ones(3)],
        (jnp.ones(2), jnp.ones((2, 2))),
        jnp.ones(4),
    ):
        names = tf1.get_slot_names(tx.init(params), params)
        assert names == ["average", "mu", "nu"]


def of_nnx(tx):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    train_step(model, optimizer)
    return nnx.state(model, nnx.Param), optimizer


@pytest.mark.slow
def test_slots_of_an_nnx_optimizer_are_like_the_models_state():
    params, optimizer = of_nnx(emaopt.averaged(optax.adam(0.1), 0.9))
    opt_state = optimizer.opt_state
    slots = {
        "mu": opt_state.inner_state[0].mu,
        "nu": opt_state.inner_state[0].nu,
        "average": opt_state.averaging.average,
    }
    for state in (optimizer, opt_state, nnx.state(optimizer)):
        assert tf1.get_slot_names(state, params) == sorted(slots)
        for name, expected in slots.items():
            slot = tf1.get_slot(state, params, name)
            assert jax.tree.structure(slot) == jax.tree.structure(params)
            chex.assert_trees_all_equal(
                nnx.to_pure_dict(slot), nnx.to_pure_dict(expected)
            )
            pure = tf1.get_slot(state, nnx.to_pure_dict(params), name)
            chex.assert_trees_all_equal(pure, nnx.to_pure_dict(expected))


def test_slots_of_an_nnx_optimizer_may_lack_parameters():
    mask = emaopt.by_name("kernel")
    params, optimizer = of_nnx(optax.masked(optax.sgd(0.1, momentum=0.9), mask))
    slot = tf1.get_slot(optimizer, params, "trace")
    trace = optimizer.opt_state.inner_state[0].trace
    assert len(jax.tree.leaves(slot)) == len(jax.tree.leaves(trace)) == 2
    chex.assert_trees_all_equal(jax.tree.leaves(slot), jax.tree.leaves(trace))


@pytest.mark.parametrize(
    "name, params, words",
    [
        ("mu", {}, "there are no parameters"),
        ("momentum", PARAMS, "no slot 'momentum' .* 0/mu, 0/nu, 1/average, 2/average.$"),
        ("u", PARAMS, "no slot 'u'"),
        (
            "average",
            PARAMS,
            "several slots 'average' .* there are 1/average, 2/average.$",
        ),
        ("mu", {"other": jnp.ones(2)}, "no slot 'mu' in this state; there are none.$"),
    ],
)
def test_slot_that_is_not_one_is_refused_with_those_that_there_are(name, params, words):
    averages = emaopt.average_params(0.9), emaopt.average_params(0.99)
    state = state_of(optax.chain(optax.scale_by_adam(), *averages))
    with pytest.raises(ValueError, match=f"^get_slot: {words}"):
        tf1.get_slot(state, params, name)


@pytest.mark.parametrize("name", TRACED)
def test_variables_are_all_arrays_of_the_state_each_under_a_name(name):
    state = state_of(made(name))
    variables = tf1.variables(state)
    assert list(variables) == sorted(variables)
    ids = sorted(map(id, jax.tree.leaves(state)))
    assert sorted(map(id, variables.values())) == ids


def test_variables_that_would_have_one_name_are_refused():
    params = {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}
    state = optax.sgd(0.1, momentum=0.9).init(params)
    with pytest.raises(ValueError, match="several arrays are called 0/trace/a/b"):
        tf1.variables(state)


def test_variables_have_the_parameters_names_and_take_values_by_them():
    state = emaopt.averaged(optax.adam(0.1), 0.9).init(PARAMS)
    names = set(tf1.variables(state))
    assert {
        "inner_state/0/mu/b/c",
        "averaging/average/a",
        "averaging/num_updates",
    } <= names
    np.testing.assert_array_equal(
        tf1.variables(state)["averaging/average/a"], PARAMS["a"]
    )
