"""Adopting, dropping and moving averages: saved by one optimizer, restored by another.

Forms that an optimizer and its average may have × containers of slots × containers of
parameters × layouts of training states × doors. What is right is put together by hand.
"""

from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1
from test_optimizer_slots import OPTIMIZERS
from test_places import CONTAINERS, LAYOUTS, PARAMS, WAYS, heavy_ball, same

import emaopt
from emaopt import checkpoint
from emaopt._optimizer_states import optimizer_roots

AVERAGE = emaopt.average_params(0.5)
MULTI = optax.MultiSteps(optax.sgd(0.1), 1).init({"x": jnp.ones(1)})


class Form:
    """How an optimizer stands beside or around its average, and what state that is."""

    def __init__(self, make, state, averages=True, own=False):
        self.make, self.state, self.averages, self.own = make, state, averages, own


def multi(tx):
    return optax.MultiSteps(tx, 1).gradient_transformation()


FORMS = {
    "alone": Form(lambda inner: inner, lambda s, a: s, averages=False),
    "chained": Form(lambda inner: optax.chain(inner, AVERAGE), lambda s, a: (s, a)),
    "second": Form(
        lambda inner: optax.chain(optax.clip(9.0), inner, AVERAGE),
        lambda s, a: (optax.EmptyState(), s, a),
    ),
    "second alone": Form(
        lambda inner: optax.chain(optax.clip(9.0), inner),
        lambda s, a: (optax.EmptyState(), s),
        averages=False,
    ),
    "named": Form(
        lambda inner: optax.named_chain(("inner", inner), ("average", AVERAGE)),
        lambda s, a: OrderedDict(inner=s, average=a),
    ),
    "averaged": Form(
        lambda inner: emaopt.averaged(inner, 0.5), lambda s, a: emaopt.AveragedState(s, a)
    ),
    "masked": Form(
        lambda inner: optax.masked(
            optax.chain(inner, AVERAGE), lambda p: jax.tree.map(lambda _: True, p)
        ),
        lambda s, a: optax.MaskedState((s, a)),
    ),
}


def moved(tree):
    """Values that nothing starts with, each leaf's its own."""
    leaves, treedef = jax.tree.flatten(tree)

    def move(i, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.fold_in(leaf, i)
        return (leaf + 3 + i).astype(leaf.dtype)

    return jax.tree.unflatten(treedef, [move(*pair) for pair in enumerate(leaves)])


def average_of(params):
    """An average that has moved, and one that starts from the parameters."""
    fresh: Any = AVERAGE.init(params)
    return moved(fresh._replace(pending=jnp.ones(()))), fresh


def write(door, path, state, served):
    if not served:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, state)
    elif door == "v1":
        v1.save(
            path,
            checkpoint.swap_state(state),
            custom_metadata=checkpoint.metadata(state),
        )
    else:
        checkpoint.save(path, state)


