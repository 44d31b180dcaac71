"""Readers get versions whole, in order, and as their own arrays are."""

import functools
import gc
import logging
import shutil
import threading
import time
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from records import edit
from test_checkpoint import assert_same
from test_publish import PARAMS, changed, is_key, numbers, state_of, versions

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import _files, _read, _replacement


class Params(NamedTuple):
    w: jax.Array
    none: None
    rest: list


@pytest.mark.parametrize("masked", [False, True])
def test_it_comes_in_the_containers_and_dtypes_of_the_reader(masked, tmp_path):
    params = Params(jnp.ones(2, jnp.bfloat16), None, [jnp.ones((2, 3)), jnp.int32(4)])
    mask = (
        Params(True, None, [False, False]) if masked else Params(True, None, [True] * 2)
    )
    tx = emaopt.averaged(optax.sgd(0.1), 0.5, mask=mask)
    state = (params, tx.init(params))
    checkpoint.publish(tmp_path, state, params="0")
    average = emaopt.get_average(state[1], params)
    got = checkpoint.watch(tmp_path, average).poll()
    assert_same(got.params, average)
    wide = jax.tree.map(
        lambda x: np.zeros(x.shape, jnp.result_type(x, jnp.float32)), params
    )
    wide.rest[1] = np.int32(0)
    got = checkpoint.watch(tmp_path, wide).poll()
    assert isinstance(got.params, Params) and isinstance(got.params.w, np.ndarray)
    assert got.params.w.dtype == np.float32 and got.params.rest[1] == 4


# On the reader's devices


def mesh_of(spec):
    return NamedSharding(make_mesh((8,)), spec)


def on_another_device():
    with jax.default_device(jax.devices()[3]):
        return {"w": jnp.ones(2), "weak": jnp.array(1.0), "key": jax.random.key(0)}


LIKES = {
    "fresh": lambda: jax.tree.map(jnp.copy, PARAMS),
    "on a device": lambda: jax.device_put(PARAMS, jax.devices()[3]),
    "replicated": lambda: jax.device_put(PARAMS, mesh_of(P())),
    "split": lambda: (
        jax.device_put(PARAMS, mesh_of(P()))
        | {"w": jax.device_put(PARAMS["w"], mesh_of(P("data")))}
    ),
    "scalars": lambda: {
        "weak": jnp.array(1.0),
        "number": jnp.float32(2),
        "n": jnp.array(3),
    },
    "weak": lambda: {
        "vector": jnp.full(3, 1.0),
        "there": jax.device_put(jnp.array(1.0), mesh_of(P())),
        "split": jax.device_put(jnp.full((8, 2), 1), mesh_of(P("data"))),
    },
    "by default on another device": on_another_device,
    "keys": lambda: {
        "free": jax.random.key(0),
        "legacy": jax.random.PRNGKey(0),
        "there": jax.device_put(jax.random.key(0, impl="rbg"), mesh_of(P())),
        "split": jax.device_put(
            jax.random.split(jax.random.key(0), 8), mesh_of(P("data"))
        ),
        "w": jnp.ones(2),
    },
    "numpy's, without an axis": lambda: {
        "w": np.zeros((), np.float32),
        "n": np.array(1),
        "half": np.zeros((), jnp.bfloat16),
    },
    "numpy's scalar": lambda: {"w": np.float32(2), "n": np.int32(2)},
    "numpy": lambda: jax.tree.map(np.asarray, PARAMS),
}


@pytest.mark.parametrize("make", LIKES.values(), ids=LIKES)
def test_no_version_is_compiled_again(make, tmp_path):
    like = make()
    apply = jax.jit(functools.partial(changed, lambda x: x + 1))
    apply(like)
    with checkpoint.watch(tmp_path, like) as watching:
        for number in (1, 2):
            checkpoint.publish(tmp_path, state_of(number, like))
            got = next(watching).params
            assert numbers(got) == {number}
            for one, other in zip(*map(jax.tree.leaves, (got, like)), strict=True):
                assert not is_key(one) or (one == other).all()
            assert [*map(type, jax.tree.leaves(got))] == [
                *map(type, jax.tree.leaves(like))
            ]
            assert jax.tree.map(lambda x: getattr(x, "sharding", None), got) == (
                jax.tree.map(lambda x: getattr(x, "sharding", None), like)
            )
            apply(got)
    assert apply._cache_size() == 1


