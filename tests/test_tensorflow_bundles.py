"""TensorFlow's files, read without TensorFlow: every number, every damage."""

import gzip
import random
import shutil
import struct
import sys
import tracemalloc
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from etils import epath
from other_writers import bundle, bundles

from emaopt import checkpoint
from emaopt.checkpoint._formats import _table, _tensorbundle

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from convert import as_table, masked

NAMES = [name for name in bundles() if name != "v1_saver_v1_format"]


def opened(name, tmp_path):
    """The bundle of a record; one has its index packed."""
    folder, said, tensors = bundle(name)
    for packed in folder.glob("*.index.gz"):
        shutil.copytree(folder, tmp_path / name)
        folder = tmp_path / name
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    (prefix,) = _tensorbundle.prefixes_in(epath.Path(folder))
    return _tensorbundle.opened(prefix), said, tensors


def value(array):
    return array.read(tuple((0, n) for n in array.shape))


@pytest.mark.quick(99)
@pytest.mark.parametrize("name", NAMES)
def test_all_tensors_are_those_that_were_saved(name, tmp_path):
    found, said, tensors = opened(name, tmp_path)
    kinds = {n: one for n, one in said["tensors"].items() if one["dtype"] != "string"}
    assert found.keys() == kinds.keys()
    for one, kind in kinds.items():
        assert [str(found[one].dtype), list(found[one].shape)] == [
            kind["dtype"],
            kind["shape"],
        ]
    if set(tensors) == {"flat"}:  # all of them, in the order of their names
        flat = [value(found[n]).reshape(-1) for n in sorted(kinds)]
        np.testing.assert_array_equal(np.concatenate(flat), tensors["flat"])
        return
    for one, tensor in tensors.items():
        array = value(found[one])
        np.testing.assert_array_equal(array.astype(tensor.dtype), tensor, one)


def made(path, entries):
    (path / "made.index").write_bytes(as_table(dict(sorted(entries.items()))))
    return path / "made"


def one_array(array, order=0, **changed):
    content = array.tobytes()
    crc = masked(google_crc32c.value(content))
    fields = {"dtype": 1, "size": len(content), "crc32c": crc} | changed
    entry = _tensorbundle._MESSAGES["Entry"](**fields)
    for n in array.shape:
        entry.shape.dim.add(size=n)
    header = _tensorbundle._MESSAGES["Header"](num_shards=1, endianness=order)
    return {b"": header.SerializeToString(), b"w": entry.SerializeToString()}, content


@pytest.mark.parametrize("order", "<>")
def test_both_orders_of_bytes(order, tmp_path):
    array = np.arange(6, dtype=f"{order}f4").reshape(2, 3)
    entries, content = one_array(array, "<>".index(order))
    prefix = made(tmp_path, entries)
    (tmp_path / "made.data-00000-of-00001").write_bytes(content)
    found = _tensorbundle.opened(epath.Path(prefix))["w"]
    assert value(found).dtype == np.float32
    np.testing.assert_array_equal(value(found), array)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 20}, "the size of w is not that of its shape"),
        ({"offset": 8}, "ends before w does"),
        ({"offset": -8}, "the size of w"),
        ({"shard_id": 1}, "w stands in file 1 of 1"),
        ({"crc32c": 1}, "the checksum of w is of other numbers"),
    ],
)
def test_entries_that_cannot_be(changed, message, tmp_path):
    entries, content = one_array(np.arange(6, dtype=np.float32), **changed)
    prefix = made(tmp_path, entries)
    (tmp_path / "made.data-00000-of-00001").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.convert(prefix, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_compressed_blocks_are_named(tmp_path):
    entries, _ = one_array(np.arange(6, dtype=np.float32))
    prefix = made(tmp_path, entries)
    with pytest.raises(ValueError, match=r"made.data-00000-of-00001 is missing"):
        checkpoint.load_averaged(prefix)
    table = bytearray((tmp_path / "made.index").read_bytes())
    content = bytes(table)
    handle, _ = _table._handle(content, len(content) - 48)
    _, at = _table._handle(content, len(content) - 48)
    (begin, length), _ = _table._handle(content, at)
    assert handle[0] == 0
    table[begin + length] = 1  # Snappy
    crc = masked(google_crc32c.value(bytes(table[begin : begin + length + 1])))
    table[begin + length + 1 : begin + length + 5] = struct.pack("<I", crc)
    (tmp_path / "made.index").write_bytes(table)
    with pytest.raises(ValueError, match="compressed with Snappy"):
        checkpoint.load_averaged(prefix)


def test_ordered_codes_of_numbers():
    """Known codes: positive and negative numbers at the ends of each length."""
    codes = {0: "80", 63: "bf", 64: "c040", -1: "7f", -64: "40", -65: "3fbf"}
    codes |= {8191: "dfff", 8192: "e02000", 2**62 - 1: "ffbfffffffffffffff"}
    codes |= {2**62: "ffc04000000000000000"}
    for number, code in codes.items():
        assert _tensorbundle._signed(number).hex() == code, number
    assert sorted(codes, key=_tensorbundle._signed) == sorted(codes)


def damaged(content, chance):
    """Bytes with a few of them changed, cut off, doubled or moved."""
    content = bytearray(content)
    kind = chance.randrange(5)
    at = chance.randrange(len(content))
    if kind == 0:
        content[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[at : at + 4] = chance.randbytes(4)
    elif kind == 3:
        del content[at : at + chance.randrange(1, 9)]
    else:
        content[at:at] = chance.randbytes(chance.randrange(1, 9))
    return bytes(content)


@pytest.mark.parametrize("seed", range(5))
def test_random_damage_is_an_error_or_does_no_harm(seed, tmp_path):
    """A hundred damages for each seed: an error that names the files, or all numbers."""
    chance = random.Random(seed)
    names = ["v1_ema", "v1_partitioned", "v1_sharded", "v1_bfloat16", "tf2_tfm"]
    refused = 0
    for trial in range(100):
        folder, _, tensors = bundle(chance.choice(names))
        path = tmp_path / f"{trial}"
        path.mkdir()
        files = [f for f in folder.iterdir() if ".index" in f.name or ".data" in f.name]
        hit = chance.choice(files)
        for file in files:
            content = file.read_bytes()
            (path / file.name).write_bytes(
                damaged(content, chance) if file == hit else content
            )
        tracemalloc.start()
        try:
            (prefix,) = _tensorbundle.prefixes_in(epath.Path(path))
            arrays = _tensorbundle.opened(prefix)
            assert arrays.keys() == tensors.keys()
            found = {name: value(array) for name, array in arrays.items()}
        except ValueError as error:
            assert str(error)
            refused += 1
        else:
            for name, tensor in tensors.items():
                array = found[name].astype(tensor.dtype)
                np.testing.assert_array_equal(array, tensor, f"{folder.name} {name}")
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 8 << 20
        shutil.rmtree(path)
    assert refused > 50
