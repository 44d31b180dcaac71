"""Faults that no other test of what others wrote would notice."""

import json
import os

import flax.serialization
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from other_writers import bundle, other
from safetensors.numpy import load_file, save_file
from test_adopt import THEIRS, TX, equal, orbax, start
from test_tensorflow_bundles import made, one_array, value

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import _checksums, _stream
from emaopt.checkpoint._formats import _bytes, _tensorbundle, _tensorflow


def test_checksum_of_a_tensor_of_several_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(_bytes, "PIECE", 8)
    entries, content = one_array(np.arange(7, dtype=np.float32))
    prefix = made(tmp_path, entries)
    (tmp_path / "made.data-00000-of-00001").write_bytes(content)
    assert value(_tensorbundle.opened(epath.Path(prefix))["w"])[6] == 6


@pytest.mark.parametrize(
    ("starts", "message"),
    [([0, 0], "overlap"), ([0], "do not make up"), ([0, 3], "lies outside")],
)
def test_slices_that_cannot_be(starts, message, tmp_path):
    part = np.arange(2, dtype=np.float32)
    entries, content = one_array(part)
    small = entries.pop(b"w")
    whole = _tensorbundle._MESSAGES["Entry"](dtype=1)
    whole.shape.dim.add(size=4)
    for i in starts:
        whole.slices.add().extent.add(start=i, length=2)
        entries[_tensorbundle._slice_key(b"w", [i], [2])] = small
    entries[b"w"] = whole.SerializeToString()
    prefix = made(tmp_path, entries)
    (tmp_path / "made.data-00000-of-00001").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _tensorbundle.opened(epath.Path(prefix))


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (24, jnp.float8_e5m2),
        (25, jnp.float8_e4m3fn),
        (17, np.uint16),
        (22, np.uint32),
        (23, np.uint64),
        (5, np.int16),
        (18, np.complex128),
    ],
)
def test_dtypes_by_tensorflows_numbers(number, dtype, tmp_path):
    array = np.array([1, 3], dtype)
    entries, content = one_array(array, dtype=number)
    prefix = made(tmp_path, entries)
    (tmp_path / "made.data-00000-of-00001").write_bytes(content)
    found = value(_tensorbundle.opened(epath.Path(prefix))["w"])
    assert found.dtype == dtype and found.tolist() == array.tolist()


def test_of_two_counts_none_is_taken():
    arrays = {
        "global_step": np.int64(1),
        "gan/global_step": np.int64(2),
        "w": np.zeros(2),
        "w/ExponentialMovingAverage": np.zeros(2),
    }
    opened = _tensorflow.of_saver(
        {n: _bytes.constant(x) for n, x in arrays.items()}, False, _tensorflow.AVERAGE
    )
    assert opened.found[0].updates is None


def test_in_a_scope_a_like_shape_does_not_make_a_slot():
    arrays = {
        n: _bytes.constant(np.zeros(2, np.float32)) for n in ("head", "scope/head/gain")
    }
    tree = _tensorflow.of_saver(arrays, False, "slow").tree
    assert set(tree) == {"params"} and "gain" in tree["params"]["scope"]["head"]


def test_a_name_in_two_parts_is_refused(tmp_path):
    for i in (1, 2):
        save_file({"w": np.full(2, i, np.float32)}, tmp_path / f"m-{i}.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "m-1.safetensors", "v": "m-2.safetensors"}})
    )
    with pytest.raises(ValueError, match="another part has, too"):
        checkpoint.describe(tmp_path / "m.safetensors.index.json")


def test_shards_with_empty_arrays(tmp_path):
    tree = {
        "a": np.zeros((0, 3), np.float32),
        "b": np.arange(2, dtype=np.float32),
        "c": np.arange(3, dtype=np.float32),
        "z": np.full(1, 7, np.float32),
    }
    save_file(tree, tmp_path / "x.safetensors")
    checkpoint.export_safetensors(
        tmp_path / "x.safetensors", tmp_path / "m.safetensors", shard_bytes=12
    )
    found = {}
    for file in tmp_path.glob("m-*.safetensors"):
        found |= load_file(file)
    equal(found, tree)


def test_the_older_form_goes_before_the_new_one_comes(tmp_path, monkeypatch):

    path, out = orbax(tmp_path / "c", THEIRS), tmp_path / "model.safetensors"
    checkpoint.export_safetensors(path, out)

    there, real = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda *a, **k: (there.append(out.exists()), real(*a, **k))[1]
    )
    checkpoint.export_safetensors(path, out, shard_bytes=10, force=True)
    assert there and not any(there)


