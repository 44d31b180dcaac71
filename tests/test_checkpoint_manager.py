"""CheckpointManager and the v1 API serve the average; the user's calls do not change."""

import asyncio
import gc
import json
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors
from etils import epath
from flax import nnx
from flax.training.train_state import TrainState
from orbax.checkpoint import v1
from tensorflow_records import facts
from test_checkpoint import (
    CONTAINERS,
    abstract,
    as_dict,
    as_states,
    as_train_state,
    assert_same,
    mixed_params,
    train,
    trained_nnx,
)

import emaopt
from emaopt import checkpoint

TX = emaopt.averaged(optax.adam(1e-1), 0.9)
Save, Restore = ocp.args.StandardSave, ocp.args.StandardRestore


def trained(steps=3):
    params = {"dense": {"kernel": jnp.ones((4, 2), jnp.bfloat16)}, "scale": jnp.ones(2)}
    params, opt_state = train(params, TX.init(params), steps, TX)
    return {"params": params, "opt_state": opt_state}


def manager(path, **options):
    return ocp.CheckpointManager(
        path,
        options=ocp.CheckpointManagerOptions(**options),
        handler_registry=checkpoint.handler_registry(items=("params", "opt_state")),
    )


def averages(state):
    return emaopt.get_average(state["opt_state"])


@pytest.mark.quick(20)
@pytest.mark.parametrize("name", ["default", "state", "pytree"])
def test_what_orbax_calls_a_lone_item_is_one_as_any_beside_others(name, tmp_path):
    state, x = trained(), {"x": jnp.arange(3.0)}
    apart = {name: {"opt_state": state["opt_state"]}, "params": state["params"]}
    registry = checkpoint.handler_registry()
    steps = [apart, {name: state, "extra": x}, {name: x, "train": state}]
    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as m:
        for step, items in enumerate(steps):
            m.save(
                step, args=ocp.args.Composite(**{k: Save(x) for k, x in items.items()})
            )
            m.wait_until_finished()
            for k, item in items.items():
                back = m.restore(step, args=ocp.args.Composite(**{k: Restore(item)}))
                assert_same(back[k], item)
    with ocp.StandardCheckpointer() as plain:
        assert_same(plain.restore(tmp_path / "0" / "params"), averages(state))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("make", [trained, as_dict, as_train_state])
def test_one_tree(make, asynchronous, tmp_path):
    state = make()
    with manager(tmp_path, enable_async_checkpointing=asynchronous) as m:
        m.save(7, args=Save(state))
        m.wait_until_finished()
        assert_same(m.restore(7, args=Restore(state)), state)
        assert_same(m.restore(7, args=Restore(abstract(state))), state)
    opt_state = state.opt_state if isinstance(state, TrainState) else state["opt_state"]
    expected = emaopt.get_average(opt_state)
    with ocp.CheckpointManager(tmp_path) as plain:
        served = plain.restore(7)["params"]
    if make is trained:
        assert_same(served, expected)
    assert_same(checkpoint.load_averaged(tmp_path / "7"), expected)


def test_composite_items_are_swapped_across(tmp_path):
    state = trained()
    with manager(tmp_path) as m:
        m.save(
            1,
            args=ocp.args.Composite(
                params=Save(state["params"]),
                opt_state=Save(state["opt_state"]),
                data=ocp.args.JsonSave({"position": 5}),
            ),
        )
        restored = m.restore(
            1,
            args=ocp.args.Composite(
                params=Restore(abstract(state["params"])),
                opt_state=Restore(abstract(state["opt_state"])),
                data=ocp.args.JsonRestore(),
            ),
        )
        assert restored["data"] == {"position": 5}
        assert_same({k: restored[k] for k in ("params", "opt_state")}, state)
        alone = m.restore(1, args=ocp.args.Composite(params=Restore(state["params"])))
        assert_same(alone["params"], state["params"])
    with ocp.CheckpointManager(tmp_path) as plain:
        assert_same(plain.restore(1)["params"], averages(state))
    assert_same(checkpoint.load_averaged(tmp_path / "1"), averages(state))
    assert_same(checkpoint.restore(tmp_path / "1", state), state)


