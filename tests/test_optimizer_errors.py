"""What tf.train.Optimizer refuses and allows, fact by fact, and further mistakes."""

import builtins
import re

import jax.numpy as jnp
import optax
import pytest
from tensorflow_records import facts

from emaopt import tf1

pytestmark = pytest.mark.quick(1000)  # all of them are

SGD = optax.sgd(0.1)
V = {"v": jnp.float32(1.0)}
AB = {"a": jnp.array([1.0, 2.0]), "b": jnp.ones(2)}


def compute(loss=lambda p: p["v"] ** 2, params=V, **options):
    return tf1.compute_gradients(loss, params, **options)


def apply(grads, params=V, tx=SGD, **options):
    return tf1.apply_gradients(tx, grads, tx.init(params), params, **options)[0]


def minimize(loss, params=AB, tx=SGD, **options):
    return tf1.minimize(tx, loss, tx.init(params), params, **options)


NO_GRADIENTS = "No gradients provided for any variable"
GATES = r"gate_gradients must be one of: .*GATE_NONE, .*GATE_OP, .*GATE_GRAPH\. +Not "
# What TensorFlow refuses: how it is done here, and words of both messages.
REFUSED = {
    "apply_gradients([])": (lambda: apply({}, {}), "No variables provided."),
    "apply_gradients([(None,v)])": (lambda: apply({"v": None}), NO_GRADIENTS),
    "apply_gradients([('str',v)])": (lambda: apply({"v": "str"}), "str"),
    "apply_gradients([(object(),v)])": (lambda: apply({"v": object()}), "must be"),
    "apply_gradients([(g,)]) malformed pair": (lambda: apply((1.0,)), "[Ee]xpected"),
    "gradient of the wrong shape": (lambda: apply({"v": jnp.ones(2)}), "[Ss]hape"),
    "compute_gradients(gate_gradients=3)": (
        lambda: compute(gate_gradients=3),
        GATES + "3",
    ),
    "compute_gradients(gate_gradients='GATE_OP')": (
        lambda: compute(gate_gradients="GATE_OP"),
        GATES,
    ),
    "compute_gradients, no trainable variables": (
        lambda: compute(lambda p: jnp.ones(()), {"n": jnp.int32(3)}),
        "No variables to optimize.",
    ),
    "compute_gradients(var_list=[])": (
        lambda: compute(var_list=[]),
        "No variables to optimize.",
    ),
    "compute_gradients(int loss)": (lambda: compute(lambda p: 3), "int32"),
    "compute_gradients(var_list=[1.0])": (
        lambda: compute(var_list={"v": 1.0}),
        "float|1.0",
    ),
    "minimize, loss does not depend on var_list": (
        lambda: minimize(lambda p: p["a"].sum(), var_list="b"),
        NO_GRADIENTS,
    ),
}
# Where the kind of error is not TensorFlow's.
OTHER_KIND = {
    "compute_gradients(int loss)": TypeError,
    "compute_gradients(var_list=[1.0])": TypeError,  # as TensorFlow's documentation says
}
# What TensorFlow allows, and is the same here: a call that returns the recorded result.
ALLOWED = {
    "python-float gradient is converted": lambda: "NoOp" if apply({"v": 1.0}) else None,
    "compute_gradients unconnected var gives None": lambda: [
        str(compute(lambda p: p["a"].sum(), AB)[1]["b"])
    ],
    "constraint is applied after the update: a=[1,2], loss 5a, lr 3, clip to [-.1,0]": (
        lambda: minimize(
            lambda p: 5 * p,
            AB["a"],
            optax.chain(optax.sgd(3.0), tf1.constrain(lambda p: jnp.clip(p, -0.1, 0))),
        )[1].tolist()
    ),
    "callable loss in graph mode": lambda: [str(compute()[1]["v"] is not None)],
    "GATE constants": lambda: {
        name: getattr(tf1, name) for name in ("GATE_NONE", "GATE_OP", "GATE_GRAPH")
    },
}
NO_NAME = "an optimizer has no name; optax.named_chain names parts of a state"
A_TENSOR = "apply_gradients([(tf.constant(1.),tf.constant(1.))]) target is a Tensor"
NO_VARIABLE = "parameters are values: there is no variable or tensor to tell apart"
NO_OP = "a step returns its results; there is no operation and no collection"
FROM_INIT = "slots are there from init on, for every parameter"
WITHOUT_COUNTERPART = {
    "Optimizer(use_locking=False,name='')": NO_NAME,
    "Optimizer(False,None)": NO_NAME,
    "default names": NO_NAME,
    "slot name under scopes (variable in net/, optimizer in train/)": NO_NAME,
    "base-class apply_gradients (abstract)": "a transformation is a pair of functions",
    "apply_gradients with a generator": "gradients are a tree like the parameters",
    A_TENSOR: NO_VARIABLE,
    "apply_gradients([(1.0, 3.0)]) target is a float": NO_VARIABLE,
    "compute_gradients w.r.t. a Tensor": NO_VARIABLE,
    "then apply_gradients on it": NO_VARIABLE,
    "gradient dtype float64 for float32 variable": "cast, as optax.apply_updates does",
    "compute_gradients(var_list=['v'])": "allowed: a name chooses a parameter",
    "constraint with a sparse gradient": "allowed: the projection gets the touched rows",
    "minimize(global_step) returned op": NO_OP,
    "minimize(name='mytrain') op name": NO_OP,
    "apply_gradients twice on one variable: slot is shared": NO_OP,
    "get_slot / get_slot_names / variables before apply_gradients": FROM_INIT,
    "no slot for a variable whose gradient is None": FROM_INIT,
}
FACTS = {fact["title"]: fact for fact in facts("base_optimizer/facts", "facts")}


