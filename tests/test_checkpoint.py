"""Checkpoints hold the averages under the names, and give training back bit for bit."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from models import Net, train_step

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import _read

TX = optax.chain(optax.adam(1e-1), emaopt.average_params(0.9))


def mixed_params():
    return {
        "dense": {"kernel": jnp.full((3, 2), 0.5, jnp.bfloat16), "bias": jnp.zeros(2)},
        "blocks": [jnp.arange(4.0), jnp.ones(())],
        "none": None,
        "empty": jnp.zeros((0, 3)),
    }


def train(params, opt_state, steps=3, tx=TX):
    @jax.jit
    def step(params, opt_state, i):
        grads = jax.tree.map(lambda p: (0.1 * p + i).astype(p.dtype), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(steps):
        params, opt_state = step(params, opt_state, i + 1)
    return params, opt_state


def trained_nnx():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)

    for _ in range(3):
        train_step(model, optimizer)
    return model, optimizer


def as_dict():
    params, opt_state = train(mixed_params(), TX.init(mixed_params()))
    key = jax.random.key(3)
    return {"params": params, "opt_state": opt_state, "step": jnp.int32(3), "key": key}


def as_tuple():
    return train(mixed_params(), TX.init(mixed_params()))


def as_train_state():
    params, opt_state = as_tuple()
    state = TrainState.create(apply_fn=jnp.dot, params=mixed_params(), tx=TX)
    return state.replace(step=jnp.int32(3), params=params, opt_state=opt_state)


def as_nested_frozen_dict():
    params, opt_state = as_tuple()
    return freeze({"train": {"params": params, "opt_state": opt_state}, "epoch": 2})


def as_nnx_states():
    model, optimizer = trained_nnx()
    return {"params": nnx.state(model, nnx.Param), "opt_state": nnx.state(optimizer)}


def as_nnx_pure():
    model, optimizer = trained_nnx()
    pure = getattr(nnx, "as_pure", None) or nnx.pure  # the name before Flax 0.12.7
    params = pure(nnx.state(model, nnx.Param))
    return {"params": params, "opt_state": pure(optimizer.opt_state)}


def as_nnx_split():
    return nnx.split(trained_nnx())[1]


def as_equinox():
    model = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    return {"model": model, "opt_state": train(model, TX.init(model))[1]}


CONTAINERS = {
    "dict": (as_dict, ("params",)),
    "tuple": (as_tuple, (0,)),
    "TrainState": (as_train_state, ("params",)),
    "nested FrozenDict": (as_nested_frozen_dict, ("train", "params")),
    "nnx states": (as_nnx_states, ("params",)),
    "nnx pure": (as_nnx_pure, ("params",)),
    "nnx split": (as_nnx_split, ("0",)),
    "nnx modules": (trained_nnx, (0,)),
    "equinox": (as_equinox, ("model",)),
}


def abstract(state):
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        state,
    )


def bits(x):
    if jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert list(map(bits, actual)) == list(map(bits, expected))


def as_states(state):
    """Modules compare by identity; their states by value."""
    return jax.tree.map(
        lambda node: nnx.state(node) if isinstance(node, nnx.Pytree) else node,
        state,
        is_leaf=lambda node: isinstance(node, nnx.Pytree),
    )


def strip_value(tree):
    """The values of a raw restore, by name; nnx keeps each under a key `value`."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [
            str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path
        ]
        leaves["/".join(n for n in names if n != "value")] = leaf
    return leaves


@pytest.mark.parametrize("make, path_to_params", CONTAINERS.values(), ids=CONTAINERS)
def test_round_trip_is_bit_exact_and_the_file_holds_the_averages(
    make, path_to_params, tmp_path
):
    state = make()
    checkpoint.save(tmp_path / "c", state)
    for target in (state, abstract(state)):
        assert_same(
            as_states(checkpoint.restore(tmp_path / "c", target)), as_states(state)
        )

    # A reader that knows nothing of emaopt finds the averages under the names.
    raw = ocp.StandardCheckpointer().restore(tmp_path / "c")
    for key in path_to_params:
        raw = raw[key]
    in_file = strip_value(raw)
    averages = strip_value(emaopt.get_average(state))
    assert averages
    for name, average in averages.items():
        if average.size:
            assert bits(in_file[name]) == bits(average)

    loaded = strip_value(checkpoint.load_averaged(tmp_path / "c"))
    for name, average in averages.items():
        assert bits(loaded[name]) == bits(average)


