"""A changed bit in a file of arrays is an error that says where, whoever reads."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from records import edit, record_of
from test_checkpoint import assert_same

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import _checksums, _stream

TX = emaopt.averaged(optax.adam(1e-2), 0.9)
KINDS = [
    np.bool_,
    np.int8,
    np.uint16,
    np.int32,
    np.float16,
    np.float32,
    np.complex64,
    jnp.bfloat16,
    jnp.float8_e4m3fn,
    jnp.int4,
]


def noise(kind, shape=(2, 8, 4)):
    rng = np.random.default_rng(0)
    real, imaginary = rng.normal(size=(2, *shape)) * 5
    return (real + 1j * imaginary if kind is np.complex64 else real).astype(kind)


def of(leaf):
    ((names, dtype, total),) = _checksums.checksums({"x": leaf})
    assert names == ["x"]
    return dtype, total


def by_hand(array):
    """The definition, in Python's integers."""
    content = array.tobytes()
    if array.dtype == jnp.int4:
        content = bytes(byte % 16 for byte in content)
    words = [
        int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4)
    ]
    mixed = [word + 0x9E3779B1 * (word >> 16) for word in words]
    return str(array.dtype), sum((2 * j + 1) * w for j, w in enumerate(mixed)) % 2**32


@pytest.mark.parametrize("kind", KINDS)
def test_checksum_is_the_definition_however_an_array_is_placed(kind):
    array = noise(kind)
    expected = by_hand(array)
    assert of(array) == of(jnp.asarray(array)) == expected
    for mode, spec in itertools.product(
        (AxisType.Auto, AxisType.Explicit), ((None, "a", "b"), (None, ("b", "a")), ("a",))
    ):
        mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(mode, mode))
        place = NamedSharding(mesh, PartitionSpec(*spec))
        assert of(jax.device_put(array, place)) == expected
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    assert of(jax.device_put(array, host)) == expected


@pytest.mark.parametrize("kind", [np.float64, np.int64, np.complex128])
def test_checksum_of_64_bits(kind):
    array = noise(np.complex64).astype(np.complex128)
    array = (array if kind is np.complex128 else array.real).astype(kind)
    with jax.enable_x64(True):
        assert of(array) == of(jnp.asarray(array)) == by_hand(array)


def test_checksum_of_a_large_array_of_numpy():
    for kind, size in ((np.float32, 3 * 2**18 + 5), (jnp.bfloat16, 2**19 + 8195)):
        array = noise(kind, (size,))
        assert of(array) == of(jnp.asarray(array)) == by_hand(array)