def bits(tree):
    return sorted(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def read_by_orbax(path, way):
    """What a program that knows nothing of emaopt finds as the parameters."""
    directory = next(path.rglob("_METADATA")).parent
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(directory).tree
    like = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    tree = handler.restore(directory, args=ocp.args.PyTreeRestore(restore_args=like))
    for name in way.split("/"):
        tree = tree[int(name) if isinstance(tree, list) else name]
    return bits(tree)


def quiet(_):
    pass


def check(tmp_path, inner, params, layout, old, door="restore", **options):
    """Restores what one form saved by all others, against what is right by hand."""
    params = moved(params)
    inner_state = moved(inner.init(params))
    average, fresh = average_of(params)
    state = LAYOUTS[layout](params, FORMS[old].state(inner_state, average))
    path = tmp_path / "c"
    if door == "manager":
        registry = checkpoint.handler_registry(optional=True, report=quiet)
        with ocp.CheckpointManager(tmp_path / "run", handler_registry=registry) as m:
            m.save(1, args=ocp.args.StandardSave(state))
    else:
        write(door, path, state, FORMS[old].averages)
    if FORMS[old].averages:
        there = path if door != "manager" else tmp_path / "run/1/default"
        assert read_by_orbax(there, WAYS[layout]) == bits(average.average)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for new, form in FORMS.items():
        target = LAYOUTS[layout](zeros, form.make(inner).init(zeros))
        kept = average if FORMS[old].averages else fresh
        right = LAYOUTS[layout](params, form.state(inner_state, kept))
        if door == "manager":
            registry = checkpoint.handler_registry(report=quiet)
            with ocp.CheckpointManager(tmp_path / "run", handler_registry=registry) as m:
                restored = m.restore(1, args=ocp.args.StandardRestore(target))
        else:
            restored = checkpoint.restore(path, target, report=quiet, **options)
        try:
            same(restored, right)
        except AssertionError as error:
            raise AssertionError(f"{old} to {new}: {error}") from None


@pytest.mark.quick(1)
@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("slots", [*CONTAINERS, "adam"])
def test_slots_in_any_container_move_with_their_unit(slots, old, tmp_path):
    inner = optax.adam(0.1) if slots == "adam" else heavy_ball(slots)
    check(tmp_path, inner, {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "params", old)


@pytest.mark.quick(1)
@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_is_adopted_and_dropped_below_any_keys(layout, old, tmp_path):
    check(
        tmp_path, optax.adam(0.1), {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, layout, old
    )


@pytest.mark.quick(1)
@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("container", PARAMS)
def test_parameters_in_any_container_may_be_adopted(container, old, tmp_path):
    check(tmp_path, optax.sgd(0.1, momentum=0.9), PARAMS[container](), "train", old)


@pytest.mark.quick(1)
@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("slots", ["dict", "tuple", "adam"])
@pytest.mark.parametrize("door", ["manager", "v1"])
def test_an_average_is_adopted_and_dropped_through_any_door(door, slots, old, tmp_path):
    inner = optax.adam(0.1) if slots == "adam" else heavy_ball(slots)
    check(tmp_path, inner, {"w": jnp.ones((2, 3))}, "params", old, door)


def preconditioned(names, lists):
    """An optimizer with its state in a dict: counters, slots, and lists of factors.

    So do PSGD's Kron (one tree of lists) and SOAP's ports (a list of lists).
    """

    def init(params):
        def factors(p):
            return [jnp.eye(n) for n in p.shape] or [jnp.ones_like(p)]

        state = {"count": jnp.zeros((), jnp.int32)}
        state |= {name: jax.tree.map(jnp.zeros_like, params) for name in names}
        if lists:
            state |= {n: [factors(p) for p in jax.tree.leaves(params)] for n in lists}
        else:
            state["factors"] = jax.tree.map(factors, params)
        return state

    return optax.GradientTransformation(
        init, lambda updates, state, params=None: (updates, state)
    )


PRECONDITIONED = {
    "kron": lambda rate: preconditioned(("mu",), ()),
    "soap": lambda rate: preconditioned(("exp_avg", "exp_avg_sq"), ("GG", "Q")),
}


def saved_by(name):
    # Orbax stores no array of size 0, as GaLore has for vectors; `save` records it.
    return ["chained", "averaged"] + ["alone"] * (name != "galore")


@pytest.mark.parametrize(
    ("name", "old"),
    [(name, old) for name in OPTIMIZERS | PRECONDITIONED for old in saved_by(name)],
)
def test_every_optimizer_adopts_and_drops_an_average(name, old, tmp_path):
    inner = (OPTIMIZERS | PRECONDITIONED)[name](0.1)
    params = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones((2, 2)), "d": jnp.ones(3)}}
    check(tmp_path, inner, params, "params", old)


def test_keys_of_optimizers_are_told_from_words_that_hold_them():
    for key in (
        "opt",
        "opts",
        "opt_state",
        "actor_opt",
        "optim",
        "optimizers",
        "q_opt_1",
    ):
        assert optimizer_roots({key: {"x": 1.0}}, typed=False) == [(key,)], key
    for key in ("adopt", "option", "optic_flow", "topt_state", "opto"):
        assert optimizer_roots({key: {"x": 1.0}}, typed=False) == [], key


def test_states_are_told_by_their_members():
    x, count = jnp.ones(2), jnp.int32(0)
    average = {"num_updates": count, "num_skipped": count, "pending": x, "average": x}
    of_ours = {"params": x, "tx": {"inner_state": {"mu": x}, "averaging": average}}
    assert optimizer_roots(of_ours, typed=False) == [("tx",)]
    # A list of states has one for each network; another one is a state's own.
    states = {"params": x, "opts": [A.init(x), A.init(x)]}
    assert optimizer_roots(states, typed=True) == [("opts", "0"), ("opts", "1")]
    state = {"params": x, "opts": [x, {"mu": x}]}
    assert optimizer_roots(state, typed=True) == [("opts",)]


# What could be two things


A, B = emaopt.average_params(0.5), emaopt.average_params(0.9)
SGD = optax.sgd(1.0)


def trace(decay):
    return optax.trace(decay)


CLIP = optax.clip(9.0)


def below(tx, *positions):
    """A chain of a chain ..., with the transformation at these positions."""
    for position in reversed(positions):
        tx = optax.chain(*[CLIP] * position, tx)
    return tx


def run(tx, steps=3) -> Any:
    params = {"w": jnp.zeros(())}
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update({"w": -jnp.ones(())}, state, params)
        params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": state}


def moves(tmp_path, old, new, **options) -> tuple[Any, Any]:
    """What `new` restores of a run of `old`, and that run's own state."""
    state = run(old)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", state)
    restored = checkpoint.restore(tmp_path / "c", run(new, 0), report=quiet, **options)
    same(restored["params"], state["params"])
    return restored["opt_state"], state["opt_state"]


CROSSED = {
    "a member before two averages": (
        optax.chain(SGD, A, B),
        optax.chain(optax.clip(9.0), SGD, A, B),
    ),
    "a member less": (optax.chain(optax.clip(9.0), SGD, A, B), optax.chain(SGD, A, B)),
    "a member between": (
        optax.chain(SGD, A, B),
        optax.chain(SGD, A, optax.clip(9.0), B),
    ),
    "a second average before": (optax.chain(SGD, B), optax.chain(SGD, A, B)),
    "a second average behind": (optax.chain(SGD, A), optax.chain(SGD, A, B)),
    "one of two averages less": (optax.chain(SGD, A, B), optax.chain(SGD, B)),
    "two momenta": (
        optax.chain(trace(0.5), trace(0.9)),
        optax.chain(optax.clip(9.0), trace(0.5), trace(0.9)),
    ),
    "a second momentum": (trace(0.9), optax.chain(trace(0.5), trace(0.9))),
    "two momenta out of their order": (
        optax.chain(optax.clip(9.0), trace(0.5), trace(0.9)),
        optax.chain(
            optax.chain(optax.clip(9.0), optax.clip(9.0), trace(0.9)), trace(0.5)
        ),
    ),
    "names for one of two": (
        optax.chain(SGD, A, B),
        optax.named_chain(("sgd", SGD), ("slow", B)),
    ),
    "names for two": (
        optax.chain(SGD, A, B),
        optax.named_chain(("sgd", SGD), ("fast", A), ("slow", B)),
    ),
    "nested the other way round": (
        optax.chain(optax.chain(SGD, A), B),
        optax.chain(B, optax.chain(SGD, A)),
    ),
    "momenta that could be one of the two only": (
        optax.chain(CLIP, optax.chain(CLIP, CLIP, trace(0.5)), CLIP, trace(0.9)),
        optax.chain(CLIP, CLIP, below(trace(0.5), 1, 3, 1), below(trace(0.9), 1, 3)),
    ),
    "momenta nested the other way round": (
        optax.chain(optax.chain(trace(0.5)), optax.clip(9.0), trace(0.9)),
        optax.chain(trace(0.9), optax.clip(9.0), optax.chain(trace(0.5))),
    ),
    "one average for a wrapper's and a named one": (
        optax.chain(SGD, B),
        emaopt.averaged(optax.named_chain(("sgd", SGD), ("slow", B)), 0.5),
    ),
    "a wrapper's and a named one for one average": (
        emaopt.averaged(optax.named_chain(("sgd", SGD), ("slow", B)), 0.5),
        optax.chain(SGD, B),
    ),
    "a named one that became a wrapper's": (
        optax.named_chain(("sgd", SGD), ("fast", A), ("slow", B)),
        emaopt.averaged(optax.named_chain(("sgd", SGD), ("fast", A)), 0.9),
    ),
    "names lost": (
        optax.named_chain(("fast", A), ("slow", B)),
        optax.chain(SGD, A, B),
    ),
}


@pytest.mark.quick(20)
@pytest.mark.parametrize("case", CROSSED)
def test_averages_and_momenta_never_cross(case, tmp_path):
    old, new = CROSSED[case]
    with pytest.raises(ValueError, match=r"which is which.*rename="):
        moves(tmp_path, old, new)
    with pytest.raises(ValueError, match=r"which is which.*rename="):
        moves(tmp_path / "2", old, new, keep_missing=True, ignore_extra=True)


TOLD = {
    "a member behind": (
        optax.chain(SGD, A, B),
        optax.chain(SGD, A, B, optax.clip(9.0)),
        lambda s: (*s, optax.EmptyState()),
    ),
    "chained once more": (
        optax.chain(A, B),
        optax.chain(optax.clip(9.0), optax.chain(A, B)),
        lambda s: (optax.EmptyState(), s),
    ),
    "each in its own chain": (
        optax.chain(trace(0.5), trace(0.9)),
        optax.chain(optax.chain(trace(0.5), SGD), optax.chain(trace(0.9), SGD)),
        lambda s: tuple((one, SGD.init({})) for one in s),
    ),
    "wrapped": (
        optax.chain(SGD, A, B),
        optax.masked(optax.chain(SGD, A, B), {"w": True}),
        optax.MaskedState,
    ),
    "named": (
        optax.named_chain(("sgd", SGD), ("fast", A), ("slow", B)),
        optax.named_chain(("clip", optax.clip(9.0)), ("slow", B), ("fast", A)),
        lambda s: OrderedDict(clip=optax.EmptyState(), slow=s["slow"], fast=s["fast"]),
    ),
}


@pytest.mark.quick(20)
@pytest.mark.parametrize("case", TOLD)
def test_what_names_and_places_tell_is_restored(case, tmp_path):
    old, new, right = TOLD[case]
    restored, state = moves(tmp_path, old, new)
    same(restored, right(state))


WRAPPED = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "averaged": lambda tx: emaopt.averaged(tx, 0.5),
    "lookahead": lambda tx: optax.lookahead(tx, 5, 0.5),
    "masked": lambda tx: optax.masked(tx, {"w": True}),
    "MultiSteps": multi,
    "our lookahead": lambda tx: emaopt.lookahead(tx, period=3),
    "partition": lambda tx: optax.partition({"all": tx}, {"w": "all"}),
    "sam": lambda tx: optax.contrib.sam(tx, SGD),
    "sam's other": lambda tx: optax.contrib.sam(SGD, tx),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
}


