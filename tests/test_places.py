"""Which parameters an average is of: told, or the only ones that it can be.

Containers of slots × containers of parameters × layouts of training states, through
`swap_state`, which is what `save` writes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import emaopt
from emaopt import checkpoint

W, B = jnp.arange(6.0).reshape(2, 3), jnp.ones(3)


class Pair(NamedTuple):
    w: Any
    b: Any


@flax.struct.dataclass
class Struct:
    w: Any
    b: Any


# JAX takes the structures of two dataclasses with the same fields for equal (0.10 to
# 0.12), and now and then the one for the other in what it has traced: "prefix has Data,
# full has Struct". So this one has a field more.
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("w", "b"), meta_fields=("kind",)
)
@dataclasses.dataclass
class Data:
    w: Any
    b: Any
    kind: str = "data"


class Linear(nnx.Module):
    def __init__(self):
        self.w, self.b = nnx.Param(W), nnx.Param(B)


class Module(eqx.Module):
    w: Any
    b: Any


PARAMS = {
    "dict": lambda: {"w": W, "b": B},
    "nested": lambda: {"params": {"w": W}, "b": [B, B + 1]},
    "FrozenDict": lambda: freeze({"w": W, "b": B}),
    "NamedTuple": lambda: Pair(W, B),
    "nested NamedTuple": lambda: Pair({"kernel": W}, Pair(B, B + 1)),
    "flax.struct": lambda: Struct(W, B),
    "dataclass": lambda: Data(W, B),
    "equinox": lambda: Module(W, B),
    "nnx.State": lambda: nnx.state(Linear()),
    "list": lambda: [W, B],
    "tuple": lambda: (W, B),
    "bare array": lambda: W,
    "one of each dtype": lambda: {"w": W.astype(jnp.bfloat16), "n": jnp.int32(3)},
}


class Slots(NamedTuple):
    mu: Any


@flax.struct.dataclass
class SlotsStruct:
    mu: Any


# What an optimizer may keep a tree like the parameters in.
CONTAINERS = {
    "dict": lambda mu: {"mu": mu},
    "deep dict": lambda mu: {"state": {"mu": mu, "nu": mu}},
    "NamedTuple": Slots,
    "flax.struct": SlotsStruct,
    "tuple": lambda mu: (mu, mu),
    "list": lambda mu: [mu],
    "bare tree": lambda mu: mu,
}


def heavy_ball(container):
    """An optimizer with a momentum in some container."""

    def init(params):
        return CONTAINERS[container](jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda x: x + 5, state)

    return optax.GradientTransformation(init, update)


OPTIMIZERS = {
    f"{container}, {how}": (container, how)
    for container in CONTAINERS
    for how in ("chained", "named", "in MultiSteps")
} | {"adam, chained": ("adam", "chained"), "adam, averaged": ("adam", "averaged")}


def optimizer(container, how, decay=0.5, **options):
    inner = optax.adam(0.1) if container == "adam" else heavy_ball(container)
    average = emaopt.average_params(decay, **options)
    if how == "named":
        return optax.named_chain(("inner", inner), ("average", average))
    if how == "averaged":
        return emaopt.averaged(inner, decay, **options)
    chained = optax.chain(inner, average)
    if how == "in MultiSteps":
        return optax.MultiSteps(chained, 1).gradient_transformation()
    return chained


class Learner(NamedTuple):
    params: Any
    opt_state: Any
    key: Any


class Learner2(NamedTuple):
    net: Any
    opt_states: Any


def in_train_state(params, opt_state):
    return TrainState(0, None, params, None, opt_state)  # pyright: ignore


LAYOUTS = {
    "params": lambda p, o: {"params": p, "opt_state": o},
    "tuple": lambda p, o: (p, o),
    "list": lambda p, o: [p, o],
    "model": lambda p, o: {"model": p, "opt_state": o},
    "train": lambda p, o: {"train": {"params": p, "opt_state": o}, "step": 3},
    "TrainState": in_train_state,
    "NamedTuple": lambda p, o: Learner(p, o, jax.random.key(0)),
    "opt_states": lambda p, o: Learner2([p], [o]),
    "variables": lambda p, o: {"variables": {"params": p, "stats": B}, "opt_state": o},
    "teacher": lambda p, o: {"params": p, "teacher": {"params": p}, "opt_state": o},
    "target": lambda p, o: {"params": p, "target_params": p, "opt_state": o},
    "gradients": lambda p, o: {"params": p, "grads": p, "opt_state": o},
}


def trained(tx, params):
    """Parameters and state after a step of +2 that the average follows by half."""
    state = tx.init(params)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 2), params)
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates), state


def same(a, b):
    chex.assert_trees_all_equal_structs(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(getattr(x, "dtype", jnp.float32), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def parameters_of(layout, state):
    """The parameters again, by hand."""
    ways = {
        "tuple": lambda s: s[0],
        "list": lambda s: s[0],
        "model": lambda s: s["model"],
        "train": lambda s: s["train"]["params"],
        "TrainState": lambda s: s.params,
        "NamedTuple": lambda s: s.params,
        "opt_states": lambda s: s.net[0],
        "variables": lambda s: s["variables"]["params"],
    }
    return ways.get(layout, lambda s: s["params"])(state)


WAYS = {
    "params": "params",
    "tuple": "0",
    "list": "0",
    "model": "model",
    "train": "train/params",
    "TrainState": "params",
    "NamedTuple": "params",
    "opt_states": "net/0",
    "variables": "variables/params",
    "teacher": "params",
    "target": "params",
    "gradients": "params",
}


def check(container, made, layout):
    tx = optimizer(*OPTIMIZERS[made])
    params, opt_state = trained(tx, PARAMS[container]())
    state = LAYOUTS[layout](params, opt_state)
    if "named" in made and layout in ("tuple", "list"):
        # A dict of one optimizer's and of an average's state, under no name that tells.
        with pytest.raises(ValueError, match="params="):
            checkpoint.swap_state(state)
    else:
        swapped = checkpoint.swap_state(state)
        same(parameters_of(layout, swapped), emaopt.get_average(opt_state))
        same(checkpoint.swap_state(swapped), state)
    swapped = checkpoint.swap_state(state, params=WAYS[layout])
    same(parameters_of(layout, swapped), emaopt.get_average(opt_state))
    same(checkpoint.swap_state(swapped, params=WAYS[layout]), state)


@pytest.mark.quick(8)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", PARAMS)
def test_parameters_in_any_container_are_served(container, layout):
    check(container, "adam, chained", layout)


@pytest.mark.quick(8)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("made", OPTIMIZERS)
@pytest.mark.parametrize("container", ["nested", "NamedTuple"])
def test_slots_in_any_container_are_not(container, made, layout):
    check(container, made, layout)


TX = optax.chain(optax.adam(0.1), emaopt.average_params(0.5))
HEAVY = optimizer("dict", "averaged")


def start(tx=TX, params=None):
    return trained(tx, {"w": W, "b": B} if params is None else params)


def two(**more):
    """A state whose parameters could be two things, by hand."""
    p, o = start()
    return {"model": p, "train": {"teacher": p, "opt_state": o}, **more}


REFUSED = {
    "a teacher that is nearer": (two, "any of model, train/teacher.*params='model'"),
    "two models": (
        lambda: {"a": start()[0], "b": start()[0], "opt_state": start()[1]},
        "could be of any of a, b",
    ),
    "the optimizer state alone": (lambda: start()[1], "no parameters with its names"),
    "slots in a dict alone": (
        lambda: {"optimizer": start(HEAVY)[1]},
        "taken for the optimizer's own: optimizer/inner_state/mu",
    ),
    "slots in a chain alone": (
        lambda: start(optax.chain(heavy_ball("bare tree"), emaopt.average_params(0.5)))[
            1
        ],
        "taken for the optimizer's own: 0; say with params=",
    ),
    "slots in a dict in a chain alone": (
        lambda: start(
            optax.chain(heavy_ball("dict"), emaopt.averaged(optax.sgd(0.1), 0.5))
        )[1],
        "taken for the optimizer's own: 0/mu; say with params=",
    ),
    "an average in a dict of nothing that tells": (
        lambda: {"model": start()[0], "ema": start()[1][1]},
        "say with params= if it is not, as params='model'",
    ),
    "other shapes": (
        lambda: {"params": {"w": B, "b": W}, "opt_state": start()[1]},
        "no parameters with its names and shapes",
    ),
    "integers of its shapes": (
        lambda: {"n": jnp.zeros((2, 3), int), "opt_state": start(params=W)[1]},
        "no parameters with its names and shapes",
    ),
}


@pytest.mark.quick(100)
@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_two_things_is_refused(case):
    state, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        checkpoint.swap_state(state())


def test_params_says_which():
    p, o = start()
    state = two()
    average = emaopt.get_average(o)
    same(checkpoint.swap_state(state, params="model")["model"], average)
    same(
        checkpoint.swap_state(state, params="train/teacher")["train"]["teacher"], average
    )
    for wrong, message in (
        ("", "params='' is the whole state"),
        ("no/such", "params='no/such', but.*there is no no/such/"),
        ("train", "there is no train/"),
        (("model", "train/teacher"), "says of 2 trees where they stand, for 1 average"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.swap_state(state, params=wrong)
    with pytest.raises(ValueError, match=r"w has shape \(3,\), its average \(2, 3\)"):
        checkpoint.swap_state(
            {"params": {"w": B, "b": B}, "opt_state": o}, params="params"
        )
    del p


def actor_and_critic():
    actor, critic = {"w": W}, {"v": B}
    return {
        "actor": dict(zip(("params", "opt_state"), start(params=actor), strict=True)),
        "critic": dict(zip(("params", "opt_state"), start(params=critic), strict=True)),
    }


def test_averages_of_several_networks_are_served_together(tmp_path):
    state = actor_and_critic()
    names = ("actor", "critic")
    checkpoint.save(tmp_path / "c", state, name=names)
    plain = ocp.StandardCheckpointer().restore(tmp_path / "c")
    for name in names:
        average = emaopt.get_average(state[name]["opt_state"])
        same(plain[name]["params"], average)
        same(checkpoint.load_averaged(tmp_path / "c", name=name), average)
    same(checkpoint.restore(tmp_path / "c", state), state)
    with pytest.raises(ValueError, match=r"serves several averages.*name="):
        checkpoint.load_averaged(tmp_path / "c")
    swapped = checkpoint.swap_state(state, name=names)
    same(checkpoint.swap_state(swapped, name=names), state)
    with pytest.raises(ValueError, match=r"all may: name=\('actor/opt_state/1', 'critic"):
        checkpoint.swap_state(state)
    with pytest.raises(ValueError, match="names one average twice"):
        checkpoint.swap_state(state, name=("actor", "actor/opt_state/1"))


def test_new_averages_of_several_networks_are_told_their_parameters(tmp_path):
    nets = {"a": {"w": W}, "b": {"w": B}}
    tx = optax.chain(optax.sgd(0.1), emaopt.average_params(0.5))
    old = {k: optax.sgd(0.1).init(p) for k, p in nets.items()}
    new = {k: tx.init(p) for k, p in nets.items()}
    copies = {k: jax.tree.map(lambda x: x + 1, p) for k, p in nets.items()}
    saved = {"nets": nets, "copies": copies, "opt_state": old}
    with ocp.StandardCheckpointer() as plain:
        plain.save(tmp_path / "c", saved)
    target = saved | {"opt_state": new}
    with pytest.raises(ValueError, match="copies/a, nets/a"):
        checkpoint.restore(tmp_path / "c", target)
    ways = ("nets/a", "nets/b")
    got = checkpoint.restore(tmp_path / "c", target, params=ways, report=lambda _: None)
    for name, p in nets.items():
        same(emaopt.get_average(got["opt_state"][name]), p)
    with pytest.raises(ValueError, match=r"is of 0 of params=\('nets/b', 'copies/b'\)"):
        checkpoint.restore(tmp_path / "c", target, params=("nets/b", "copies/b"))


def test_groups_with_different_decays_are_served_together(tmp_path):
    params = {"w": W, "b": B}
    groups = {
        "a": optimizer("adam", "chained", 0.5),
        "b": optimizer("adam", "chained", 0.9),
    }
    tx = optax.partition(groups, {"w": "a", "b": "b"})
    params, opt_state = trained(tx, params)
    state = {"params": params, "opt_state": opt_state}
    checkpoint.save(tmp_path / "c", state, name=("a", "b"))
    expected = {
        "w": emaopt.get_average(opt_state, params, name="a")["w"],
        "b": emaopt.get_average(opt_state, params, name="b")["b"],
    }
    assert np.any(expected["w"] != params["w"]) and np.any(expected["b"] != params["b"])
    same(ocp.StandardCheckpointer().restore(tmp_path / "c")["params"], expected)
    same(checkpoint.load_averaged(tmp_path / "c"), expected)
    one = checkpoint.load_averaged(tmp_path / "c", name="a")
    same(one, {"w": expected["w"], "b": params["b"]})
    same(checkpoint.restore(tmp_path / "c", state), state)


def test_averages_of_which_some_are_swapped_are_not():
    swapped = checkpoint.swap_state(actor_and_critic(), name="actor")
    with pytest.raises(ValueError, match=r"others do not: actor/.*Swap them back first"):
        checkpoint.swap_state(swapped, name=("actor", "critic"))


def test_slots_of_another_optimizer_are_no_parameters():
    p, o = start()
    state = {"model": p, "other": optax.trace(0.9).init(p), "opt_state": o}
    same(checkpoint.swap_state(state)["model"], emaopt.get_average(o))


def test_two_averages_of_one_tree_are_not():
    tx = optax.named_chain(
        ("sgd", optax.sgd(0.1)),
        ("fast", emaopt.average_params(0.5)),
        ("slow", emaopt.average_params(0.9)),
    )
    params, opt_state = start(tx)
    with pytest.raises(ValueError, match="are both of params/b; only one can stand"):
        checkpoint.swap_state(
            {"params": params, "opt_state": opt_state}, name=("fast", "slow")
        )
