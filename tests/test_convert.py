"""`convert`, and files of safetensors and msgpack, read and written."""

import json
import struct

import flax.serialization
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file
from test_adopt import THEIRS, equal, orbax
from typer.testing import CliRunner

from emaopt import checkpoint
from emaopt.cli import app


def test_a_conversion_keeps_every_bit_and_serves_anybody(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    assert checkpoint.convert(path, tmp_path / "served") == "the averages of ema_params"
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "served")
    equal(restored, {"params": THEIRS["ema_params"]})
    checkpoint.convert(path, tmp_path / "raw", weights="raw", dtype="bfloat16")
    raw = checkpoint.load_averaged(tmp_path / "raw")
    assert raw["dense"]["kernel"].dtype == jnp.bfloat16
    equal(raw, THEIRS["params"])
    described = checkpoint.describe(tmp_path / "served")
    assert described.record["weights"] == "the averages of ema_params"


def test_the_command_converts_and_says_what(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    options = ["--rename", "dense=encoder/Dense_0", "--json"]
    command = ["convert", str(path), "--out", str(tmp_path / "d"), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["weights"] == "the averages of ema_params"
    found = checkpoint.load_averaged(tmp_path / "d")
    equal(found["encoder"]["Dense_0"], THEIRS["ema_params"]["dense"])


# ---- safetensors


def test_an_export_in_several_files_is_read_back(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    out = tmp_path / "model.safetensors"
    checkpoint.export_safetensors(
        path, out, separator=".", rename={"dense": "tower.0"}, shard_bytes=10
    )
    assert not out.exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 32},
        "weight_map": {
            "tower.0.bias": "model-00001-of-00002.safetensors",
            "tower.0.kernel": "model-00002-of-00002.safetensors",
        },
    }
    parts = [
        load_file(tmp_path / name) for name in sorted({*index["weight_map"].values()})
    ]
    equal(parts[0]["tower.0.bias"], THEIRS["ema_params"]["dense"]["bias"])
    checkpoint.convert(tmp_path / "model.safetensors.index.json", tmp_path / "back")
    back = checkpoint.load_averaged(tmp_path / "back")
    equal(back["tower"]["0"], THEIRS["ema_params"]["dense"])
    with pytest.raises(FileExistsError):
        checkpoint.export_safetensors(path, out, shard_bytes=10)
    checkpoint.export_safetensors(path, out, shard_bytes=10, force=True)


def header_of(path, change):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["w"].pop("shape"), "entry 'w' is damaged"),
        (lambda h: h["w"].update(dtype="F3"), "unknown dtype 'F3'"),
        (lambda h: h["w"].update(shape=[3]), "not those of its shape"),
        (lambda h: h["w"].update(shape=[2**40]), "not those of its shape"),
        (lambda h: h["w"].update(data_offsets=[8, 16]), "was cut off"),
        (lambda h: h["w"].update(data_offsets=[-8, 0]), "entry 'w' is damaged"),
    ],
)
def test_damaged_headers(change, message, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": np.ones(2, np.float32)}, path)
    header_of(path, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.describe(path)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 16, b"\2" + bytes(7) + b"{]"]
)
def test_files_that_are_no_safetensors(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        checkpoint.describe(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"w": "../x.safetensors"}}, "names files elsewhere"),
        ({"weight_map": {"w": "y.safetensors"}}, "missing beside it"),
    ],
)
def test_indices_that_cannot_be(index, message, tmp_path):
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        checkpoint.describe(path)


def test_a_pickle_is_not_read(tmp_path):
    for content in (b"PK\3\4" + bytes(40), b"\x80\2}q\0."):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ValueError, match="is a pickle"):
            checkpoint.load_averaged(tmp_path / "x.pth")


# ---- msgpack


def test_a_file_of_flax_with_everything_in_it(tmp_path):
    tree = {
        "params": {"w": np.arange(6.0).reshape(2, 3), "half": jnp.ones(3, jnp.bfloat16)},
        "complex": 1 + 2j,
        "scalar": np.float32(3),
        "text": "abc",
        "nothing": None,
        "list": [1, -200, 70000, 2**40, -3.5, True],
        "empty": np.zeros((0, 2)),
        "long": {"x" * 300: np.zeros(300, np.uint8)},
    }
    (tmp_path / "x").write_bytes(flax.serialization.msgpack_serialize(tree))
    checkpoint.convert(tmp_path / "x", tmp_path / "c", at="params")
    equal(checkpoint.load_averaged(tmp_path / "c"), tree["params"])
    names = {leaf.name: leaf for leaf in checkpoint.describe(tmp_path / "x").leaves}
    assert names["complex"].dtype == "complex128" and names["list/3"].dtype == "int64"
    assert names["empty"].shape == (0, 2) and "text" not in names


