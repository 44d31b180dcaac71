"""Checkpoints of local updates serve the center and give training back bit for bit."""

import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from models import Net, train_step
from orbax.checkpoint import v1
from test_checkpoint import abstract

import emaopt
from emaopt import checkpoint

pytestmark = pytest.mark.quick(1)

W = 4
INNER = optax.adam(0.1)
AVERAGED = emaopt.averaged(optax.sgd(0.7, momentum=0.9), 0.5)
METHODS = {
    "diloco": emaopt.diloco(INNER, period=3, num_workers=W),
    "agn": emaopt.agn(INNER, 3, num_workers=W),
    "in turns": emaopt.agn(INNER, 3, variant="paper", reduce="sequential", num_workers=W),
    "easgd": emaopt.easgd(INNER, period=3, num_workers=W),
    "fragments": emaopt.diloco(INNER, period=3, num_workers=W, num_fragments=2),
    "int8": emaopt.diloco(
        INNER, period=3, num_workers=W, exchange_dtype=jnp.int8, error_feedback=True
    ),
    "in a chain": optax.chain(
        optax.clip(1.0), emaopt.local_sgd(INNER, period=3, num_workers=W)
    ),
    "averaged center": emaopt.diloco(INNER, AVERAGED, period=3, num_workers=W),
    "lookahead": emaopt.lookahead(INNER, period=3),
}
DILOCO = METHODS["diloco"]


def one_worker():
    return {
        "dense": {"kernel": jnp.full((3, 2), 0.5, jnp.bfloat16), "bias": jnp.zeros(2)},
        "none": None,
        "empty": jnp.zeros((0, 3)),
    }