@pytest.mark.quick(20)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_slots_move_inside_of_any_wrapper(wrapper, tmp_path):
    params: Any = {"w": jnp.ones(2)}
    of = optax.LookaheadParams(params, params) if wrapper == "lookahead" else params
    old, new = map(WRAPPED[wrapper], (trace(0.9), optax.chain(CLIP, trace(0.9))))
    saved = moved(old.init(of))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": params, "opt_state": saved})
    target = {"params": params, "opt_state": new.init(of)}
    back = checkpoint.restore(tmp_path / "c", target, report=quiet)["opt_state"]
    assert bits(back) == bits(saved)


def test_a_second_average_is_adopted_by_its_name(tmp_path):
    old = optax.named_chain(("sgd", SGD), ("fast", A))
    new = optax.named_chain(("sgd", SGD), ("slow", B), ("fast", A))
    restored, state = moves(tmp_path, old, new)
    same(restored["fast"], state["fast"])
    same(restored["slow"], B.init({"w": jnp.full((), 3.0)}))


def test_an_average_that_another_one_replaces_is_told_how_it_would_go_on(tmp_path):
    old = optax.named_chain(("sgd", SGD), ("ema", A))
    new = optax.named_chain(("sgd", SGD), ("average", A))
    state, said = run(old), []
    checkpoint.save(tmp_path / "c", state)
    target = run(new, 0)
    checkpoint.restore(tmp_path / "c", target, report=said.append)
    rename = {"opt_state/ema": "opt_state/average"}
    assert sum(f"say rename={rename}" in one for one in said) == 1
    back = checkpoint.restore(tmp_path / "c", target, rename=rename, report=quiet)
    same(back["opt_state"]["average"], state["opt_state"]["ema"])
    said.clear()
    checkpoint.restore(tmp_path / "c", run(SGD, 0), report=said.append)
    assert any("the target has none" in one for one in said)
    assert not any("rename=" in one for one in said)