def test_restore_without_arguments_gives_raw_parameters_in_their_place(tmp_path):
    state = trained()
    with manager(tmp_path / "whole") as m:
        m.save(1, args=Save(state))
        m.wait_until_finished()
        restored = m.restore(1)
    assert_same(restored["params"], state["params"])
    assert_same(restored["opt_state"]["averaging"]["average"], averages(state))
    assert restored["opt_state"]["averaging"]["num_updates"] == 3

    with manager(tmp_path / "items") as m:
        m.save(1, args=ocp.args.Composite(**{k: Save(state[k]) for k in state}))
        m.wait_until_finished()
        restored = m.restore(1)
    assert_same(restored["params"], state["params"])
    assert_same(restored["opt_state"]["averaging"]["average"], averages(state))


def test_a_registry_keeps_nothing_of_what_it_saved(tmp_path):
    state = trained()
    with manager(tmp_path, enable_async_checkpointing=False) as m:
        m.save(1, args=ocp.args.Composite(**{k: Save(state[k]) for k in state}))
        left = weakref.ref(state["params"]["scale"])
        del state
        gc.collect()
        assert left() is None


def test_save_args_of_a_swapped_state_hold_where_they_are_given(tmp_path):
    state = checkpoint.swap_state(trained())
    told = jax.tree.map(lambda _: ocp.SaveArgs(), state)
    told["params"]["scale"] = ocp.SaveArgs(dtype=jnp.dtype("bfloat16"))
    with manager(tmp_path) as m:
        m.save(1, args=ocp.args.PyTreeSave(state, save_args=told))
    with ocp.StandardCheckpointer() as plain:
        back = plain.restore(tmp_path / "1" / "default")
    assert back["params"]["scale"].dtype == jnp.bfloat16
    assert back["opt_state"]["averaging"]["average"]["scale"].dtype == jnp.float32


def test_save_args_may_be_of_arrays_of_size_0_too(tmp_path):
    state = trained() | {"empty": jnp.zeros((0, 3)), "x": jnp.ones(2), "y": jnp.ones(2)}
    told = jax.tree.map(lambda _: ocp.SaveArgs(), state)
    told["x"] = ocp.SaveArgs(dtype=jnp.dtype("bfloat16"))
    with manager(tmp_path) as m:
        m.save(1, args=ocp.args.PyTreeSave(state, save_args=told))
        m.wait_until_finished()
        assert_same(m.restore(1, args=Restore(state)), state)
    with ocp.StandardCheckpointer() as plain:
        back = plain.restore(tmp_path / "1" / "default")
    kinds = jax.tree.map(lambda leaf: str(leaf.dtype), back)
    assert (kinds["x"], kinds["y"]) == ("bfloat16", "float32")
    assert kinds["params"] == {"dense": {"kernel": "float32"}, "scale": "float32"}


def test_donated_buffers_are_saved_as_they_were(tmp_path):
    state = trained()
    kept = jax.tree.map(np.asarray, state)

    @jax.jit
    def step(state):
        grads = state["params"]
        updates, opt_state = TX.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}

    donating = jax.jit(step, donate_argnums=0)
    with manager(tmp_path) as m:
        m.save(1, args=Save(state))
        for _ in range(3):
            state = donating(state)
        m.wait_until_finished()
        assert_same(m.restore(1, args=Restore(state)), jax.tree.map(jnp.asarray, kept))


def by_save(path, state):
    checkpoint.save(path / "c", state)
    return lambda target: checkpoint.restore(path / "c", target)


def by_manager(asynchronous):
    def save(path, state):
        m = manager(path, enable_async_checkpointing=asynchronous)
        m.save(1, args=Save(state))

        def restore(target):
            with m:
                m.wait_until_finished()
                return m.restore(1, args=Restore(target))

        return restore

    return save