def train(tx, params, opt_state, first=0, steps=7):
    @jax.jit
    def step(params, opt_state, i):
        def gradient(p):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), p.shape)
            return (0.1 * p + noise).astype(p.dtype)

        grads = jax.tree.map(gradient, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(first, first + steps):
        params, opt_state = step(params, opt_state, i)
    return params, opt_state


def begin(name):
    params = one_worker()
    return params if name == "lookahead" else emaopt.stack_workers(params, W)


def trained(name):
    params = begin(name)
    return train(METHODS[name], params, METHODS[name].init(params))


def served(opt_state):
    """What is to stand under the names, by another way than the checkpoint's."""
    try:
        return emaopt.get_average(opt_state)
    except ValueError:
        return emaopt.get_center(opt_state)


def bits(tree):
    return [
        (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array) and leaf.size
    ]


@pytest.mark.parametrize("name", METHODS)
def test_the_file_holds_the_center_and_training_goes_on_bit_for_bit(name, tmp_path):
    params, opt_state = trained(name)
    state = {"params": params, "opt_state": opt_state}
    checkpoint.save(tmp_path / "c", state)
    with ocp.StandardCheckpointer() as plain:
        on_disk = plain.restore(tmp_path / "c")["params"]
    restored = checkpoint.restore(tmp_path / "c", abstract(state))
    resumed = train(METHODS[name], restored["params"], restored["opt_state"], first=7)
    assert bits(on_disk) == bits(served(opt_state))
    assert bits(checkpoint.load_averaged(tmp_path / "c")) == bits(served(opt_state))
    assert bits(restored) == bits(state)
    assert bits(resumed) == bits(train(METHODS[name], params, opt_state, first=7))


@pytest.mark.parametrize("name", METHODS)
def test_swap_is_an_involution_and_a_swapped_state_refuses_to_train(name):
    params, opt_state = trained(name)
    center, swapped = emaopt.swap(params, opt_state)
    assert bits(center) == bits(served(opt_state))
    assert bits(emaopt.swap(center, swapped)) == bits((params, opt_state))
    with pytest.raises(TypeError, match="swap back first"):
        METHODS[name].update(params, swapped, params, exchange=True)


@pytest.mark.slow
def test_of_a_center_and_its_average_either_is_served(tmp_path):
    params, opt_state = trained("averaged center")
    state = {"params": params, "opt_state": opt_state}
    checkpoint.save(tmp_path / "c", state, name="center")
    center, average = emaopt.get_center(opt_state), emaopt.get_average(opt_state)
    assert bits(checkpoint.load_averaged(tmp_path / "c")) == bits(center)
    assert bits(checkpoint.load_averaged(tmp_path / "c", name="averaging")) == bits(
        average
    )
    assert bits(checkpoint.restore(tmp_path / "c", state)) == bits(state)
    assert bits(center) != bits(average)


def as_train_state():
    params, opt_state = trained("diloco")
    state = TrainState.create(apply_fn=jnp.dot, params=begin("diloco"), tx=DILOCO)
    return state.replace(step=jnp.int32(7), params=params, opt_state=opt_state)


def as_frozen_dict():
    params, opt_state = trained("diloco")
    return freeze({"train": {"params": params, "opt_state": opt_state}})


def as_nnx():
    model = Net(nnx.Rngs(0))
    tx = emaopt.lookahead(optax.adam(0.1), period=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        train_step(model, optimizer)
    return {"params": nnx.state(model, nnx.Param), "opt_state": nnx.state(optimizer)}


def as_equinox():
    model = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    model = emaopt.stack_workers(model, W)
    params, opt_state = train(DILOCO, model, DILOCO.init(model))
    return {"model": params, "opt_state": opt_state}


def of(state, *names):
    for name in names:
        state = state[name] if not hasattr(state, name) else getattr(state, name)
    return state


@pytest.mark.parametrize(
    "make, params",
    [
        (as_train_state, ["params"]),
        (as_frozen_dict, ["train", "params"]),
        (as_nnx, ["params"]),
        (as_equinox, ["model"]),
    ],
)
def test_containers(make, params, tmp_path):
    state = make()
    checkpoint.save(tmp_path / "c", state)
    with ocp.StandardCheckpointer() as plain:
        on_disk = of(plain.restore(tmp_path / "c"), *params)
    there = bits(of(checkpoint.swap_state(state), *params))
    assert sorted(bits(on_disk)) == sorted(
        there
    )  # attributes are not in the order of keys
    assert sorted(bits(on_disk)) != sorted(bits(of(state, *params)))
    assert bits(checkpoint.restore(tmp_path / "c", state)) == bits(state)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_manager_serves_the_center_of_one_tree_and_of_items(asynchronous, tmp_path):
    params, opt_state = trained("diloco")
    state = {"params": params, "opt_state": opt_state}
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)

    def manager(directory):
        registry = checkpoint.handler_registry(items=["params", "opt_state"])
        return ocp.CheckpointManager(
            tmp_path / directory, options=options, handler_registry=registry
        )

    with manager("one") as one:
        one.save(7, args=ocp.args.StandardSave(state))
        one.wait_until_finished()
        assert bits(one.restore(7, args=ocp.args.StandardRestore(state))) == bits(state)
    save = {k: ocp.args.StandardSave(v) for k, v in state.items()}
    load = {k: ocp.args.StandardRestore(v) for k, v in state.items()}
    with manager("items") as items:
        items.save(7, args=ocp.args.Composite(**save))
        items.wait_until_finished()
        restored = items.restore(7, args=ocp.args.Composite(**load))
        assert bits({k: restored[k] for k in state}) == bits(state)
    for directory, item in (("one", "default"), ("items", "params")):
        with ocp.StandardCheckpointer() as plain:
            on_disk = plain.restore(tmp_path / directory / "7" / item)
        on_disk = on_disk if item == "params" else on_disk["params"]
        assert bits(on_disk) == bits(emaopt.get_center(opt_state))


def test_v1_writes_and_reads_the_center(tmp_path):
    params = {"w": jnp.arange(8.0).reshape(W, 2)}
    params, opt_state = train(DILOCO, params, DILOCO.init(params))
    state = {"params": params, "opt_state": opt_state}
    swapped = checkpoint.swap_state(state)
    v1.save(tmp_path / "c", swapped, custom_metadata=checkpoint.metadata(state))
    loaded = v1.load(tmp_path / "c", abstract(swapped))
    assert bits(loaded["params"]) == bits(emaopt.get_center(opt_state))
    assert bits(checkpoint.swap_state(loaded)) == bits(state)
    assert bits(checkpoint.restore(tmp_path / "c", state)) == bits(state)


@pytest.mark.slow
def test_a_process_without_emaopt_serves_the_center(tmp_path):
    params, opt_state = trained("diloco")
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": opt_state})
    program = """
        import sys
        sys.modules["emaopt"] = None
        import numpy as np, orbax.checkpoint as ocp
        params = ocp.StandardCheckpointer().restore(sys.argv[1])["params"]
        print(np.asarray(params["dense"]["kernel"]).tobytes().hex())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "c")],
        capture_output=True,
        text=True,
        check=True,
    )
    kernel = emaopt.get_center(opt_state)["dense"]["kernel"]
    assert run.stdout.strip() == np.asarray(kernel).tobytes().hex()


def test_an_average_of_the_center_is_adopted_from_the_center(tmp_path):
    params, opt_state = trained("diloco")
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": opt_state})
    outer = emaopt.averaged(optax.sgd(0.7, momentum=0.9, nesterov=True), 0.5)
    tx = emaopt.diloco(INNER, outer, period=3, num_workers=W)
    target = {"params": params, "opt_state": tx.init(begin("diloco"))}
    said = []
    restored = checkpoint.restore(tmp_path / "c", target, report=said.append)
    average = emaopt.get_average(restored["opt_state"])
    assert bits(average) == bits(emaopt.get_center(opt_state))
    assert any("started the average anew" in sentence for sentence in said)


def test_plain_orbax_cannot_take_the_center_for_the_workers(tmp_path):
    params = {"w": jnp.ones(2)}
    tx = METHODS["lookahead"]
    state = {"params": params, "opt_state": tx.init(params)}
    checkpoint.save(tmp_path / "c", state)
    with ocp.StandardCheckpointer() as plain:
        with pytest.raises(ValueError, match="swapped_at"):
            plain.restore(tmp_path / "c", state)


# Other numbers of workers


def state_of(tx, workers, steps=0, dtype=jnp.bfloat16, empty=True):
    params = one_worker()
    if not empty:  # which plain Orbax does not store
        del params["empty"]
    params["dense"]["kernel"] = params["dense"]["kernel"].astype(dtype)
    if workers:
        params = emaopt.stack_workers(params, workers)
    params, opt_state = train(tx, params, tx.init(params), steps=steps)
    return {"params": params, "opt_state": opt_state}


def local(workers, inner=INNER, outer=None, **options):
    outer = outer or optax.sgd(0.7, momentum=0.9, nesterov=True)
    return emaopt.diloco(inner, outer, period=3, num_workers=workers, **options)


def center_of(state):
    """The center in the parameters' dtypes, as a pull gives it."""
    return jax.tree.map(
        lambda c, p: c.astype(p.dtype),
        emaopt.get_center(state["opt_state"]),
        state["params"],
    )


def dealt(tree, workers):
    """Row w of the result is row w % W."""
    return jax.tree.map(lambda x: x[np.arange(workers) % len(x)], tree)


LOCAL = {
    "diloco": {},
    "fragments": {"num_fragments": 2},
    "int8": {"exchange_dtype": jnp.int8, "error_feedback": True},
    "momentum as the outer one": {"inner": optax.sgd(0.1, momentum=0.9)},
    "averaged center": {"outer": AVERAGED},
    "schedule": {"inner": optax.adam(optax.linear_schedule(0.1, 0.0, 10))},
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("new", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", LOCAL)
def test_workers_of_another_number_start_from_the_center(kind, new, tmp_path):
    old = state_of(local(4, **LOCAL[kind]), 4, steps=7)  # one step after an exchange
    name = "center" if kind == "averaged center" else None
    # Of other rows than there, checksums tell nothing.
    checkpoint.save(tmp_path / "c", old, name=name, checksums=True)
    target = state_of(local(new, **LOCAL[kind]), new)
    said = []
    restored = checkpoint.restore(tmp_path / "c", target, report=said.append)
    before, after = old["opt_state"], restored["opt_state"]
    if new == 4:
        assert bits(restored) == bits(old) and not said
        return
    assert f"started {new} workers from the center of 4" in said[0]
    assert bits(restored["params"]) == bits(emaopt.stack_workers(center_of(old), new))
    assert bits(after.center) == bits(before.center)
    assert bits(after.outer_state) == bits(before.outer_state)
    assert bits(after.inner_state) == bits(dealt(before.inner_state, new))
    assert int(after.num_steps) == 7 and not any(map(int, after.since_exchange))
    for fresh in (after.accumulated, after.residual):
        assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(fresh))
    _, opt_state = train(local(new, **LOCAL[kind]), restored["params"], after, 7, 3)
    assert bits(emaopt.get_center({"o": opt_state})) != bits(before.center)


@pytest.mark.parametrize("kind", ["agn", "in turns"])
def test_what_workers_added_up_or_pulled_starts_anew(kind, tmp_path):
    old = dict(zip(("params", "opt_state"), trained(kind), strict=True))
    checkpoint.save(tmp_path / "c", old)
    tx = emaopt.agn(INNER, 3, num_workers=2)
    if kind == "in turns":
        tx = emaopt.agn(INNER, 3, variant="paper", reduce="sequential", num_workers=2)
    restored = checkpoint.restore(tmp_path / "c", state_of(tx, 2), report=len)
    after = restored["opt_state"]
    rows = bits(emaopt.stack_workers(center_of(old), 2))
    assert bits(restored["params"]) == rows
    if after.pulled is not None:
        pulled = emaopt.stack_workers(emaopt.get_center(old["opt_state"]), 2)
        assert bits(after.pulled) == bits(pulled)
    if after.accumulated is not None:
        sums = jax.tree.leaves(after.accumulated)
        assert not any(np.any(np.asarray(x)) for x in sums)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_becomes_one_of_local_updates_and_back(averaged, dtype, tmp_path):
    alone = emaopt.averaged(INNER, 0.5) if averaged else INNER
    outer = AVERAGED if averaged else None
    old = state_of(alone, None, 4, dtype, empty=averaged)
    if averaged:
        checkpoint.save(tmp_path / "1", old)
    else:
        with ocp.StandardCheckpointer() as plain:
            plain.save(tmp_path / "1", old)
    tx = local(3, outer=outer)
    blank = state_of(tx, 3, dtype=dtype, empty=averaged)
    said = []
    there = checkpoint.restore(tmp_path / "1", blank, report=said.append)
    assert any("started 3 workers from the parameters" in one for one in said)
    after = there["opt_state"]
    assert bits(there["params"]) == bits(emaopt.stack_workers(old["params"], 3))
    assert bits(emaopt.get_center(after)) == bits(
        jax.tree.map(lambda p: p.astype(jnp.float32), old["params"])
    )
    if averaged:
        assert bits(emaopt.get_average(after)) == bits(
            emaopt.get_average(old["opt_state"])
        )
    counts = jax.tree.leaves(after.inner_state)[0]
    assert counts.shape == (3,) and set(counts.tolist()) == {4}
    assert int(after.num_steps) == 0
    params, opt_state = train(tx, there["params"], there["opt_state"], 4, 5)
    there = {"params": params, "opt_state": opt_state}
    checkpoint.save(tmp_path / "2", there)
    back = checkpoint.restore(tmp_path / "2", old, report=said.append)
    assert any("took the center at opt_state" in one for one in said)
    assert bits(back["params"]) == bits(center_of(there))
    first = jax.tree.map(lambda x: x[0], there["opt_state"].inner_state)
    if not averaged:
        assert bits(back["opt_state"]) == bits(first)
        return
    assert bits(back["opt_state"].inner_state) == bits(first)
    assert bits(emaopt.get_average(back["opt_state"])) == bits(
        emaopt.get_average(there["opt_state"])
    )


def test_parameters_alone_are_the_workers_or_the_center_by_their_shapes(tmp_path):
    old = state_of(local(4), 4, 7)
    checkpoint.save(tmp_path / "c", old)
    for target, right in (
        (old["params"], old["params"]),
        (one_worker(), center_of(old)),
    ):
        restored = checkpoint.restore(
            tmp_path / "c", {"params": target}, ignore_extra=True, report=len
        )
        assert bits(restored["params"]) == bits(right)


def test_lookahead_ends_with_its_slow_weights(tmp_path):
    tx = emaopt.lookahead(INNER, period=3)
    old = state_of(tx, None, 7)
    checkpoint.save(tmp_path / "c", old)
    alone = checkpoint.restore(
        tmp_path / "c", {"params": old["params"]}, ignore_extra=True, report=len
    )
    assert bits(alone["params"]) == bits(old["params"])
    restored = checkpoint.restore(tmp_path / "c", state_of(INNER, None), report=len)
    assert bits(restored["params"]) == bits(center_of(old))
    assert bits(restored["opt_state"]) == bits(old["opt_state"].inner_state)
    again = checkpoint.restore(
        tmp_path / "c", state_of(INNER, None), ignore_extra=True, report=len
    )
    assert bits(again) == bits(restored)
    back = checkpoint.restore(tmp_path / "c", state_of(tx, None), report=len)
    assert bits(back) == bits(old)


@pytest.mark.parametrize("kind", ["momentum in both", "agn", "no slots"])
def test_slots_of_the_inner_and_the_outer_optimizer_do_not_mix(kind, tmp_path):
    inner = optax.sgd(0.1, momentum=None if kind == "no slots" else 0.9)
    tx = emaopt.agn(inner, 3, num_workers=3) if kind == "agn" else local(3, inner)
    there = state_of(tx, 3, 4)
    checkpoint.save(tmp_path / "1", there)
    for alone in (
        inner,
        emaopt.averaged(inner, 0.5),
        optax.chain(inner, emaopt.average_params(0.5)),
    ):
        target = state_of(alone, None)
        back = checkpoint.restore(tmp_path / "1", target, report=len)
        assert bits(back["params"]) == bits(center_of(there))
        first = jax.tree.map(lambda x: x[0], there["opt_state"].inner_state)
        mine = back["opt_state"] if alone is inner else back["opt_state"][0]
        assert bits(mine) == bits(first)
        if alone is not inner:
            average = emaopt.get_average(back["opt_state"])
            assert bits(average) == bits(emaopt.get_center(there["opt_state"]))
    old = state_of(inner, None, 4, empty=False)
    with ocp.StandardCheckpointer() as plain:
        plain.save(tmp_path / "2", old)
    target = state_of(tx, 3, empty=False)
    restored = checkpoint.restore(tmp_path / "2", target, report=len)
    assert bits(restored["params"]) == bits(emaopt.stack_workers(old["params"], 3))
    rows = emaopt.stack_workers(old["opt_state"], 3)
    assert bits(restored["opt_state"].inner_state) == bits(rows)
    outer = target["opt_state"].outer_state
    assert bits(restored["opt_state"].outer_state) == bits(outer)
    if kind != "agn":
        with pytest.raises(ValueError, match="give arrays, as tx"):
            checkpoint.restore(tmp_path / "2", jax.eval_shape(lambda: target), report=len)


def test_workers_go_on_beside_leaves_that_their_center_gets(tmp_path):
    old = state_of(local(4), 4, 7)
    checkpoint.save(tmp_path / "c", old)
    new = one_worker() | {"a": jnp.ones(2), "z": jnp.ones(2)}
    target = emaopt.stack_workers(new, 4)
    target = {"params": target, "opt_state": local(4).init(target)}
    said = []
    restored = checkpoint.restore(
        tmp_path / "c", target, keep_missing=True, report=said.append
    )
    assert not any("started" in one for one in said)
    params, center = restored["params"], restored["opt_state"].center
    for there, ours in ((old["params"], params), (old["opt_state"].center, center)):
        assert bits({name: ours[name] for name in there}) == bits(there)


@pytest.mark.parametrize("new", [2, 4])
def test_a_target_network_beside_workers_is_not_taken_for_them(new, tmp_path):
    def with_target(state):
        online, target = state["params"], jax.tree.map(lambda p: p + 1, state["params"])
        return state | {"params": {"online": online, "target": target}}

    old = with_target(state_of(local(4), 4, 7, empty=False))
    checkpoint.save(tmp_path / "c", old, params="params/online")
    told = {"params": "params/online", "report": len}
    if new == 4:
        target = jax.tree.map(jnp.zeros_like, old)
        assert bits(checkpoint.restore(tmp_path / "c", target)) == bits(old)
    else:
        target = state_of(local(new), new, empty=False)
        # The optimizer does not know of the target network: it takes as it is.
        target["params"] = {"online": target["params"], "target": old["params"]["target"]}
        restored = checkpoint.restore(tmp_path / "c", target, **told)["params"]
        online = {"params": old["params"]["online"], "opt_state": old["opt_state"]}
        assert bits(restored["online"]) == bits(
            emaopt.stack_workers(center_of(online), new)
        )
        assert bits(restored["target"]) == bits(old["params"]["target"])
    with ocp.StandardCheckpointer() as plain:
        plain.save(tmp_path / "p", old)
    target = jax.tree.map(jnp.zeros_like, old)
    assert bits(checkpoint.restore(tmp_path / "p", target, **told)) == bits(old)


@pytest.mark.parametrize("recorded", [True, False])
def test_twins_workers_start_from_their_own_centers(recorded, tmp_path):
    def twins(workers):
        both = {"params": {}, "opt_state": {}}
        for name, x in (("actor", 1.0), ("critic", 2.0)):
            params = emaopt.stack_workers({"w": jnp.full(2, x)}, workers)
            both["opt_state"][name] = local(workers).init(params)
            both["params"][name] = jax.tree.map(lambda p: p + 1, params)
        return both

    told = {f"opt_state/{name}": f"params/{name}" for name in ("actor", "critic")}
    if recorded:
        checkpoint.save(tmp_path / "c", twins(4), name="actor", params="params/actor")
    else:
        with ocp.StandardCheckpointer() as plain:
            plain.save(tmp_path / "c", twins(4))
    restored = checkpoint.restore(tmp_path / "c", twins(2), params=told, report=len)
    for name, x in (("actor", 1.0), ("critic", 2.0)):
        assert bits(restored["params"][name]) == bits({"w": jnp.full((2, 2), x)})
        assert bits(restored["opt_state"][name].center) == bits({"w": jnp.full(2, x)})
    with pytest.raises(ValueError, match="critic could be of any of params/actor"):
        checkpoint.restore(tmp_path / "c", twins(2), params="params/actor")


def test_lookahead_around_an_optimizer_without_slots_ends_too(tmp_path):
    tx = emaopt.lookahead(optax.sgd(0.1), period=3)
    old = state_of(tx, None, 7)
    checkpoint.save(tmp_path / "c", old)
    restored = checkpoint.restore(
        tmp_path / "c", state_of(optax.sgd(0.1), None), report=len
    )
    assert bits(restored["params"]) == bits(center_of(old))


@pytest.mark.slow
def test_keys_of_workers_are_dealt_out_too(tmp_path):
    inner = optax.noisy_sgd(0.1, key=jax.random.key(3))
    old = state_of(local(4, inner), 4, 4, empty=False)
    checkpoint.save(tmp_path / "c", old)
    for workers in (2, 8):
        target = state_of(local(workers, inner), workers, empty=False)
        restored = checkpoint.restore(tmp_path / "c", target, report=len)
        keys = [
            jax.random.key_data(jax.tree.leaves(state["opt_state"].inner_state)[1])
            for state in (old, restored)
        ]
        np.testing.assert_array_equal(keys[1], keys[0][np.arange(workers) % 4])