def test_the_reader_keeps_no_version(tmp_path):
    like = jax.tree.map(jnp.copy, PARAMS) | {"half": np.ones(3, jnp.bfloat16)}
    kept = [weakref.ref(x) for x in jax.tree.leaves(like)]
    watching = checkpoint.watch(tmp_path, like)
    del like
    checkpoint.publish(tmp_path, state_of(1))
    kept += [weakref.ref(x) for x in jax.tree.leaves(next(watching).params)]
    gc.collect()
    assert not any(one() is not None for one in kept)


def test_what_is_cast_for_a_mesh_is_checked_first(tmp_path):
    """A checksum is of what was saved."""
    params = {"w": jnp.arange(64.0).reshape(8, 8)}
    checkpoint.publish(tmp_path, state_of(3, params))
    like = {"w": jax.device_put(params["w"].astype(jnp.bfloat16), mesh_of(P("data")))}
    got = checkpoint.watch(tmp_path, like).poll().params["w"]
    assert numbers(got) == {3} and got.dtype == jnp.bfloat16
    assert got.sharding == like["w"].sharding
    file = tmp_path / "1" / "_CHECKPOINT_METADATA"
    edit(file, add_to_the_first_sum, key="emaopt_combination")
    said = []
    assert checkpoint.watch(tmp_path, like, report=said.append).poll() is None
    assert "checksums differ" in said[0]
    with pytest.raises(ValueError, match="checksums differ"):
        sharding = like["w"].sharding
        checkpoint.load_averaged(tmp_path / "1", sharding=sharding, dtype=jnp.bfloat16)


def add_to_the_first_sum(record):
    record["checksums"][0][2] ^= 1


def test_arrays_without_an_axis_stay_arrays_where_they_are_cast(tmp_path):
    checkpoint.publish(tmp_path, state_of(3, {"w": np.float32(1)}))
    for dtype in (jnp.bfloat16, np.float16, np.float64):
        like = {"w": np.zeros((), dtype)}
        got = checkpoint.watch(tmp_path, like).poll().params["w"]
        assert isinstance(got, np.ndarray) and got.flags.writeable and got == 3


def test_weak_types_in_a_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    place = NamedSharding(mesh, P("d"))
    like = {"split": jax.device_put(jnp.full(8, 1.0), place), "one": jnp.array(1.0)}
    checkpoint.publish(tmp_path, state_of(3, like))
    watching = checkpoint.watch(tmp_path, like)
    with jax.set_mesh(mesh):
        got = watching.poll().params
    assert jax.tree.map(lambda x: (x.sharding, x.committed), got) == (
        jax.tree.map(lambda x: (x.sharding, x.committed), like)
    )
    assert got["split"].weak_type


def test_a_key_of_another_algorithm_is_refused(tmp_path):
    params = {"w": jnp.ones(2), "key": jax.random.key(0, impl="rbg")}
    checkpoint.publish(tmp_path, state_of(3, params))
    like = params | {"key": jax.random.key(0, impl="unsafe_rbg")}
    with pytest.raises(
        ValueError, match=r"has key<rbg> .* at params/key, the target key<urbg>"
    ):
        checkpoint.watch(tmp_path, like).poll()


def test_what_is_read_twice_comes_twice_each_time_as_it_is_wanted(tmp_path):
    params = {"model": {"w": jnp.ones(2), "stats": jnp.zeros(3)}}
    mask = {"w": True, "stats": False}
    tx = emaopt.averaged(optax.sgd(0.1), 0.5, mask=mask)
    state = params | {"opt_state": tx.init(params["model"])}
    served = {"model/stats": np.full(3, 7, np.float32)}
    checkpoint.publish(tmp_path, state, served=served)
    got = checkpoint.watch(tmp_path, params["model"], served=served).poll()
    assert_same(got.params["stats"], jnp.full(3, 7.0))
    assert isinstance(got.served["model/stats"], np.ndarray)


@pytest.mark.parametrize("key", ["", "/", 0])
def test_keys_say_where_something_stands(key, tmp_path):
    with pytest.raises(ValueError, match=r"^watch: served has the key .*say where"):
        checkpoint.watch(tmp_path, PARAMS, served={key: PARAMS})