@pytest.mark.slow
def test_factors_of_numpy_begin_anew_after_2_to_the_30_words():
    array = np.zeros(4 * (2**30 + 1) + 1, np.uint8)  # whose zeros take no memory
    array[[4 * 2**30, -1]] = 1  # the words 2**30 and 2**30 + 1: 1 * 1 + 3 * 1
    assert of(array) == ("uint8", 4)


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32])
@pytest.mark.parametrize("copies", [2, 4, 1024])
def test_each_bit_counts_that_flips_in_equal_parts(copies, kind):
    """A compressed file holds equal parts once, as of workers that are alike."""
    part = noise(kind, (8,))
    for bit in range(64):
        changed = part.view(np.uint8).copy()
        changed[bit // 8] ^= 1 << bit % 8
        many = np.tile(changed.view(kind), copies)
        assert of(many) != of(np.tile(part, copies))


@pytest.mark.parametrize("kind", [np.int8, np.float16, np.float32, np.complex64])
def test_each_bit_and_the_order_count(kind):
    array = noise(kind, (5,))
    content = np.frombuffer(array.tobytes(), np.uint8)
    assert of(array[::-1]) != of(array)
    for bit in range(8 * content.size):
        changed = content.copy()
        changed[bit // 8] ^= 1 << bit % 8
        assert of(changed.view(kind)) != of(array)


def mixed():
    """A state with leaves of all kinds that Orbax takes."""
    params = {
        "w": jnp.asarray(noise(np.float32)),
        "half": jnp.asarray(noise(jnp.bfloat16)),
        "empty": jnp.zeros((0, 3)),
    }
    nans = np.arange(0x7F800001, 0x7F800001 + 8, dtype=np.uint32).view(np.float32)
    return {
        "params": params,
        "opt_state": TX.init(params),
        "key": jax.random.key(1),
        "bits": jnp.asarray(noise(np.bool_)),
        "eighths": jnp.asarray(noise(jnp.float8_e4m3fn)),
        "complex": jnp.asarray(noise(np.complex64)),
        "nans": jnp.asarray(nans),
        "numpy": noise(np.int64),
        "scalar": np.float32(3),
        "number": 5,
        "rate": 0.1,
        "flag": True,
    }


def change_sum(file, i, key="emaopt"):
    """Changes a checksum in Orbax's JSON."""

    def change(record):
        record["checksums"][i][2] ^= 1

    edit(file, change, key)


@pytest.mark.slow
def test_every_leaf_is_checked(tmp_path):
    state = mixed()
    checkpoint.save(tmp_path / "c", state)
    assert_same(checkpoint.restore(tmp_path / "c", state), state)
    file = tmp_path / "c" / "_CHECKPOINT_METADATA"
    entries = record_of(file)["checksums"]
    full = [leaf for leaf in jax.tree.leaves(state) if np.size(leaf)]
    assert len(entries) == len(full)
    for i, (names, *_) in enumerate(entries):
        before = file.read_text()
        change_sum(file, i)
        where = "/".join(names)
        with pytest.raises(
            ValueError, match=rf"other numbers at {where} than were saved"
        ):
            checkpoint.restore(tmp_path / "c", state)
        file.write_text(before)


def test_every_array_of_an_average_is_checked_that_is_written_in_batches(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(_stream, "BATCH", 1)
    params = {name: jnp.full(2, i, jnp.float32) for i, name in enumerate("abc")}
    checkpoint.save(tmp_path / "c", {"params": params, "opt_state": TX.init(params)})
    checkpoint.average([tmp_path / "c"], tmp_path / "out")
    file = tmp_path / "out" / "_CHECKPOINT_METADATA"
    content = file.read_text()
    for i, name in enumerate("abc"):
        change_sum(file, i, "emaopt_combination")
        with pytest.raises(ValueError, match=rf"other numbers at params/{name} than"):
            checkpoint.load_averaged(tmp_path / "out")
        file.write_text(content)


def test_a_checkpoint_without_checksums_is_read(tmp_path):
    state = mixed()
    checkpoint.save(tmp_path / "c", state, checksums=False)
    assert "checksums" not in record_of(tmp_path / "c" / "_CHECKPOINT_METADATA")
    assert_same(checkpoint.restore(tmp_path / "c", state), state)


def small():
    params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    return {"params": params, "opt_state": TX.init(params)}


def plain(path):
    """What Orbax reads, or None if it cannot."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return [
                np.asarray(x).tobytes()
                for x in jax.tree.leaves(checkpointer.restore(path))
            ]
    except Exception:
        return None


def flips(path, every):
    """Flips single bits of files of arrays, one by one, and tells what Orbax reads."""
    for file in sorted(path.rglob("d/*")):
        content = file.read_bytes()
        for i in range(0, len(content), every):
            changed = bytearray(content)
            changed[i] ^= 1 << i % 8
            file.write_bytes(changed)
            yield plain(path)
        file.write_bytes(content)


READERS = {
    "restore": lambda path, out: checkpoint.restore(path, small()),
    "combine": lambda path, out: checkpoint.combine(
        [path], [1.0], out, weights=None, force=True
    ),
    "export": lambda path, out: checkpoint.export_safetensors(path, out, force=True),
    "load_averaged": lambda path, out: checkpoint.load_averaged(path),
}


@pytest.mark.slow
# Orbax drops the reads that were under way when the first one failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_that_orbax_does_not_notice_is_an_error(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, small())
    right, unnoticed = plain(path), 0
    for read in flips(path, 499):
        if read == right:
            assert_same(checkpoint.restore(path, small()), small())
        elif read is not None:
            unnoticed += 1
            with pytest.raises(
                ValueError, match=rf"{path} holds other numbers at .*w than.*take another"
            ):
                checkpoint.restore(path, small())
    assert unnoticed >= 10
    assert_same(checkpoint.restore(path, small()), small())


@pytest.fixture
def damaged(tmp_path):
    """A checkpoint whose averages have a flipped bit that Orbax does not notice."""
    path = tmp_path / "c"
    checkpoint.save(path, small())
    with ocp.StandardCheckpointer() as checkpointer:
        right = np.asarray(checkpointer.restore(path)["params"]["w"])
    for read in flips(path, 499):
        if read is not None:
            with ocp.StandardCheckpointer() as checkpointer:
                found = np.asarray(checkpointer.restore(path)["params"]["w"])
            if found.tobytes() != right.tobytes():
                return path
    raise AssertionError("no flip that goes unnoticed")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_ours_checks(reader, damaged, tmp_path):
    with pytest.raises(ValueError, match="holds other numbers at params/w than"):
        READERS[reader](damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_read_as_another_dtype_is_checked_before_it_is_cast(damaged):
    with pytest.raises(ValueError, match=r"holds other numbers at params/w than"):
        checkpoint.load_averaged(damaged, dtype=jnp.bfloat16)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    parts = NamedSharding(mesh, PartitionSpec("a"))
    for dtype in (jnp.bfloat16, None):
        with pytest.raises(ValueError, match=r"holds other numbers at params/w than"):
            checkpoint.load_averaged(damaged, dtype=dtype, sharding=parts)


def test_what_is_whole_is_read_beside_what_is_damaged(tmp_path):
    def spoil(record):
        for entry in record["checksums"]:
            if entry[0] == ["params", "a"]:
                entry[2] ^= 1

    params = {"a": jnp.ones(3), "b": jnp.arange(4.0)}
    path = tmp_path / "c"
    checkpoint.save(path, {"params": params, "opt_state": TX.init(params)})
    edit(path / "_CHECKPOINT_METADATA", spoil)
    with pytest.raises(ValueError, match=r"other numbers at params/a than"):
        checkpoint.load_averaged(path)
    assert_same(checkpoint.load_averaged(path, at="params/b"), params["b"])
    target = {"b": params["b"]}
    found = checkpoint.load_averaged(path, target=target, ignore_extra=True)
    assert_same(found, target)


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_manager_records_and_checks(asynchronous, composite, tmp_path):
    state = mixed()
    args = {name: state[name] for name in ("params", "opt_state")}

    def wrap(kind, tree):
        if not composite:
            return kind(tree)
        return ocp.args.Composite(**{name: kind(tree[name]) for name in tree})

    with ocp.CheckpointManager(
        tmp_path,
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous),
        handler_registry=checkpoint.handler_registry(),
    ) as manager:
        donated = jax.tree.map(jnp.copy, args)
        manager.save(1, args=wrap(ocp.args.StandardSave, donated))
        jax.tree.map(lambda x: x.delete(), donated)
        manager.wait_until_finished()
        restore = wrap(ocp.args.StandardRestore, args)
        restored = manager.restore(1, args=restore)
        assert_same(dict(restored.items()) if composite else restored, args)

        item = tmp_path / "1" / ("params" if composite else "default") / "_METADATA"
        first = record_of(item)["checksums"][-1]
        change_sum(item, -1)
        where = "/".join(["params"] * composite + first[0])
        with pytest.raises(ValueError, match=re.escape(f"numbers at {where} than")):
            manager.restore(1, args=restore)


def test_copies_that_are_not_alike_have_no_checksum(tmp_path):
    """As of statistics that nobody averaged: Orbax writes parts of any of them."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("a"))
    x = jax.device_put(jnp.arange(16.0).reshape(8, 2), rows)
    own = jax.shard_map(
        lambda x: x[0],
        mesh=mesh,
        in_specs=PartitionSpec("a"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    state = small() | {"statistics": jax.jit(own)(x), "rows": x}
    names = [names for names, *_ in _checksums.checksums(state)]
    assert ["rows"] in names and ["statistics"] not in names
    checkpoint.save(tmp_path / "c", state)
    restored = checkpoint.restore(tmp_path / "c", state)
    assert_same(restored["rows"], x)


def test_what_is_no_number_has_no_checksum():
    odd = {"text": np.asarray("x"), "object": np.asarray([None]), "large": 2**70}
    assert _checksums.checksums(odd) == []