def test_rename_says_which_is_which(tmp_path):
    old = optax.chain(SGD, A, B)
    new = optax.chain(optax.clip(9.0), SGD, A, B)
    rename = {"opt_state/1": "opt_state/2", "opt_state/2": "opt_state/3"}
    restored, state = moves(tmp_path, old, new, rename=rename)
    same(restored[2:], state[1:])
    # One of two: the other one is new.
    restored, state = moves(
        tmp_path / "2",
        optax.chain(SGD, B),
        optax.chain(SGD, A, B),
        rename={"opt_state/1": "opt_state/2"},
    )
    same(restored[2], state[1])
    same(restored[1], A.init({"w": jnp.full((), 3.0)}))


def test_rename_through_the_manager(tmp_path):
    registry = checkpoint.handler_registry(
        name="2",
        rename={"opt_state/1": "opt_state/2", "opt_state/2": "opt_state/3"},
        report=quiet,
    )
    state = run(optax.chain(SGD, A, B))
    target = run(optax.chain(optax.clip(9.0), SGD, A, B), 0)
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        restored = manager.restore(1, args=ocp.args.StandardRestore(target))
    same(restored["opt_state"][2:], state["opt_state"][1:])


WRONG_NAMES = {
    "nothing there": {"opt_state/7": "opt_state/2"},
    "nowhere to go": {"opt_state/1": "opt_state/7"},
    "twice": {"opt_state/1": "opt_state/2", "opt_state/2": "opt_state/2"},
}