def test_shards_of_another_number_go(tmp_path):
    path, out = orbax(tmp_path / "c", THEIRS), tmp_path / "model.safetensors"
    checkpoint.export_safetensors(path, out, shard_bytes=10)
    checkpoint.export_safetensors(
        path, out, shard_bytes=10, at="params/dense/kernel", force=True
    ) if False else None
    small = orbax(tmp_path / "d", {"params": {f"{i}": jnp.ones(2) for i in range(3)}})
    checkpoint.export_safetensors(small, out, shard_bytes=8, force=True)
    assert len(list(tmp_path.glob("model-*"))) == 3


def test_a_tree_of_another_kind_is_no_average(tmp_path):
    theirs = {"params": {"w": jnp.ones(2)}, "ema_params": {"w": jnp.ones(2, jnp.int32)}}
    with pytest.raises(ValueError, match="holds no average"):
        checkpoint.load_averaged(orbax(tmp_path / "c", theirs))


def test_at_depth_any_name_is_no_average(tmp_path):
    inner = {"grads": THEIRS["params"], "grads_ema": THEIRS["ema_params"]}
    path = orbax(tmp_path / "c", {"params": THEIRS["params"], "stats": inner})
    with pytest.raises(ValueError, match="holds no average"):
        checkpoint.load_averaged(path)


def test_a_step_of_a_shape_is_no_count(tmp_path):
    found = checkpoint.adopt(
        orbax(tmp_path / "c", {**THEIRS, "step": jnp.full(1, 7)}), start()
    )
    assert found["opt_state"].averaging.num_updates == 0


@pytest.mark.parametrize(("step", "count"), [(-3, 0), (2**40, 2**31 - 1)])
def test_counts_out_of_range(step, count, tmp_path):
    found = checkpoint.adopt(
        orbax(tmp_path / "c", {**THEIRS, "step": np.int64(step)}), start()
    )
    assert found["opt_state"].averaging.num_updates == count