def by_v1(asynchronous):
    def save(path, state):
        record = checkpoint.metadata(state)
        state = checkpoint.swap_state(as_states(state))
        if asynchronous:
            saved = v1.save_async(path / "c", state, custom_metadata=record)
        else:
            v1.save(path / "c", state, custom_metadata=record)

        def restore(target):
            if asynchronous:
                saved.result()
            loaded = v1.load(path / "c", checkpoint.swap_state(as_states(target)))
            return checkpoint.swap_state(loaded)

        return restore

    return save


WRITERS = {
    "save": by_save,
    "manager": by_manager(False),
    "manager, async": by_manager(True),
    "v1": by_v1(False),
    "v1, async": by_v1(True),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "make", [make for make, _ in CONTAINERS.values()], ids=CONTAINERS
)
def test_every_container_goes_through_every_api_while_its_buffers_are_donated(
    make, writer, tmp_path, monkeypatch
):
    if "v1" in writer:  # which refuses arrays of size 0
        params = {k: x for k, x in mixed_params().items() if k != "empty"}
        monkeypatch.setattr("test_checkpoint.mixed_params", lambda: params)
    state = make()
    kept = jax.tree.map(copied, as_states(state))
    target = abstract(state)
    restore = WRITERS[writer](tmp_path, state)
    donating = jax.jit(lambda leaves: [2 * x for x in leaves], donate_argnums=0)
    donating([x for x in jax.tree.leaves(as_states(state)) if is_number(x)])
    assert_same(as_states(restore(target)), kept)


def copied(leaf):
    """A copy on the host, so that nothing can overwrite it."""
    return jnp.asarray(np.array(leaf)) if is_number(leaf) else leaf


def is_number(leaf):
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, jax.Array) and not jnp.issubdtype(dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("metrics_of", ["raw", "averaged", None])
def test_max_to_keep_and_best_fn_with_a_record_of_the_weights_measured(
    metrics_of, tmp_path
):
    registry = checkpoint.handler_registry(metrics_of=metrics_of)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, best_fn=lambda metrics: metrics["loss"], best_mode="min"
    )
    states = {step: trained(step) for step in (1, 2, 3)}
    with ocp.CheckpointManager(tmp_path, options=options, handler_registry=registry) as m:
        for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
            m.save(step, args=Save(states[step]), metrics={"loss": loss})
        m.wait_until_finished()
        assert m.best_step() == 2 and m.all_steps() == [2]
        assert_same(m.restore(2, args=Restore(states[2])), states[2])
    with ocp.CheckpointManager(tmp_path) as plain:
        plain.restore(2)
        record = plain.item_metadata(2).custom_metadata["emaopt"]
        assert plain.metrics(2) == {"loss": 0.1}
    assert record.get("metrics_of") == metrics_of


def test_users_own_custom_metadata_stays(tmp_path):
    with manager(tmp_path) as m:
        m.save(1, args=Save(trained(), custom_metadata={"run": "a"}))
        m.wait_until_finished()
        assert m.item_metadata(1).custom_metadata["run"] == "a"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_state_without_an_average_is_not_saved(asynchronous, tmp_path):
    m = manager(tmp_path, enable_async_checkpointing=asynchronous)
    with pytest.raises(ValueError, match=r"CheckpointManager\.save: no average in this"):
        m.save(1, args=Save({"params": jnp.ones(2), "opt_state": ()}))
        m.wait_until_finished()
    assert m.all_steps() == [] and not (tmp_path / "1").exists()
    m.save(2, args=Save(trained()))
    m.wait_until_finished()
    assert m.all_steps() == [2]
    m.close()