def test_arrays_of_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(NamedSharding, "is_fully_addressable", False)
    like = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=mesh_of(P("data")))
    with pytest.raises(ValueError, match="like/w spans several processes"):
        checkpoint.watch(tmp_path, {"w": like})
    for key in ("stats", "like"):
        with pytest.raises(ValueError, match=f"served/{key} spans several processes"):
            checkpoint.watch(tmp_path, {"w": np.ones(2)}, served={key: like})


# What goes wrong


def test_a_version_of_another_shape_is_an_error_and_the_next_one_comes(tmp_path):
    other = {"w": jnp.ones(3)}
    checkpoint.publish(tmp_path, state_of(1, other))
    watching = checkpoint.watch(tmp_path, PARAMS)
    with pytest.raises(ValueError, match=r"^watch: .*w has shape \(3,\) there"):
        next(watching)
    assert watching.poll() is None
    checkpoint.publish(tmp_path, state_of(2))
    assert next(watching).version == 2
    checkpoint.save(tmp_path / "3", state_of(1))
    with pytest.raises(ValueError, match="was not published"):
        next(watching)
    checkpoint.convert(tmp_path / "3", tmp_path / "4")
    assert next(watching).version == 4


def damage(path):
    """Changes one byte of an array's file."""
    file = max((path / "d").iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_version_is_compared_with_its_checksums(tmp_path):
    said = []
    checkpoint.publish(tmp_path, state_of(1))
    file = tmp_path / "1" / "_CHECKPOINT_METADATA"
    edit(file, add_to_the_first_sum, key="emaopt_combination")
    assert checkpoint.watch(tmp_path, PARAMS, report=said.append).poll() is None
    assert "checksums differ" in said[0]


def test_a_damaged_version_is_read_once_in_a_poll(tmp_path, monkeypatch):
    checkpoint.publish(tmp_path, state_of(1))
    damage(tmp_path / "1")
    opened, open_files = [], _files.open_files

    def opening(*args, **kwargs):
        opened.append(1)
        return open_files(*args, **kwargs)

    monkeypatch.setattr(_files, "open_files", opening)
    said = []
    assert checkpoint.watch(tmp_path, PARAMS, report=said.append).poll() is None
    assert len(opened) == len(said) == 1


def test_a_reader_that_is_always_late_says_so(tmp_path, monkeypatch):
    def reading(function, files, wanted):
        checkpoint.publish(tmp_path, state_of(2), max_to_keep=1)
        raise ValueError("It is gone.")

    monkeypatch.setattr(_read, "read", reading)
    checkpoint.publish(tmp_path, state_of(1))
    said = []
    assert checkpoint.watch(tmp_path, PARAMS, report=said.append).poll() is None
    assert said == ["It is gone. It waits for another version."]


def test_a_damaged_version_is_reported_once_and_passed_over(tmp_path):
    said = []
    checkpoint.publish(tmp_path, state_of(1))
    damage(tmp_path / "1")
    watching = checkpoint.watch(tmp_path, PARAMS, report=said.append)
    assert watching.poll() is None and watching.poll() is None
    assert len(said) == 1 and str(tmp_path / "1") in said[0]
    assert said[0].startswith("watch: ")
    checkpoint.publish(tmp_path, state_of(2))
    assert watching.poll().version == 2
    damage(tmp_path / "2")  # nobody reads it again
    assert watching.poll() is None and len(said) == 1


def test_an_error_of_the_system_is_reported_and_tried_again(tmp_path, monkeypatch):
    checkpoint.publish(tmp_path, state_of(1))
    said, read, left = [], _read.read, [True, True]

    def reading(function, files, wanted):
        if left and left.pop():
            raise OSError("the disk is away")
        return read(function, files, wanted)

    monkeypatch.setattr(_read, "read", reading)
    watching = checkpoint.watch(tmp_path, PARAMS, report=said.append)
    assert [watching.poll(), watching.poll()] == [None, None]
    assert watching.poll().version == 1 and len(said) == 1 and "disk is away" in said[0]


def test_a_late_reader_gets_the_version_before_a_damaged_one(tmp_path, monkeypatch):
    for number in (1, 2):
        checkpoint.publish(tmp_path, state_of(number))
    damage(tmp_path / "2")
    said = []
    watching = checkpoint.watch(tmp_path, PARAMS, report=said.append)
    assert [watching.poll() for _ in range(5)] == [None] * 5
    assert watching.poll().version == 1 and watching.poll() is None
    reads = []
    monkeypatch.setattr(_read, "read", lambda *args: reads.append(1))
    assert watching.poll() is None and not reads and len(said) == 1


def test_a_version_that_is_being_removed_is_none(tmp_path):
    for number in (1, 2):
        checkpoint.publish(tmp_path, state_of(number))
    (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()
    assert checkpoint.watch(tmp_path, PARAMS).poll().version == 1


def test_what_goes_while_it_is_read_is_not_called_another_kind(tmp_path, monkeypatch):
    for number in (1, 2):
        checkpoint.publish(tmp_path, state_of(number))
    open_files = _files.open_files

    def opening(function, path, **options):
        if path.name == "2":
            (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()
        return open_files(function, path, **options)

    monkeypatch.setattr(_files, "open_files", opening)
    assert checkpoint.watch(tmp_path, PARAMS).poll().version == 1


def test_a_report_goes_to_the_log(tmp_path, caplog):
    (tmp_path / "1").mkdir()
    assert checkpoint.publish(tmp_path, state_of(1)) == 2
    damage(tmp_path / "2")
    with caplog.at_level(logging.WARNING, "emaopt"):
        assert checkpoint.watch(tmp_path, PARAMS).poll() is None
    assert "waits for another version" in caplog.text


def test_what_is_removed_is_taken_back(tmp_path):
    for number in (1, 2):
        checkpoint.publish(tmp_path, state_of(number))
    watching = checkpoint.watch(tmp_path, PARAMS)
    assert numbers(watching.poll().params) == {2}
    shutil.rmtree(tmp_path / "2")
    assert numbers(watching.poll().params) == {1}
    assert checkpoint.publish(tmp_path, state_of(5)) == 2
    assert numbers(watching.poll().params) == {5}
    shutil.rmtree(tmp_path / "2")
    assert checkpoint.publish(tmp_path, state_of(6)) == 2  # by the same name
    assert numbers(watching.poll().params) == {6}
    # A run that starts over begins to count anew.
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    assert watching.poll() is None
    assert checkpoint.publish(tmp_path, state_of(7)) == 1
    assert numbers(watching.poll().params) == {7}


@pytest.mark.parametrize("when", ["opened", "read"])
def test_of_a_version_that_is_removed_meanwhile_the_next_one_is_read(
    when, tmp_path, monkeypatch
):
    checkpoint.publish(tmp_path, state_of(1), max_to_keep=1)
    said, read, left = [], _read.read, [True]

    def reading(function, files, wanted):
        if left and left.pop():
            checkpoint.publish(tmp_path, state_of(2), max_to_keep=1)
            if when == "opened":
                raise ValueError("as if it had not been complete")
        return read(function, files, wanted)

    monkeypatch.setattr(_read, "read", reading)
    published = checkpoint.watch(tmp_path, PARAMS, report=said.append).poll()
    assert numbers(published.params) == {published.version}
    assert published.version == 2 or when == "read"
    assert said == [] and versions(tmp_path) == ["2"]


def test_closing_ends_the_iteration_of_another_thread(tmp_path):
    checkpoint.publish(tmp_path, state_of(1))
    watching, seen = checkpoint.watch(tmp_path, PARAMS, poll_seconds=30), []

    def follow():
        seen.extend(published.version for published in watching)

    thread = threading.Thread(target=follow)
    thread.start()
    while not seen and thread.is_alive():
        time.sleep(0.01)
        if watching._last is not None:
            break
    watching.close()
    thread.join(timeout=10)
    assert not thread.is_alive() and seen == [1]
    with pytest.raises(StopIteration):
        next(watching)


def test_a_version_that_goes_while_it_is_looked_at_is_none(tmp_path, monkeypatch):
    checkpoint.publish(tmp_path, state_of(1))
    watching = checkpoint.watch(tmp_path, PARAMS)

    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(_replacement, "complete", gone)
    assert watching.poll() is None
    monkeypatch.undo()
    assert watching.poll().version == 1