@pytest.mark.parametrize("case", WRONG_NAMES)
def test_rename_of_what_is_not_there_is_refused(case, tmp_path):
    with pytest.raises(ValueError, match=r"rename=.*holds nothing at"):
        moves(
            tmp_path,
            optax.chain(SGD, A, B),
            optax.chain(optax.clip(9.0), SGD, A, B),
            rename=WRONG_NAMES[case],
        )


def test_each_network_of_a_list_may_adopt_its_own(tmp_path):
    params = [{"w": jnp.ones(2)}, {"w": jnp.ones(2)}]  # twins: nothing else tells them
    alone, new = optax.adam(0.1), optax.chain(optax.clip(9.0), optax.adam(0.1), A)
    states = [moved(alone.init(p)) for p in params]
    states[1] = moved(states[1])
    params[1] = moved(params[1])
    saved = {"params": params, "opt_states": states}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", saved)
    for some in ((0,), (1,), (0, 1)):
        made = [new.init(p) if i in some else alone.init(p) for i, p in enumerate(params)]
        right = [
            (optax.EmptyState(), states[i], A.init(p)) if i in some else states[i]
            for i, p in enumerate(params)
        ]
        restored = checkpoint.restore(
            tmp_path / "c",
            {"params": params, "opt_states": made},
            params={f"opt_states/{i}": f"params/{i}" for i in some},
            report=quiet,
        )
        same(restored, {"params": params, "opt_states": right})
    target = {"params": params, "opt_states": [new.init(p) for p in params]}
    with pytest.raises(ValueError, match=r"could be of any of params/0, params/1"):
        checkpoint.restore(tmp_path / "c", target, report=quiet)
    with pytest.raises(ValueError, match=r"as params={'opt_states/0/2': 'params/0'}"):
        checkpoint.restore(
            tmp_path / "c", target, params=("params/0", "params/1"), report=quiet
        )


