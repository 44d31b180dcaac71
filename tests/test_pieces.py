"""Arrays in pieces: how they are cut, read, written and checked."""

import asyncio
import errno
import os
import threading

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file
from test_adopt import equal

from emaopt import checkpoint
from emaopt.checkpoint import _arrays, _orbax, _stream
from emaopt.checkpoint._formats import _bytes


def test_pieces_go_along_the_axis_before_whole_ones():
    def block(shape, chunk):
        array = _arrays.MadeArray(shape, np.dtype(np.float32), np.zeros, chunk)
        files = type("Files", (), {"saved": {(): array}})
        stored = _stream.Stored(files, (), shape, array.dtype)
        return _stream.block_of([stored])

    assert block((60_000, 8, 8), (1, 8, 8)) == (32_768, 8, 8)
    assert block((2, 3, 4_000_000), (1, 1, 1000)) == (1, 1, 2_097_000)
    assert block((4096, 4096), (64, 64)) == (4096, 4096)  # no stretch of it: whole


def test_large_arrays_are_converted_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(_stream, "BATCH", 64)
    monkeypatch.setattr(_bytes, "PIECE", 32)
    tree = {
        f"{i}": np.random.default_rng(i).random((7, 3, 2), np.float32) for i in range(3)
    }
    tree["half"] = jnp.arange(99, dtype=jnp.bfloat16)
    tree["odd"] = np.arange(77, dtype=np.int8)
    save_file({n: np.asarray(x) for n, x in tree.items()}, tmp_path / "x.safetensors")
    done = []
    checkpoint.convert(
        tmp_path / "x.safetensors", tmp_path / "c", progress=lambda *at: done.append(at)
    )
    equal(checkpoint.load_averaged(tmp_path / "c"), tree)  # compares checksums
    with ocp.StandardCheckpointer() as checkpointer:
        equal(checkpointer.restore(tmp_path / "c")["params"], tree)
    assert len(done) > 10 and done[-1][0] == done[-1][1]
    checkpoint.average([tmp_path / "c", tmp_path / "c"], tmp_path / "mean", steps=[1, 2])
    equal(checkpoint.load_averaged(tmp_path / "mean"), tree)
    # Its own files come in pieces, too: a changed bit is noticed behind the last one.
    checkpoint.export_safetensors(tmp_path / "c", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    equal(again, {n: np.asarray(x) for n, x in tree.items()})


def test_two_batches_are_written_at_once_and_no_more(monkeypatch):
    seen = []

    class Future:
        def __init__(self, name, value=None):
            self.name, self.value = name, value

        def result(self, timeout=None):
            seen.append(("done", self.name))
            return self.value

    class Store:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, index):
            return self

        def write(self, array, **options):
            seen.append(("begun", self.name))
            return Future(self.name)

    class Info:
        parent_dir = "nowhere"

        async def await_path_creation(self):
            pass

    def created(leaf, info, args):
        return Future("open", Store(leaf.names[0]))

    monkeypatch.setattr(_orbax, "_created", created)
    leaves = [_orbax.Pending((n,), (1,), np.dtype(np.float32)) for n in "abc"]
    part = np.zeros(1, np.float32)
    batches = iter([[_orbax.Part(leaf.names, (), True, part)] for leaf in leaves])
    asyncio.run(_orbax._Writing(batches).serialize(leaves, [Info()] * 3))
    steps = [(what, name) for what, name in seen if name != "open"]
    begun, done = (
        [steps.index((what, name)) for name in "abc"] for what in ("begun", "done")
    )
    assert begun == sorted(begun) and done == sorted(done)
    assert begun[1] < done[0] < begun[2] < done[1]  # two under way, and never three


def test_what_is_written_in_batches_is_on_the_disk(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def spy(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    tree = {"a": _orbax.Pending(("a",), (999,), np.dtype(np.float32))}
    values = np.random.default_rng(0).random(999, np.float32)
    part = _orbax.Part(("a",), (slice(0, 999),), True, values)
    with ocp.Checkpointer(_orbax.writer(iter([[part]]))) as checkpointer:
        checkpointer.save(tmp_path / "c", args=ocp.args.PyTreeSave(tree))
    data = [p for p in (tmp_path / "c").rglob("d/*") if p.stat().st_size > 3000]
    assert data and {p.stat().st_ino for p in data} <= synced


def test_the_disk_is_waited_for_beside_the_writing(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync

    def spy(descriptor):
        seen.append((threading.current_thread(), os.fstat(descriptor).st_ino))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    (tmp_path / "d").mkdir()
    disk = _orbax._Disk([tmp_path])
    first, second = tmp_path / "d" / "first", tmp_path / "second"
    first.write_text("1")
    disk.sync_beside()
    disk._thread.join()
    assert [inode for _, inode in seen] == [first.stat().st_ino]
    second.write_text("2")
    disk.sync_beside()
    disk._thread.join()
    assert [inode for _, inode in seen[1:]] == [second.stat().st_ino]  # not both again
    assert all(thread is not threading.main_thread() for thread, _ in seen)
    disk.sync()
    last = {inode for thread, inode in seen if thread is threading.main_thread()}
    assert last == {p.stat().st_ino for p in (tmp_path, *tmp_path.rglob("*"))}


def test_a_disk_that_fails_beside_the_writing_fails_the_writing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "file").write_text("1")
    disk = _orbax._Disk([tmp_path])
    disk.sync_beside()
    disk._thread.join()
    monkeypatch.setattr(os, "fsync", fsync)  # the system tells of it once
    with pytest.raises(OSError, match="No space left"):
        disk.sync()