def test_every_fact_has_a_counterpart_or_a_reason():
    assert sorted(FACTS) == sorted([*REFUSED, *ALLOWED, *WITHOUT_COUNTERPART])


@pytest.mark.parametrize("title", REFUSED)
def test_what_tensorflow_refuses_is_refused(title):
    call, words = REFUSED[title]
    theirs = FACTS[title]
    kind = OTHER_KIND.get(title) or getattr(builtins, theirs["raises"])
    assert re.search(words, theirs["message"])
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("title", ALLOWED)
def test_what_tensorflow_returns_is_returned(title):
    assert ALLOWED[title]() == pytest.approx(FACTS[title]["result"])


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda: compute(jnp.ones(())), TypeError, "loss` should be a function"),
        (lambda: compute(var_list=["w"]), ValueError, "names w; the variables are v"),
        (lambda: compute(var_list={"w": True}), ValueError, "tree of booleans like"),
        (lambda: compute(gate_gradients=True), ValueError, GATES),
        (lambda: compute(grad_loss=jnp.ones(2)), ValueError, r"\(2,\), the loss \(\)"),
        (lambda: compute(lambda p: (p["v"], 1)), TypeError, "pass has_aux=True"),
        (lambda: compute(lambda p: p["v"] * 1j), TypeError, "complex64"),
        (lambda: compute(lambda p: None), TypeError, "floating array, got NoneType"),
        (
            lambda: compute(lambda p: p["v"], has_aux=True),
            TypeError,
            r"with has_aux=True the loss must return \(value, aux\)",
        ),
        (lambda: minimize(lambda p: 3.0), ValueError, NO_GRADIENTS + ".*none of a, b"),
        (lambda: apply({"w": 1.0}), ValueError, "tree like the parameters"),
        (
            lambda: tf1.apply_gradients(SGD, V | {"f": None}, (), V | {"f": jnp.tanh}),
            TypeError,
            "the parameter f must be an array, got .*eqx.partition",
        ),
        (
            lambda: tf1.apply_gradients(optax.MultiSteps(SGD, 2), V, (), V),
            TypeError,
            r"Of an optax.MultiSteps, give its gradient_transformation\(\)",
        ),
        (lambda: tf1.gate_gradients(3), ValueError, "gate_gradients: " + GATES),
        (
            lambda: tf1.minimize(optax.sgd, lambda p: p["v"], (), V),
            TypeError,
            "minimize: optimizer must be an optax.GradientTransformation",
        ),
        (
            lambda: tf1.apply_gradients(SGD.update, V, (), V),
            TypeError,
            "apply_gradients: optimizer must be an optax.GradientTransformation",
        ),
    ],
)
def test_further_mistakes_say_what_is_wrong(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