def test_labels_of_a_partition_keep_their_slots_apart(tmp_path):
    def partition(wrap):
        return optax.partition(
            {"a": wrap(optax.adam(0.1)), "b": wrap(optax.adam(0.2))}, {"x": "a", "y": "b"}
        )

    params = {"x": jnp.ones(2), "y": jnp.ones(2)}
    old = partition(lambda tx: tx)
    new = emaopt.averaged(partition(lambda tx: optax.chain(optax.clip(9.0), tx)), 0.5)
    state = moved(old.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": params, "opt_state": state})
    restored = checkpoint.restore(
        tmp_path / "c", {"params": params, "opt_state": new.init(params)}, report=quiet
    )["opt_state"]
    for label in "ab":
        there = restored.inner_state.inner_states[label].inner_state
        same(there[1], state.inner_states[label].inner_state)


# Kinds of numbers

KINDS = {
    "complex64 to float32": (jnp.complex64(1 + 2j), jnp.float32(0), False),
    "float32 to complex64": (jnp.float32(1), jnp.complex64(0), False),
    "float32 to int32": (jnp.float32(2.7), jnp.int32(0), False),
    "int32 to float32": (jnp.int32(2), jnp.float32(0), False),
    "bool to int32": (jnp.bool_(True), jnp.int32(0), False),
    "int32 to bool": (jnp.int32(2), jnp.bool_(False), False),
    "int32 to int16": (jnp.int32(70000), jnp.int16(0), False),
    "int32 to uint32": (jnp.int32(-1), jnp.uint32(0), False),
    "uint32 to int32": (jnp.uint32(2**31 + 1), jnp.int32(0), False),
    "int16 to int32": (jnp.int16(-3), jnp.int32(0), True),
    "uint8 to int16": (jnp.uint8(255), jnp.int16(0), True),
    "float32 to bfloat16": (jnp.float32(1.5), jnp.bfloat16(0), True),
    "bfloat16 to float32": (jnp.bfloat16(1.5), jnp.float32(0), True),
    "float16 to bfloat16": (jnp.float16(1.5), jnp.bfloat16(0), True),
    "a number to int32": (7, jnp.int32(0), True),
    "int32 to a number": (jnp.int32(7), 0, True),
    "a number to float32": (7, jnp.float32(0), False),
    "a fraction to float32": (2.5, jnp.float32(0), True),
    "float32 to text": (jnp.float32(7), "", False),
    "a number to text": (7, "", False),
}


@pytest.mark.quick(20)
@pytest.mark.parametrize("case", KINDS)
def test_restore_keeps_kinds_of_numbers(case, tmp_path):
    saved, target, keeps = KINDS[case]
    state = run(optax.chain(SGD, A))
    checkpoint.save(tmp_path / "c", state | {"x": saved})
    if keeps:
        restored = checkpoint.restore(tmp_path / "c", state | {"x": target})["x"]
        assert restored == saved
        assert jnp.result_type(restored) == jnp.result_type(target)
    else:
        with pytest.raises(ValueError, match=r"x is .* there and .* in the target"):
            checkpoint.restore(tmp_path / "c", state | {"x": target})


@pytest.mark.parametrize("target", [jnp.float32(0), 0])
def test_text_is_no_number(target, tmp_path):
    state = run(optax.chain(SGD, A))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", state | {"x": "7"})
    with pytest.raises(ValueError, match=r"x is text there and .* in the target"):
        checkpoint.restore(tmp_path / "c", state | {"x": target})
    assert checkpoint.restore(tmp_path / "c", state | {"x": ""})["x"] == "7"


LARGE = 2**40 + 7


@pytest.mark.parametrize(
    "target",
    [
        jnp.int32(0),
        np.int32(0),
        np.zeros((), np.uint8),
        jax.ShapeDtypeStruct((), np.int64),  # JAX makes an int32 of it
    ],
)
def test_an_integer_that_a_target_cannot_hold_is_refused(target, tmp_path):
    state = run(optax.chain(SGD, A))
    checkpoint.save(tmp_path / "c", state | {"x": LARGE})
    with pytest.raises(ValueError, match=f"c: x is {LARGE}, which .* cannot hold"):
        checkpoint.restore(tmp_path / "c", state | {"x": target})
    large = checkpoint.restore(tmp_path / "c", state | {"x": np.int64(0)})["x"]
    assert type(large) is np.int64 and large == LARGE
    params = {"w": jnp.zeros(()), "x": LARGE}
    tx = emaopt.average_params(0.5, mask={"w": True, "x": False})
    with ocp.StandardCheckpointer() as plain:
        opt_state = tx.init(params | {"x": 0})
        plain.save(tmp_path / "p", {"params": params, "opt_state": opt_state})
    with pytest.raises(ValueError, match=f"x is {LARGE}, which .* cannot hold"):
        checkpoint.load_averaged(tmp_path / "p", target={"w": jnp.zeros(()), "x": target})


def test_scalars_of_numpy_keep_their_types_and_their_nan(tmp_path):
    state = run(optax.chain(SGD, A))
    for x in (np.float32("nan"), np.float64(0.1), np.int8(-3), np.bool_(True)):
        checkpoint.save(tmp_path / "c", state | {"x": x}, force=True)
        restored = checkpoint.restore(tmp_path / "c", state | {"x": x})["x"]
        assert type(restored) is type(x) and restored.tobytes() == x.tobytes()


def test_load_averaged_keeps_kinds_of_numbers(tmp_path):
    tx = emaopt.averaged(SGD, 0.5)
    params = {"w": jnp.array([1 + 2j])}
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": tx.init(params)})
    with pytest.raises(
        ValueError, match="w is complex64 there and float32 in the target"
    ):
        checkpoint.load_averaged(tmp_path / "c", target={"w": jnp.zeros(1)})


def test_a_state_that_got_a_field_is_told_to_be_the_same(tmp_path):
    def slots(*names):
        def init(params):
            return {name: jax.tree.map(jnp.zeros_like, params) for name in names}

        return optax.GradientTransformation(init, lambda u, s, params=None: (u, s))

    params = {"w": jnp.ones(2)}
    saved = moved(slots("mu").init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": params, "opt_state": saved})
    target = {"params": params, "opt_state": moved(slots("mu", "nu").init(params))}
    with pytest.raises(
        ValueError, match=r"other fields.*rename={'opt_state': 'opt_state'}"
    ):
        checkpoint.restore(tmp_path / "c", target, keep_missing=True)
    restored = checkpoint.restore(
        tmp_path / "c",
        target,
        keep_missing=True,
        rename={"opt_state": "opt_state"},
        report=quiet,
    )
    same(restored["opt_state"], {"mu": saved["mu"], "nu": target["opt_state"]["nu"]})


# Of averages in part, of several networks, and of names that are wrong


def test_an_average_of_more_leaves_starts_from_the_parameters_or_is_refused(tmp_path):
    head = emaopt.average_params(0.9, mask=emaopt.by_name("head"))
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    state = {"params": params, "opt_state": moved(head.init(params))}
    checkpoint.save(tmp_path / "c", state)
    blank = jax.tree.map(jnp.zeros_like, params)
    target = {"params": blank, "opt_state": emaopt.average_params(0.9).init(blank)}
    with pytest.raises(ValueError, match=r"lacks .*encoder.* emaopt\.change_mask"):
        checkpoint.restore(tmp_path / "c", target)
    restored = checkpoint.restore(tmp_path / "c", target, keep_missing=True, report=quiet)
    same(restored["params"], params)
    average = emaopt.get_average(restored["opt_state"])
    same(average["encoder"], params["encoder"])
    same(average["head"], state["opt_state"].average["head"])


TWINS = {"actor": 1.0, "critic": 2.0}


def test_of_an_average_without_a_counter_what_is_kept_is_the_targets(tmp_path):
    params = {"w": jnp.ones(2)}
    old = moved(A.init(params))
    with ocp.StandardCheckpointer() as plain:
        there = {k: x for k, x in old._asdict().items() if k != "num_skipped"}
        plain.save(tmp_path / "c", {"params": params, "opt_state": there})
    target = {"params": params, "opt_state": moved(moved(A.init(params)))}
    back = checkpoint.restore(tmp_path / "c", target, keep_missing=True, report=quiet)
    same(back["opt_state"], old._replace(num_skipped=target["opt_state"].num_skipped))


def two_networks():
    params = {"actor": {"w": jnp.ones(3)}, "critic": {"v": jnp.ones(2)}}
    tx = optax.chain(SGD, A)
    states = {name: moved(tx.init(p)) for name, p in params.items()}
    return {"params": params, "opt_states": states}


def test_a_place_above_two_averages_has_both_whichever_is_served(tmp_path):
    state = two_networks()
    right = {n: s[1].average for n, s in state["opt_states"].items()}
    for i, name in enumerate(["actor", "critic", ("actor", "critic")]):
        checkpoint.save(tmp_path / str(i), state, name=name)
        same(checkpoint.load_averaged(tmp_path / str(i), at="params"), right)
        same(
            checkpoint.load_averaged(tmp_path / str(i), name="opt_states/actor"),
            right["actor"],
        )


def test_a_way_to_no_average_is_refused():
    state, names = two_networks(), ("actor", "critic")
    told = {"opt_states/actor": "params/actor", "opt_states/critic": "params/critic"}
    swapped = checkpoint.swap_state(state, name=names, params=told)
    same(swapped, checkpoint.swap_state(state, name=names))
    with pytest.raises(ValueError, match="'opt_states/acotr' leads to no average; there"):
        checkpoint.swap_state(
            state, name=names, params={"opt_states/acotr": "params/actor"}
        )


@pytest.mark.parametrize("layout", ["by network", "by kind"])
def test_an_average_is_not_taken_for_that_of_a_twin_on_record(layout, tmp_path):
    head = emaopt.average_params(0.5, mask=emaopt.by_name("w"))
    params = {n: {"w": jnp.full(2, x), "v": jnp.full(2, x)} for n, x in TWINS.items()}
    states = {name: moved(head.init(p)) for name, p in params.items()}
    right = {n: p | {"w": states[n].average["w"]} for n, p in params.items()}
    if layout == "by network":
        state = {n: {"params": params[n], "opt_state": states[n]} for n in TWINS}
        checkpoint.save(tmp_path / "c", state, name="actor")
        critic = "critic/params"
        same(checkpoint.load_averaged(tmp_path / "c", name="critic"), right["critic"])
        above = checkpoint.load_averaged(tmp_path / "c", at="critic")
        same(above["params"], right["critic"])
        assert not jax.tree.leaves(above["opt_state"])  # the average's own, left out
    else:
        state = {"params": params, "opt_state": states}
        critic = "params/critic"
        checkpoint.save(tmp_path / "c", state, name="actor", params="params/actor")
        for options in ({"name": "critic"}, {"at": "params"}):
            with pytest.raises(ValueError, match="any of params/actor, params/critic"):
                checkpoint.load_averaged(tmp_path / "c", **options)
    same(checkpoint.load_averaged(tmp_path / "c"), right["actor"])
    same(checkpoint.load_averaged(tmp_path / "c", at=critic), right["critic"])


def test_an_average_of_leaves_by_other_names_is_not_said_to_be_one_of_fewer(tmp_path):
    params = {"w": jnp.ones(2)}
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": A.init(params)})
    deeper = {"model": params}
    target = {"params": deeper, "opt_state": A.init(deeper)}
    with pytest.raises(ValueError, match=r"lacks opt_state/average/model/w") as raised:
        checkpoint.restore(tmp_path / "c", target)
    assert "change_mask" not in str(raised.value)
    moved = {"params": "params/model", "opt_state/average": "opt_state/average/model"}
    same(checkpoint.restore(tmp_path / "c", target, rename=moved, report=quiet), target)


def test_what_is_said_of_one_average_goes_before_what_is_of_all():
    params = {"a": {"w": jnp.zeros(2)}, "b": {"w": jnp.ones(2)}}
    state = {"params": params, "opt_state": {name: A.init(params["a"]) for name in "ab"}}
    told = {"opt_state": "params/a", "opt_state/b": "params/b"}
    for params in (told, dict(reversed(told.items()))):
        swapped = checkpoint.swap_state(state, name="b", params=params)
        same(swapped["params"]["b"], state["params"]["a"])
        same(swapped["params"]["a"], state["params"]["a"])


def test_one_code_saves_with_an_average_and_without(tmp_path):
    for tx in (SGD, optax.chain(SGD, A)):
        state = run(tx)
        swapped = checkpoint.swap_state(state, optional=True)
        record = checkpoint.metadata(state, optional=True)
        v1.save(tmp_path / str(len(record)), swapped, custom_metadata=record)
        same(checkpoint.restore(tmp_path / str(len(record)), state), state)
    same(checkpoint.swap_state(run(SGD), optional=True), run(SGD))
    with pytest.raises(ValueError, match="optional=True"):
        checkpoint.metadata(run(SGD))