def test_random_damage_of_msgpack_is_an_error_or_does_no_harm(tmp_path):
    tree = {
        "params": {"w": np.arange(20.0)},
        "ema_params": {"w": np.zeros(20)},
        "step": 3,
    }
    content = flax.serialization.msgpack_serialize(tree)
    rng, path = np.random.default_rng(0), tmp_path / "x"
    for _ in range(300):
        found = bytearray(content)
        found[rng.integers(len(found))] ^= 1 << rng.integers(8)
        path.write_bytes(found[: rng.integers(1, 2 * len(found))])
        try:
            checkpoint.describe(path)
        except ValueError as error:
            assert str(path) in str(error)


def test_an_export_in_another_form_replaces_the_older_one(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    out = tmp_path / "model.safetensors"

    def files():
        return sorted(p.name for p in tmp_path.iterdir() if "model" in p.name)

    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard_bytes, wanted in [
        (10, [*parts, "model.safetensors.index.json"]),
        (None, ["model.safetensors"]),
        (10, [*parts, "model.safetensors.index.json"]),
    ]:
        checkpoint.export_safetensors(path, out, shard_bytes=shard_bytes, force=True)
        assert files() == wanted
        for other_form in (None, 10):
            with pytest.raises(FileExistsError):
                checkpoint.export_safetensors(path, out, shard_bytes=other_form)


def test_what_a_conversion_leaves_out_is_said(tmp_path):
    path, said = orbax(tmp_path / "c", {**THEIRS, "batch_stats": {"mean": 1.0}}), []
    checkpoint.convert(path, tmp_path / "d", report=said.append)
    assert said == [f"convert: {path}: left out batch_stats, step."]
    out = tmp_path / "x.safetensors"
    assert checkpoint.export_safetensors(tmp_path / "d", out) == (
        "the averages of ema_params"
    )


def test_empty_arrays_of_other_formats(tmp_path):
    tree = {"params": {"w": np.ones(2), "none": np.zeros((0, 3)), "no": np.zeros((2, 0))}}
    (tmp_path / "x").write_bytes(flax.serialization.msgpack_serialize(tree))
    checkpoint.convert(tmp_path / "x", tmp_path / "c")
    assert checkpoint.load_averaged(tmp_path / "c")["w"].tolist() == [1, 1]
    checkpoint.export_safetensors(tmp_path / "x", tmp_path / "y")
    assert load_file(tmp_path / "y")["none"].shape == (0, 3)
    checkpoint.average([tmp_path / "x"], tmp_path / "mean")


def test_a_part_of_a_file_of_several_processes_is_refused(tmp_path):
    tree = {"params": {"w": "//GDAPlaceholder:params/w"}}
    (tmp_path / "x").write_bytes(flax.serialization.msgpack_serialize(tree))
    with pytest.raises(ValueError, match="arrays of several processes"):
        checkpoint.describe(tmp_path / "x")


def test_names_that_fall_together_are_refused(tmp_path):
    save_file({"a..b": np.ones(1), "a.b": np.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="differ only in empty parts"):
        checkpoint.describe(tmp_path / "x.safetensors")


def test_numbers_of_python_come_from_any_format(tmp_path):
    (tmp_path / "x").write_bytes(
        flax.serialization.to_bytes({**THEIRS, "rate": 0.5, "on": True})
    )
    state = {"params": THEIRS["params"], "step": 0, "rate": 1.0, "on": False}
    found = checkpoint.adopt(tmp_path / "x", state, report=lambda said: None)
    assert (found["step"], found["rate"], found["on"]) == (4, 0.5, True)
    assert [type(found[n]) for n in ("step", "rate", "on")] == [int, float, bool]


def test_other_files_called_index_are_no_checkpoints(tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    (tmp_path / "c.index").write_bytes(b"of another program")
    (tmp_path / "c" / "x.index").write_bytes(b"of another program")
    equal(checkpoint.load_averaged(path), THEIRS["ema_params"])


@pytest.mark.parametrize("rename", [{"dense": ""}, {"dense/bias": "dense/kernel/b"}])
def test_names_that_no_file_can_have(rename, tmp_path):
    path = orbax(tmp_path / "c", THEIRS)
    with pytest.raises(ValueError, match="rename="):
        checkpoint.convert(path, tmp_path / "d", rename=rename)
    with pytest.raises(ValueError, match="rename="):
        checkpoint.export_safetensors(path, tmp_path / "x", rename=rename)