@pytest.mark.parametrize(
    "make", [make for make, _ in CONTAINERS.values()], ids=CONTAINERS
)
def test_swap_state_is_an_involution(make):
    state = as_states(make())
    assert_same(checkpoint.swap_state(checkpoint.swap_state(state)), state)


READERS = {
    "StandardCheckpointer": "ocp.StandardCheckpointer().restore(path + '/saved')",
    "StandardCheckpointer of a step": (
        "ocp.StandardCheckpointer().restore(path + '/steps/7/default')"
    ),
    "CheckpointManager": "ocp.CheckpointManager(path + '/steps').restore(7)",
    "v1": "v1.load(path + '/saved')",
    "v1 of a step": "v1.load(path + '/steps/7')",
}


@pytest.mark.slow
def test_any_process_without_emaopt_serves_the_average(tmp_path):
    state = as_dict()
    checkpoint.save(tmp_path / "saved", state)
    registry = checkpoint.handler_registry()
    with ocp.CheckpointManager(tmp_path / "steps", handler_registry=registry) as manager:
        manager.save(7, args=ocp.args.StandardSave(state))
    readers = ", ".join(READERS.values())
    program = f"""
        import json, sys
        sys.modules["emaopt"] = None  # importing it raises from here on
        try:
            import emaopt
        except ImportError:
            pass
        import numpy as np
        import orbax.checkpoint as ocp
        from orbax.checkpoint import v1
        path = sys.argv[1]
        for tree in ({readers}):
            params = tree["params"]
            found = params["blocks"][0], params["dense"]["kernel"]
            print(json.dumps([np.asarray(x, np.float32).tolist() for x in found]))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    average = emaopt.get_average(state["opt_state"])
    found = average["blocks"][0], average["dense"]["kernel"]
    expected = [np.asarray(x, np.float32).tolist() for x in found]
    read = list(map(json.loads, run.stdout.splitlines()))
    assert read == [expected] * len(READERS)


@pytest.mark.slow
def test_resuming_equals_training_on_bit_for_bit(tmp_path):
    params = mixed_params()
    tx = emaopt.averaged(
        optax.adamw(1e-2), emaopt.warmup_decay(0.99), every=2, debias=True
    )
    halfway = train(params, tx.init(params), 5, tx)
    checkpoint.save(tmp_path / "c", halfway)
    resumed = checkpoint.restore(tmp_path / "c", jax.eval_shape(lambda: halfway))
    assert_same(train(*resumed, 6, tx), train(*halfway, 6, tx))


def test_disk_size_is_that_of_the_plain_state(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (512, 1024))}
    state = {"params": params, "opt_state": TX.init(params)}
    checkpoint.save(tmp_path / "swapped", state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", state)

    def size(path):
        return sum(
            file.stat().st_size for file in Path(path).rglob("*") if file.is_file()
        )

    assert size(tmp_path / "swapped") <= 1.01 * size(tmp_path / "plain")


def test_masked_parameters_stand_under_their_names_as_they_are(tmp_path):
    tx = emaopt.averaged(optax.sgd(0.1), 0.9, mask=emaopt.by_name("kernel"))
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
    state = train(params, tx.init(params), tx=tx)
    checkpoint.save(tmp_path / "c", state)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    assert_same(
        checkpoint.load_averaged(tmp_path / "c"), emaopt.get_average(state[1], state[0])
    )


def test_of_several_averages_one_is_served(tmp_path):
    tx = optax.named_chain(
        ("sgd", optax.sgd(0.1)),
        ("fast", emaopt.average_params(0.5)),
        ("slow", emaopt.average_params(0.99)),
    )
    params, opt_state = train({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}), tx=tx)
    state = {"params": params, "opt_state": opt_state}
    checkpoint.save(tmp_path / "c", state, name="slow")
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    assert_same(
        checkpoint.load_averaged(tmp_path / "c"),
        emaopt.get_average(opt_state, name="slow"),
    )
    with pytest.raises(
        ValueError, match=r"several averages in this state, at.*fast.*name="
    ):
        checkpoint.save(tmp_path / "d", state)


def test_load_averaged_takes_containers_dtypes_and_shardings(tmp_path):
    params = {"w": jnp.arange(16.0).reshape(8, 2), "t": (jnp.ones(8, jnp.bfloat16),)}
    state = train(params, TX.init(params))
    checkpoint.save(tmp_path / "c", state)
    average = emaopt.get_average(state[1])
    path = tmp_path / "c"

    assert_same(
        checkpoint.load_averaged(path, target=params),
        emaopt.get_average(state[1], params),
    )
    half = checkpoint.load_averaged(path, target=params, dtype=jnp.float16)
    assert_same(half, jax.tree.map(lambda x: x.astype(jnp.float16), average))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    for sharding in (sharded, {"w": sharded, "t": (sharded,)}):
        loaded = checkpoint.load_averaged(path, target=params, sharding=sharding)
        assert loaded["w"].sharding == sharded and loaded["t"][0].sharding == sharded
        np.testing.assert_array_equal(loaded["w"], average["w"])


def test_restore_to_another_sharding(tmp_path):
    params = {"w": jnp.arange(16.0).reshape(8, 2)}
    state = train(params, TX.init(params))
    checkpoint.save(tmp_path / "c", state)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def placed(x):
        spec = PartitionSpec("data") if x.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    restored = checkpoint.restore(tmp_path / "c", jax.tree.map(placed, state))
    assert_same(restored, state)
    assert len(restored[1][1].average["w"].sharding.device_set) == 8


@pytest.mark.parametrize("written, read", [(8, 1), (1, 8), (4, 8), (8, 4)])
def test_restore_reads_one_part_of_one_array_after_another(
    written, read, tmp_path, monkeypatch
):
    """As few as Orbax takes at once, so that memory stays bounded: no less, no error."""

    def on(devices, x):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        # What was split along one axis is read along the other one.
        axes = (("data", None), (None, "data"))[devices == read]
        return NamedSharding(mesh, PartitionSpec(*axes[: x.ndim and 2]))

    params = {"w": jnp.arange(8.0 * 24).reshape(8, 24), "i": jnp.ones((24, 8), jnp.int4)}
    state = {"params": params, "opt_state": emaopt.averaged(optax.sgd(0.1), 0.9)}
    state["opt_state"] = state["opt_state"].init(params)
    state |= {"keys": jax.random.split(jax.random.key(0), 1000), "number": np.int32(3)}
    checkpoint.save(
        tmp_path / "c",
        jax.tree.map(
            lambda x: jax.device_put(x, on(written, x)) if jnp.ndim(x) == 2 else x, state
        ),
    )
    monkeypatch.setattr(_read, "MIN_IN_FLIGHT", 1)
    target = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(read, x))
            if jnp.ndim(x) == 2
            else x
        ),
        state,
    )
    assert_same(checkpoint.restore(tmp_path / "c", target), state)


def test_restore_to_other_dtypes(tmp_path):
    state = as_dict()
    checkpoint.save(tmp_path / "c", state)

    def cast(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return (
            x.astype({2: jnp.float32, 4: jnp.float16}[x.dtype.itemsize])
            if floating
            else x
        )

    wanted = jax.tree.map(cast, state)
    assert_same(checkpoint.restore(tmp_path / "c", abstract(wanted)), wanted)


def test_an_average_that_is_sharded_over_replicas_comes_back_so(tmp_path):
    """Parameters on all devices, the average split over them; on other devices too."""

    def placed(state, devices):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))

        def place(path, x):
            split = "average" in jax.tree_util.keystr(path) and x.ndim
            spec = PartitionSpec("data") if split else PartitionSpec()
            return jax.device_put(x, NamedSharding(mesh, spec))

        return jax.tree_util.tree_map_with_path(place, state)

    params = {"w": jnp.arange(16.0).reshape(8, 2)}
    state = placed(train(params, TX.init(params)), 8)
    checkpoint.save(tmp_path / "c", state)
    for devices in (8, 4, 1):
        wanted = placed(state, devices)
        restored = checkpoint.restore(tmp_path / "c", abstract(wanted))
        assert_same(restored, state)
        same = jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, wanted)
        assert all(jax.tree.leaves(same))


def test_a_swapped_state_is_saved_as_it_is(tmp_path):
    state = as_dict()
    checkpoint.save(tmp_path / "c", checkpoint.swap_state(state))
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    swapped = checkpoint.restore(tmp_path / "c", checkpoint.swap_state(state))
    assert_same(checkpoint.swap_state(swapped), state)


def test_plain_orbax_cannot_take_the_averages_for_raw_parameters(tmp_path):
    params = {"w": jnp.ones(2)}
    state = (params, TX.init(params))
    checkpoint.save(tmp_path / "c", state)
    with pytest.raises(ValueError, match="num_updates"):
        ocp.StandardCheckpointer().restore(tmp_path / "c", abstract(state))


def test_custom_metadata_is_kept_beside_the_marker(tmp_path):
    checkpoint.save(tmp_path / "c", as_tuple(), custom_metadata={"run": "a"})
    metadata = ocp.StandardCheckpointer().metadata(tmp_path / "c").custom_metadata
    assert metadata["run"] == "a"
    assert metadata["emaopt"]["params"] == ["0"]
    assert metadata["emaopt"]["average"] == ["1", "1"]


def test_force_replaces(tmp_path):
    first, second = as_tuple(), train(*as_tuple())
    checkpoint.save(tmp_path / "c", first)
    with pytest.raises(ValueError, match=r"c already exists; pass force=True"):
        checkpoint.save(tmp_path / "c", second)
    assert_same(checkpoint.restore(tmp_path / "c", first), first)
    checkpoint.save(tmp_path / "c", second, force=True)
    assert_same(checkpoint.restore(tmp_path / "c", first), second)


@pytest.mark.slow
def test_forced_save_removes_the_old_checkpoint_only_when_the_new_one_is_complete(
    tmp_path, monkeypatch
):
    first = as_tuple()
    checkpoint.save(tmp_path / "c", first)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", full)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path / "c", train(*first), force=True)
    monkeypatch.undo()
    assert_same(checkpoint.restore(tmp_path / "c", first), first)
    checkpoint.save(tmp_path / "c", train(*first), force=True)
    assert_same(checkpoint.restore(tmp_path / "c", first), train(*first))


LAYOUTS = {
    "beside a better copy": lambda p, s: {
        "train_state": {"params": p, "opt_state": s},
        "best_params": jax.tree.map(jnp.zeros_like, p),
    },
    "with a copy at the same place": lambda p, s: {
        "best": jax.tree.map(jnp.zeros_like, p),
        "params": p,
        "opt_state": s,
        "teacher": jax.tree.map(jnp.zeros_like, p),
    },
    "with a target network": lambda p, s: {
        "target_params": jax.tree.map(jnp.zeros_like, p),
        "train": {"params": p, "opt_state": s},
    },
    "deep": lambda p, s: {"opt_state": s, "run": {"net": {"params": p}}},
    "tuple with a counter": lambda p, s: (p, s, jnp.int32(3)),
    "other names": lambda p, s: {"model": p, "optimizer": s},
}


@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parameters_are_told_from_everything_that_looks_like_them(
    layout, inner, tmp_path
):
    tx = emaopt.averaged(inner, 0.9)
    params = {"w": jnp.arange(3.0), "temperature": 1.0}
    params, opt_state = train(params, tx.init(params), tx=tx)
    state = LAYOUTS[layout](params, opt_state)
    checkpoint.save(tmp_path / "c", state)
    assert_same(checkpoint.load_averaged(tmp_path / "c"), emaopt.get_average(opt_state))
    assert_same(checkpoint.restore(tmp_path / "c", state), state)


def test_an_average_that_is_there_in_part_is_not_started_anew(tmp_path):
    params = {"w": jnp.ones(3), "b": jnp.zeros(2)}
    part = emaopt.averaged(optax.sgd(0.1), 0.9, mask={"w": True, "b": False})
    whole = emaopt.averaged(optax.sgd(0.1), 0.9)
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": part.init(params)})
    target = {"params": params, "opt_state": whole.init(params)}
    with pytest.raises(ValueError, match="it lacks opt_state/averaging/average/b"):
        checkpoint.restore(tmp_path / "c", target)


def test_two_runs_in_one_state_are_told_apart_by_name(tmp_path):
    def run(start):
        params = {"w": start}
        params, opt_state = train(params, TX.init(params))
        return {"params": params, "opt_state": opt_state}

    state = {"gen": run(jnp.ones(3)), "disc": run(jnp.zeros(3))}
    checkpoint.save(tmp_path / "c", state, name="gen")
    expected = emaopt.get_average(state["gen"]["opt_state"])
    assert_same(checkpoint.load_averaged(tmp_path / "c"), expected)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)


def test_a_lost_marker_does_not_make_raw_parameters_averages(tmp_path):
    state = dict(zip(("params", "opt_state"), as_tuple(), strict=True))
    del state["params"]["empty"], state["opt_state"]
    state["opt_state"] = TX.init(state["params"])
    state["params"], state["opt_state"] = train(state["params"], state["opt_state"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", checkpoint.swap_state(state))
    average = emaopt.get_average(state["opt_state"])
    assert_same(checkpoint.load_averaged(tmp_path / "c"), average)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save("c", as_tuple())
    assert_same(checkpoint.restore("c", as_tuple()), as_tuple())
    assert os.listdir(tmp_path) == ["c"]


def test_keys_are_compared_with_what_they_are_made_of(tmp_path):
    state = as_dict()
    checkpoint.save(tmp_path / "c", state)
    for other in (jax.random.split(jax.random.key(0), 3), jax.random.key(0, impl="rbg")):
        with pytest.raises(ValueError, match="key has shape"):
            checkpoint.restore(tmp_path / "c", state | {"key": other})


def test_own_key_of_custom_metadata_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is where emaopt keeps its own record"):
        checkpoint.save(tmp_path / "c", as_tuple(), custom_metadata={"emaopt": 1})


def test_trees_without_parameters(tmp_path):
    state = {"params": {}, "opt_state": TX.init({})}
    checkpoint.save(tmp_path / "c", state)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    with pytest.raises(ValueError, match="c holds an average of no parameters"):
        checkpoint.load_averaged(tmp_path / "c")


def test_nan_infinity_and_the_smallest_numbers_keep_their_bits(tmp_path):
    values = jnp.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], jnp.float32)
    params = {"w": values, "h": values.astype(jnp.bfloat16)}
    state = {"params": params, "opt_state": TX.init(params)}
    checkpoint.save(tmp_path / "c", state)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    average = emaopt.get_average(state["opt_state"])
    assert_same(checkpoint.load_averaged(tmp_path / "c"), average)


# Errors.


@pytest.mark.parametrize("use", ["restore", "load_averaged"])
def test_path_that_does_not_exist(use, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"{use}: there is no checkpoint at .*nowhere"
    ):
        if use == "restore":
            checkpoint.restore(tmp_path / "nowhere", as_tuple())
        else:
            checkpoint.load_averaged(tmp_path / "nowhere")


def test_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is not a complete Orbax checkpoint"):
        checkpoint.load_averaged(tmp_path)


def test_checkpoint_without_an_average(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": {"w": jnp.ones(2)}})
    with pytest.raises(ValueError, match="c holds no average: its parameters are raw"):
        checkpoint.load_averaged(tmp_path / "c")


def test_target_with_another_shape_or_other_names(tmp_path):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    checkpoint.save(tmp_path / "c", (params, TX.init(params)))

    other = {"w": jnp.ones((2, 4)), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"0/w has shape \(2, 3\) there and \(2, 4\) in"):
        checkpoint.restore(tmp_path / "c", (other, TX.init(other)))
    with pytest.raises(ValueError, match=r"w has shape \(2, 3\) there and \(2, 4\) in"):
        checkpoint.load_averaged(tmp_path / "c", target=other)

    other = {"w": jnp.ones((2, 3)), "scale": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"it lacks 0/scale.*it also holds 0/b"):
        checkpoint.restore(tmp_path / "c", (other, TX.init(other)))
    with pytest.raises(ValueError, match="it lacks scale; it also holds b"):
        checkpoint.load_averaged(tmp_path / "c", target=other)
    with pytest.raises(ValueError, match=r"sharding must be.*they differ at"):
        checkpoint.load_averaged(tmp_path / "c", sharding={"w": None})


@pytest.mark.parametrize(
    "state, message",
    [
        ({"params": {"w": jnp.ones(2)}}, "save: no average in this state. Train with"),
        (
            {"opt_state": TX.init({"w": jnp.ones(2)})[1]},
            "no parameters with its names and shapes",
        ),
        ({"opt_state": TX.init({"w": jnp.ones(2)})}, "no parameters with its names"),
        (
            {"params": {"w": jnp.ones(3)}, "opt_state": TX.init({"w": jnp.ones(2)})},
            "no parameters with its names and shapes",
        ),
        (
            {"w": jnp.ones(2), "opt_state": TX.init({"w": jnp.ones(2)})},
            "no parameters with its names and shapes",
        ),
        (
            {"params": (p := {"a.b": 1.0, "a": {"b": 2.0}}), "opt_state": TX.init(p)},
            "to one file, because it joins names with dots",
        ),
        (
            {"a": jnp.ones(2), "b": jnp.ones(2), "opt_state": TX.init(jnp.ones(2))},
            "could be of any of a, b. Say with params= which, as params='a'",
        ),
    ],
)
def test_state_that_cannot_be_swapped_is_not_saved(state, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "c", state)
    assert not (tmp_path / "c").exists()
