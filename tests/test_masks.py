"""Masks that are trees, masks that are functions, and how a mask changes."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import emaopt
from emaopt import checkpoint, tf1

pytestmark = pytest.mark.quick(2)


class Equinox(eqx.Module):
    w: object
    b: object

    def __call__(self, x):
        return self.w * x + self.b


# Each with a field of its own: JAX takes the structures of dataclasses with the same
# fields for equal, and now and then the one for the other.
@struct.dataclass
class Struct:
    w: object
    b: object
    kind: str = struct.field(pytree_node=False, default="mask, of Flax")

    def __call__(self, x):
        return self.w * x + self.b


class Nnx(nnx.Module):
    def __init__(self, w, b):
        self.w, self.b = nnx.Param(w), nnx.Param(b)

    def __call__(self, x):
        return self.w * x + self.b


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("w", "b"), meta_fields=("kind",)
)
@dataclasses.dataclass
class Dataclass:
    w: object
    b: object
    kind: str = "mask"

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
    _, grads = tf1.compute_gradients(loss, model(kind), var_list=chosen)
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
    _, grads = tf1.compute_gradients(
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
        tf1.compute_gradients(lambda m: 1.0, Empty(), var_list=Empty())


def test_mesh_is_neither_a_sharding_nor_a_mask():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(TypeError, match=r"sharding must be .*got Mesh"):
        emaopt.average_params(0.9, sharding=mesh)
    with pytest.raises(TypeError, match="mask must hold booleans, got Mesh"):
        emaopt.average_params(0.9, mask=mesh).init(jnp.ones(2))


DECAYS = {
    "constant": 0.8,
    "warmup": emaopt.warmup_decay(0.99),
    "uniform": emaopt.uniform_decay(),
    "power": emaopt.power_decay(sigma_rel=0.2),
}
OPTIONS = {
    "plain": {},
    "every": {"every": 3},
    "start": {"start": 2},
    "start, every": {"start": 3, "every": 2},
    "late start": {"start": 9},
    "debias": {"debias": True},
    "debias, start, every": {"debias": True, "start": 2, "every": 3},
}
PARAMS = {"encoder": jnp.array([2.0, -1.0]), "head": jnp.array([0.5])}
FROZEN, STEPS = 5, 12  # the encoder stands still for so many steps of all


def trained(tx, params, state, numbers):
    """Steps of which no two are alike; returns what the parameters were, too."""
    iterates = [params]
    for number in numbers:
        moves = {"encoder": number > FROZEN, "head": True}
        updates = {
            name: moves[name] * jnp.sin(number + jnp.arange(leaf.size)).astype(leaf.dtype)
            for name, leaf in params.items()
        }
        updates, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        iterates.append(params)
    return params, state, iterates


def average_of(iterates, decay, **options):
    weights = emaopt.decay_weights(decay, len(iterates) - 1, **options)
    return {
        name: sum(
            weight * np.float64(iterate[name])
            for weight, iterate in zip(weights, iterates, strict=True)
        )
        for name in iterates[0]
    }


@pytest.mark.quick(2)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("decay", DECAYS)
def test_leaf_that_comes_in_is_averaged_as_if_it_had_stood_still(decay, options):
    decay, options = DECAYS[decay], OPTIONS[options]
    head = emaopt.average_params(decay, mask={"encoder": False, "head": True}, **options)
    both = emaopt.average_params(decay, **options)
    params, state, first = trained(head, PARAMS, head.init(PARAMS), range(1, FROZEN + 1))
    state = emaopt.change_mask(state, params, both)
    later = range(FROZEN + 1, STEPS + 1)
    params, state, second = trained(both, params, state, later)
    expected = average_of(first + second[1:], decay, **options)
    for name, average in emaopt.get_average(state).items():
        np.testing.assert_allclose(average, expected[name], rtol=2e-6, atol=1e-6)
    # To the bit as the average of a run that kept it from the start.
    _, always, _ = trained(both, PARAMS, both.init(PARAMS), range(1, STEPS + 1))
    assert_same(state, always)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())


def test_leaf_that_goes_leaves_the_average_of_the_others_as_it_is():
    both, head = (
        emaopt.averaged(optax.adam(0.1), 0.5, mask=mask)
        for mask in (None, emaopt.by_name("head"))
    )
    params, state, _ = trained(both, PARAMS, both.init(PARAMS), range(1, 4))
    fewer = emaopt.change_mask(state, params, head)
    assert fewer.averaging.average["encoder"] == optax.MaskedNode()
    assert fewer.averaging.average["head"] is state.averaging.average["head"]
    assert_same(fewer.inner_state, state.inner_state)
    assert jax.tree.structure(fewer) == jax.tree.structure(head.init(PARAMS))
    continued = trained(head, params, fewer, range(4, 7))[1].averaging
    always = trained(both, params, state, range(4, 7))[1].averaging
    assert_same(continued.average["head"], always.average["head"])


def of_part(make):
    return lambda part: make({"encoder": part, "head": True})


WAYS = {
    "average_params": of_part(
        lambda mask: optax.chain(optax.sgd(1.0), emaopt.average_params(0.5, mask=mask))
    ),
    "averaged": of_part(lambda mask: emaopt.averaged(optax.sgd(1.0), 0.5, mask=mask)),
    "every, debias": of_part(
        lambda mask: emaopt.averaged(
            optax.sgd(1.0), 0.5, mask=mask, every=2, debias=True, skip_nonfinite=True
        )
    ),
    "inside local updates": of_part(
        lambda mask: emaopt.local_sgd(
            optax.chain(optax.sgd(1.0), emaopt.average_params(0.5, mask=mask)),
            period=2,
            num_workers=2,
        )
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_mask_that_changed_is_refused(way, before, jit):
    params = PARAMS
    if way == "inside local updates":
        params = emaopt.stack_workers(PARAMS, 2)
    state = WAYS[way](before).init(params)
    for part in (before, not before):
        update = WAYS[way](part).update
        update = jax.jit(update) if jit else update
        if part == before:
            update(params, state, params)
            continue
        function = (
            "averaged" if way in ("averaged", "every, debias") else "average_params"
        )
        says = "leaves out" if before else "averages"
        message = f"^{function}: the mask is not the one .*: now it {says} encoder\\. .*"
        with pytest.raises(ValueError, match=message + "emaopt.change_mask"):
            update(params, state, params)


def test_message_lists_ten_leaves_of_each_direction():
    tree = {f"{i:02}": jnp.ones(1) for i in range(25)}
    averager = emaopt.average_tree(0.5, mask={k: k < "12" for k in tree})
    other = emaopt.average_tree(0.5, mask={k: k >= "12" for k in tree})
    message = (
        r"^average_tree: .* averages 12, .*, 21 and 3 more and it leaves out 00, .*, "
        r"09 and 2 more\."
    )
    with pytest.raises(ValueError, match=message):
        other.update(tree, averager.init(tree))


def test_mask_of_optax_that_grew_is_refused_and_can_be_changed():
    make = lambda part: optax.masked(  # noqa: E731
        emaopt.averaged(optax.sgd(1.0), 0.5), {"encoder": part, "head": True}
    )
    state = make(False).init(PARAMS)
    with pytest.raises(ValueError, match="now it averages encoder"):
        make(True).update(PARAMS, state, PARAMS)
    state = emaopt.change_mask(state, PARAMS, make(True))
    assert_same(state, make(True).init(PARAMS))


class Pair(struct.PyTreeNode):
    encoder: object
    head: object


UNCHANGED = {
    "prefix": (PARAMS, {"encoder": False, "head": True}),
    "whole prefix": (PARAMS, False),
    "by_name": (PARAMS, emaopt.by_name("head")),
    "function of dtypes": (
        {
            "w": jnp.ones(2),
            "n": jnp.int32(3),
            "none": None,
            "half": jnp.ones(2, "bfloat16"),
        },
        lambda tree: jax.tree.map(lambda x: x.dtype == jnp.float32, tree),
    ),
    "function of dimensions": (
        {"w": jnp.ones((2, 2)), "b": jnp.ones(2)},
        lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
    ),
    "integers": ({"w": jnp.ones(2), "n": jnp.int32(3)}, {"w": True, "n": False}),
    "struct": (Pair(jnp.ones(2), jnp.ones(2)), Pair(True, False)),
    "LookaheadParams": (
        optax.LookaheadParams(jnp.ones(2), jnp.ones(2)),
        optax.LookaheadParams(False, True),
    ),
    "function of values": (
        {"w": jnp.ones(2), "b": jnp.zeros(2)},
        lambda tree: jax.tree.map(lambda x: bool(jnp.any(x != 0)), tree),
    ),
    "empty": ({}, {}),
    "empty, by_name": ({}, emaopt.by_name("w")),
    "none": ({"w": jnp.ones(2), "none": None}, None),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_mask_that_did_not_change_is_taken(case):
    params, mask = UNCHANGED[case]
    averager = emaopt.average_tree(0.5, mask=mask)
    state = averager.init(params)
    assert_same(jax.jit(averager.update)(params, state).average, state.average)
    assert_same(averager.update(params, state).average, state.average)


def test_mask_of_leaves_that_are_never_averaged_may_change():
    params = {"w": jnp.ones(2), "n": jnp.int32(3)}
    state = emaopt.average_tree(0.5, mask={"w": True, "n": False}).init(params)
    state = emaopt.average_tree(0.5).update(params, state)
    assert state.average["n"] == optax.MaskedNode()


def test_mask_of_sizes_is_that_of_whole_parameters_where_few_rows_move():
    params = {"table": jnp.ones((8, 2)), "w": jnp.ones(2)}
    small = lambda tree: jax.tree.map(lambda x: x.size < 10, tree)  # noqa: E731
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, mask=small)
    rows = BCOO((jnp.ones((1, 2)), jnp.array([[3]])), shape=(8, 2))
    grads = {"table": rows, "w": jnp.ones(2)}
    params, state = tf1.apply_gradients(
        tx, grads, tx.init(params), params, touched_rows_only=True
    )
    assert params["table"][3, 0] == 0 and params["table"][2, 0] == 1
    assert state.averaging.average["table"] == optax.MaskedNode()
    # Of whole parameters, later, a mask that changed is still refused.
    other = emaopt.averaged(optax.sgd(1.0), 0.5)
    with pytest.raises(ValueError, match="the mask is not the one"):
        other.update({"table": jnp.ones((8, 2)), "w": jnp.ones(2)}, state, params)


def test_what_comes_in_is_where_the_optimizer_puts_it():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    options = {"accumulator_dtype": jnp.bfloat16, "sharding": "data"}
    head = emaopt.average_params(0.5, mask=emaopt.by_name("head"), **options)
    both = emaopt.average_params(0.5, **options)
    state = emaopt.change_mask(head.init(params), params, both)
    encoder = state.average["encoder"]
    assert (encoder.dtype, encoder.sharding.spec) == (jnp.bfloat16, P("data"))
    assert_same(state, both.init(params))
    update = jax.jit(both.update)
    with jax.set_mesh(mesh):
        for _ in range(2):
            _, state = update(params, state, params)
    assert update._cache_size() == 1


def test_what_comes_in_is_a_copy():
    tx = emaopt.average_tree(0.5, mask=False)
    average = emaopt.change_mask(
        tx.init(PARAMS), PARAMS, emaopt.average_tree(0.5, zero_init=True)
    ).average
    assert_same(average, PARAMS)
    for leaf, param in zip(*map(jax.tree.leaves, (average, PARAMS)), strict=True):
        assert leaf.unsafe_buffer_pointer() != param.unsafe_buffer_pointer()


def test_one_of_several_averages_changes_through_wrappers_and_under_jit():
    def make(part):
        mask = {"encoder": part, "head": True}
        chain = optax.named_chain(
            ("sgd", optax.sgd(1.0)),
            ("fast", emaopt.average_params(0.5, mask=mask)),
            ("slow", emaopt.average_params(0.9)),
        )
        return optax.apply_if_finite(chain, 3)

    params, state, _ = trained(make(False), PARAMS, make(False).init(PARAMS), [1])
    change = jax.jit(lambda s, p: emaopt.change_mask(s, p, make(True), name="fast"))
    changed = change(state, params)
    assert_same(
        emaopt.get_average(changed, name="slow"), state.inner_state["slow"].average
    )
    trained(make(True), params, changed, [2])


def test_average_of_an_nnx_optimizer_changes_in_its_own_variables():
    net = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    make = lambda mask: emaopt.averaged(optax.adam(0.1), 0.5, mask=mask)  # noqa: E731
    optimizer = nnx.Optimizer(net, make(emaopt.by_name("kernel")), wrt=nnx.Param)
    step = lambda: optimizer.update(  # noqa: E731
        net, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(net)
    )
    step()
    kinds = jax.tree.structure(nnx.Optimizer(net, make(None), wrt=nnx.Param).opt_state)
    params = nnx.state(net, nnx.Param)
    changed = emaopt.change_mask(optimizer.opt_state, params, make(None))
    assert jax.tree.structure(changed) == kinds
    optimizer.opt_state, optimizer.tx = nnx.data(changed), make(None)
    old = net.bias[...]
    step()
    bias = emaopt.get_average(optimizer, nnx.state(net, nnx.Param))["bias"][...]
    np.testing.assert_allclose(bias, (old + net.bias[...]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda tx: emaopt.change_mask(tx.init(PARAMS), PARAMS, "adam"),
            TypeError,
            "change_mask: optimizer must be an optax.GradientTransformation",
        ),
        (
            lambda tx: emaopt.change_mask(
                tx.init(PARAMS), PARAMS, emaopt.average_params(0.5, debias=True)
            ),
            ValueError,
            "change_mask: the optimizer has debias=True, but the state .* debias=False",
        ),
        (
            lambda tx: emaopt.change_mask(tx.init(PARAMS), PARAMS, optax.sgd(1.0)),
            ValueError,
            "change_mask: no average in this optimizer state",
        ),
        (
            lambda tx: emaopt.change_mask(
                emaopt.swap(PARAMS, tx.init(PARAMS))[1], PARAMS, tx
            ),
            ValueError,
            "change_mask: this state is swapped",
        ),
        (
            lambda tx: emaopt.change_mask(tx.init({"other": jnp.ones(1)}), PARAMS, tx),
            ValueError,
            "change_mask: the average is of other parameters.* holds other",
        ),
    ],
)
def test_change_of_a_mask_that_cannot_be_says_why(change, error, message):
    with pytest.raises(error, match=message):
        change(emaopt.average_params(0.5))