FAILING = {
    "no average": (Save({"w": jnp.ones(2)}), ValueError),
    "save_args of another tree": (
        ocp.args.PyTreeSave(trained(0), save_args={"w": ocp.SaveArgs()}),
        IndexError,
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_an_error_in_saving_is_raised_by_the_future_alone(case, tmp_path):
    """From the coroutine, it may let threads of Orbax wait when the process is to end."""
    args, kind = FAILING[case]
    handler = checkpoint.handler_registry().get("default", type(args))
    directory = epath.Path(tmp_path / "1.orbax-checkpoint-tmp" / "default")
    (future,) = asyncio.run(handler.async_save(directory, args=args))
    with pytest.raises(kind):
        future.result()


def test_registry_checks_its_argument():
    with pytest.raises(ValueError, match="metrics_of must be 'raw', 'averaged' or None"):
        checkpoint.handler_registry(metrics_of="ema")  # pyright: ignore


# Orbax's v1 API, experimental there.


# v1 says so whenever it restores arrays without a target.
no_target = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


@no_target
def test_v1_writes_and_reads_what_swap_state_and_metadata_give(tmp_path):
    state = trained()
    v1.save(
        tmp_path / "c",
        checkpoint.swap_state(state),
        custom_metadata=checkpoint.metadata(state),
    )
    restored = v1.load(tmp_path / "c", checkpoint.swap_state(abstract(state)))
    assert_same(checkpoint.swap_state(restored), state)
    assert_same(v1.load(tmp_path / "c")["params"], averages(state))
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    assert_same(checkpoint.load_averaged(tmp_path / "c"), averages(state))


@no_target
def test_v1_reads_what_save_and_the_manager_write(tmp_path):
    state = trained()
    checkpoint.save(tmp_path / "saved", state)
    assert_same(v1.load(tmp_path / "saved")["params"], averages(state))
    with manager(tmp_path / "managed") as m:
        m.save(1, args=Save(state))
    assert_same(v1.load(tmp_path / "managed" / "1")["params"], averages(state))


# Checkpoints that never had an average, and targets without one.


def plain_orbax(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


PLAIN = {
    "bare": optax.adam(1e-1),
    "chain": optax.chain(optax.clip(1.0), optax.adam(1e-1)),
    "schedule": optax.adam(optax.linear_schedule(0.1, 0.0, 10)),
}


ADOPTING = {
    "chain": lambda inner: optax.chain(inner, emaopt.average_params(0.9)),
    "named_chain": lambda inner: optax.named_chain(
        ("inner", inner), ("average", emaopt.average_params(0.9))
    ),
    "averaged": lambda inner: emaopt.averaged(inner, 0.9),
}


@pytest.mark.parametrize("wrap", ADOPTING)
@pytest.mark.parametrize("inner", PLAIN.values(), ids=PLAIN)
def test_adopt_starts_the_average_from_the_parameters(inner, wrap, tmp_path):
    params = {"w": jnp.arange(4.0), "b": jnp.ones(2, jnp.bfloat16)}
    params, opt_state = train(params, inner.init(params), 3, inner)
    plain_orbax(tmp_path / "c", {"params": params, "opt_state": opt_state})
    tx = ADOPTING[wrap](inner)
    blank = jax.tree.map(jnp.zeros_like, params)
    report = []
    restored = checkpoint.restore(
        tmp_path / "c",
        {"params": blank, "opt_state": tx.init(blank)},
        report=report.append,
    )
    fresh = emaopt.averaged(inner, 0.9).init(params).averaging
    state = restored["opt_state"]
    inner_state, averaging = state.values() if wrap == "named_chain" else state
    assert_same(restored["params"], params)
    assert_same(inner_state, opt_state)
    assert_same(averaging, fresh)
    assert "renamed" in report[0] and "started the average anew" in report[1]


def test_adopt_across_composite_items(tmp_path):
    params = {"w": jnp.arange(4.0)}
    inner = optax.adam(1e-1)
    params, opt_state = train(params, inner.init(params), 3, inner)
    with ocp.CheckpointManager(tmp_path) as m:
        m.save(1, args=ocp.args.Composite(params=Save(params), opt_state=Save(opt_state)))
    target = TX.init(params)
    with ocp.CheckpointManager(
        tmp_path, handler_registry=checkpoint.handler_registry(report=lambda _: None)
    ) as m:
        restored = m.restore(
            1, args=ocp.args.Composite(params=Restore(params), opt_state=Restore(target))
        )
    assert_same(restored["params"], params)
    assert_same(restored["opt_state"].averaging, TX.init(params).averaging)
    assert_same(restored["opt_state"].inner_state, opt_state)


@pytest.mark.parametrize("inner", PLAIN.values(), ids=PLAIN)
def test_drop_restores_the_raw_parameters_without_the_average(inner, tmp_path):
    tx = emaopt.averaged(inner, 0.9)
    params = {"w": jnp.arange(4.0), "b": jnp.ones(2)}
    params, opt_state = train(params, tx.init(params), 3, tx)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": opt_state})
    report = []
    restored = checkpoint.restore(
        tmp_path / "c",
        {"params": params, "opt_state": inner.init(params)},
        report=report.append,
    )
    assert_same(restored, {"params": params, "opt_state": opt_state.inner_state})
    assert any("left out an average" in sentence for sentence in report)


def test_ordinary_checkpoint_with_an_average_is_read_as_it_is(tmp_path):
    state = trained()
    plain_orbax(tmp_path / "c", state)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    assert_same(checkpoint.load_averaged(tmp_path / "c"), averages(state))


def test_ordinary_checkpoint_of_a_mask_gives_raw_values_where_no_average_exists(tmp_path):
    tx = emaopt.averaged(optax.sgd(0.1), 0.9, mask=emaopt.by_name("w"))
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    params, opt_state = train(params, tx.init(params), 3, tx)
    plain_orbax(tmp_path / "c", {"params": params, "opt_state": opt_state})
    assert_same(
        checkpoint.load_averaged(tmp_path / "c"), emaopt.get_average(opt_state, params)
    )


def test_file_of_parameters_alone_is_an_error_unless_asked_for(tmp_path):
    state = trained()
    plain_orbax(tmp_path / "c", {"params": averages(state)})
    with pytest.raises(ValueError, match="it lacks opt_state/inner_state/0/count"):
        checkpoint.restore(tmp_path / "c", state)
    report = []
    fresh = {"params": state["params"], "opt_state": TX.init(state["params"])}
    restored = checkpoint.restore(
        tmp_path / "c", fresh, keep_missing=True, report=report.append
    )
    assert_same(restored["opt_state"].inner_state, fresh["opt_state"].inner_state)
    np.testing.assert_array_equal(restored["params"]["scale"], averages(state)["scale"])
    assert any("kept the target's values of opt_state/inner_state" in s for s in report)


def test_raw_parameters_alone(tmp_path):
    state = trained()
    checkpoint.save(tmp_path / "c", state)
    target = {"params": abstract(state["params"])}
    report = []
    restored = checkpoint.restore(
        tmp_path / "c", target, ignore_extra=True, report=report.append
    )
    assert_same(restored, {"params": state["params"]})
    assert any("left out opt_state/inner_state" in sentence for sentence in report)
    with pytest.raises(ValueError, match="it also holds opt_state/inner_state"):
        checkpoint.restore(tmp_path / "c", target)


def test_any_of_several_averages_is_loaded_by_name(tmp_path):
    tx = optax.named_chain(
        ("sgd", optax.sgd(0.1)),
        ("fast", emaopt.average_params(0.5)),
        ("slow", emaopt.average_params(0.99, mask=emaopt.by_name("w"))),
    )
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    params, opt_state = train(params, tx.init(params), 3, tx)
    checkpoint.save(
        tmp_path / "c", {"params": params, "opt_state": opt_state}, name="fast"
    )
    for name in ("fast", "slow"):
        assert_same(
            checkpoint.load_averaged(tmp_path / "c", name=name),
            emaopt.get_average(opt_state, params, name=name),
        )
    with pytest.raises(
        ValueError, match=r"no average under the name 'medium'; there are"
    ):
        checkpoint.load_averaged(tmp_path / "c", name="medium")


def test_an_item_of_a_composite_leads_to_its_step(tmp_path):
    state = trained()
    with manager(tmp_path) as m:
        m.save(5, args=ocp.args.Composite(**{k: Save(state[k]) for k in state}))
    for item in ("params", "opt_state"):
        assert_same(checkpoint.load_averaged(tmp_path / "5" / item), averages(state))


def test_parameters_of_a_model_with_other_variables(tmp_path):
    model, optimizer = trained_nnx()
    checkpoint.save(tmp_path / "c", {"model": model, "optimizer": optimizer})
    target = nnx.state(model, nnx.Param)
    loaded = checkpoint.load_averaged(tmp_path / "c", target=target)
    assert_same(loaded, emaopt.get_average(optimizer, target))


def test_dtype_to_load_must_be_floating(tmp_path):
    checkpoint.save(tmp_path / "c", trained())
    with pytest.raises(ValueError, match="dtype must be floating"):
        checkpoint.load_averaged(tmp_path / "c", dtype=jnp.int8)


MAPS = {case["title"]: case for case in facts("tf_ema/names", "maps")}
VARIABLES = {
    # title, key in it: (parameters, arguments); TensorFlow's map of tensors is left out.
    ("plain", "variables_to_restore_before_apply"): (
        {"v0": 1.0, "v1": 1.0, "v2": 1.0},
        {"name": "foo", "mask": {"v0": True, "v1": True, "v2": False}},
    ),
    ("scopes", "variables_to_restore"): (
        {"scope1": {"v0": 1.0, "v1": 1.0, "v2": 1.0}},
        {"name": "foo", "scope": "scope2", "mask": emaopt.by_name("v0", "v1")},
    ),
    # Without the list, TensorFlow makes up an average for c.
    ("trainable_without_average", "variables_to_restore_given_a_b"): (
        {"a": 1.0, "b": 1.0, "c": 1.0},
        {"mask": emaopt.by_name("a", "b")},
    ),
}


@pytest.mark.parametrize("title, key", VARIABLES)
def test_names_are_those_that_tensorflow_gives(title, key):
    params, arguments = VARIABLES[title, key]
    recorded = MAPS[title][key]
    of_variables = {k: v for k, v in recorded.items() if "add/" not in k}
    assert checkpoint.average_names(params, **arguments) == of_variables


def test_names_without_a_mask_and_with_another_one():
    assert checkpoint.average_names({"a": 1.0, "b": {"c": 2.0}}) == {
        "a/ExponentialMovingAverage": "a",
        "b/c/ExponentialMovingAverage": "b/c",
    }
    with pytest.raises(ValueError, match="a tree of booleans like params"):
        checkpoint.average_names({"a": 1.0}, mask={"b": True})


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
def test_safetensors_keep_names_dtypes_and_bits(dtype, tmp_path):
    state = trained()
    checkpoint.save(tmp_path / "c", state)
    out = tmp_path / "average.safetensors"
    checkpoint.export_safetensors(tmp_path / "c", out, dtype=dtype)
    with safetensors.safe_open(out, "numpy") as file:
        loaded = {name: file.get_tensor(name) for name in file.keys()}
    average = checkpoint.load_averaged(tmp_path / "c", dtype=dtype)
    expected = {"dense/kernel": average["dense"]["kernel"], "scale": average["scale"]}
    assert_same(loaded, jax.tree.map(np.asarray, expected))
    with pytest.raises(FileExistsError, match="pass force=True to replace it"):
        checkpoint.export_safetensors(tmp_path / "c", out)
    checkpoint.export_safetensors(tmp_path / "c", out, separator=".", force=True)
    with safetensors.safe_open(out, "numpy") as file:
        assert set(file.keys()) == {"dense.kernel", "scale"}


def test_safetensors_names_that_collide_are_refused(tmp_path):
    params = {"x": {"y": jnp.ones(1)}, "x-y": jnp.zeros(1)}
    checkpoint.save(tmp_path / "c", (params, TX.init(params)))
    with pytest.raises(ValueError, match="two parameters are called 'x-y'"):
        checkpoint.export_safetensors(tmp_path / "c", tmp_path / "o", separator="-")
    assert not (tmp_path / "o").exists()


# Damage.


def test_manager_directory_and_unfinished_step_say_what_to_give(tmp_path):
    with manager(tmp_path) as m:
        m.save(3, args=Save(trained()))
    with pytest.raises(
        ValueError,
        match=r"It holds steps: 3. Give the directory of one, such as \S+/3",
    ):
        checkpoint.load_averaged(tmp_path)
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(ValueError, match="is an unfinished save"):
        checkpoint.load_averaged(tmp_path / "9.orbax-checkpoint-tmp")


def test_missing_metadata_is_named(tmp_path):
    checkpoint.save(tmp_path / "c", trained())
    (tmp_path / "c" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="its metadata is lost, or it never was one"):
        checkpoint.restore(tmp_path / "c", trained())


def test_broken_metadata_is_named(tmp_path):
    checkpoint.save(tmp_path / "c", trained())
    (tmp_path / "c" / "_METADATA").write_text('{"tree')
    with pytest.raises(ValueError, match=r"the metadata in .*c cannot be read"):
        checkpoint.restore(tmp_path / "c", trained())


def flipped(content):
    """Flipped bits all over; single ones are in test_checkpoint_checksums."""
    return bytes(x ^ 0x10 if i % 97 == 0 else x for i, x in enumerate(content))


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": flipped,
    "lost": None,
}


# Orbax drops the reads that were under way when the first one failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("managed", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_an_error_that_says_where_or_does_no_harm(
    damage, managed, tmp_path
):
    params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    state = {"params": params, "opt_state": TX.init(params)}
    if managed:
        with manager(tmp_path) as m:
            m.save(1, args=Save(state))
    else:
        checkpoint.save(tmp_path / "1", state)
    errors = 0
    for file in [path for path in (tmp_path / "1").rglob("*") if path.is_file()]:
        content = file.read_bytes()
        if (change := DAMAGE[damage]) is not None:
            file.write_bytes(change(content))
        else:
            file.unlink()
        for call, expected in (
            (lambda: checkpoint.restore(tmp_path / "1", state), state),
            (lambda: checkpoint.load_averaged(tmp_path / "1"), averages(state)),
        ):
            try:
                assert_same(call(), expected)
            except ValueError as error:
                assert re.search(rf"{tmp_path}/1.*[Tt]ake another step", str(error))
                errors += 1
        file.write_bytes(content)
    assert errors >= 8
    assert_same(checkpoint.restore(tmp_path / "1", state), state)
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_array_that_cannot_be_read_is_named(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    state = {"params": params, "opt_state": TX.init(params)}
    checkpoint.save(tmp_path / "c", state)
    file = max((tmp_path / "c").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(flipped(file.read_bytes()))
    with pytest.raises(ValueError, match=r'Error reading "[a-z0-9_.]*\.w/0\.0"'):
        checkpoint.restore(tmp_path / "c", state)
    gc.collect()


def test_newer_format_asks_for_an_upgrade(tmp_path):
    checkpoint.save(tmp_path / "c", trained())
    file = tmp_path / "c" / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    content["custom_metadata"]["emaopt"]["version"] = 99
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="written by a newer emaopt"):
        checkpoint.load_averaged(tmp_path / "c")


def test_mixed_state_goes_through_the_manager(tmp_path):
    params = mixed_params()
    state = {"params": params, "opt_state": TX.init(params)}
    with manager(tmp_path) as m:
        m.save(1, args=Save(state))
        assert_same(m.restore(1, args=Restore(state)), state)