def test_checksums_follow_a_rename(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c", start())
    checked = set()
    real = _checksums.check
    monkeypatch.setattr(
        _checksums,
        "check",
        lambda f, p, sums, values: (
            checked.update(n for n in values if n in sums),
            real(f, p, sums, values),
        )[1],
    )
    checkpoint.adopt(
        tmp_path / "c",
        start(params={"Dense_0": THEIRS["params"]["dense"]}),
        rename={"dense": "Dense_0"},
    )
    assert ("params", "Dense_0", "kernel") in checked


def test_numbers_of_python_under_other_names(tmp_path):
    path = orbax(tmp_path / "c", {**THEIRS, "global_step": 12})
    found = checkpoint.adopt(path, start() | {"mine": 0}, rename={"global_step": "mine"})
    assert found["mine"] == 12


@pytest.mark.parametrize("n", [1])
def test_the_weight_of_a_debiased_average_of_emaopts(n, tmp_path):
    tx = emaopt.averaged(optax.sgd(1.0), 0.5, debias=True)
    state = start(tx)
    _, state["opt_state"] = tx.update(
        state["params"], state["opt_state"], state["params"]
    )
    checkpoint.save(tmp_path / "c", state)
    found = checkpoint.adopt(tmp_path / "c", start(tx))
    assert found["opt_state"].averaging.weight == state["opt_state"].averaging.weight != 1


def test_parameters_at_the_root():
    pass


def test_every_bit(tmp_path):
    bits = np.array([0x80000000, 0x7FC00001, 0xFFC12345, 1], np.uint32)
    save_file({"w": bits.view(np.float32)}, tmp_path / "x.safetensors")
    checkpoint.convert(tmp_path / "x.safetensors", tmp_path / "c")
    found = np.asarray(checkpoint.load_averaged(tmp_path / "c")["w"])
    assert found.view(np.uint32).tolist() == bits.tolist()


def test_a_changed_bit_is_noticed_behind_the_last_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(_stream, "BATCH", 64)
    monkeypatch.setattr(_bytes, "PIECE", 32)
    save_file(
        {"w": np.arange(42, dtype=np.float32).reshape(21, 2)}, tmp_path / "x.safetensors"
    )
    checkpoint.convert(tmp_path / "x.safetensors", tmp_path / "c")
    real = _stream.read

    def read(*args):
        found = real(*args)
        for array in found:
            array[array == 41] = 40
        return found

    monkeypatch.setattr(_stream, "read", read)
    with pytest.raises(ValueError, match="the checksums differ"):
        checkpoint.export_safetensors(tmp_path / "c", tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("kind", [np.int8, np.float16, np.float32])
def test_the_sum_of_pieces_is_that_of_the_whole(kind):
    array = np.random.default_rng(0).integers(0, 99, 101).astype(kind)
    running = _checksums.Running()
    for begin in range(0, 101, 7):
        running.add(array[begin : begin + 7])
    assert running.result() == _checksums._of_numpy(array)


def test_a_value_of_ones_own_keeps_its_name(tmp_path):
    params = {"v": {"value": jnp.ones(2)}, "w": jnp.ones(1)}
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": TX.init(params)})
    checkpoint.convert(tmp_path / "c", tmp_path / "d")
    names = [leaf.name for leaf in checkpoint.describe(tmp_path / "d").leaves]
    assert names == ["params/v/value", "params/w"]


def test_parts_with_a_row(tmp_path):
    array = _bytes.constant(np.arange(6).reshape(3, 2))
    assert array.reading((0, slice(0, 2)), array.dtype).result().tolist() == [0, 1]
    assert array.reading(
        (np.array([2, 0]), slice(0, 1)), array.dtype
    ).result().tolist() == [[4], [0]]


def test_leaves_have_the_names_of_their_file(tmp_path):

    folder, said, _ = bundle("v1_ema")
    names = {leaf.name for leaf in checkpoint.describe(folder).leaves}
    assert names == {n for n, one in said["tensors"].items() if one["dtype"] != "string"}


def test_of_several_renames_the_longest_decides(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    rename = {"dense": "a", "dense/bias": "b/bias"}
    checkpoint.convert(path, tmp_path / "d", rename=rename)
    found = checkpoint.load_averaged(tmp_path / "d")
    equal(
        found,
        {
            "a": {"kernel": THEIRS["ema_params"]["dense"]["kernel"]},
            "b": {"bias": THEIRS["ema_params"]["dense"]["bias"]},
        },
    )


def test_adopt_longest(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    rename = {"dense": "a", "dense/bias": "b/bias"}
    d = THEIRS["params"]["dense"]
    found = checkpoint.adopt(
        path,
        start(params={"a": {"kernel": d["kernel"]}, "b": {"bias": d["bias"]}}),
        rename=rename,
    )
    equal(
        emaopt.get_average(found["opt_state"])["b"]["bias"],
        THEIRS["ema_params"]["dense"]["bias"],
    )


def test_keys_that_differ_in_type_alone(tmp_path):
    # {1: True, "1": False} in msgpack
    (tmp_path / "x").write_bytes(b"\x82\x01\xc3\xa1\x31\xc2")
    with pytest.raises(ValueError, match="differ in type alone"):
        checkpoint.describe(tmp_path / "x")


def test_bytes_behind_the_end(tmp_path):
    content = flax.serialization.msgpack_serialize({"params": {"w": np.ones(2)}})
    (tmp_path / "x").write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="goes on behind its end"):
        checkpoint.describe(tmp_path / "x")


def test_of_two_optimizers_counts_none_is_taken():
    names = ["model/w", "model/w/.OPTIMIZER_SLOT/a/average", "a/iter", "b/iter"]
    arrays = {
        n + "/.ATTRIBUTES/VARIABLE_VALUE": _bytes.constant(np.int64(i))
        for i, n in enumerate(names)
    }
    opened = _tensorflow.of_object_graph(arrays, False)
    assert [one.updates for one in opened.found] == [None]


def test_an_export_in_another_dtype(tmp_path):
    out = tmp_path / "x.safetensors"
    checkpoint.export_safetensors(orbax(tmp_path / "c", THEIRS), out, dtype="float16")
    found = load_file(out)
    assert found["dense/kernel"].dtype == np.float16
    equal(found["dense/bias"], np.full(2, 5, np.float16))


def test_own_field_with_rename(tmp_path):
    state = start(params={"Dense_0": THEIRS["params"]["dense"]})
    state["ema_params"] = state["params"]
    found = checkpoint.adopt(
        orbax(tmp_path / "c", THEIRS), state, rename={"dense": "Dense_0"}
    )
    equal(found["ema_params"]["Dense_0"], THEIRS["ema_params"]["dense"])


def test_value_in_safetensors(tmp_path):
    save_file(
        {"head.value": np.ones(2, np.float32), "w": np.ones(1, np.float32)},
        tmp_path / "x.safetensors",
    )
    names = [leaf.name for leaf in checkpoint.describe(tmp_path / "x.safetensors").leaves]
    assert names == ["head/value", "w"]


@pytest.mark.quick(9)
@pytest.mark.parametrize("name", ["kauldron", "levanter", "msgpack_legacy"])
def test_a_directory_of_steps_says_which_there_are(name):
    path = other(name).path
    with pytest.raises(
        ValueError, match=f"It holds steps: {path.name}. Give .*{path.name}"
    ):
        checkpoint.load_averaged(path.parent)
